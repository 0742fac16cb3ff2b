"""Drafts change no token: whatever is proposed, accepted, batched, chunked, cached or preempted."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import replace

import engine_faults
import pytest
import torch
from engine_judge import GREEDY, Judge, tiny
from scipy.stats import chi2
from transformers import LlamaConfig, LlamaForCausalLM

from twinserve.engine.device_queue import OpenSteps
from twinserve.engine.llm import LLM
from twinserve.engine.online import StepError
from twinserve.engine.speculation.proposers import ForcedProposer, LateDrafts, NgramProposer
from twinserve.engine.speculation.runner import SpeculativeRunner
from twinserve.policies import SamplingParams, Sequence, SequenceStatus
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.record import RunRecorder, load_record
from twinserve.traces.runs.replay import replay

every_depth = pytest.mark.parametrize("depth", [0, 1])
K = 3
PROPOSERS = ["ngram", "draft_model", "itself", "forced 0.7", "forced 1", "draft_model ahead", "itself ahead"]
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])
every_proposer = pytest.mark.parametrize("proposer", PROPOSERS)


class Ahead:
    """A queue that concludes steps as that of a CUDA device: when they are waited for, or before one that needs it.

    Attributes:
        count: steps with rows that were laid out before the one before them was concluded.
    """

    def __init__(self) -> None:
        self.open = OpenSteps()
        self.count = 0

    @torch.inference_mode()
    def submit_parts(self, parts) -> AheadStep:
        self.open.make_way(parts)
        self.count += len(self.open) if parts.rows else 0
        parts.lay_out()
        start_ns = time.perf_counter_ns()
        numbers = parts.compute()
        parts.go_on()
        step = AheadStep(self, parts, numbers.tolist(), start_ns)
        self.open.add(step)
        return step

    def close(self) -> None:
        self.open.clear()


class AheadStep:
    waited_ns = 0

    def __init__(self, queue: Ahead, parts, numbers: list[int], start_ns: int) -> None:
        self.queue, self.parts, self.numbers = queue, parts, numbers
        self.start_ns, self.end_ns = start_ns, time.perf_counter_ns()
        self.tokens: list[int] = []

    def conclude(self) -> None:
        self.tokens = self.parts.conclude(self.numbers)

    def result(self) -> list[int]:
        self.queue.open.conclude(self)
        return self.tokens


@pytest.fixture
def speculating():
    """Makes LLMs of a judge's model that draft in some way, and closes them."""
    made: list[LLM] = []

    def make(judge, proposer: str, depth: int, seed: int = 0, device: str = "cpu", **settings) -> LLM:
        config: dict = {"method": "ngram_gpu", "num_speculative_tokens": K, "prompt_lookup_min": 1}
        draft = None
        proposer, *ahead = proposer.split(" ahead")
        if proposer in ("draft_model", "itself"):
            config = {"method": "draft_model", "num_speculative_tokens": K, "model": "given"}
            draft = judge.model if proposer == "itself" else tiny(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1)
        values = {"block_size": 16, "num_gpu_blocks": 256, "pipeline_depth": depth, "speculative_config": config}
        options = {"seed": seed, "device": device, "execution": "eager"}
        llm = LLM(judge.model, settings=Settings.load(values | settings), draft=draft, **options)
        made.append(llm)
        if ahead:
            llm.runner._queue = Ahead()
        if proposer.startswith("forced"):
            assert isinstance(llm.runner, SpeculativeRunner)
            rate = float(proposer.removeprefix("forced "))

            def text_of(seq: Sequence) -> list[int]:
                prompt = seq.token_ids[: seq.num_prompt_tokens]
                return prompt + judge.generate(prompt, seq.sampling_params.max_tokens + K)

            llm.runner._proposer = ForcedProposer(text_of, rate, 512)
        return llm

    yield make
    for llm in made:
        llm.close()


def prompts_of(lengths: list[int], max_tokens: int) -> list[Request]:
    """Requests that come at once, each with a text of its own."""
    return [Request(i, 0, (Part(i, 0, length),), max_tokens) for i, length in enumerate(lengths)]


class Drafts:
    """A recorder that only counts what came of drafts."""

    def __init__(self, watcher) -> None:
        self.watcher = watcher
        self.made: list[int] = []
        self.by_request: list[tuple[int, int]] = []
        self.passed_over = 0

    def __getattr__(self, name: str):
        return getattr(self.watcher, name)

    def committed(self, batch) -> None:
        self.watcher.committed(batch)
        self.made += [made for _, made, _ in batch.runs]
        self.by_request += [(seq.seq_id, made) for seq, made, _ in batch.runs]
        self.passed_over += len(batch.skipped)


@pytest.fixture
def counted(watcher) -> Drafts:
    return Drafts(watcher)


@every_device
@every_depth
@every_proposer
def test_chunked_prompts_beside_drafts(llama, speculating, counted, proposer, depth, device):
    llm = speculating(llama, proposer, depth, device=device, max_num_seqs=8, max_num_batched_tokens=48)
    requests = prompts_of([1, 90, 7, 16, 33, 130, 2, 48, 17, 64], max_tokens=14)
    sequences = llm.run_trace(requests, params=GREEDY, recorder=counted)
    assert counted.watcher.chunks and counted.watcher.largest_batch >= 5 and counted.watcher.mixed_steps
    assert counted.made
    if proposer in ("itself", "itself ahead", "forced 1"):
        assert max(counted.made) == K + 1
    llama.check_all(sequences)


@every_depth
@every_proposer
def test_shared_prefixes(llama, speculating, counted, proposer, depth):
    """Request 6 leaves one token to compute, so its admission is padded."""
    llm = speculating(llama, proposer, depth, max_num_seqs=4, max_num_batched_tokens=600)
    shared = Part(100, 0, 300)
    requests = [Request(i, 0, (shared, Part(i, 0, length)), 10) for i, length in enumerate([5, 30, 1, 77, 12, 21])]
    requests.append(Request(6, 0, requests[5].parts, 10))
    sequences = llm.run_trace(requests, params=GREEDY, recorder=counted)
    assert counted.watcher.hit_tokens >= 6 * 288
    llama.check_all(sequences)


@every_depth
@every_proposer
def test_preemptions(llama, speculating, counted, proposer, depth):
    llm = speculating(llama, proposer, depth, num_gpu_blocks=11, max_num_batched_tokens=64, max_num_seqs=8)
    sequences = llm.run_trace(prompts_of([30, 41, 38, 29, 33], 40), params=GREEDY, recorder=counted)
    assert counted.watcher.preemptions
    llama.check_all(sequences)


@every_depth
def test_drafts_that_are_all_right_give_all_tokens_of_a_row(llama, speculating, counted, depth):
    llm = speculating(llama, "itself", depth)
    sequences = llm.run_trace(prompts_of([20], 41), params=GREEDY, recorder=counted)
    assert counted.made[:10] == [K + 1] * 10 and len(counted.made) <= 10 + depth, "one more may run ahead"
    llama.check_all(sequences)


@every_depth
@every_proposer
def test_a_stop_inside_a_run_ends_it_there(llama, speculating, proposer, depth):
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(6)]
    full = [llama.generate(prompt, 30) for prompt in prompts]
    # The second of a run where all drafts are right, for the first time in that text.
    stop = next(one for n, one in enumerate(full[0]) if n > 4 and n % (K + 1) == 2 and full[0].index(one) == n)
    llm = speculating(llama, proposer, depth, block_size=4, num_gpu_blocks=1024, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=(stop,))
    for prompt, completion, tokens in zip(prompts, llm.generate(prompts, params), full, strict=True):
        ends = [tokens.index(token) + 1 for token in (stop, llm.eos_token_id) if token in tokens]
        assert completion.token_ids == tokens[: min([30, *ends])], prompt


@every_depth
@every_proposer
def test_requests_with_seeds_penalties_and_logprobs_get_what_they_get_without_drafts(
    llama, serving, speculating, proposer, depth
):
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(6)]
    ways = [
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"temperature": 0.7, "min_p": 0.05, "logit_bias": ((7, 2.0),)},
        {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 3},
        {"temperature": 0.9, "min_tokens": 9, "stop_token_ids": (11, 12, 13), "logprobs": 2},
    ]
    params = [SamplingParams(seed=7 + i, max_tokens=24, **way) for i, way in enumerate(ways)]
    plain = serving(llama).generate(prompts, params)
    drafted = speculating(llama, proposer, depth).generate(prompts, params)
    for one, other in zip(plain, drafted, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]


@every_depth
@pytest.mark.parametrize("way", [{"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}])
def test_penalties_are_for_the_drafts_before_a_token_too(llama, serving, speculating, counted, depth, way):
    """Of a few tokens each next one is the most probable because those before it came already."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=1 + 2 * (K + 1),
        ignore_eos=True,
        logit_bias=tuple((100 + number, 90.0 - number / 8) for number in range(16)),
    )
    penalised, requests = replace(params, **way), prompts_of([3], params.max_tokens)
    (free,), (seq,) = (serving(llama).run_trace(requests, params=one) for one in (params, penalised))
    text = seq.completion_token_ids
    assert len(set(free.completion_token_ids)) < len(set(text)) and len(set(text[1 : 1 + K])) == K
    llm = speculating(llama, "forced 1", depth)
    llm.runner._proposer = ForcedProposer(lambda own: [*own.token_ids[: own.num_prompt_tokens], *text], 1.0, 512)
    (drafted,) = llm.run_trace(requests, params=penalised, recorder=counted)
    assert drafted.completion_token_ids == text and counted.made[:2] == [K + 1] * 2


@every_depth
@every_proposer
def test_a_real_speculative_run_is_decided_again_from_its_record(llama, speculating, tmp_path, proposer, depth):
    llm = speculating(llama, proposer, depth, num_gpu_blocks=14, max_num_batched_tokens=64, max_num_seqs=8)
    with RunRecorder(tmp_path / "run", world="real", settings=llm.settings.model_dump(), facts=llm.facts()) as recorder:
        llm.run_trace(prompts_of([30, 41, 38, 29, 33, 12, 7], 40), params=GREEDY, recorder=recorder)
        recorder.close()
    record = load_record(tmp_path / "run")
    result = replay(record)
    assert result.is_exact, result.difference
    assert record.run["summary"]["speculation"]["drafts"] > 20
    row = [row for row in record.steps if "runs" in row][4]
    request, made, kept = row["runs"][0]
    row["runs"][0] = (request, made, kept + 1)
    assert not replay(record).is_exact


@every_depth
@pytest.mark.parametrize("proposer", ["ngram", "draft_model"])
def test_faults_end_what_they_must_and_nothing_else(llama, speculating, monkeypatch, proposer, depth):
    llm = speculating(llama, proposer, depth, max_model_len=128)
    engine_faults.check_what_cannot_be_served_is_refused(llm)
    prompts = [[5 + i, 9, 300 - i] * 4 for i in range(3)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    name = "propose" if proposer == "ngram" else "propose_behind"
    propose, calls = getattr(llm.runner._proposer, name), []

    def failing(behind, asked):
        calls.append(asked)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return propose(behind, asked)

    with monkeypatch.context() as patch:
        patch.setattr(llm.runner._proposer, name, failing)
        with pytest.raises(StepError, match="tried to allocate 2 GiB"):
            llm.generate(prompts, params)
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        llama.check(prompt, completion.token_ids)


@every_depth
def test_logits_that_are_no_numbers_end_their_request_alone(llama, speculating, depth):
    llm = speculating(llama, "ngram", depth, max_model_len=128)
    engine_faults.check_logits_that_are_no_numbers_end_their_request_alone(llm)


@pytest.mark.parametrize("proposer", ["draft_model ahead", "itself ahead"])
def test_steps_are_laid_out_before_anybody_knows_what_was_accepted(llama, speculating, counted, monkeypatch, proposer):
    """All but those that follow a change: the first, what is admitted last, the end of a request and of its context."""
    llm, read = speculating(llama, proposer, 1, max_model_len=96), list[int]()
    get = LateDrafts.__getitem__
    monkeypatch.setattr(LateDrafts, "__getitem__", lambda own, place: (read.append(place), get(own, place))[1])
    sequences = llm.run_trace(prompts_of([9, 30, 17], 40), params=GREEDY, recorder=counted)
    llama.check_all(sequences)
    assert not read, "what is proposed stays on the device"
    steps = 40 if proposer.startswith("draft") else 40 // (K + 1)
    assert steps - 5 <= llm.runner._queue.count, "of all steps with decodes"


def test_a_step_is_waited_for_where_what_is_proposed_ahead_might_leave_the_context(llama, speculating):
    llm, length, ends = speculating(llama, "draft_model ahead", 1, max_model_len=48), 48, list[int]()
    must_know = llm.runner.must_know

    def noted(launched) -> bool:
        is_known = must_know(launched)
        ends.extend(0 if is_known else row.start + row.num_tokens for row in launched.rows)
        return is_known

    llm.runner.must_know = noted
    sequences = llm.run_trace(prompts_of([20], 100), params=GREEDY)
    llama.check_all(sequences, length - 20)
    assert length - 3 * K < max(ends) < length - 2 * K, "drafts behind it, and behind the step before"


def test_no_more_drafts_are_proposed_than_the_context_has_places_for(llama, speculating, counted):
    llm, proposed = speculating(llama, "itself", 0, max_model_len=48), list[tuple[int, int]]()
    counted.watcher.committed = lambda batch: proposed.extend((48 - seq.num_tokens, n) for seq, n in batch.proposed)
    llama.check_all(llm.run_trace(prompts_of([21], 100), params=GREEDY, recorder=counted), 27)
    assert proposed and all(number == min(left, K) for left, number in proposed)
    assert min(left for left, _ in proposed) < K


@pytest.mark.parametrize("ways", [{"temperature": 0.8, "seed": 5}, {"logprobs": 2}, {"repetition_penalty": 1.3}])
def test_steps_wait_for_what_was_accepted_where_sampling_asks_for_it(llama, speculating, ways):
    """A request's own draws and penalties go by the places of its tokens."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 30, "ignore_eos": True} | ways)
    found = []
    for proposer in ("ngram", "itself ahead", "draft_model ahead"):
        llm = speculating(llama, proposer, 1)
        found.append([one.token_ids for one in llm.generate([[5, 9, 300], [7] * 20], params)])
    assert found[0] == found[1] == found[2]
    assert not llm.runner._queue.count


def test_what_ended_is_forgotten(llama, speculating):
    llm = speculating(llama, "ngram", 0)
    for length in (5, 9):
        llm.run_trace(prompts_of([length, 30], 12), params=GREEDY)
        assert len(llm.runner._texts) <= 2, "those that ended last are known until the next decision"


class Kept(Drafts):
    """Of whom a runner keeps texts, drafts and turns, as each step ends."""

    def __init__(self, watcher, runner) -> None:
        super().__init__(watcher)
        self.runner, self.most = runner, {"_texts": 0, "_drafts": 0, "_turns": 0}
        self.launched: weakref.WeakSet = weakref.WeakSet()
        lay = runner.laid_out
        runner.laid_out = lambda launched: (self.launched.add(launched), lay(launched))[1]

    def committed(self, batch) -> None:
        super().committed(batch)
        for name in self.most:
            own = getattr(self.runner, name)
            self.most[name] = max(self.most[name], len(own))
            gone = [seq for seq in own if seq.status is not SequenceStatus.RUNNING and seq not in batch.seqs]
            assert not gone, f"{name} of {gone}"
        assert len(self.launched) <= 2, "a step knows the one before it until it is computed"


NARROW = {"max_num_batched_tokens": 2 * (K + 1), "max_num_seqs": 3}
"""Three short prompts have room in a step, and then two rows with drafts."""


def test_only_what_runs_is_kept(llama, speculating, watcher):
    """Sequences are passed over, for want of budget, preempted, and end, in many more steps than there are of them."""
    llm = speculating(llama, "forced 0.5", 0, num_gpu_blocks=6, **NARROW)
    llm.runner.acceptance_rate = 0.5
    kept = Kept(watcher, llm.runner)
    llm.run_trace(prompts_of([3, 3, 2, 3, 3, 2], 40), params=GREEDY, recorder=kept)
    assert kept.passed_over and watcher.preemptions and len(kept.made) > 60 and all(kept.most.values()), kept.most


@every_depth
def test_drafts_of_sequences_that_are_passed_over_wait_for_them(llama, speculating, counted, depth):
    llm = speculating(llama, "forced 1", depth, **NARROW)
    sequences = llm.run_trace(prompts_of([3, 3, 2], 1 + 5 * (K + 1)), params=GREEDY, recorder=counted)
    llama.check_all(sequences)
    assert counted.passed_over >= 4
    made = [number for request, number in counted.by_request if request == 2]
    assert made[:5] == [K + 1] * 5


@pytest.mark.parametrize("ahead", ["", " ahead"])
@pytest.mark.parametrize("proposer", ["draft_model", "itself"])
def test_a_model_drafts_what_it_finds_most_probable_behind_the_text(llama, speculating, monkeypatch, proposer, ahead):
    """However many of the drafts before were accepted, and behind prompts in chunks."""
    llm = speculating(llama, proposer + ahead, 1, max_num_batched_tokens=40, max_num_seqs=4)
    llm.runner.acceptance_rate = 0.6
    drafting = llama if proposer == "itself" else Judge(tiny(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1))
    conclude, drafted = SpeculativeRunner.conclude, list[int]()

    def concluded(own, launched, runs):
        tokens = conclude(own, launched, runs)
        for seq, drafts, run in zip(launched.places, launched.drafts, runs, strict=True):
            drafting.check(own._texts[seq], drafts)
            drafted.append(len(run))
        return tokens

    monkeypatch.setattr(SpeculativeRunner, "conclude", concluded)
    llm.run_trace(prompts_of([9, 70, 17, 33, 5], 30), params=GREEDY)
    assert set(drafted) == {*range(1, K + 2)} and len(drafted) >= 5 * 30 // (K + 1)


@pytest.mark.parametrize("number", [0, 1])
def test_where_all_is_accepted_a_text_is_made_of_drafts_whatever_they_are(llama, speculating, number):
    """And of the model's own token behind each run of them, on top of their keys and values."""
    llm = speculating(llama, "forced 0", 0)
    llm.runner.acceptance_rate = 1.0
    (request,) = prompts_of([20 + number], 1 + 3 * (K + 1))
    (seq,) = llm.run_trace([request], params=GREEDY)
    prompt, tokens = seq.token_ids[: seq.num_prompt_tokens], seq.completion_token_ids
    wrong = [(token + 1) % 512 for token in llama.generate(prompt, 1 + 3 * (K + 1))]
    for place, token in enumerate(tokens):
        if place % (K + 1):
            assert token == wrong[place], "a draft"
        else:
            llama.check(prompt + tokens[:place], [token])


def test_how_much_is_accepted_is_drawn_by_seed_request_step_and_draft(llama, speculating, watcher):
    """With probability p each: 0 to K of K drafts with 1 - p, p (1 - p), ..., p^K."""
    rate, made = 0.6, {}
    for seed in (0, 0, 1):
        llm = speculating(llama, "draft_model", 0, seed=seed, max_num_seqs=32, max_num_batched_tokens=512)
        llm.runner.acceptance_rate = rate
        counted = Drafts(watcher)
        llm.run_trace(prompts_of([5 + number for number in range(32)], 60), params=GREEDY, recorder=counted)
        by_request = {}
        for request, number in counted.by_request:
            by_request.setdefault(request, []).append(number)
        assert made.setdefault(seed, by_request) == by_request, "a seed gives the same twice"
    assert made[0] != made[1]
    runs = [tuple(one[:8]) for one in made[0].values()]
    assert len(set(runs)) == 32 and not any(len(set(one)) == 1 for one in runs), "requests differ, and steps"
    counts = Counter(number - 1 for one in made[0].values() for number in one[:-2])
    total = sum(counts.values())
    expected = [total * (1 - rate) * rate**number for number in range(K)] + [total * rate**K]
    statistic = sum((counts[number] - count) ** 2 / count for number, count in enumerate(expected))
    assert total > 500 and chi2.sf(statistic, K) > 0.001, counts


@every_depth
def test_in_place_of_drafts_that_are_not_found_nothing_is_right(llama, speculating, counted, depth):
    """Not even where the model has the token that stands there."""
    llm = speculating(llama, "ngram", depth)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias=((0, 100.0),))
    sequences = llm.run_trace(prompts_of([7], 12), params=params, recorder=counted)
    assert sequences[0].completion_token_ids == [0] * 12
    assert counted.made[0] == 1 or not depth, "nothing lies before the first of them"
    assert max(counted.made) == K + 1


WAYS = {
    "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.5, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
}
VOCAB = 16


def probabilities(logits: torch.Tensor, way: dict) -> torch.Tensor:
    """What `way` draws from, worked out a token at a time from sorted probabilities."""
    own = (logits.double() / way["temperature"]).softmax(-1)
    order = own.argsort(descending=True).tolist()
    kept = [token for token in order if own[token] >= way.get("min_p", 0.0) * own[order[0]]]
    kept = kept[: way.get("top_k", len(kept))]
    total, nucleus = 0.0, []
    mass = sum(own[token].item() for token in kept)
    for token in kept:
        if total < way.get("top_p", 1.0):
            nucleus.append(token)
        total += own[token].item() / mass
    chosen = torch.zeros_like(own)
    chosen[nucleus] = own[nucleus]
    return chosen / chosen.sum()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_accepted_is_distributed_as_the_model_has_it(speculating, way):
    """4,000 answers of three tokens, the last two of them verified drafts or what took their place: 8,000 draws."""
    model = tiny(LlamaForCausalLM, LlamaConfig, vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, seed=3)
    llm = speculating(Judge(model), "itself", 0, max_num_seqs=256, num_gpu_blocks=600, max_num_batched_tokens=2048)
    prompt = [3, 9, 4]
    number = 4_000
    params = SamplingParams(max_tokens=3, ignore_eos=True, **WAYS[way])
    answers = [tuple(one.token_ids) for one in llm.generate([prompt] * number, params)]
    expected: dict[tuple[int, ...], float] = {(): float(number)}
    for _ in range(3):
        longer = {}
        for text, count in expected.items():
            own = probabilities(model(torch.tensor([[*prompt, *text]])).logits[0, -1], WAYS[way])
            longer |= {(*text, token): count * p for token, p in enumerate(own.tolist()) if p > 0}
        expected = longer
    observed = Counter(answers)
    assert set(observed) <= set(expected), "a token that is not kept was drawn"
    cells = [(observed[text], count) for text, count in expected.items() if count >= 5]
    rest = number - sum(count for _, count in cells)
    if rest >= 5:
        cells.append((number - sum(seen for seen, _ in cells), rest))
    assert len(cells) > 20
    statistic = sum((seen - count) ** 2 / count for seen, count in cells)
    assert chi2.sf(statistic, len(cells) - 1) > 0.001, f"{statistic:.1f} with {len(cells)} cells"


def test_prompt_lookup_takes_the_longest_run_of_last_tokens_and_its_first_place():
    lookup = NgramProposer(2, 3, 100)
    assert lookup.of([1, 2, 3, 4, 9, 2, 3], 2) == [4, 9]
    assert lookup.of([2, 3, 8, 1, 2, 3, 7, 1, 2, 3], 1) == [7], "three tokens go before two"
    assert lookup.of([2, 3, 8, 2, 3, 7, 2, 3], 1) == [8], "the first place"
    assert lookup.of([5, 5, 5, 5, 5], 3) == [5, 5], "as many as there are"
    assert lookup.of([1, 2, 3], 3) == [] == lookup.of([1], 3) == lookup.of([3, 1, 3], 3), "two tokens at least"
    assert NgramProposer(1, 1, 100).of([3, 1, 3], 3) == [1, 3]
    texts = {Sequence([1]): [3, 1, 3], Sequence([2]): [7, 7, 7, 7, 7]}
    assert NgramProposer(1, 1, 5).propose(texts, 3) == [[1, 3], []], "no further than the context goes"
    assert NgramProposer(1, 1, 4).propose(texts, 3) == [[1], []]


def test_a_draft_with_another_vocabulary_or_a_shorter_context_is_refused_before_weights_are_loaded(llama):
    settings = {"speculative_config": {"method": "draft_model", "num_speculative_tokens": 2, "model": "given"}}
    for fields, problem in (
        ({"vocab_size": 500}, "expected a vocabulary of 512 tokens, it has 500"),
        ({"max_position_embeddings": 512}, "expected a context of 1024, it has 512"),
    ):
        with pytest.raises(InputError, match=problem):
            LLM(llama.model, settings=Settings.load(settings), draft=tiny(LlamaForCausalLM, LlamaConfig, **fields))
    with pytest.raises(InputError, match="'eagle3', expected ngram, ngram_gpu or draft_model in the engine"):
        LLM(
            llama.model,
            settings=Settings.load({"speculative_config": {"method": "eagle3", "num_speculative_tokens": 2}}),
        )
