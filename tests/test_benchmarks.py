"""The benchmarks of the seven cycles: what each writes, that none takes the others with it, how results are shown."""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import anchors
import benchmark_cycle1
import benchmark_cycle2
import benchmark_cycle3
import benchmark_cycle4
import benchmark_cycle5
import benchmark_cycle6
import benchmark_cycle7
import benchmark_tensor_parallel
import command_line
import copies
import cycle_results
import flash_stand_in
import headline
import quantities
import render
import run_all
import simulator
import timing
import tune
from environment import ROOT, commit, device_folder
from forked_scripts import help_of
from sizes import SIZES
from subject import EndlessTokenizer, Subject
from work import yardstick

import twinserve
from twinserve.engine.layers import choice
from twinserve.planning.tune import Tuning
from twinserve.policies import IS_COMPILED
from twinserve.settings.errors import InputError

BENCHMARKS = {
    1: benchmark_cycle1.benchmark_naive,
    2: benchmark_cycle2.benchmark_kv_cache,
    3: benchmark_cycle3.benchmark_memory_utilization,
    4: benchmark_cycle4.benchmark_throughput,
    5: benchmark_cycle5.benchmark_ttft,
    6: benchmark_cycle6.benchmark_flash_attention,
    7: benchmark_cycle7.benchmark_quantization,
}
FEW = replace(
    SIZES["cpu"],
    requests=2,
    shared=32,
    own=4,
    output=2,
    outputs=(1, 2),
    long_prompt=32,
    decoded=3,
    system_prompt=32,
    user_message=4,
    attention_requests=3,
    attention_prompts=(5, 40),
    attention_output=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Llama without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def subject(folder, monkeypatch) -> Subject:
    """The tiny model, with little to compute."""
    monkeypatch.setattr(benchmark_cycle1, "MAX_NEW_TOKENS", (2, 3, 4))
    monkeypatch.setattr(benchmark_cycle4, "REQUESTS", 5)
    return replace(Subject.of(str(folder)), sizes=FEW)


@pytest.mark.parametrize("cycle", BENCHMARKS)
def test_a_benchmark_says_what_it_measured_and_on_what(cycle, subject):
    measured = json.loads(json.dumps(BENCHMARKS[cycle](subject, repeats=1)))
    assert measured["cycle"] == cycle
    assert measured["benchmark"] == BENCHMARKS[cycle].__name__
    assert measured["device"] == "cpu" and measured["model"] == "tiny" and measured["dtype"] == "float32"
    assert measured["machine"] == f"CPU, {torch.get_num_threads()} threads"
    assert measured["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert measured["commit"] == commit()
    assert len(measured["repeats_s"]) == 1
    assert measured["mean_s"] == measured["median_s"] == measured["repeats_s"][0] > 0
    assert measured["output_tokens"] == FEW.requests * FEW.output
    assert measured["tokens_per_s"] == pytest.approx(measured["output_tokens"] / measured["median_s"])
    assert measured["memory_mb"] > 0
    assert "not loading the model" in measured["timing"]
    assert measured["expectations"] and measured["cases"] + measured["figures"]
    neighbour = measured.get("before", {}).get("speed_up", {})
    assert (cycle in {1, 6}) == (not neighbour), "every cycle but the first, and 6 without flash-attn, has a neighbour"
    if neighbour:
        ratio = measured["before"]["median_s"] / measured["median_s"]
        assert neighbour["least"] == neighbour["value"] == neighbour["most"] == pytest.approx(ratio)
    assert all(len(case["repeats_s"]) >= 1 and case["median_s"] > 0 for case in measured["cases"])


@pytest.mark.parametrize("cycle", [1, 7])
def test_random_weights_need_no_more_than_a_shape(cycle, subject):
    measured = BENCHMARKS[cycle](replace(subject, is_random=True), repeats=1)
    assert measured["weights"] == "random"
    if cycle == 7:
        assert measured["expectations"][1]["met"] is None, "the quality of random weights says nothing"


def test_every_cycle_is_measured_with_the_guides_conditions():
    assert benchmark_cycle1.PROMPT == "Hello, I am a language model"
    assert benchmark_cycle1.MAX_NEW_TOKENS == (50, 100, 200)
    assert benchmark_cycle3.SEQUENCES == benchmark_cycle4.REQUESTS == 100
    for benchmark in BENCHMARKS.values():
        parameters = inspect.signature(benchmark).parameters
        assert parameters["repeats"].default >= 3
        assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters.values())


def test_every_script_starts():
    modules = sorted((ROOT / "benchmarks").glob("*.py"))
    scripts = [path for path in modules if '__name__ == "__main__"' in path.read_text()]
    assert len(scripts) >= 20
    for script in scripts:
        shown = help_of(script)
        assert shown.returncode == 0, f"{script.name} --help: {shown.stderr}"
        assert shown.stdout.startswith(f"usage: {script.name} [-h]"), script.name


def test_as_many_tokens_are_generated_as_were_asked_for(subject):
    model, tokenizer = subject.transformers_model(), subject.tokenizer()
    text = benchmark_cycle1.generate_naive(model, tokenizer, "7 8 word", 20, temperature=0.0)
    assert len(text.split()) == 23 and text.startswith("7 8 ")
    ends = EndlessTokenizer(tokenizer)
    assert ends.eos_token_id is None and ends.encode("7 8") == [7, 8]


def test_memory_is_counted_to_the_block():
    assert benchmark_cycle3.allocated_tokens([1, 16, 17, 300], 16) == 16 * (1 + 1 + 2 + 19)
    assert benchmark_cycle3.allocated_tokens([1, 16, 17, 300], 256) == 256 * 5
    lengths = benchmark_cycle3.various_lengths(100, 2048)
    assert len(set(lengths)) > 50 and min(lengths) >= 1 and max(lengths) <= 2048
    count = benchmark_cycle3.sequences_that_fit(4096, 256)
    blocks = [-(-length // 16) for length in benchmark_cycle3.various_lengths(4096, 256)]
    assert sum(blocks[:count]) <= 256 < sum(blocks[: count + 1])


def test_every_cycle_serves_the_same_requests(subject):
    jobs = yardstick(subject)
    assert jobs == yardstick(subject)
    assert {tuple(job.prompt[: FEW.shared]) for job in jobs} == {tuple(jobs[0].prompt[: FEW.shared])}
    assert len({tuple(job.prompt) for job in jobs}) == FEW.requests


def test_the_definition_of_attention_is_what_the_backend_computes(subject):
    measured = benchmark_cycle6.benchmark_flash_attention(subject, repeats=1)
    (difference,) = [one["value"] for one in measured["figures"] if one["name"].startswith("largest difference")]
    assert difference < 1e-5
    assert measured["expectations"][0]["met"] is None
    assert "flash-attn runs on NVIDIA GPUs" in measured["expectations"][0]["seen"]


def test_where_flash_attn_serves_it_is_held_against_sdpa(subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", flash_stand_in.module())
    monkeypatch.setitem(choice.BACKENDS, "flash", flash_stand_in.AnywhereFlash)
    for name, value in {
        "memory_allocated": 1,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 3_000_001,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    measured = benchmark_cycle6.benchmark_flash_attention(subject, repeats=2)
    assert [case["name"] for case in measured["cases"]] == ["long prompts, sdpa", "long prompts, flash"]
    memory = {one["name"]: one["value"] for one in measured["figures"] if one["unit"] == "MB"}
    assert memory == {f"{name}: most GPU memory beside weights and KV": 3.0 for name in ("sdpa", "flash")}
    assert measured["expectations"][0]["met"] in (True, False, None)
    assert measured["what"] == "Attention by flash" and "before" in measured


def test_perplexity_is_that_of_transformers(subject):
    token_ids = torch.randint(512, (50,), generator=torch.Generator().manual_seed(0))
    with subject.engine(yardstick(subject)) as llm:
        found = benchmark_cycle7.perplexity(llm.runner.model, token_ids)
    loss = subject.transformers_model()(token_ids[None], labels=token_ids[None]).loss
    assert found == pytest.approx(loss.exp().item(), rel=1e-5)


def test_a_script_writes_the_json_of_its_cycle(folder, subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", FEW)
    options = ["--model", str(folder), "--repeats", "1", "--out", str(tmp_path), "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/benchmark_cycle3.py", *options])
    assert command_line.main(benchmark_cycle3.benchmark_memory_utilization) == 0
    path = tmp_path / "cpu" / "cycle3-tiny.json"
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0] == f"benchmark_cycle3: tiny on CPU, {torch.get_num_threads()} threads" and lines[-1] == str(path)
    assert [line.split("  ")[1] for line in lines if "speed-up" in line] == ["their speed-up over the cycle before"]
    assert "turn 1 of 1: the requests that every cycle serves" in said.err
    measured = json.loads(path.read_text())
    assert measured["commit"] == "abc"
    assert measured["command"] == f"python benchmarks/benchmark_cycle3.py --device cpu --model {folder} --repeats 1"


def test_results_go_to_a_scratch_folder_unless_told_otherwise(folder, subject, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "cpu", FEW)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmark_cycle4.py", "--model", str(folder), "--repeats", "1"])
    assert command_line.main(benchmark_cycle4.benchmark_throughput) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.is_file() and path.is_relative_to(tmp_path) and path.name == "cycle4-tiny.json"


def test_ways_take_turns_and_each_is_gone_once_before_on_cuda(monkeypatch):
    gone = []
    ways = {name: lambda name=name: gone.append(name) for name in "ab"}
    taken = timing.in_turns(ways, 2, "cpu")
    assert gone == ["a", "b"] * 2 and {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gone.clear()
    taken = timing.in_turns(ways, 2, "cuda")
    assert gone == ["a", "b"] * 3 and len(taken["a"]) == 2


def test_neighbours_are_compared_turn_by_turn():
    before, after = {"repeats_s": [2.0, 9.0, 4.0]}, {"repeats_s": [1.0, 3.0, 1.0]}
    found = quantities.speed_up("gain", before, after)
    assert found == {"name": "gain", "value": 3.0, "unit": "x", "least": 2.0, "most": 4.0}
    assert [cycle_results.reaches(found, limit) for limit in (2.0, 3.0, 4.1)] == [True, None, False]
    slow, fast = found | {"least": 1.0, "most": 1.5}, found | {"least": 2.5, "most": 4.5}
    larger = benchmark_cycle2.is_larger
    assert [larger(slow, found), larger(fast, slow), larger(found, fast)] == [True, False, None]


@pytest.mark.parametrize(
    ("least", "value", "most", "unit", "text"),
    [
        (2.0, 3.0, 4.0, "x", "3.00x (2.00 to 4.00x)"),
        (0.5, 0.6, 0.7, "x", "0.6x (0.5 to 0.7x)"),
        (0.9, 1.3, 1.4, "x", "within the spread (0.9 to 1.40x)"),
        (-2.0, 3.0, 4.0, "%", "within the spread (-2.00 to 4.00%)"),
        (-3.0, -2.0, -1.0, "%", "-2.00% (-3.00 to -1.00%)"),
        (3.0, 3.0, 3.0, "x", "3.00x"),
    ],
)
def test_no_comparison_is_told_that_lies_within_its_spread(least, value, most, unit, text):
    shown = {"name": "", "value": value, "unit": unit, "least": least, "most": most}
    assert quantities.quantity(shown) == text


def test_a_model_that_is_not_there_is_one_line_and_status_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmarks/benchmark_cycle3.py", "--model", "no-such-model"])
    assert command_line.main(benchmark_cycle3.benchmark_memory_utilization) == 2
    assert capsys.readouterr().err.startswith("benchmark_cycle3.py: model is 'no-such-model'")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no CUDA device"):
            Subject.of(str(tmp_path), device="cuda")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [("smollm2-135m", "auto")]),
        (["--load-format", "dummy"], [("smollm2-135m-shape", "dummy")]),
        (["--load-format", "dummy", "--shape", "qwen3-0.6b"], [("qwen3-0.6b", "dummy")]),
        (["--model", "a", "--shape", "b", "--shape", "c"], [("a", "auto"), ("b", "dummy"), ("c", "dummy")]),
    ],
)
def test_the_command_line_names_the_models(options, expected):
    assert command_line.subjects(command_line.parser("").parse_args(options)) == expected


def test_one_benchmark_that_fails_or_hangs_takes_none_with_it(monkeypatch, capsys, tmp_path):
    started = []

    def stand_in(command, *, timeout, check):
        started.append(Path(command[1]).name)
        assert timeout == 7.0 and str(tmp_path) in command
        if len(started) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 3 if len(started) == 2 else 0)

    monkeypatch.setattr(run_all.subprocess, "run", stand_in)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--cycles", "2,4,7", "--limit", "7", "--out", str(tmp_path)])
    assert run_all.main() == 1
    assert started == ["benchmark_cycle2.py", "benchmark_cycle4.py", "benchmark_cycle7.py"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[1] for line in lines] == [
        "smollm2-135m: stopped at the limit of 7 s",
        "smollm2-135m: failed with exit status 3",
        "smollm2-135m: done",
    ]


def test_all_benchmarks_write_into_one_scratch_folder_unless_told_otherwise(monkeypatch, capsys, tmp_path):
    folders = []

    def stand_in(command, *, timeout, check):
        folders.append(command[command.index("--out") + 1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run_all.subprocess, "run", stand_in)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--device", "cuda", "--shape", "llama-3-8b"])
    assert run_all.main() == 0
    assert len(folders) == 7 and len(set(folders)) == 1 and Path(folders[0]).parent == tmp_path
    assert capsys.readouterr().out == f"results: {folders[0]}\n"


@pytest.mark.parametrize("text", ["", "0", "8", "1,x"])
def test_cycles_that_are_none_are_refused(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--cycles", text])
    with pytest.raises(SystemExit):
        run_all.main()
    assert "expected numbers from 1 to 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("card", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Some Card", "some-card"),
    ],
)
def test_a_card_has_a_folder(card, short, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    assert device_folder("cuda") == short


# --- copies of twinserve in turns, and another simulator ---


def test_a_checkout_is_measured_by_its_own_script_and_a_wheel_by_this_one(tmp_path):
    script = ROOT / "benchmarks" / "simulator.py"
    wheel = copies.Copy("wheel", tmp_path)
    assert wheel.command(script) == [sys.executable, str(script)]
    own = tmp_path / "benchmarks" / "simulator.py"
    own.parent.mkdir()
    own.write_text("")
    assert wheel.command(script) == [sys.executable, str(own)]
    assert wheel.environment()["PYTHONPATH"] == str(tmp_path)


def test_the_imported_copy_says_what_its_policies_are():
    assert (copies.imported().folder / "twinserve" / "__init__.py").samefile(twinserve.__file__)
    assert copies.imported().name == copies.policies() == ("compiled" if IS_COMPILED else "interpreted")


@pytest.mark.parametrize("text", ["twinserve", "=.", "before=no-such-folder"])
def test_a_copy_that_is_none_is_refused(text, capsys):
    parser = argparse.ArgumentParser()
    copies.add_other(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--other", text])
    assert f"{text!r}, expected NAME=FOLDER" in capsys.readouterr().err


def test_two_copies_of_one_name_are_refused(capsys):
    parser = argparse.ArgumentParser()
    copies.add_other(parser)
    others = parser.parse_args(["--other", f"{copies.policies()}={ROOT}"]).other
    with pytest.raises(SystemExit):
        copies.with_imported(others, parser)
    assert f"--other: {copies.policies()}, {copies.policies()}, expected each name once" in capsys.readouterr().err


def test_turns_give_the_median_of_every_number():
    found = [{"step_us": {"16": {"1": value}}, "slow_model_step_us": {"256": None}} for value in (3.0, 9.0, 1.0)]
    assert copies.medians(found) == {"step_us": {"16": {"1": 3.0}}, "slow_model_step_us": {"256": None}}


def test_runs_are_taken_in_turns_and_their_medians_told():
    begun = []

    def runner(name: str, seconds: list[float]) -> simulator.Measured:
        def run(point: str, num_requests: int) -> dict:
            begun.append(name + point)
            return timed(steps=num_requests, loop_s=seconds.pop())

        return run

    runners = {"x": runner("x", [1.0, 5.0, 2.0]), "y": runner("y", [4.0, 4.0, 8.0])}
    found = simulator.measure(runners, ["a"], 7, repeats=3)
    assert begun == ["xa", "ya"] * 3
    assert found == {"x": {"a": timed(7, loop_s=2.0)}, "y": {"a": timed(7, loop_s=4.0)}}


STAND_IN = """
from types import SimpleNamespace
def run_trace_replay(path, **options):
    lines = open(path).readlines()
    assert options["extra_engine_args"] == {"engine": {"block_size": 64}}, options
    assert (options["num_workers"], options["router_mode"], options["trace_block_size"]) == (8, "round_robin", 512)
    return SimpleNamespace(summary=dict(num_requests=len(lines), completed_requests=len(lines), wall_time_ms=1500.0))
"""


def test_the_other_simulator_is_told_the_trace_and_the_settings(monkeypatch, tmp_path):
    (tmp_path / "dynamo").mkdir()
    (tmp_path / "dynamo" / "replay.py").write_text(STAND_IN)
    (tmp_path / "ai_dynamo-9.8.dist-info").mkdir()
    (tmp_path / "ai_dynamo-9.8.dist-info" / "METADATA").write_text("Name: ai-dynamo\nVersion: 9.8\n")
    (tmp_path / "b.jsonl").write_text("{}\n{}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    traces = {"b": (tmp_path / "b.jsonl", {"block_size": 64})}
    run = simulator.run_peer(Path(sys.executable), traces, "b", 2)
    assert (run["requests"], run["version"], run["loop_s"]) == (2, "9.8", 1.5)
    assert run["cpu_s"] > 0 and run["peak_rss_mb"] > 1


def test_requests_are_equal_whose_first_and_last_tokens_come_at_the_same_instants():
    ours = [
        {"arrival": 5.0 * n, "first": 5.0 * n + 30, "last": 5.0 * n + 90, "tokens": 5, "cached": n} for n in range(4)
    ]
    late = [row | {"first": row["first"] + (row["arrival"] == 10)} for row in reversed(ours)]
    found = anchors.compared(ours, late)
    assert (found["equal"], found["cached_tokens"]) == (3, [6, 6])
    assert found["metrics"]["TTFT"]["mean"] == [30, 30.25] and found["metrics"]["TPOT"]["mean"] == [15, 14.9375]
    assert found["metrics"]["E2E"]["p99"] == [90, 90]
    step = anchors.StepFeatures(0, 3, 10, 2, 0, 0, 1)
    assert anchors.Fixed().step_cost(step) == (0, (anchors.PREFILL_MS + anchors.DECODE_MS) * 10**6)
    assert anchors.Fixed().step_cost(step._replace(prompt_tokens=0)) == (0, anchors.DECODE_MS * 10**6)


def test_the_other_simulator_gets_the_same_requests_and_no_shared_prefixes(public_traces, tmp_path):
    written = simulator.write_peer_traces(public_traces, tmp_path)
    lines = [json.loads(line) for line in written["a"][0].read_text().splitlines()]
    ours = list(simulator.azure_requests(simulator.azure_lengths(public_traces), 10_000))
    told = [(line["input_length"], line["output_length"], round(line["timestamp"] * 1e6)) for line in lines]
    assert told == [(request.prompt_tokens, request.max_tokens, request.arrival_ns) for request in ours]
    hashes = [hash_id for line in lines for hash_id in line["hash_ids"]]
    assert len(hashes) == len(set(hashes)) == sum(-(-line["input_length"] // 512) for line in lines)
    assert len(written["b"][0].read_text().splitlines()) == 12_031
    assert written["a"][1]["num_gpu_blocks"] == 28_252 and written["b"][1]["num_gpu_blocks"] == 8192


# --- rendering ---


def measured(cycle: int, seconds: float, *, device: str = "cpu", **fields) -> dict:
    """A result as a benchmark writes it."""
    return {
        "cycle": cycle,
        "what": f"No. {cycle}",
        "device": device,
        "model": "m",
        "weights": "as published",
        "dtype": "float32",
        "machine": "CPU, 2 threads",
        "versions": {"torch": "9"},
        "commit": "abc",
        "yardstick": "8 requests",
        "timing": "everything",
        "repeats_s": [seconds, seconds * 1.25],
        "median_s": seconds,
        "mean_s": seconds * 1.1,
        "tokens_per_s": 128 / seconds,
        "memory_mb": 538.2,
        "memory_is": "counted",
        "cases": [{"name": "50 new tokens", "repeats_s": [0.25], "median_s": 0.25, "tokens_per_s": 200.0}],
        "figures": [{"name": "speed-up | all", "value": 2.5, "unit": "x"}],
        "expectations": [{"text": "faster", "seen": "2.5x", "met": True}, {"text": "none", "seen": "", "met": None}],
    } | fields


NEIGHBOUR = {
    "repeats_s": [8.0],
    "median_s": 8.0,
    "speed_up": {"name": "", "value": 2.0, "unit": "x", "least": 1.5, "most": 3.0},
}


def written(folder: Path, *results: dict) -> Path:
    """A folder of results."""
    for result in results:
        path = folder / result["device"] / f"cycle{result['cycle']}-{result['model']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return folder


def rendered(monkeypatch, results: Path, folder: Path, *options: str) -> int:
    """Exit status of render.py on `results`, writing below `folder`."""
    arguments = ["--results", str(results), "--out", str(folder / "results.md"), "--pages", str(folder)]
    arguments += ["--vllm-page", str(folder / "vllm.md"), "--serving-page", str(folder / "serving.md")]
    arguments += ["--readme", str(folder / "README.md")]
    monkeypatch.setattr(sys, "argv", ["render.py", *arguments, *options])
    return render.main()


def test_the_table_follows_from_the_json_alone(monkeypatch, tmp_path):
    results = written(tmp_path / "results", measured(2, 4.0, before=NEIGHBOUR), measured(1, 10.0), measured(4, 0.5))
    assert rendered(monkeypatch, results, tmp_path) == 0
    text = (tmp_path / "results.md").read_text()
    lines = text.splitlines()
    assert lines[lines.index("## m on CPU, 2 threads") + 6 : lines.index("Memory: counted.") - 1] == [
        "| 1 | No. 1 | 10.0 s (10.0 to 12.5 s) | 12.8 tok/s | 538 MB | – | – | faster<br>none | 2.5x<br>– | yes<br>– |",
        "| 2 | No. 2 | 4.00 s (4.00 to 5.00 s) | 32.0 tok/s | 538 MB | 2.00x (1.50 to 3.00x) | 2.50x (2.00 to 3.12x) | "
        "faster<br>none | 2.5x<br>– | yes<br>– |",
        "| 4 | No. 4 | 500 ms (500 to 625 ms) | 256 tok/s | 538 MB | – | 20.0x (16.0 to 25.0x) | faster<br>none | "
        "2.5x<br>– | yes<br>– |",
    ]
    assert "| 2 | 50 new tokens | 250 ms, 200 tok/s |" in lines
    assert "| 2 | speed-up \\| all | 2.50x |" in lines
    assert "- Cycle 4: everything." in lines
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0, "the same JSON gives the same bytes"
    (tmp_path / "results.md").write_text(text + "x")
    assert rendered(monkeypatch, results, tmp_path, "--check") == 1
    assert (tmp_path / "results.md").read_text() == text + "x", "--check writes nothing"


def test_what_drafts_buy_is_shown_beside_the_cycles(monkeypatch, tmp_path):
    page = tmp_path / "speculation.md"
    page.write_text("a\n<!-- figures of speculation -->\nold\n<!-- end of figures of speculation -->\nb\n")
    results = tmp_path / "results"
    rendered(monkeypatch, results, tmp_path)
    assert "Not measured yet." in page.read_text() and "old" not in page.read_text()
    drafts = {"acceptance_rate": 0.75, "tokens_per_step": 4.0}
    before, after = timing.spread([3.0, 3.0]), timing.spread([1.5, 1.0])
    times = {"tokens": 64, "without": before, "with": after, "speed_up": quantities.speed_up("", before, after)}
    found = {
        "model": "m",
        "machine": "CPU, 2 threads",
        "repeats": 3,
        "commit": "abc",
        "load_before": 0.5,
        "lookup_ns": [50_000.0, 120.0],
        "speculative_config": {"num_speculative_tokens": 4},
        "cases": [
            times | {"text": "with repeats", "speculation": drafts},
            times | {"text": "none", "speculation": None},
        ],
    }
    (results / "cpu").mkdir(parents=True)
    (results / "cpu" / "speculation-m.json").write_text(json.dumps(found))
    rendered(monkeypatch, results, tmp_path)
    text = page.read_text()
    assert (
        "| with repeats | 64 | 3.00 s (3.00 to 3.00 s) | 1.25 s (1.00 to 1.50 s) | 2.50x (2.00 to 3.00x) | 75% | 4.00 |"
        in text
    )
    assert "x) | – | – |" in text
    assert "takes 50.0 us and 120 ns a token of the text" in text and text.startswith("a\n") and text.endswith("b\n")
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0


def test_what_a_model_that_drafts_buys_one_request_is_of_the_study(monkeypatch, tmp_path):
    page, marks = tmp_path / "speculation.md", "figures of one request with drafts -->"
    page.write_text(f"a\n<!-- {marks}\nold\n<!-- end of {marks}\nb\n")
    results = tmp_path / "results"
    rendered(monkeypatch, results, tmp_path)
    assert "Not measured on a GPU yet." in page.read_text() and "old" not in page.read_text()
    rates = {(0, 0.0, 1): 200.0, (2, 0.5, 1): 250.0, (2, 0.9, 1): 401.0, (0, 0.0, 4): 700.0, (2, 0.5, 4): 710.0}
    found = {
        "about": {"device": "h9", "commit": "abc", "options": {"model": "m", "drafts": [2], "acceptance": [0.5, 0.9]}},
        "runs": [
            {"drafts": drafts, "acceptance": right, "requests": requests, "output_tok_s": rate}
            for (drafts, right, requests), rate in rates.items()
        ],
    }
    (results / "h9").mkdir(parents=True)
    (results / "h9" / "draft-study.json").write_text(json.dumps(found))
    rendered(monkeypatch, results, tmp_path)
    text = page.read_text()
    assert "m with random weights on one H9, one request" in text and "200 tokens a second without drafts" in text
    assert "| 50% | 1.25x |" in text and "| 90% | 2.00x |" in text and text.endswith("b\n")
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0


def ranks_case(ranks: int, machine: str, rates: list[float], ms: list[float]) -> dict:
    """A number of ranks as benchmark_tensor_parallel.py has it."""
    many = [{"output_tok_s": rate} for rate in rates]
    alone = [{"output_tokens": 1000, "seconds": each} for each in ms]
    medians = {"output_tok_s": statistics.median(rates), "ms_a_token": statistics.median(ms)}
    return {"ranks": ranks, "machine": machine, "repeats": {"many": many, "alone": alone}} | medians


def test_what_ranks_buy_is_shown_beside_the_cycles(monkeypatch, tmp_path):
    page = tmp_path / "tensor-parallel.md"
    page.write_text(
        "a\n<!-- figures of tensor parallelism -->\nold\n<!-- end of figures of tensor parallelism -->\nb\n"
    )
    results = tmp_path / "results"
    rendered(monkeypatch, results, tmp_path)
    assert "Not measured yet." in page.read_text() and "old" not in page.read_text()
    found = {
        "model": "m",
        "workload": "W256",
        "repeats": 3,
        "commit": "abc",
        "load_before": 0.5,
        "cases": [
            ranks_case(1, "H", [1000.0, 1000.0], [4.0, 4.0]),
            ranks_case(2, "2 x H", [1750.0, 2000.0], [2.5, 5.0]),
        ],
        "cases_by_nccl": [ranks_case(2, "2 x H", [1500.0, 1500.0], [4.0, 4.0])],
        "sums": {
            "2": {
                "nccl": [{"bytes": 1024, "us": 12.5}, {"bytes": 1048576, "us": 20.0}],
                "peers": [{"bytes": 8192, "us": 4.5}, {"bytes": 1048576, "us": 9.0}],
            }
        },
        "collectives": {"2": {"ranks": 2, "all_reduce_ns": 9500.0, "link": 250e9}},
    }
    (results / "h").mkdir(parents=True)
    (results / "h" / "tensor-parallel-m.json").write_text(json.dumps(found))
    rendered(monkeypatch, results, tmp_path)
    text = page.read_text()
    assert (
        "m with random weights, W256, 2 x H, medians of 3, one number of ranks after the other, load before 0.5" in text
    )
    assert "| 2 | 1,875 | 1.88x (1.75 to 2.00x) | 3.75 | within the spread (0.8 to 1.60x) |" in text
    assert "| 1 | 1,000 |  | 4.00 |  |" in text
    assert "| 2, sums by NCCL | 1,500 | 1.50x" in text
    assert "those by the ranks' memory is 9.5 us and what goes over the link at 250.00 GB/s" in text
    assert "| bytes | by the ranks' memory | by NCCL |" in text and "| 1,024 | – | 12.5 |" in text
    assert "| 1,048,576 | 9.00 | 20.0 |" in text and text.startswith("a\n") and text.endswith("b\n")
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0


def test_a_window_that_ranks_served_is_shown_beside_its_twins(monkeypatch, tmp_path):
    page = tmp_path / "tensor-parallel.md"
    page.write_text("a\n<!-- a window over ranks -->\nold\n<!-- end of a window over ranks -->\nb\n")
    results = tmp_path / "results"
    rendered(monkeypatch, results, tmp_path)
    assert "old" not in page.read_text()
    found = {
        "device": "2 x H",
        "model": "m",
        "requests": 670,
        "duration_s": 41.4,
        "decisions": {"recorded": 6000, "equal": 6000},
        "served": {"tpot_s.mean": 0.0062, "output_tok_s": 4334.1},
        "errors": {"profile": {"tpot_s.mean": -0.004, "output_tok_s": 0.0}, "roofline": {"tpot_s.mean": -0.08}},
    }
    found["errors"]["roofline"]["output_tok_s"] = 0.002
    (results / "h").mkdir(parents=True)
    (results / "h" / "tensor-parallel-window.json").write_text(json.dumps(found))
    rendered(monkeypatch, results, tmp_path)
    text = page.read_text()
    assert "670 requests of the Azure conversation trace in 41 s" in text and "m on 2 x H: 6,000 of 6,000" in text
    assert "| tpot_s.mean | 6.2 ms | -0.4% | -8.0% |" in text and "| output_tok_s | 4,334 | +0.0% | +0.2% |" in text
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0


def test_a_line_is_fitted_to_all_reduces_and_makes_a_device(tmp_path):
    from twinserve.sim.roofline import RooflineLatency

    measured = [{"bytes": count, "us": 12.0 + 1.5 * count / 1e9 * 1e6} for count in (1024, 65_536, 4_194_304)]
    line = benchmark_tensor_parallel.fitted_line(4, measured)
    assert line["ranks"] == 4 and line["all_reduce_ns"] == pytest.approx(12_000, rel=1e-3)
    assert line["link"] == pytest.approx(1e9, rel=1e-3), "1.5 of a byte's size goes over it"
    found = {
        "commit": "abc",
        "load_before": 0.5,
        "host_ns": 300_000,
        "products": {"bandwidth": 8e9, "flops": 5e10},
        "collectives": {"2": line | {"ranks": 2}, "4": line},
    }
    path = tmp_path / "cpu.toml"
    path.write_text(benchmark_tensor_parallel.device_file(found))
    latency = RooflineLatency.parse(f"smollm2-135m@{path}:tp=3")
    assert latency.device.collectives.ranks == 4 and latency.device.bandwidth == 4e9
    assert latency.name == "roofline of smollm2-135m on 3 x CPU thread, shares measured"


def test_other_requests_are_not_compared(monkeypatch, tmp_path):
    results = written(tmp_path / "results", measured(1, 10.0), measured(2, 4.0, yardstick="9 requests"))
    rendered(monkeypatch, results, tmp_path)
    assert "| 32.0 tok/s | 538 MB | – | – |" in (tmp_path / "results.md").read_text()


def test_devices_and_models_are_apart_and_in_a_fixed_order(monkeypatch, tmp_path):
    other = measured(1, 1.0, device="a100", machine="A100")
    h100 = [measured(1, 1.0, device="h100", machine="H100", model=name) for name in ("z", "b")]
    h100.append(measured(1, 1.0, device="h100", machine="H100", model="a", weights="random"))
    rendered(monkeypatch, written(tmp_path / "results", other, *h100, measured(1, 2.0)), tmp_path)
    titles = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("## ")]
    assert titles == ["## m on CPU, 2 threads", "## b on H100", "## z on H100", "## a on H100", "## m on A100"]


def test_a_page_gets_its_figures_between_its_marks(monkeypatch, tmp_path):
    page = tmp_path / "cycle2.md"
    page.write_text("before\n<!-- figures of cycle 2 -->\nold\n<!-- end of figures -->\nafter\n")
    other = measured(2, 1.0, device="a100", machine="A100", figures=[{"name": "bytes", "value": 7, "unit": ""}])
    results = written(tmp_path / "results", measured(1, 10.0), measured(2, 4.0, before=NEIGHBOUR), other)
    rendered(monkeypatch, results, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n<!-- figures of cycle 2 -->\n\n| Measured | m on CPU, 2 threads | m on A100 |\n")
    assert text.endswith("- an H100: not measured yet\n\n<!-- end of figures -->\nafter\n")
    lines = text.splitlines()
    begun = lines.index("| Measured | m on CPU, 2 threads | m on A100 |")
    assert lines[begun + 2 : begun + 9] == [
        "| the requests that every cycle serves | 4.00 s (4.00 to 5.00 s), 32.0 tok/s | "
        "1.00 s (1.00 to 1.25 s), 128 tok/s |",
        "| as the cycle before serves them | 8.00 s | – |",
        "| their speed-up over the cycle before | 2.00x (1.50 to 3.00x) | – |",
        "| their speed-up over cycle 1, another process | 2.50x (2.00 to 3.12x) | – |",
        "| 50 new tokens | 250 ms, 200 tok/s | 250 ms, 200 tok/s |",
        "| bytes | – | 7 |",
        "| speed-up \\| all | 2.50x | – |",
    ]
    assert "| the guide: faster | 2.5x (yes) | 2.5x (yes) |" in text and "old" not in text
    assert "- m on A100: float32, weights as published, 8 requests; commit abc" in lines
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0


# --- pages in another language ---


def test_a_translated_page_gets_code_and_figures_of_the_page_that_it_translates(monkeypatch, tmp_path):
    english = (
        "one\n\n    a\n    b\n\ntwo\n\n```python\nx = 1\n```\n\n<!-- figures of cycle 2 -->\n<!-- end of figures -->\n"
    )
    korean = "하나\n\n    ...\n\n둘\n\n```\n```\n\n<!-- figures of cycle 2 -->\n<!-- end of figures -->\n끝\n"
    (tmp_path / "ko").mkdir()
    (tmp_path / "cycle2.md").write_text(english)
    page = tmp_path / "ko" / "cycle2.md"
    page.write_text(korean)
    rendered(monkeypatch, written(tmp_path / "results", measured(2, 4.0)), tmp_path)
    text = page.read_text()
    assert text.startswith(
        "하나\n\n    a\n    b\n\n둘\n\n```python\nx = 1\n```\n\n<!-- figures of cycle 2 -->\n\n| Measured | m"
    )
    assert text.endswith("<!-- end of figures -->\n끝\n")
    assert rendered(monkeypatch, tmp_path / "results", tmp_path, "--check") == 0
    page.write_text(text.replace("x = 1", "x = 2"))
    assert rendered(monkeypatch, tmp_path / "results", tmp_path, "--check") == 1
    page.write_text("하나\n\n    ...\n")
    assert rendered(monkeypatch, tmp_path / "results", tmp_path) == 2, "blocks that are missing are said, not guessed"


def timed(steps: int | None = None, **fields) -> dict:
    """A run as benchmarks/simulator.py writes it; with steps if it counts them."""
    run = {"loop_s": 0.5, "wall_s": 1.25, "cpu_s": 0.75, "peak_rss_mb": 160.0, "requests": 1000, "record_mb": 2.0}
    return run | ({} if steps is None else {"steps": steps}) | fields


def test_the_page_of_tuning_says_flags_gain_and_interval_or_that_none_helps():
    better = Tuning({"max_num_batched_tokens": 512}, 1.25, 0.5, 0.6, (0.5, 0.7), 60)
    unsure, same = replace(better, interval=(-0.1, 0.7)), replace(better, changed={}, after=1.25, gain=0.0)
    assert tune.cells("t", 15.0, "o", better)[3:] == [
        "`--max-num-batched-tokens 512`", "125.0%", "50.0%", "60.0%", "50.0% to 70.0%", "60"
    ]  # fmt: skip
    assert tune.cells("t", 15.0, "o", unsure)[3] == "none helps; best `--max-num-batched-tokens 512`"
    assert tune.cells("t", 15.0, "o", same)[3:] == ["none helps", "125.0%", "125.0%", "0.0%", "-", "60"]


CIRCUMSTANCES = {
    "policies": "compiled",
    "command": "python x.py",
    "date": "2026-01-02",
    "machine": {"python": "3.11", "cpu": "CPU", "cores": 2},
    "load_before": 1.5,
    "repeats": 3,
    "turns": 5,
}


def rows_below(heading: str, page: Path) -> list[str]:
    """The rows of the first tables below a heading, without their heads."""
    lines = page.read_text().splitlines()
    return [line for line in lines[lines.index(heading) :] if line.startswith("| ") and "---" not in line][1:]


def test_what_the_simulator_takes_stands_beside_other_copies_and_its_limits(monkeypatch, tmp_path):
    simulator = CIRCUMSTANCES | {
        "a": timed(5433),
        "b": timed(9),
        "others": {"interpreted": {"a": timed(5433, loop_s=2.0)}, "peer": {"a": timed(version="1.6"), "b": timed()}},
        "elsewhere_s": {"another": {"a": 34.0}, "a third 1.2": {"a": 6.8, "b": 14.2}},
        "growth": {"1000": timed(5433)},
    }
    results = written(tmp_path / "results", measured(1, 10.0))
    (results / "simulator.json").write_text(json.dumps(simulator))
    rendered(monkeypatch, results, tmp_path)
    cells = [row.strip("| ").split(" | ") for row in rows_below("## The simulator", tmp_path / "results.md")]
    assert [row[0][:3] for row in cells[:5]] == ["(a)", "(a)", "(a)", "(b)", "(b)"]
    assert [row[1:] for row in cells[:3]] == [
        ["interpreted", "5,433", "2.00 s", "1.25 s", "750 ms", "160 MB"],
        ["peer 1.6", "–", "500 ms", "1.25 s", "750 ms", "160 MB"],
        ["compiled", "5,433", "500 ms (500 ms: kept)", "1.25 s (900 ms: missed)", "750 ms", "160 MB (150 MB: missed)"],
    ]
    assert cells[4][3:5] == ["500 ms (3.00 s: kept)", "1.25 s (3.60 s: kept)"]
    assert cells[-1] == ["1,000", "5,433", "500 ms", "500 us", "160 MB", "2.00 MB"]
    text = (tmp_path / "results.md").read_text()
    assert "another 34.0 s for (a); a third 1.2 6.80 s for (a) and 14.2 s for (b)." in text
    assert (
        "On one of 2 cores (CPU), Python 3.11, 2026-01-02, by `python x.py`; the load average before was 1.50." in text
    )


def test_what_http_costs_stands_beside_its_twin(monkeypatch, tmp_path):
    page, results = tmp_path / "serving.md", written(tmp_path / "results", measured(1, 10.0))
    page.write_text("before\n<!-- what HTTP costs -->\nold\n<!-- end of what HTTP costs -->\nafter\n")
    rendered(monkeypatch, results, tmp_path)
    assert "\nNot measured on a GPU yet.\n" in page.read_text() and "old" not in page.read_text()

    def turn(http: float) -> dict:
        twin = {metric: {"sim": 1.1 * http, "real": http} for metric in render.TWIN}
        worlds = {"run": {"full_tok_s": 1000.0}, "http": {"full_tok_s": http}, "seen_tok_s": 900.0}
        return worlds | {"overhead": 1 - http / 1000, "replay": {"exact": True}, "twin": twin}

    options = {"model": "m", "device": "cuda", "streams": 256, "max_num_seqs": 128}
    options |= {"prompt_tokens": 64, "output_tokens": 32}
    result = {"options": options, "command": "x", "commit": "c", "repeats": [turn(980.0), turn(990.0), turn(970.0)]}
    (results / "h200").mkdir()
    (results / "h200" / "http-overhead.json").write_text(json.dumps(result))
    rendered(monkeypatch, results, tmp_path)
    lines = page.read_text().splitlines()
    assert "| 2 | 1,000 | 990 | 1.0% | 900 |" in lines and "Every served record" in page.read_text()
    assert "| ttft_s.mean | 980 | 1,078 | +10.0% |" in lines
    assert rendered(monkeypatch, results, tmp_path, "--check") == 0
    result["repeats"] = [turn(980.0) | {"twin": {}, "no_twin": "too few shapes"}]
    (results / "h200" / "http-overhead.json").write_text(json.dumps(result))
    rendered(monkeypatch, results, tmp_path)
    assert "\nNo twin: too few shapes.\n" in page.read_text() and "its twin" not in page.read_text()


def test_the_top_of_readme_has_the_figures_of_the_files(monkeypatch, tmp_path):
    page, results = tmp_path / "README.md", written(tmp_path / "results", measured(1, 10.0))
    page.write_text("before\n<!-- measured -->\nold\n<!-- end of measured -->\nafter\n")
    rendered(monkeypatch, results, tmp_path)
    assert page.read_text() == "before\n<!-- measured -->\n<!-- end of measured -->\nafter\n", "nothing is measured"

    def window(sim: float) -> dict:
        return {"sim": {"tpot_s.mean": sim}, "real": {"tpot_s.mean": 2.0}}

    (results / "h200").mkdir()
    windows = {"a": window(2.02), "b": window(1.9), "c": window(2.04)}
    fidelity = {"decisions": [1999, 2000], "device": "card", "windows": windows}
    (results / "h200" / "fidelity.json").write_text(json.dumps(fidelity))
    run = {"loop_s": 1.0, "wall_s": 4.5, "cpu_s": 1.0, "peak_rss_mb": 64.0, "requests": 10_000, "steps": 30_000}
    simulator = {"a": run, "policies": "interpreted", "others": {"compiled": {"a": run | {"wall_s": 2.1}}, "other": {}}}
    assert headline.headline(results).count("\n") == 4
    (results / "h200.json").write_text(json.dumps({"card": "card", "w256_output_tok_s": 26508.5}))
    (results / "fidelity-vllm.json").write_text(
        json.dumps({"runs": {name: {"replay": {"equal": 4, "recorded": 5}} for name in "ab"}})
    )
    (results / "simulator.json").write_text(json.dumps(simulator))
    cells = [line.split(" | ")[1] for line in headline.headline(results).splitlines()[2:] if line]
    assert cells == [
        "1,999 of 2,000 of the engine's, 8 of 10 of a real vLLM's",
        "2.0% off in the median, 5.0% at worst",
        "2.10 s compiled or 4.50 s interpreted, 64.0 MB",
        "26,508 output tokens/s",
    ]


def test_what_a_step_costs_stands_beside_vllms(monkeypatch, tmp_path):
    """As it was measured in turns with them; else as it was measured elsewhere."""

    def costs(cost: float) -> dict:
        return {"step_us": {"16": {"256": cost}}, "mixed_step_us": {"16": {"256": cost}}}

    page, results = tmp_path / "vllm.md", written(tmp_path / "results", measured(1, 10.0))
    page.write_text("before\n<!-- what a step costs -->\nold\n<!-- end of what a step costs -->\nafter\n")
    policies = CIRCUMSTANCES | costs(32.0) | {"others": {"interpreted": costs(90.0), "before": costs(1.0)}}
    policies["elsewhere"] = {"vLLM 1": {"step_us": {"16": {"256": 2000}}}, "other": {"step_us": {}}}
    for turns, expected in (
        ({}, ["| vLLM 1, on a like machine | 2,000 |"]),
        (
            {"2": {"synchronous": {"min": 10.0}, "asynchronous": {"min": 20.0}}},
            ["| vLLM 2, synchronous | 10.0 |", "| vLLM 2, asynchronous | 20.0 |"],
        ),
    ):
        (results / "policies.json").write_text(json.dumps(policies | {"vllm_step_us": turns}))
        rendered(monkeypatch, results, tmp_path)
        lines = page.read_text().splitlines()
        assert [line for line in lines if line.startswith("| ") and "---" not in line][1:] == [
            *expected,
            "| here, interpreted | 90.0 |",
            "| here, compiled | 32.0 |",
        ]
        assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
        assert rendered(monkeypatch, results, tmp_path, "--check") == 0


def test_what_a_step_costs_stands_beside_other_copies_and_others(monkeypatch, tmp_path):
    def costs(alone: float, beside: float) -> dict:
        return {"step_us": {"16": {"1": alone, "1024": alone}}, "mixed_step_us": {"16": {"1": beside}}}

    policies = CIRCUMSTANCES | costs(1.0, 2.0) | {"others": {"before": costs(3.0, 4.0)}}
    policies["elsewhere"] = {"an engine": {"step_us": {"16": {"1": 18}}}}
    results = written(tmp_path / "results", measured(1, 10.0))
    (results / "policies.json").write_text(json.dumps(policies))
    rendered(monkeypatch, results, tmp_path)
    assert rows_below("## A step of the policies", tmp_path / "results.md") == [
        "| decodes alone | 16 | 1 | 3.00 | 1.00 | 18 |",
        "| decodes alone | 16 | 1,024 | 3.00 | 1.00 | – |",
        "| decodes beside a chunk of 256 tokens | 16 | 1 | 4.00 | 2.00 | – |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.000123, "0.000123"),
        (0.5, "0.5"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (99.96, "100.0"),
        (1234.5, "1,234"),
        (7, "7"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert quantities.number(value) == text


def test_what_is_committed_is_what_render_makes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["render.py", "--check"])
    assert render.main() == 0, "python benchmarks/render.py, and commit what it changed"
