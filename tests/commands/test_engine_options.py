"""Options of the engine: one definition for every command that runs it, checked before anything is loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from twinserve.commands.app import parser
from twinserve.engine.options import RUNNER_SETTINGS, EngineOptions
from twinserve.sim.profiles import Profile

pytest.importorskip("torch")

SIZES = ("--max-seqs", 2, "--max-context", 64, "--max-prompt", 32, "--repeats", 1)
CHOICES = {
    "dtype": ("float64", "'auto', 'float32', 'bfloat16', 'float16'"),
    "attention": ("fast", "'auto', 'triton', 'flash', 'sdpa'"),
    "execution": ("graph", "'auto', 'graphs', 'eager'"),
    "load_format": ("empty", "'auto', 'dummy'"),
    "quantization": ("int4", "'none', 'int8', 'fp8'"),
    "kv_cache_dtype": ("fp16", "'auto', 'fp8'"),
}
"""For each choice, what it is not, and what it is."""
ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
from twinserve.cli import main
main()
"""


@pytest.fixture
def shape(tmp_path):
    """A folder with a config and no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512, "eos_token_id": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def config(tmp_path):
    """Writes a file of settings."""

    def write(text):
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return write


def command_line(command, trace, tmp_path):
    """A command that runs the engine, with a model that is not there."""
    more = {"run": (trace,), "profile": ("--out", tmp_path / "latency.json"), "generate": ("Hello",)}
    return (command, *more[command], "--model", tmp_path / "nowhere")


def assert_refused(result, start, end):
    """The command ended with one line, from `start` to `end`."""
    (line,) = result.err.splitlines()
    assert result.code == 2 and line.startswith(f"twinserve: {start}") and line.endswith(end), result.err


every_command = pytest.mark.parametrize("command", ["run", "profile", "generate"])


@every_command
def test_a_command_takes_every_option(command):
    known = {option for parameter in parser().commands[command].params for option in parameter.opts}
    assert {f"--{name.replace('_', '-')}" for name in EngineOptions.model_fields} <= known


@every_command
@pytest.mark.parametrize("name", CHOICES)
def test_a_typo_of_a_choice_is_refused_before_a_model_is_looked_for(twinserve, trace, tmp_path, command, name):
    value, choices = CHOICES[name]
    flag = f"--{name.replace('_', '-')}"
    result = twinserve(*command_line(command, trace, tmp_path), flag, value)
    assert_refused(
        result, f"Invalid value for '{flag}': ", f"'{value}' is not one of {choices}. (see twinserve {command} -h)"
    )


@every_command
@pytest.mark.parametrize("name", CHOICES)
def test_a_typo_in_a_file_is_named_with_the_file(twinserve, trace, tmp_path, config, command, name):
    value, choices = CHOICES[name]
    path = config(f'[engine]\n{name} = "{value}"\n')
    result = twinserve(*command_line(command, trace, tmp_path), "--config", path)
    choices = " or ".join(choices.rsplit(", ", 1))
    expected = f"twinserve: {path}: engine.{name} is '{value}', expected: Input should be {choices}\n"
    assert (result.code, result.err) == (2, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[engine]\ndevice = "gpu"\n', "engine.device is 'gpu', expected: cpu, cuda or cuda:N"),
        ("[engine]\nseed = 1.5\n", "engine.seed is 1.5, expected: Input should be a valid integer"),
        ('[engine]\nattn = "sdpa"\n', "engine.attn is 'sdpa', there is no such field, did you mean attention?"),
        ("engine = 3\n", "engine is 3, expected a table"),
        ('[engin]\ndtype = "float32"\n', "engin is {'dtype': 'float32'}, there is no such field"),
        ("[fleet]\nreplicas = 2\n", "fleet is {'replicas': 2}, there is no such field"),
    ],
)
def test_what_a_file_cannot_say_is_refused(twinserve, trace, tmp_path, config, text, message):
    path = config(text)
    result = twinserve(*command_line("run", trace, tmp_path), "--config", path)
    assert (result.code, result.err) == (2, f"twinserve: {path}: {message}\n")


def test_a_file_gives_options_that_others_override_and_the_record_has_them(
    twinserve, trace, latency, shape, tmp_path, config
):
    path = config(
        f'block_size = 32\n[engine]\nmodel = "{shape}"\nload_format = "dummy"\ndtype = "bfloat16"\n'
        'execution = "eager"\n'
        "gpu_memory_utilization = 0.5\nseed = 3\n"
    )
    out = tmp_path / "run"
    result = twinserve("run", trace, "--config", path, "--seed", 4, "--attention", "sdpa", "--out", out)
    assert result.code == 0, result.err
    run = json.loads((out / "run.json").read_text())
    assert {name: run["facts"][name] for name in EngineOptions.model_fields} == {
        "model": str(shape), "device": "cpu", "dtype": "bfloat16", "attention": "sdpa", "execution": "eager",
        "load_format": "dummy", "quantization": "none", "kv_cache_dtype": "bfloat16", "gpu_memory_utilization": 0.5,
        "seed": 4, "tensor_parallel_size": 1,
    }  # fmt: skip
    assert run["settings"]["block_size"] == 32
    simulated = twinserve("sim", trace, "--latency", latency, "--config", path, "--json")
    assert simulated.code == 0, "a file for the engine serves the simulator too"


def test_a_typo_is_refused_and_a_simulation_runs_where_there_is_no_torch(trace, latency, config):
    path = config('[engine]\nexecution = "eager"\n')

    def without_torch(*words):
        command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    assert without_torch("sim", trace, "--latency", latency, "--config", path).returncode == 0
    refused = without_torch("run", trace, "--execution", "graph")
    assert refused.returncode == 2 and refused.stderr.startswith("twinserve: Invalid value for '--execution'")
    missed = without_torch("run", trace, "--config", path)
    assert missed.returncode == 2 and missed.stderr.startswith("twinserve: the engine needs torch")


def test_a_run_says_which_attention_serves_and_notes_it(twinserve, trace, shape, tmp_path):
    out = tmp_path / "run"
    result = twinserve("run", trace, "--model", shape, "--load-format", "dummy", "--json", "--out", out)
    assert result.code == 0, result.err
    assert result.err.count("attention: sdpa (device is 'cpu', expected cuda") == 1
    run = json.loads((out / "run.json").read_text())
    assert (run["facts"]["attention"], run["facts"]["load_format"]) == ("sdpa", "dummy")
    assert run["facts"]["attention_reason"].startswith("device is 'cpu'")
    assert run["settings"]["block_size"] == 16
    assert twinserve("replay", out).code == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--attention", "flash", "device is 'cpu', expected cuda: flash-attn runs on NVIDIA GPUs"),
        ("--attention", "triton", "execution is 'auto', expected graphs: triton runs in no other"),
        ("--execution", "graphs", "device is 'cpu', expected cuda: graphs run on NVIDIA GPUs"),
        ("--kv-cache-dtype", "fp8", "kv_cache_dtype is 'fp8', expected auto with sdpa"),
        ("--max-model-len", "513", "max_model_len is 513, expected at most 512, the model's max_position_embeddings"),
        ("--gpu-memory-utilization", "1.5", "gpu_memory_utilization is 1.5, expected: Input should be less than 1"),
        ("--device", "gpu", "device is 'gpu', expected: cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_made(
    twinserve, trace, shape, monkeypatch, option, value, message
):
    monkeypatch.setattr("twinserve.engine.models.source.dummy_model", lambda *_, **__: pytest.fail("weights were made"))
    options = {"--model": shape, "--load-format": "dummy"} | {option: value}
    result = twinserve("run", trace, *(word for pair in options.items() for word in pair))
    assert (result.code, result.err) == (2, f"twinserve: {message}\n")


def test_a_shape_is_profiled(twinserve, shape, tmp_path):
    out = tmp_path / "latency.json"
    result = twinserve("profile", "--model", shape, "--load-format", "dummy", *SIZES, "--out", out)
    assert result.code == 0, result.err
    about = json.loads(out.read_text())["about"]
    assert (about["attention"], about["load_format"], about["block_size"]) == ("sdpa", "dummy", 16)


def test_what_a_run_can_be_is_profiled_and_the_latency_file_says_what_it_was(twinserve, shape, tmp_path, config):
    path = config(f'max_num_seqs = 64\n[engine]\nmodel = "{shape}"\nload_format = "dummy"\n')
    out = tmp_path / "latency.json"
    options = {
        "kv_cache_dtype": "auto", "execution": "eager", "attention": "sdpa", "dtype": "bfloat16",
        "quantization": "int8", "block_size": 32, "num_gpu_blocks": 40, "max_model_len": 256,
        "max_num_batched_tokens": 512,
    }  # fmt: skip
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    result = twinserve("profile", "--config", path, *flags, *SIZES, "--out", out)
    assert result.code == 0, result.err
    about = json.loads(out.read_text())["about"]
    expected = options | {"kv_cache_dtype": "bfloat16", "max_num_seqs": 64, "load_format": "dummy", "model": str(shape)}
    assert {name: about[name] for name in expected} == expected
    assert expected.keys() >= set(RUNNER_SETTINGS)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1},
        {"max_num_seqs": 2, "max_num_batched_tokens": 2},
        {"max_model_len": 43, "num_gpu_blocks": 12},
    ],
)
def test_an_engine_with_the_smallest_limits_is_profiled_within_them(twinserve, shape, trace, latency, tmp_path, limits):
    words = [word for name, value in limits.items() for word in (f"--{name.replace('_', '-')}", value)]
    model = ("--model", shape, "--load-format", "dummy", *SIZES, "--shapes", 16)
    source = ("--trace", trace, "--latency", latency) if "max_model_len" not in limits else ()
    result = twinserve("profile", *model, *words, *source, "--out", tmp_path / "own.json")
    assert result.code == 0, result.err
    steps = [sample.features for sample in Profile.load(tmp_path / "own.profile.jsonl.gz").samples]
    assert {bool(step.prompts) for step in steps} == {True, False}
    assert max(step.seqs for step in steps) <= limits.get("max_num_seqs", 4)
    assert max(step.tokens for step in steps) <= limits.get("max_num_batched_tokens", 2048)


def test_half_of_a_profile_is_of_the_steps_that_a_trace_makes(twinserve, shape, trace, latency, tmp_path):
    out = tmp_path / "profile.json"
    model = ("--model", shape, "--load-format", "dummy", *SIZES, "--shapes", 32)
    result = twinserve("profile", *model, "--trace", trace, "--rate-scale", 3.0, "--latency", latency, "--out", out)
    assert result.code == 0, result.err
    fitted, profile = json.loads(out.read_text()), Profile.load(tmp_path / "profile.profile.jsonl.gz")
    assert fitted["about"] == profile.about and fitted["uncertainty"]["device"].keys() == {"decode", "prompt"}
    features = [sample.features for sample in profile.samples]
    assert len(features) == 32
    # The trace's prompts are of 56 tokens, 32 of them shared; the design's shapes are within SIZES.
    assert any(length == 56 or (start, length) == (32, 24) for step in features[16:] for start, length in step.prompts)
    assert not any(length == 56 for step in features[:16] for _, length in step.prompts)
    assert max(step.decode_tokens for step in features[16:]) > 2
    again = twinserve("profile", *model, "--out", out)
    assert again.code == 2 and "exists already" in again.err
    for words in (("--latency", latency), ("--limit", 3)):
        refused = twinserve("profile", *model, *words, "--out", tmp_path / "other.json")
        assert refused.code == 2 and "expected one beside its options" in refused.err


def test_a_profile_and_a_run_are_fitted_together(twinserve, shape, trace, tmp_path):
    model = ("--model", shape, "--load-format", "dummy")
    for words in (("profile", *SIZES), ("run", trace)):
        result = twinserve(*words, *model, "--out", tmp_path / f"{words[0]}.json")
        assert result.code == 0, result.err
    profile = ("--profile", tmp_path / "profile.profile.jsonl.gz")
    result = twinserve("fit", tmp_path / "run.json", *profile, "--out", tmp_path / "both.json", "--json")
    assert result.code == 0, result.err
    data, measured = json.loads(result.out), Profile.load(profile[1])
    assert data["about"]["profile"] == {"name": profile[1].name, "identity": measured.identity}
    steps = sum(found["samples"] for found in data["residuals"].values())
    run = json.loads((tmp_path / "run.json" / "run.json").read_text())
    assert steps == len(measured.samples) + run["summary"]["steps"]
    Profile(measured.about | {"device": "another"}, measured.kernels, measured.samples).save(tmp_path / "other")
    refused = twinserve("fit", tmp_path / "run.json", "--profile", tmp_path / "other", "--out", tmp_path / "x.json")
    assert refused.code == 2 and "device is 'another', expected " in refused.err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--kv-cache-dtype", "fp8", "kv_cache_dtype is 'fp8', expected auto with sdpa"),
        ("--execution", "graphs", "device is 'cpu', expected cuda: graphs run on NVIDIA GPUs"),
        ("--block-size", 0, "block_size is 0, expected: Input should be greater than or equal to 1"),
        ("--num-gpu-blocks", 1, "most steps to measure do not fit the 16 tokens of the KV pool"),
        ("--num-gpu-blocks", 2, "most steps to measure do not fit the 32 tokens of the KV pool"),
        (
            "--max-model-len",
            42,
            "max_model_len is 42, expected at least 43, as contexts grow while the 25 steps of a shape are run",
        ),
    ],
)
def test_what_cannot_be_profiled_is_refused(twinserve, shape, tmp_path, option, value, message):
    out = tmp_path / "latency.json"
    model = ("--model", shape, "--load-format", "dummy")
    result = twinserve("profile", *model, *SIZES, "--out", out, option, value)
    assert result.code == 2 and result.err.splitlines()[-1].endswith(message) and not out.exists()


def test_verify_takes_the_options_of_what_serves(twinserve, tmp_path):
    for flag, value, expected in (
        (
            "--dtype",
            "float64",
            "'float64' is not one of 'auto', 'float32', 'bfloat16', 'float16'. (see twinserve model verify -h)",
        ),
        ("--kv-cache-dtype", "fp16", "'fp16' is not one of 'auto', 'fp8'. (see twinserve model verify -h)"),
        ("--device", "gpu", "device is 'gpu', expected: cpu, cuda or cuda:N"),
    ):
        result = twinserve("model", "verify", tmp_path / "nowhere", flag, value)
        assert_refused(result, "", expected)


def test_a_step_that_fails_is_one_line_and_leaves_no_record(twinserve, trace, shape, tmp_path, monkeypatch):
    import torch

    from twinserve.engine.model_runner import ModelRunner

    def launch(self, batch):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB.\nSee the manual")

    monkeypatch.setattr(ModelRunner, "launch", launch)
    result = twinserve("run", trace, "--model", shape, "--load-format", "dummy", "--out", tmp_path / "run")
    assert (result.code, result.out) == (1, "")
    (line,) = [line for line in result.err.splitlines() if line.startswith("twinserve: ")]
    assert line.startswith("twinserve: step 0 failed (")
    assert line.endswith("): OutOfMemoryError: tried to allocate 2 GiB. See the manual")
    assert result.err.splitlines()[-1] == line and "Traceback" not in result.err
    assert not (tmp_path / "run").exists()


def test_what_is_no_step_failure_is_not_hidden(twinserve, trace, shape, monkeypatch):
    monkeypatch.setattr("twinserve.worlds.run.run_real", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        twinserve("run", trace, "--model", shape, "--load-format", "dummy")


def test_an_answer_is_printed_as_it_comes_and_its_speed_beside_it(twinserve, tmp_path):
    from engine_judge import judge_of
    from guide_models import word_tokenizer

    judge_of("llama").model.save_pretrained(tmp_path / "tiny")
    word_tokenizer(2).save_pretrained(tmp_path / "tiny")
    command = ("generate", "w005 w009 w300", "--raw", "--model", tmp_path / "tiny", "--max-tokens", 40)
    shown, told = twinserve(*command), twinserve(*command, "--json")
    assert shown.code == 0, shown.err
    completion = json.loads(told.out)
    assert shown.out.split() == completion["text"].split() != []
    for ran in (shown, told):
        count = len(completion["token_ids"])
        assert re.search(rf"^{count} tokens, the first after [\d.]+ s, then [\d.e+]+ tokens/s$", ran.err, re.MULTILINE)
