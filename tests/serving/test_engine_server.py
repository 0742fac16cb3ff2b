"""A server over the engine: its answers are the model's own, whoever else is served."""

from __future__ import annotations

import asyncio
import json
import math
import random
import socket
import threading
import time
from collections import defaultdict
from functools import partial
from itertools import accumulate

import httpx
import openai
import pytest
import torch
from engine_judge import judge_of
from live_servers import Running, TinyModel, byte_tokenizer, simulated

from twinserve.engine.llm import LLM
from twinserve.engine.online import StepError
from twinserve.policies import SamplingParams
from twinserve.serving.backends import EngineBackend
from twinserve.serving.protocol import CompletionRequest
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.readers import read_trace
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

IDS = {"return_token_ids": True}
CHAT = [{"role": "user", "content": "what is it?"}]


def alone(prompt: str, count: int) -> list[int]:
    """The greedy tokens after a prompt."""
    return judge_of("llama").generate(byte_tokenizer().encode(prompt), count)


def text_of(prompt: str, tokens: list[int]) -> str:
    tokenizer = byte_tokenizer()
    known = tokenizer.encode(prompt)
    return tokenizer.decode([*known, *tokens], skip_special_tokens=True)[len(tokenizer.decode(known)) :]


def test_greedy_answers_are_the_models_own(serving):
    client = serving(TinyModel()).client()
    done = client.completions.create(
        model="tiny", prompt=["abc", "hello"], max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    for prompt, choice in zip(("abc", "hello"), done.choices, strict=True):
        tokens = alone(prompt, 12)
        ends = tokens.index(2) + 1 if 2 in tokens else 12
        assert choice.token_ids == tokens[:ends]
        assert choice.text == text_of(prompt, tokens[:ends])
    chat = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=5,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    assert chat.choices[0].token_ids == alone("<user>what is it?\n<assistant>", 5)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_logits_that_are_no_numbers_fail_their_request_alone_and_the_record_replays(serving, tmp_path, pipeline_depth):
    model = TinyModel({"pipeline_depth": pipeline_depth})
    running = serving(model, tmp_path / "run")
    model.llm.runner.model.embedding.weight.data[511] = torch.nan
    client = running.client()
    how = {"model": "tiny", "max_tokens": 12, "temperature": 0, "extra_body": IDS | {"ignore_eos": True}}
    expected = alone("abc", 12)
    assert 511 not in expected
    answers: list = []
    beside = threading.Thread(target=lambda: answers.append(client.completions.create(prompt="abc", **how)))
    beside.start()
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="this request has failed: the model's logits for it are no finite"):
            list(client.completions.create(prompt=[5, 511], stream=stream, logprobs=2, **how))
    beside.join()
    assert answers[0].choices[0].token_ids == expected
    assert client.completions.create(prompt="abc", **how).choices[0].token_ids == expected
    running.settle()
    running.stop()
    record = load_record(tmp_path / "run")
    assert sorted(row["finish_reason"] for row in record.requests) == ["abort", "abort", "length", "length"]
    assert [row["refusal"] is None for row in record.requests] == [
        row["finish_reason"] == "length" for row in record.requests
    ]
    result = replay(record)
    assert result.is_exact, result.difference


def test_a_stop_token_ends_the_answer_and_is_not_in_its_text(serving):
    tokens = alone("abc", 12)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    place = tokens.index(stop)
    done = (
        serving(TinyModel())
        .client()
        .completions.create(
            model="tiny", prompt="abc", max_tokens=12, temperature=0, extra_body={"stop_token_ids": [stop]}
        )
    )
    choice = done.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert done.usage.completion_tokens == place + 1
    assert choice.text == text_of("abc", tokens[:place])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_each_of_several_answers_and_free_their_blocks(serving, stream):
    running = serving(TinyModel())
    tokens = alone("abc", 60)
    text = text_of("abc", tokens)
    stop = text[9:12]
    how = {"model": "tiny", "prompt": "abc", "max_tokens": 900, "temperature": 0, "n": 3, "stop": stop}
    done = running.client().completions.create(**how, stream=stream, extra_body={"ignore_eos": True})
    texts, reasons = defaultdict(str), {}
    for choice in (choice for chunk in (done if stream else [done]) for choice in chunk.choices):
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason, choice.stop_reason
    assert texts == dict.fromkeys(range(3), text[: text.index(stop)])
    assert reasons == dict.fromkeys(range(3), ("stop", stop))
    running.settle()


def test_stop_token_ids_end_an_answer_that_ignores_the_end_of_the_text(serving):
    running, tokens = serving(TinyModel()), alone("abc", 12)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    body = {"stop_token_ids": [stop], "ignore_eos": True, "return_token_ids": True}
    done = running.client().completions.create(
        model="tiny", prompt="abc", max_tokens=900, temperature=0, extra_body=body
    )
    choice = done.choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == tokens[: tokens.index(stop) + 1]


def test_biases_and_least_lengths_reach_the_sampler(serving):
    client = serving(TinyModel()).client()
    how = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    biased = client.completions.create(**how, logit_bias={"77": 100}, extra_body=IDS).choices[0]
    assert biased.token_ids == [77] * 8
    ended = client.completions.create(**how, logit_bias={"2": 100}, extra_body=IDS | {"min_tokens": 5}).choices[0]
    assert (len(ended.token_ids), ended.token_ids[5], ended.finish_reason) == (6, 2, "stop")
    assert 2 not in ended.token_ids[:5]


def test_logprobs_come_with_their_tokens_streamed_or_not(serving):
    client = serving(TinyModel()).client()
    how = {"model": "tiny", "messages": CHAT, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    how["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**how).choices[0].logprobs.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**how, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in whole], abs=1e-4)
    for token in whole:
        assert token.logprob == max(top.logprob for top in token.top_logprobs) and len(token.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0
    done = client.completions.create(model="tiny", prompt="a", max_tokens=4, temperature=0, logprobs=2).choices[0]
    assert len(done.logprobs.tokens) == len(done.logprobs.token_logprobs) == len(done.logprobs.top_logprobs)


def expected_logprobs(ids: list[int]) -> torch.Tensor:
    """Of each token but the first, over the vocabulary: [tokens - 1, vocabulary]."""
    return judge_of("llama").model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 16}, {"num_gpu_blocks": 12, "max_num_seqs": 6}]
)
def test_logprobs_of_prompts_are_the_models_own_whatever_was_hit_cut_or_preempted(serving, settings):
    client = serving(TinyModel(settings)).client()
    prompts = [[5, 6, 7, 300] * 9 + [number, number + 100] for number in range(3, 6)]
    for prompt in (prompts[0], *prompts):
        client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    body = IDS | {"prompt_logprobs": 2, "ignore_eos": True}
    done = client.completions.create(model="tiny", prompt=prompts, max_tokens=20, n=2, temperature=0, extra_body=body)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    for index, choice in enumerate(done.choices):
        prompt = prompts[index // 2]
        first, *rest = choice.prompt_logprobs
        assert first is None and len(rest) == len(prompt) - 1
        for token, row, of_token in zip(prompt[1:], expected_logprobs(prompt), rest, strict=True):
            own = of_token[str(token)]
            assert own["logprob"] == pytest.approx(row[token].item(), abs=1e-3)
            assert abs(own["rank"] - int((row >= row[token]).sum())) <= 1
            others = [entry["logprob"] for entry in of_token.values() if entry["rank"] <= 2]
            assert max(others) == pytest.approx(row.max().item(), abs=1e-3) and len(of_token) in (2, 3)
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=2, extra_body={"prompt_logprobs": 0})
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_has_the_logprobs_of_prompt_and_answer(serving, stream):
    """As those ask who score answers: with max_tokens 0 the prompt alone."""
    client, columns = serving(TinyModel()).client(), {}
    how = {"model": "tiny", "prompt": ["abc", "hello there"], "echo": True, "logprobs": 1, "temperature": 0}
    for count in (0, 4):
        done = client.completions.create(**how, max_tokens=count, stream=stream, extra_body={"ignore_eos": True})
        texts, columns = {0: "", 1: ""}, {0: defaultdict(list), 1: defaultdict(list)}
        for choice in (choice for chunk in (done if stream else [done]) for choice in chunk.choices):
            texts[choice.index] += choice.text
            for name, values in choice.logprobs or ():
                columns[choice.index][name] += values
        for index, prompt in enumerate(how["prompt"]):
            ids = byte_tokenizer().encode(prompt)
            ids += alone(prompt, count)
            assert texts[index] == prompt + (text_of(prompt, ids[len(prompt) :]) if count else "")
            row = columns[index]
            assert row["tokens"] == [byte_tokenizer().decode([token]) for token in ids]
            assert row["text_offset"] == list(accumulate(map(len, row["tokens"][:-1]), initial=0))
            wanted = [values[token].item() for values, token in zip(expected_logprobs(ids), ids[1:], strict=True)]
            assert row["token_logprobs"] == [None, *(pytest.approx(value, abs=1e-3) for value in wanted)]
            assert row["top_logprobs"][0] is None and all(len(top) in (1, 2) for top in row["top_logprobs"][1:])
    with pytest.raises(openai.BadRequestError, match="or 0 with echo"):
        client.completions.create(model="tiny", prompt="a", max_tokens=0)
    with pytest.raises(openai.BadRequestError, match="are not available when `stream=True`"):
        client.completions.create(model="tiny", prompt="a", stream=True, extra_body={"prompt_logprobs": 1})


def test_seeded_choices_repeat_and_differ_from_one_another(serving):
    client = serving(TinyModel()).client()
    how = {"model": "tiny", "prompt": "x", "max_tokens": 10, "n": 3, "temperature": 1.5, "seed": 7}
    first, again = ([choice.text for choice in client.completions.create(**how).choices] for _ in range(2))
    assert first == again and len(set(first)) == 3


def test_crowds_with_aborts_get_their_own_tokens_and_the_record_replays_exactly(serving, tmp_path):
    model = TinyModel({"num_gpu_blocks": 40, "max_num_seqs": 8})
    running = serving(model, record=tmp_path / "run", segment_bytes=20_000)
    prompts = [f"{number} " + "tell me " * (number % 5) for number in range(12)]
    expected = {prompt: alone(prompt, 24) for prompt in prompts}
    draws = random.Random(3)

    async def one(client, number):
        prompt, count = prompts[number % 12], draws.randrange(2, 24)
        await asyncio.sleep(draws.random())
        body = {"return_token_ids": True, "ignore_eos": True}
        how = {"model": "tiny", "prompt": prompt, "max_tokens": count, "temperature": 0, "extra_body": body}
        if number % 3 == 0:
            got, left = [], draws.randrange(10)
            stream = await client.completions.create(**how, stream=True)
            async for chunk in stream:
                got += chunk.choices[0].token_ids
                left -= 1
                if left < 0:
                    break
            await stream.close()
            return got == expected[prompt][: len(got)]
        done = await client.completions.create(**how)
        return done.choices[0].token_ids == expected[prompt][:count]

    async def crowd():
        async with running.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, number) for number in range(60)))

    assert all(asyncio.run(crowd()))
    running.settle()
    runner = running.service.host._llm.runner
    assert not runner.logprobs and not runner.prompt_asks
    running.stop()
    record = load_record(tmp_path / "run")
    assert len(record.requests) == 60 and sum(row["cached_tokens"] for row in record.requests) > 0
    assert len(list((tmp_path / "run" / "segments").iterdir())) > 3
    result = replay(record)
    assert result.is_exact, result.difference


def test_a_conversation_hits_its_own_answers_and_replays_exactly_without_its_text(serving, tmp_path):
    running = serving(TinyModel(), record=tmp_path / "run")
    client, prompt, cached = running.client(), list(range(3, 40)), []
    for _ in range(3):
        done = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=40, seed=1, extra_body=IDS | {"ignore_eos": True}
        )
        cached.append(done.usage.prompt_tokens_details.cached_tokens)
        prompt += [*done.choices[0].token_ids, 7, 8]
    assert cached == [0, 64, 112]
    running.stop()
    record = load_record(tmp_path / "run")
    assert replay(record).is_exact
    numbers = [number for row in record.prompts.values() for number in row]
    assert min(numbers) >= 1 << 31
    trace = read_trace(tmp_path / "run")
    assert trace.sha256 == record.run["facts"]["trace"]["sha256"]
    assert [request.after for request in trace.requests] == [None, 0, 1]
    assert [request.max_tokens for request in trace.requests] == [len(tokens) for tokens in record.outputs.values()]


def test_a_client_that_goes_away_frees_its_blocks(serving):
    running = serving(TinyModel())
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 900, "ignore_eos": true}'
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        while not running.core.sequences:
            pass
    running.settle()
    assert running.core.scheduler.block_manager.num_used_blocks == 0
    said = httpx.get(f"{running.url}/metrics", timeout=60).text
    assert 'finished_reason="abort",model_name="tiny"} 1.0' in said


def test_what_cannot_be_served_by_the_engine_is_refused(serving):
    url = f"{serving(TinyModel({'max_model_len': 64, 'num_gpu_blocks': 3})).url}/v1/completions"
    for body, message in (
        ({"prompt": [512]}, "token id 512, expected ids from 0 to 511"),
        ({"prompt": "a", "stop_token_ids": [512]}, "token id 512, expected ids from 0 to 511"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is 21, expected at most 20"),
        ({"prompt": "a", "max_tokens": 60}, "this request can never be served: needs 4 blocks"),
        ({"prompt": "a", "max_tokens": 60, "stream": True}, "this request can never be served: needs 4 blocks"),
        ({"prompt": "a", "logit_bias": {"512": 1}}, "a token of logit_bias is 512, expected an id from 0 to 511"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias must have numbers from -100 to 100"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens is 17, expected at most 16"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs is 21, expected at most 20"),
    ):
        response = httpx.post(url, json=body, timeout=60)
        assert (response.status_code, message in response.json()["error"]["message"]) == (400, True), response.text


def test_an_engine_that_fails_tells_its_clients_and_ends_the_server(tmp_path):
    model = TinyModel()
    running = Running(model, record=tmp_path / "run").wait()
    model.llm.runner.model.logits = lambda hidden: hidden[10_000]
    with pytest.raises(openai.InternalServerError, match="the engine has failed: step 0 failed"):
        running.client().completions.create(model="tiny", prompt="a")
    with pytest.raises(StepError):
        running._thread.join()
        running.stop()
    [row] = load_record(tmp_path / "run").requests
    assert (row["finish_reason"], row["output_tokens"]) == (None, 0)


@pytest.mark.parametrize(
    ("world", "longest"), [(TinyModel, ("length", "abort")), (partial(simulated, 20.0), ("abort",))]
)
def test_at_shutdown_what_runs_may_end_within_the_time_and_is_aborted_after_it(serving, world, longest, tmp_path):
    running = serving(world(), record=tmp_path / "run", shutdown_timeout=3)
    name = running.client().models.list().data[0].id
    reasons = {}

    def ask(count):
        done = running.client().completions.create(
            model=name, prompt="a", max_tokens=count, extra_body={"ignore_eos": True}, stream=True
        )
        try:
            reasons[count] = [chunk.choices[0].finish_reason for chunk in done][-1]
        except openai.APIError as error:
            reasons[count] = type(error)
        except httpx.HTTPError as error:
            reasons[count] = type(error)

    short, long = threads = [threading.Thread(target=ask, args=(count,)) for count in (2, 990)]
    long.start()
    while not running.core.sequences and 990 not in reasons:
        time.sleep(0.001)
    short.start()
    while len(running.core.sequences) < 2 and 2 not in reasons:
        time.sleep(0.001)
    running.stop()
    for thread in threads:
        thread.join()
    assert reasons[2] == "length"
    kept = {row["max_tokens"]: row["finish_reason"] for row in load_record(tmp_path / "run").requests}
    assert kept.pop(2) == "length"
    assert kept.pop(990) in longest and not kept


def test_what_a_request_leaves_open_is_as_the_generation_config_says(tmp_path):
    judge_of("llama").model.save_pretrained(tmp_path)
    said = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": [2, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    llm = LLM(tmp_path, settings=Settings(num_gpu_blocks=8))
    body = CompletionRequest(prompt=[5], top_p=0.5)
    params = EngineBackend(llm).params(body, 16, 0)
    assert (params.temperature, params.top_k, params.top_p, params.stop_token_ids) == (0.6, 20, 0.5, (7,))
    plain = EngineBackend(llm, takes_defaults=False).params(body, 16, 0)
    assert (plain.temperature, plain.top_k) == (1.0, 0)
    llm.close()
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(InputError, match="generation_config.json: temperature is 'hot', expected a number"):
        LLM(tmp_path)


def test_sampling_without_defaults_is_that_of_openai():
    params = CompletionRequest(prompt="a").sampling_params({}, 16, 0)
    assert params == SamplingParams(temperature=1.0, max_tokens=16)
