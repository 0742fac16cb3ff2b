"""A server over a simulated replica, as OpenAI's own client and plain HTTP see it."""

from __future__ import annotations

import asyncio
import json
import random
import threading

import httpx
import openai
import pytest
from live_servers import Running, TinyModel, simulated
from prometheus_client.parser import text_string_to_metric_families
from shell import fitted

from twinserve.policies import SamplingParams
from twinserve.serving.protocol import NOT_SERVED
from twinserve.serving.simulated import StandInTokenizer
from twinserve.settings.build_core import Settings
from twinserve.sim.replica import simulate
from twinserve.traces.generator import LengthSpec
from twinserve.traces.readers import read_trace
from twinserve.traces.runs.fleet_record import load_replicas
from twinserve.traces.runs.record import RunRecorder, load_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.vllm_records import load_run

CHAT = [{"role": "user", "content": "hello"}]


def test_the_client_gets_models_answers_and_usage(serving):
    client = serving(simulated()).client()
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("round", 1024)
    chat = client.chat.completions.create(model="round", messages=CHAT, max_tokens=7)
    assert (chat.choices[0].finish_reason, chat.choices[0].message.role) == ("length", "assistant")
    assert len(chat.choices[0].message.content.split()) == chat.usage.completion_tokens == 7
    done = client.completions.create(model="round", prompt=[[5, 6], [5, 6, 7]], n=2, max_tokens=3)
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 12)
    assert len({choice.text for choice in done.choices}) > 1


def test_a_stream_says_the_same_as_a_whole_answer(serving):
    client = serving(simulated()).client()
    usage = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(messages=CHAT, model="round", max_tokens=20, stream=True, stream_options=usage)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices)
    assert len(text.split()) == 20
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 20)
    done = list(client.completions.create(model="round", prompt="say", max_tokens=4, n=3, echo=True, stream=True))
    texts = {index: "" for index in range(3)}
    for chunk in done:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert all(text.startswith("say") and len(text[3:].split()) == 4 for text in texts.values())


def test_the_next_turn_of_a_conversation_hits_the_answer_of_the_turn_before(serving):
    client = serving(simulated()).client()
    messages = [{"role": "user", "content": "tell me a story " * 8}]
    first = client.chat.completions.create(model="round", messages=messages, max_tokens=100)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, *CHAT]
    second = client.chat.completions.create(model="round", messages=messages, max_tokens=5)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    known = first.usage.prompt_tokens + 99
    assert second.usage.prompt_tokens_details.cached_tokens == known - known % 16
    salted = client.chat.completions.create(
        model="round", messages=messages, max_tokens=5, extra_body={"cache_salt": "mine"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"model": "other", "prompt": "a"}, 404, "The model `other` does not exist."),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens: Input should be greater"),
        ("completions", {"prompt": "a", "prompt_logprobs": 1}, 400, "logprobs are not served by a simulation"),
        ("completions", {"prompt": "a", "max_tokens": 1024}, 400, "maximum context length is 1024 tokens; the prompt"),
        ("completions", {"prompt": [5] * 1024}, 400, "maximum context length is 1024 tokens; the prompt has 1024"),
        ("completions", {"prompt": []}, 400, "the prompt has no tokens"),
        ("completions", {"prompt": [-1]}, 400, "token id -1, expected ids from 0"),
        ("completions", {"prompt": [-1], "echo": True}, 400, "token id -1, expected ids from 0"),
        ("completions", {"prompt": "a", "stream_options": {}}, 400, "can only be defined when `stream=True`"),
        ("completions", {"prompt": "a", "stop": ["", "b"]}, 400, "stop cannot contain an empty string"),
        ("completions", {"prompt": "a", "logprobs": 1}, 400, "logprobs are not served by a simulation"),
        ("completions", {"prompt": "a", "priority": 1}, 400, "priority is served with --scheduling-policy priority"),
        ("completions", {"prompt": "a", "cache_salt": ""}, 400, "'cache_salt' must be a non-empty string"),
        ("completions", {"prompt": [[1]] * 65, "n": 128}, 400, "8320 answers are asked for, expected at most 8192"),
        ("completions", {"prompt": "a", "stop": ["b"] * 1025}, 400, "stop: expected at most 1024 strings, not 1025"),
        ("completions", {"prompt": "a", "stop_token_ids": [7] * 1025}, 400, "stop_token_ids: List should have at most"),
        ("completions", {"prompt": "a", "logit_bias": dict.fromkeys(range(1025), 1)}, 400, "logit_bias: Dictionary"),
        ("completions", {"prompt": ["a"] * 8193}, 400, "8193 answers are asked for, expected at most 8192"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature: Input should be greater than or"),
        ("chat/completions", {"messages": CHAT, "min_tokens": 129}, 400, "min_tokens is 129, expected at most 128"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": CHAT, "top_logprobs": 2}, 400, "`logprobs` must be set to true"),
        ("chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools is not served here"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line_of_vllms_form(serving, path, body, status, message):
    response = httpx.post(f"{serving(simulated()).url}/v1/{path}", json=body)
    error = response.json()["error"]
    assert response.status_code == error["code"] == status
    assert message in error["message"] and "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_fields_that_are_not_served_are_refused_unless_they_ask_for_nothing(serving):
    url = f"{serving(simulated()).url}/v1/completions"
    for name, neutral in NOT_SERVED.items():
        for value in neutral:
            assert httpx.post(url, json={"prompt": "a", "max_tokens": 1, name: value}, timeout=60).status_code == 200, (
                name
            )
        refused = httpx.post(url, json={"prompt": "a", "max_tokens": 1, name: "something"}, timeout=60)
        assert (refused.status_code, name in refused.json()["error"]["message"]) == (400, True)
    assert httpx.post(url, json={"prompt": "a", "max_tokens": 1, "never_heard_of": 1}, timeout=60).status_code == 200


def test_broken_bodies_are_refused(serving):
    url = f"{serving(simulated()).url}/v1/completions"
    for content in (b"", b"{", b"[]", b'"a"', b"\xff", b'{"prompt": {"a": 1}}', b'{"prompt": [1, "a"]}'):
        refused = httpx.post(url, content=content, headers={"content-type": "application/json"}, timeout=60)
        assert refused.status_code == 400
        if content == b"{":
            problem = "the body is not JSON at character 1: Expecting property name enclosed in double quotes"
            assert refused.json()["error"] | {"type": ""} == {
                "message": problem,
                "type": "",
                "param": None,
                "code": 400,
            }


def test_each_chunk_says_what_was_used_where_both_options_ask_for_it(serving):
    client = serving(simulated()).client()
    how = {"model": "round", "messages": CHAT, "max_tokens": 4, "stream": True}

    def said(**options: bool) -> list[int | None]:
        chunks = client.chat.completions.create(**how, stream_options=options)
        return [None if chunk.usage is None else chunk.usage.completion_tokens for chunk in chunks]

    every = said(include_usage=True, continuous_usage_stats=True)
    assert every[0] == 0 and every[1:] == sorted(every[1:]) and 1 <= every[1] <= every[-1] == 4
    *before, last = said(include_usage=True)
    assert set(before) == {None} and last == 4
    assert set(said(continuous_usage_stats=True)) == {None}


def test_numbers_that_only_the_policies_refuse_are_refused_too(serving):
    url = f"{serving(simulated()).url}/v1/completions"
    for name, value in (("repetition_penalty", 5e-324), ("top_p", 5e-324), ("temperature", 1e300)):
        refused = httpx.post(url, json={"prompt": "a", "max_tokens": 1, name: value}, timeout=60)
        assert (refused.status_code, name in refused.json()["error"]["message"]) == (400, True)


def test_the_other_paths_answer(serving):
    url = serving(simulated(), served_model_name=["first", "second"]).url
    assert (
        httpx.get(f"{url}/health", timeout=60).status_code == httpx.post(f"{url}/ping", timeout=60).status_code == 200
    )
    assert "version" in httpx.get(f"{url}/version", timeout=60).json()
    assert [row["id"] for row in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]] == ["first", "second"]
    tokens = httpx.post(f"{url}/tokenize", json={"prompt": "über alle", "return_token_strs": True}, timeout=60).json()
    assert (tokens["count"], "".join(tokens["token_strs"])) == (len(tokens["tokens"]), "über alle")
    assert httpx.post(f"{url}/detokenize", json={"tokens": tokens["tokens"]}, timeout=60).json() == {
        "prompt": "über alle"
    }
    chat = httpx.post(f"{url}/tokenize", json={"messages": CHAT}, timeout=60).json()
    assert (
        httpx.post(f"{url}/detokenize", json={"tokens": chat["tokens"]}, timeout=60)
        .json()["prompt"]
        .endswith("<assistant>\n")
    )


def test_a_key_and_origins_are_asked_for_where_they_are_set(serving):
    running = serving(simulated(), api_key=["one", "two"], allowed_origins=["http://page"])
    with pytest.raises(openai.AuthenticationError):
        running.client().models.list()
    assert running.client(api_key="two").models.list().data
    assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
    headers = {"origin": "http://page", "access-control-request-method": "POST"}
    allowed = httpx.options(f"{running.url}/v1/completions", headers=headers)
    assert allowed.headers["access-control-allow-origin"] == "http://page"


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_a_full_queue_is_429_with_the_time_to_come_again(serving, max_num_seqs):
    """Full of what runs, too, as in vLLM 0.33: each answer of a request counts until it has ended, or was left."""
    running = serving(simulated(20.0, max_num_seqs=max_num_seqs), max_num_queued_reqs=5)

    def ask(client, n, **more):
        return client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2, "n": n} | more)

    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert ask(client, 5).status_code == 200
        assert ask(client, 6).status_code == 429
        long = {"prompt": "a", "max_tokens": 900, "n": 3, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as first:
            lines = first.iter_lines()
            next(lines)
            refused = ask(client, 3)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            problem = "the queue is full: 3 answers have not ended, 3 more are asked for, expected at most 5 at a time"
            assert refused.json()["error"]["message"] == problem
            assert ask(client, 3, temperature="hot").status_code == 400  # what is wrong is wrong at any time
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=long | {"n": 2, "stream": False}, timeout=0.5)
        running.settle()
        assert ask(client, 5).status_code == 200


@pytest.mark.parametrize("world", [TinyModel, simulated])
def test_while_what_serves_is_being_made_every_path_says_503(serving, world):
    class Slow:
        is_apart = world is TinyModel

        def host(self, record):
            ready.wait()
            return world().host(record)

    ready = threading.Event()
    running = Running(Slow())
    running.wait(for_host=False)
    for path in ("health", "v1/models", "metrics"):
        response = httpx.get(f"{running.url}/{path}", timeout=60)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    ready.set()
    running.wait()
    assert httpx.get(f"{running.url}/health", timeout=60).status_code == 200
    running.stop()


def test_answers_are_as_long_as_the_law_says_and_no_longer_than_asked_for(serving):
    client = serving(simulated(lengths=LengthSpec.parse("fixed:6"))).client()
    for asked, got, reason in ((None, 6, "stop"), (20, 6, "stop"), (6, 6, "length"), (4, 4, "length")):
        choice = client.chat.completions.create(model="round", messages=CHAT, max_tokens=asked).choices[0]
        assert (len(choice.message.content.split()), choice.finish_reason) == (got, reason)
    forced = client.completions.create(model="round", prompt="a", max_tokens=9, extra_body={"ignore_eos": True})
    assert forced.usage.completion_tokens == 9


def test_a_stop_string_ends_the_answer_before_it(serving):
    client = serving(simulated()).client()
    whole = client.completions.create(model="round", prompt="a", max_tokens=12).choices[0].text
    stop = whole.split()[5][1:] + " "
    for extra, rest in (({}, ""), ({"include_stop_str_in_output": True}, stop)):
        running = serving(simulated())
        done = running.client().completions.create(
            model="round", prompt="a", max_tokens=500, stop=stop, extra_body=extra
        )
        choice = done.choices[0]
        assert choice.text == whole[: whole.index(stop)] + rest
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert done.usage.completion_tokens == 7


def scraped(url: str) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_bucket")
    }


def test_the_metrics_say_what_the_record_says_under_both_names(serving, tmp_path):
    running = serving(simulated(num_gpu_blocks=24, max_num_seqs=8), record=tmp_path / "run")
    client = running.client()
    for number in range(6):
        client.completions.create(model="round", prompt="once upon a time " * 9, n=6, max_tokens=10 + 5 * number)
    said = scraped(running.url)
    counts = running.stop()
    record = load_record(tmp_path / "run")
    rows, summary = record.requests, record.run["summary"]
    assert counts == {"requests": 36, "length": 36}
    assert said["vllm:num_preemptions_total"] == sum(row["preemptions"] for row in rows) > 0
    assert said["vllm:prompt_tokens_total"] == sum(row["prompt_tokens"] for row in rows) == summary["prompt_tokens"]
    assert said["vllm:generation_tokens_total"] == sum(row["output_tokens"] for row in rows)
    assert said["vllm:request_success_totallength"] == len(rows) == summary["finished"] == 36
    assert said["vllm:prefix_cache_hits_total"] == said["vllm:prompt_tokens_cached_total"] == summary["cached_tokens"]
    computed = sum(row["prompt_tokens"] - row["cached_tokens"] for row in rows)
    assert said["vllm:request_prefill_kv_computed_tokens_sum"] == computed
    for name, first, last in (
        ("time_to_first_token", "arrival_ns", "first_token_ns"),
        ("e2e_request_latency", "arrival_ns", "finish_ns"),
        ("request_queue_time", "arrival_ns", "first_scheduled_ns"),
        ("request_decode_time", "first_token_ns", "finish_ns"),
    ):
        assert said[f"vllm:{name}_seconds_sum"] == pytest.approx(sum(row[last] - row[first] for row in rows) / 1e9)
    assert said["vllm:num_requests_running"] == said["vllm:kv_cache_usage_perc"] == 0
    own = {name.replace("twinserve:", "vllm:"): value for name, value in said.items() if name.startswith("twinserve:")}
    theirs = {name: value for name, value in said.items() if name.startswith("vllm:")}
    lags = {"vllm:simulation_lag_seconds", "vllm:stream_lag_seconds"}
    assert own.keys() - theirs.keys() == lags and not theirs.keys() - own.keys()
    assert own["vllm:generation_tokens_total"] == theirs["vllm:generation_tokens_total"]


def test_200_clients_with_random_aborts_lose_nothing_and_the_record_replays_exactly(serving, tmp_path):
    # So slow that an answer of 900 tokens takes seconds: who leaves is noticed before it ends, on a busy machine too.
    running = serving(simulated(4.0, num_gpu_blocks=64, max_num_seqs=16), record=tmp_path / "run")
    draws = random.Random(1)

    async def one(client, number):
        tokens = draws.randrange(1, 60)
        prompt = "in the beginning there was a word " * draws.randrange(1, 6) + str(number % 7)
        await asyncio.sleep(draws.random())
        if draws.random() < 0.3:
            stream = await client.completions.create(model="round", prompt=prompt, max_tokens=tokens, stream=True)
            left = draws.randrange(8)
            async for _ in stream:
                left -= 1
                if left < 0:
                    break
            await stream.close()
            return None
        if draws.random() < 0.2:
            try:
                async with asyncio.timeout(draws.random() / 10):
                    await client.completions.create(model="round", prompt=prompt, max_tokens=900)
            except TimeoutError:
                return None
            return None
        done = await client.completions.create(model="round", prompt=prompt, max_tokens=tokens)
        return len(done.choices[0].text.split()) == tokens

    async def crowd():
        async with running.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    results = asyncio.run(crowd())
    assert results.count(True) > 80 and False not in results
    running.settle()
    running.stop()
    record = load_record(tmp_path / "run")
    assert {row["finish_reason"] for row in record.requests} == {"length", "abort"}
    result = replay(record)
    assert result.is_exact, result.difference


def test_what_was_served_is_what_a_simulation_of_its_arrivals_decides(serving, tmp_path):
    """Each request arrives to the nanosecond, however late the process is that serves it."""
    running = serving(simulated(num_gpu_blocks=48, max_num_seqs=4), record=tmp_path / "live")

    async def crowd():
        async with running.client(openai.AsyncOpenAI) as client:
            await asyncio.gather(
                *(
                    client.completions.create(model="round", prompt="a b c " * number, max_tokens=5 + number, n=2)
                    for number in range(1, 12)
                )
            )

    asyncio.run(crowd())
    running.stop()
    live = load_record(tmp_path / "live")
    requests = read_trace(tmp_path / "live").requests
    settings = Settings.model_validate(live.run["settings"])
    with RunRecorder(tmp_path / "sim", world="sim", settings=settings.model_dump(), facts={}) as recorder:
        core = settings.build_core(listener=recorder)
        simulate(
            requests, core, fitted(), announce=lambda request: recorder.expect(request, SamplingParams(ignore_eos=True))
        )
        recorder.close()
    again = load_record(tmp_path / "sim")
    begun = live.requests[0]["arrival_ns"]
    assert [row["finish_ns"] + begun for row in again.requests] == [row["finish_ns"] for row in live.requests]
    assert [row.get("digest") for row in again.steps][-1] == live.steps[-1]["digest"]


def test_a_fleet_behind_one_endpoint_shares_its_requests_by_the_router_and_is_recorded(serving, tmp_path):
    running = serving(simulated(replicas=3), record=tmp_path / "fleet", segment_bytes=4000)

    async def crowd():
        async with running.client(openai.AsyncOpenAI) as client:
            asks = [client.completions.create(model="round", prompt="a b", max_tokens=40, n=2) for _ in range(6)]
            stream = await client.completions.create(model="round", prompt="c", max_tokens=900, stream=True)
            await stream.close()
            return await asyncio.gather(*asks)

    assert all(done.usage.completion_tokens == 80 for done in asyncio.run(crowd()))
    running.settle()
    counts = [core.num_ingested for core in running.cores]
    assert sum(counts) == 13 and min(counts) >= 3
    assert scraped(running.url)["vllm:request_success_totallength"] == 12
    assert running.stop() == {"requests": 13, "length": 12, "abort": 1}
    replicas = load_replicas(tmp_path / "fleet")
    assert [len(record.requests) for record in replicas] == counts
    assert all(replay(record).is_exact and len(record.steps) for record in replicas)
    fleet = load_run(tmp_path / "fleet")
    assert (len(fleet.requests), fleet.run["summary"]["finished"]) == (13, 12)
    assert len(read_trace(tmp_path / "fleet").requests) == 13


def test_the_page_of_the_interface_is_there(serving):
    paths = httpx.get(f"{serving(simulated()).url}/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/tokenize"} <= paths.keys()
    assert json.dumps(paths)


@pytest.mark.parametrize(
    ("broken", "path", "body"),
    [
        ("encode", "/v1/completions", {"prompt": "hello"}),
        ("encode", "/tokenize", {"prompt": "hello"}),
        ("apply_chat_template", "/v1/chat/completions", {"messages": CHAT}),
        ("apply_chat_template", "/tokenize", {"messages": CHAT}),
        ("decode", "/detokenize", {"tokens": [5]}),
        ("decode", "/v1/completions", {"prompt": [5], "echo": True, "max_tokens": 1}),
    ],
)
def test_what_a_tokenizer_or_a_template_refuses_is_said_to_the_client(serving, monkeypatch, broken, path, body):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("byte 7 is not among mine")

    running = serving(simulated())
    with monkeypatch.context() as patch:
        patch.setattr(StandInTokenizer, broken, refuse)
        answer = httpx.post(running.url + path, json=body, timeout=60)
    assert answer.status_code == 400
    assert "byte 7 is not among mine" in answer.json()["error"]["message"]
    assert httpx.post(f"{running.url}/tokenize", json={"prompt": "hello"}, timeout=60).json()["count"] == 2


def test_a_client_gives_variables_of_a_template_and_neither_a_template_nor_what_becomes_of_it(serving):
    running = serving(simulated())
    for_ever = "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}"
    given = {"chat_template": for_ever, "tokenize": False, "padding": "max_length", "max_length": 10**12}
    for kwargs in ({"enable_thinking": False}, *({name: value} for name, value in given.items())):
        body = {"messages": CHAT, "max_tokens": 1, "chat_template_kwargs": kwargs}
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
        (name,) = kwargs
        assert answer.status_code == (400 if name in given else 200)
        assert name not in given or f"which {name} is none of" in answer.json()["error"]["message"]


def test_arguments_that_have_a_template_give_something_else_are_refused(serving, monkeypatch):
    monkeypatch.setattr(StandInTokenizer, "apply_chat_template", lambda *_, **how: "text" if "new" in how else [5])
    running = serving(simulated())
    for kwargs, status in ((None, 200), ({"new": False}, 400)):
        body = {"messages": CHAT, "max_tokens": 1, "chat_template_kwargs": kwargs}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).status_code == status
