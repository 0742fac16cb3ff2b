"""Bad input is one line that names what is wrong, exit status 2, and leaves nothing behind."""

import gzip
import json
import os
import re
import resource
import shlex
import string
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
import typer

from twinserve.commands.app import COMMANDS, app
from twinserve.settings.errors import InputError
from twinserve.settings.limits import limit
from twinserve.sim.model_configs import load_shape
from twinserve.traces.readers import read_trace

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'

BAD_TRACES = {
    "a missing column": ("TIMESTAMP,ContextTokens\r\n2023-11-16 18:15:46.6805900,374\r\n", "GeneratedTokens"),
    "a negative length": (AZURE + "2023-11-16 18:15:46.6805900,-374,44\r\n", ":2: ContextTokens is '-374'"),
    "a length that is no integer": (AZURE + "2023-11-16 18:15:46.6805900,374,4.5\r\n", ":2: GeneratedTokens is '4.5'"),
    "times that go backwards": (
        AZURE + "2023-11-16 18:15:46.6805900,374,44\r\n2023-11-16 18:15:45.0000000,9,9\r\n",
        ":3: TIMESTAMP",
    ),
    "an unknown format": ("request at noon, please\n", ":1: 'request at noon, please', expected a trace"),
    "an empty file": ("", "expected a trace"),
    "blocks that do not match the length": (MOONCAKE.replace("600", "1600"), ":1: hash_ids"),
}


def assert_refused(result, *words):
    assert result.code == 2, (result.out, result.err)
    lines = [line for line in result.err.splitlines() if line.startswith("twinserve: ")]
    assert len(lines) == 1 and result.err.splitlines()[-1] == lines[0], result.err
    assert result.out == ""
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("what", BAD_TRACES)
def test_a_bad_trace_is_refused(twinserve, tmp_path, latency, what):
    content, words = BAD_TRACES[what]
    path = tmp_path / "bad"
    path.write_bytes(content.encode())
    out = tmp_path / "run"
    assert_refused(twinserve("sim", path, "--latency", latency, "--out", out), str(path), words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "latency.json"]


def test_a_broken_gzip_is_refused(twinserve, tmp_path, latency):
    path = tmp_path / "bad.gz"
    path.write_bytes(gzip.compress(MOONCAKE.encode() * 50)[:-12])
    assert_refused(twinserve("sim", path, "--latency", latency), str(path), "gzip")


def test_a_trace_that_is_not_there_is_refused(twinserve, tmp_path, latency):
    assert_refused(twinserve("sim", tmp_path / "none", "--latency", latency), str(tmp_path / "none"))


def test_an_existing_out_is_refused_and_kept(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert_refused(twinserve("sim", trace, "--latency", latency, "--out", out), str(out), "exists already")
    assert (out / "mine").read_text() == "kept"
    for arguments in (
        ("trace", "make", "--out", trace),
        ("profile", "--out", latency),
        ("report", out, "--out", latency),
    ):
        assert_refused(twinserve(*arguments), "exists already")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema": "other/3"}', "schema is 'other/3', expected 'twinserve-latency/2' or 'twinserve-latency/1'"),
        ("no json", "expected JSON"),
    ],
)
def test_a_latency_file_of_another_schema_is_refused(twinserve, trace, tmp_path, content, words):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert_refused(twinserve("sim", trace, "--latency", path), str(path), words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--max-num-batched-tokens", 8, "--max-num-seqs", 16),
            "max_num_batched_tokens is 8, expected at least max_num_seqs",
        ),
        (("--no-enable-chunked-prefill", "--max-model-len", 4096), "expected at least max_model_len (4096)"),
        (("--watermark", 0.1), "watermark is 0.1, expected num_gpu_blocks beside it"),
        (("--block-size", 0), "block_size is 0"),
        (("--pipeline-depth", 2), "pipeline_depth is 2"),
        (("--window-s", "soon"), "window_s is 'soon', expected START:END"),
        (("--limit", 0), "is 0, expected"),
        (("--max-num-seqs", "many"), "--max-num-seqs"),
        (("--composition", "random"), "--composition"),
    ],
)
def test_settings_that_cannot_hold_are_refused(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, *options), words)


def test_an_unknown_setting_in_a_file_is_named_with_the_file(twinserve, trace, latency, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text("max_num_sequences = 4\n")
    result = twinserve("sim", trace, "--latency", latency, "--config", config)
    assert_refused(result, str(config), "max_num_sequences is 4")


def test_latency_from_two_sources_is_refused(twinserve, trace, latency, tmp_path):
    assert_refused(twinserve("sim", trace, "--latency", latency, "--latency-from", tmp_path), "only one of latency")


def test_a_model_folder_without_weights_or_of_an_unknown_architecture_is_refused(twinserve, trace, tmp_path):
    pytest.importorskip("torch")
    folder = tmp_path / "model"
    folder.mkdir()
    assert_refused(twinserve("run", trace, "--model", folder), str(folder), "config.json")
    (folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    assert_refused(twinserve("run", trace, "--model", folder), "config.json", "Mamba")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(twinserve("run", trace, "--model", folder), str(folder), "safetensors")
    assert_refused(twinserve("run", trace, "--model", "no-such-model"), "no-such-model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_cuda_device_that_is_not_there_is_refused(twinserve, trace):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert_refused(twinserve("run", trace, "--device", "cuda"), "device is 'cuda'")


@pytest.mark.parametrize("file", ["run.json", "requests.jsonl", "steps.jsonl"])
def test_a_record_that_lacks_a_file_is_refused(twinserve, trace, latency, tmp_path, file):
    out = tmp_path / "run"
    twinserve("sim", trace, "--latency", latency, "--out", out)
    (out / file).unlink()
    assert_refused(twinserve("replay", out), file)


def test_comparing_runs_of_different_traces_is_refused(twinserve, trace, latency, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "a")
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "b", "--limit", 5)
    assert_refused(twinserve("compare", tmp_path / "a", tmp_path / "b"), "facts.trace.transforms")


def test_an_unknown_option_or_metric_is_refused(twinserve, tmp_path):
    assert_refused(twinserve("sim", tmp_path, "--speed", 3), "--speed")
    assert_refused(twinserve("compare", tmp_path, tmp_path, "--max-error", "ttft=0.1"), "metric is 'ttft'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--num-gpu-blocks", 10**9), "num_gpu_blocks is 1000000000, expected"),
        (("--num-gpu-blocks", 2**70), "num_gpu_blocks is 1180591620717411303424, expected"),
        (("--block-size", 10**30), "block_size is 1000000000000000000000000000000, expected"),
        (("--num-gpu-blocks", 9_192_992), "num_gpu_blocks is 9192992, expected"),
        (("--replicas", 10**8), "replicas is 100000000, expected"),
        (("--replicas", 2000, "--num-gpu-blocks", 40_000), "they have 80000000 (TWINSERVE_MOST_FLEET_BLOCKS)"),
        (("--rate-scale", 1e-300), "rate_scale is 1e-300, expected a number >"),
        (("--session-rate", 1e-300), "session_rate is 1e-300, expected"),
    ],
)
def test_numbers_that_no_machine_can_serve_are_refused_at_once(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, *options), words)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("limit", 0), ("rate_scale", -1), ("session_rate", 0), ("window_s", "-1:2"), ("window_s", "2:1"),
        ("window_s", "900:901"), ("max_prompt_tokens", 0), ("max_output_tokens", -1), ("rate", 0), ("rate", "nan"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_option_of_a_trace_is_said_by_its_name(twinserve, trace, latency, option, value):
    result = twinserve("sim", trace, "--latency", latency, f"--{option.replace('_', '-')}", value)
    assert_refused(result, f"{option} is ")


def test_a_rate_excludes_what_says_how_dense_arrivals_are_too(twinserve, trace, latency):
    sim = ("sim", trace, "--latency", latency)
    denser = twinserve(*sim, "--rate", 3, "--rate-scale", 2)
    assert_refused(denser, "rate_scale is 2.0, expected none of it beside rate")
    assert_refused(twinserve(*sim, "--arrivals", "poisson"), "arrivals is 'poisson', expected a rate beside it")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--window-s", "0:1_0"), "0:1_0"), (("--replicas", 2, "--die", "\uff11:0:1"), "\uff11:0:1"),
        (("--latency", "roofline:llama-3-8b@h100:tp=\uff11"), "\uff11"), (("--block-size", "1_6"), "'1_6'"),
        (("--vllm-args", "--max-num-seqs 1_6"), "'1_6'"), (("--vllm-args", "--max-model-len 1_6k"), "'1_6k'"),
        (("--vllm-args", "--max-model-len infk"), "'infk'"),
    ],
)  # fmt: skip
def test_numbers_that_python_alone_reads_are_refused(twinserve, trace, latency, options, word):
    given = options if "--latency" in options else ("--latency", latency, *options)
    assert_refused(twinserve("sim", trace, *given), word)


@pytest.mark.parametrize(
    "command",
    [
        "plan TRACE --model qwen3-0.6b --devices h100 --price h100=2_5",
        "plan TRACE --model qwen3-0.6b --devices h100 --price 2 --try max_num_seqs=1_6",
        "capacity TRACE --latency roofline:qwen3-0.6b@h100 --price +2",
        "capacity TRACE --latency roofline:qwen3-0.6b@h100 --objective 'p99 TTFT of priority=\u0661 <= 1 s'",
        "compare . . --max-error tpot_s.mean=0.2_5",
        "trace make --out OUT --priority-shares 0.7_5,0.2_5",
    ],
)
def test_so_are_those_within_a_text(twinserve, trace, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words = [str(trace) if word == "TRACE" else word for word in shlex.split(command)]
    if "--objective" not in words and "TRACE" in command:
        words += ["--objective", "p99 TTFT <= 1 s"]
    number = re.search("[+\u0661]|[0-9._]*_[0-9]", command.partition("--")[2])
    assert number is not None
    assert_refused(twinserve(*words), number[0])
    assert not (tmp_path / "OUT").exists()


def options():
    """Each option of each command that takes a value: the words of the command, it, and the option."""
    every = typer.main.get_command(app)
    for words in COMMANDS:
        command = every
        for word in words.split():
            command = command.commands[word]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                yield words, command, parameter


FULL_WIDTH = str.maketrans({digit: chr(0xFF10 + number) for number, digit in enumerate(string.digits)})


@pytest.mark.parametrize("form", ["0_{}", "+{}", " {}", "{}\n", "full width"])
def test_no_option_of_any_command_is_made_a_number_of_what_python_alone_reads(form):
    """Each option of each command, by itself: its text is refused as it is written, or stays a text."""
    refused = 0
    for words, command, parameter in options():
        numbers = [number for number in ("1", "64") if numbers_of(command, parameter, number)]
        for number in numbers or ["16"]:
            text = number.translate(FULL_WIDTH) if form == "full width" else form.format(number)
            if numbers:
                with pytest.raises(typer.BadParameter, match="is not written as a number|unable to parse"):
                    command.make_context("x", [parameter.opts[0], text])
                numbers_of(command, parameter, text)  # as a shell parses it, which completes a line that has it
            else:
                assert not numbers_of(command, parameter, text), (words, parameter.name)
        refused += bool(numbers)
    assert refused > 250, refused


def numbers_of(command, parameter, text):
    """The numbers that an option of a command is once it is parsed; one that is refused for what it says is none."""
    value = command.make_context("x", [parameter.opts[0], text], resilient_parsing=True).params[parameter.name]
    return [one for one in (value if isinstance(value, list | tuple) else [value]) if type(one) in (int, float)]


def test_numbers_of_a_file_are_those_of_toml(twinserve, trace, latency, tmp_path):
    """Which has underscores between digits; a text is none, however it is written."""
    config = tmp_path / "settings.toml"
    config.write_text("block_size = 1_6\n")
    assert twinserve("sim", trace, "--latency", latency, "--config", config, "--out", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["block_size"] == 16
    for text in ("'1_6'", "'16'"):
        config.write_text(f"block_size = {text}\n")
        result = twinserve("sim", trace, "--latency", latency, "--config", config)
        assert_refused(result, f"block_size is {text}, expected: Input should be a valid integer")


@pytest.mark.parametrize("table", ["collectives]\nranks", "measured_power]\nidle_w"])
def test_nor_is_a_text_a_number_in_a_table_of_a_device(twinserve, trace, tmp_path, table):
    device = tmp_path / "own.toml"
    rest = "all_reduce_ns = 1\nlink = 1e9\n" if "ranks" in table else "active_w = 1\n"
    device.write_text(f"base = 'h100'\n[{table} = '1_6'\n{rest}source = 'me'\n")
    assert_refused(twinserve("sim", trace, "--latency", f"roofline:qwen3-0.6b@{device}"), "'1_6', expected: Input")


@pytest.mark.parametrize("lengths", ["fixed:1_0", "fixed:\uff11", "lognormal:1_0:1", "lognormal:100:+1"])
def test_lengths_that_python_alone_reads_are_refused(twinserve, tmp_path, lengths):
    assert_refused(twinserve("trace", "make", "--out", tmp_path / "out", "--prompt-tokens", lengths), "fixed:N")


def test_lengths_that_no_array_can_hold_are_refused_where_they_would_be_served(twinserve, latency, tmp_path):
    path = tmp_path / "vidur.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n1,5,999999999999\n")
    assert twinserve("trace", "stat", path).code == 0
    assert_refused(twinserve("sim", path, "--latency", latency), "request 0 is", "TWINSERVE_MOST_TOKENS")


@pytest.mark.parametrize("options", [(), ("--rate", 1.2e-10), ("--session-rate", 1.2e-10)])
def test_arrivals_that_leave_no_time_to_be_served_are_refused(twinserve, latency, tmp_path, options):
    path, last = tmp_path / "trace.jsonl", (1 << 63) - 1
    rows = [{"arrival_ns": time_ns, "prompt_tokens": 4, "max_tokens": 2} for time_ns in (0, 9 if options else last)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"format": "twinserve-trace/1"}, *rows]))
    assert twinserve("trace", "stat", path).code == 0
    assert_refused(twinserve("sim", path, "--latency", latency, *options), "expected")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("seeds = 1000000000\narrivals = 'poisson'\nrate = 1.0\n", "points is 1000000000, expected a plan of at most"),
        (
            "[grid]\n"
            + "".join(f"{n} = {list(range(1, 60))}\n" for n in ("max_num_seqs", "limit", "block_size", "seed")),
            "points is",
        ),
        ("limit = true\n", "limit is True, expected"),
        ("limit = 2.0\n", "limit is 2.0, expected"),
        ("limit = '4'\n", "limit is '4', expected"),
        ("replicas = true\n", "replicas is True, expected"),
    ],
)
def test_a_plan_beyond_measure_or_of_other_kinds_is_refused(twinserve, trace, tmp_path, lines, words):
    plan = tmp_path / "plan.toml"
    plan.write_text(f"trace = {str(trace)!r}\n{lines}")
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--rate", 1e-300), ("--arrivals", "gamma", "--cv", 1e308), ("--think-time-s", 1e300),
        ("--output-tokens", "lognormal:9:1e300"), ("--priority-shares", "1e308,1e308"), ("--turns", 10**9),
        ("--rate", 1e-9, "--requests", 9999), ("--requests", 10**5, "--turns", 10**4),
        ("--arrivals", "burst", "--burst-size", 10**12), ("--system-prompts", 1, "--system-prompt-tokens", 10**15),
    ],
)  # fmt: skip
def test_a_synthetic_trace_beyond_measure_is_refused(twinserve, tmp_path, options):
    assert_refused(twinserve("trace", "make", "--out", tmp_path / "out", "--turns", 2, *options), "expected")


def test_a_burst_takes_no_memory(twinserve, tmp_path):
    arguments = ("--arrivals", "burst", "--burst-size", 1 << 26, "--requests", 3, "--out", tmp_path / "out")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert twinserve("trace", "make", *arguments).code == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("out", ["", ".", "/"])
@pytest.mark.parametrize(
    "command",
    [
        "sim {trace} --latency {latency} --out", "trace make --out", "trace convert {trace}", "config init",
        "fit {trace} --out", "profile --out", "fit {trace} --out new.json --acceptance", "report {trace} --out",
        "export {trace} --format csv --out", "record import {trace}", "run {trace} --out",
    ],
)  # fmt: skip
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_has_no_name_is_not_written(twinserve, trace, latency, tmp_path, monkeypatch, command, out, force):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    words = [word.format(trace=trace, latency=latency) for word in command.split()]
    assert_refused(twinserve(*words, out, *(force if words[0] != "config" else ())), "expected")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tolerance", 1e-9), "tolerance is 1e-09, expected a share"),
        (("--objective", " and ".join(["p99 TTFT <= 1 s"] * 70)), "expected at most 64 terms"),
        (("--jobs", 10**6), "--jobs"),
    ],
)
def test_a_search_that_is_refused_leaves_no_folder(twinserve, trace, latency, tmp_path, options, words):
    search = ("capacity", trace, "--latency", latency, "--objective", "p99 TTFT <= 1 s", "--out", tmp_path / "out")
    assert_refused(twinserve(*search, *options), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "a = " + "1" * 5000, "a = 1\na = 2\n", "\xff"])
def test_settings_that_are_no_toml_are_one_line(twinserve, trace, latency, tmp_path, content):
    (tmp_path / "settings.toml").write_bytes(content.encode("latin-1"))
    assert_refused(
        twinserve("sim", trace, "--latency", latency, "--config", tmp_path / "settings.toml"), "expected TOML"
    )


@pytest.mark.parametrize(
    "key", ["a" + ".a" * 50_000, ".".join(['"b b"'] * 3000), "[" + " . ".join(["'c'"] * 3000) + "]"]
)
def test_keys_of_thousands_of_parts_are_refused_before_they_take_minutes(twinserve, trace, latency, tmp_path, key):
    plan = tmp_path / "plan.toml"
    plan.write_text(f"# a comment\n{key}{'' if key.startswith('[') else ' = 1'}\n")
    result = twinserve("sim", trace, "--latency", latency, "--config", plan)
    assert_refused(result, f"{plan}:2: ", "expected keys of at most 64 parts")
    result = twinserve("sweep", plan, "--out", tmp_path / "out")
    assert_refused(result, "expected keys of at most 64 parts")
    assert result.err.count(str(plan)) == 1


def test_dots_that_are_no_keys_are_read(twinserve, trace, tmp_path):
    plan = tmp_path / "plan.toml"
    rates = ",\n".join(["1.5, 2.5"] * 40)
    plan.write_text(f"trace = {str(trace)!r}\n# {'. ' * 300}\nseeds = 1000000000\n[grid]\nrate = [\n{rates}]\n")
    assert_refused(twinserve("sweep", plan, "--out", tmp_path / "out"), f"{plan}: points is 80000000000, expected")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--scheduling-policy", "a\udcff.py:A"), "scheduling_policy is "),
        (("--admission", "caf\udce9.py:A(x='\udcff')"), "admission is "),
        (("--replicas", 2, "--router", "rand\udcffm"), "router is "),
        (("--window-s", "0:\udcff"), "window_s is "),
        (("--speculative-config", '{"method": "\\ud83d"}'), "speculative_config.method is "),
        (("--speculative-config", "[" * 100_000), "speculative_config is "),
    ],
)
def test_options_that_are_no_text_or_nested_without_end_are_refused(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, *options), words)


def test_settings_may_have_a_byte_order_mark(twinserve, trace, latency, tmp_path):
    (tmp_path / "settings.toml").write_bytes(b"\xef\xbb\xbfmax_num_seqs = 8\r\n")
    assert twinserve("sim", trace, "--latency", latency, "--config", tmp_path / "settings.toml").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--simulate", "--record-segment-mib", "1e308", "--record", "r"), "record_segment_mib is 1e+308"),
        (("serve", "--simulate", "--record-segment-s", "inf", "--record", "r"), "record_segment_s is inf"),
        (("serve", "--simulate", "--tensor-parallel-size", "2"), "tensor_parallel_size is 2, expected none beside"),
        (("serve", "--simulate", "--model", "m"), "model is 'm', expected none beside --simulate, which has no engine"),
        (("serve", "--simulate", "--time-scale", "1e-300"), "time_scale is 1e-300, expected a number from"),
        (("serve", "--simulate", "--time-scale", "1e300"), "time_scale is 1e+300, expected a number from"),
        (("serve", "--simulate", "--max-body-mib", "1e308"), "max_body_mib is 1e+308"),
        (("serve", "--simulate", "--client-timeout", "1e9"), "client_timeout is 1000000000.0"),
        (("serve", "--simulate", "--shutdown-timeout", "9" * 30), "shutdown_timeout is 9999"),
        (("serve", "--simulate", "--max-num-queued-reqs", "9" * 30), "max_num_queued_reqs is 9999"),
        (("run", "{trace}", "--time-scale", "1e300"), "time_scale is 1e+300, expected a number from 0 to"),
        (("profile", "--out", "p.json", "--pipeline-depth", "1"), "pipeline_depth is 1, expected none without"),
        (("profile", "--out", "p.json", "--shapes", "1000000000"), "--shapes"),
        (("profile", "--out", "p.json", "--repeats", "1000000000"), "--repeats"),
        (("profile", "--out", "p.json", "--max-context", "9" * 12), "--max-context"),
        (("capacity", "{trace}", "--objective", "p99 TTFT <= 1 s", "--tolerance", "1e-300"), "tolerance is 1e-300"),
        (("capacity", "{trace}", "--objective", "p99 TTFT <= 1 s", "--tolerance", "nan"), "tolerance is nan"),
        (("model", "verify", "nowhere", "--max-tokens", "9" * 12), "--max-tokens"),
        (("top", "http://127.0.0.1:9", "--interval", "1e308"), "--interval"),
    ],
)
def test_what_nobody_waits_for_and_no_memory_holds_is_refused_at_once(
    twinserve, trace, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert_refused(twinserve(*(str(word).format(trace=trace) for word in arguments)), words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("memory_mib", 2**31), ("memory_mib", 0), ("bandwidth", "inf"), ("bandwidth", "nan"), ("bandwidth", 1e-300),
        ("flops", 1e308), ("link", 1), ("hop_ns", 2**62), ("host_ns", 2**62), ("host_seq_ns", -1), ("linked", 2**31),
        ("multiprocessors", 2**31), ("name", "'"), ("bandwidth", "true"), ("hop_ns", "'1'"),
    ],
)  # fmt: skip
def test_a_device_that_none_can_be_is_refused(twinserve, trace, tmp_path, field, value):
    values = {"name": "'x'", "bandwidth": 1e12, "flops": 1e14, "memory_mib": 81920, "link": 1e11, "source": "'a table'"}
    path = tmp_path / "device.toml"
    path.write_text("".join(f"{name} = {one}\n" for name, one in (values | {field: value}).items()))
    result = twinserve("sim", trace, "--latency", f"roofline:qwen3-0.6b@{path}")
    assert_refused(result, str(path), "expected TOML" if value == "'" else f"{field} is ")


@pytest.mark.parametrize("name", ["settings.toml", "order.py"])
def test_a_small_file_without_end_is_refused_before_it_fills_the_memory(twinserve, trace, latency, tmp_path, name):
    (tmp_path / "settings.toml").write_text("scheduling_policy = 'order.py:Order'\n")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    result = twinserve("sim", trace, "--latency", latency, "--config", tmp_path / "settings.toml")
    assert_refused(result, name, "at most 4194304 bytes", "TWINSERVE_MOST_SETTINGS_BYTES")


def test_a_class_nested_without_end_is_refused(twinserve, trace, latency, tmp_path):
    (tmp_path / "order.py").write_text("x = " + "-" * 100_000 + "1\n")
    policy = f"{tmp_path / 'order.py'}:Order"
    result = twinserve("sim", trace, "--latency", latency, "--scheduling-policy", policy)
    assert_refused(result, "order.py", "scheduling_policy")
    result = twinserve("sim", trace, "--latency", latency, "--scheduling-policy", f"{policy}(x={'-' * 100_000}1)")
    assert_refused(result, "scheduling_policy", "FILE.py:CLASS")


@pytest.mark.parametrize("value", ["x", "", "-1", "1e9", "1_000", "9" * 30])
@pytest.mark.parametrize("variable", ["TWINSERVE_MOST_BLOCKS", "TWINSERVE_LARGEST_VALUE"])
def test_a_limit_that_is_no_number_is_named(monkeypatch, trace, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"{variable} is '{value}', expected an integer"):
        limit("BLOCKS", 7)
        read_trace(trace)


def test_a_limit_that_is_no_number_is_one_line_of_a_command(trace):
    words = [sys.executable, "-m", "twinserve", "trace", "stat", str(trace)]
    environment = os.environ | {"TWINSERVE_MOST_BLOCKS": "x"}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("twinserve: TWINSERVE_MOST_BLOCKS is 'x', expected an integer")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", ["replay {}", "compare {} {}", "report {}", "fit {} --out f.json", "record import {} out"]
)
def test_a_record_by_a_name_that_no_file_can_have_is_one_line(twinserve, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    name = "x" * 300
    assert_refused(twinserve(*(word.format(name) for word in command.split())), "File name too long")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_no_latency_can_be_fitted_to_leaves_no_law_of_its_drafts_either(twinserve, trace, latency, tmp_path):
    drafts = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "synthetic_acceptance_rate": 0.5})
    run = tmp_path / "run"
    assert twinserve("sim", trace, "--latency", latency, "--speculative-config", drafts, "--out", run).code == 0
    result = twinserve("fit", run, "--out", tmp_path / "new.json", "--acceptance", tmp_path / "law.json")
    assert_refused(result, "expected the record of a real run")
    assert not (tmp_path / "new.json").exists() and not (tmp_path / "law.json").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("replay record", "run.json"), ("replay record", "steps.jsonl"), ("trace stat record", "requests.jsonl"),
        ("replay live", "segments/000001/outputs.jsonl"), ("trace stat live", "segments/000000/requests.jsonl"),
        ("trace stat weka", "a.json"), ("model describe model", "config.json"),
        ("run trace --model model --out out", "tokenizer.json"), ("fit record --out out", "outputs.jsonl.gz"),
    ],
)  # fmt: skip
def test_a_pipe_in_a_folder_is_refused_and_not_waited_for(twinserve, tmp_path, monkeypatch, command, name):
    if command.startswith("run"):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trace").write_text('{"timestamp": 0, "input_length": 9, "output_length": 2, "hash_ids": [1]}\n')
    folder = next(word for word in command.split() if word in ("record", "live", "weka", "model"))
    run = {
        "schema": "twinserve-run/2", "world": "real", "device": "x", "versions": {}, "settings": {},
        "facts": {"trace": {}}, "summary": None,
    }  # fmt: skip
    for made in ("segments/000000", "segments/000001") if folder == "live" else ("",):
        (tmp_path / folder / made).mkdir(parents=True)
    (tmp_path / folder / "run.json").write_text(json.dumps(run))
    (tmp_path / folder / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / folder / name)
    writer = Timer(20, lambda: os.close(os.open(tmp_path / folder / name, os.O_WRONLY)))  # ends what waits
    writer.daemon = True
    writer.start()
    result = twinserve(*command.split())
    writer.cancel()
    assert (result.code, result.err) == (2, f"twinserve: {Path(folder, name)}: expected a file or a folder\n")


def test_a_link_into_a_devices_bytes_is_refused_too(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"config.json: expected a file or a folder"):
        load_shape(tmp_path)
