"""Malformed inputs of what models, devices, drafts, deployments and bodies of requests are made of."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from changes import JUNK, WORDS, changed, changed_value
from outcome import Work
from valid import DRAFTS, SMALLEST_PROFILE, TRACES, Valid

ENGINE = """max_num_seqs = 4
num_gpu_blocks = 64
[engine]
device = 'cpu'
dtype = 'float32'
attention = 'auto'
quantization = 'none'
seed = 3
[serve]
port = 0
max_body_mib = 1.0
served_model_name = ['x']
"""
DRAFTED = {"method": "draft_model", "num_speculative_tokens": 3, "draft_latency": "qwen3-0.6b-h100",
           "num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 9, 0]]}  # fmt: skip
SAMPLED = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3, "n": 1, "stop": ["x"],
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 1.0},
    "min_tokens": 1, "stop_token_ids": [9], "ignore_eos": True, "stream": False,
}  # fmt: skip
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "the sky", "logprobs": 2, "echo": False} | SAMPLED,
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
    | SAMPLED,
    "/tokenize": {"prompt": "the sky"},
    "/detokenize": {"tokens": [5, 6]},
}


def model_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """A model's folder one of whose files is changed."""
    shutil.copytree(valid.model, model := folder / "model")
    path = rng.choice(sorted(model.iterdir()))
    path.write_bytes(changed(rng, path.read_bytes()))
    few, out = ["--num-gpu-blocks", "64"], ["--out", str(folder / "out")]
    answered = ["generate", "--model", str(model), "--max-tokens", "3", "--config", str(valid.few)]
    replayed = ["run", str(valid.trace), "--limit", "2", "--max-output-tokens", "3", "--time-scale", "0"]
    return rng.choice((
        [*answered, "the sky"],
        [*answered, "the sky", "--raw", "--load-format", "dummy"],
        [*replayed, "--model", str(model), *few, *out],
        ["profile", "--model", str(model), *SMALLEST_PROFILE, *out],
        ["model", "describe", rng.choice((str(model), f"{model}@h100:tp=2"))],
        ["sim", str(valid.trace), "--latency", f"roofline:{model}@h100", *out],
    ))  # fmt: skip


def engine_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """What the engine is told by a file, and the traces that it replays."""
    few, out = ["--num-gpu-blocks", "64", "--model", str(valid.model)], ["--out", str(folder / "out")]
    bad = folder / "bad"
    if rng.random() < 0.5:
        bad.write_bytes(changed(rng, rng.choice([valid.trace.read_text(), *TRACES.values()]).encode()))
        at_once = ["--limit", "2", "--max-output-tokens", "3", "--time-scale", "0"]
        return ["run", str(bad), *few, *at_once, *out]
    bad.write_bytes(changed(rng, ENGINE.encode()))
    return rng.choice((
        ["generate", "the sky", "--max-tokens", "3", "--config", str(bad), "--model", str(valid.model)],
        ["run", str(valid.trace), "--limit", "2", "--time-scale", "0", "--config", str(bad), *few, *out],
        ["profile", "--config", str(bad), *SMALLEST_PROFILE, *few, *out],
        ["serve", "--simulate", "--config", str(bad)],
    ))  # fmt: skip


def planning_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """Traces, devices and plans of the commands that search."""
    bad, out = folder / "bad.toml", ["--out", str(folder / "out")]
    aim, roofline = ["--objective", "p99 TTFT <= 1 s", "--jobs", "1", "--limit", "4"], "roofline:qwen3-0.6b@h100"
    what = rng.random()
    if what < 0.4:
        bad.write_bytes(changed(rng, valid.device.read_bytes()))
        return rng.choice((
            ["plan", str(valid.trace), *aim, "--model", "qwen3-0.6b", "--devices", str(bad), "--price", "2", *out],
            ["sim", str(valid.trace), "--latency", f"roofline:qwen3-0.6b@{bad}", *out],
            ["model", "describe", f"qwen3-0.6b@{bad}"],
        ))  # fmt: skip
    if what < 0.7:
        bad.write_bytes(changed(rng, rng.choice([valid.trace.read_text(), *TRACES.values()]).encode()))
        return rng.choice((
            ["plan", str(bad), *aim, "--model", "qwen3-0.6b", "--devices", "h100", "--price", "2", *out],
            ["upgrade", str(bad), "--latency", roofline, "--jobs", "1", "--limit", "4"],
            ["tune", str(bad), *aim, "--latency", roofline],
        ))  # fmt: skip
    if what < 0.85:
        bad.write_bytes(changed(rng, valid.plan.read_bytes()))
        return ["capacity", "--plan", str(bad), "--jobs", "1", "--latency", roofline, *out]
    flags = ["--max-num-seqs 8", "--block-size=16", "--async-scheduling", "--no-enable-prefix-caching", "--x y"]
    flags[rng.randrange(len(flags))] = f"--max-num-seqs {rng.choice(WORDS)}"
    return ["sim", str(valid.trace), "--latency", str(valid.latency), "--vllm-args", " ".join(flags), *out]


def draft_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """Settings of drafts, laws of acceptance, and records of runs with drafts."""
    out, latency = ["--out", str(folder / "out")], str(valid.latency)
    simulated = ["sim", str(valid.trace), "--latency", latency, "--speculative-config"]
    what = rng.random()
    if what < 0.4:
        drafts = changed_value(rng, rng.choice((DRAFTED, DRAFTS | {"acceptance": str(valid.law)})))
        return [*simulated, json.dumps(drafts), *out]
    bad = folder / "bad"
    if what < 0.7:
        bad.write_bytes(changed(rng, valid.law.read_bytes()))
        return [*simulated, json.dumps(DRAFTS | {"acceptance": str(bad)}), *out]
    shutil.copytree(valid.drafted, bad)
    path = rng.choice(sorted(bad.iterdir()))
    path.write_bytes(changed(rng, path.read_bytes()))
    return rng.choice((
        ["fit", str(bad), *out, "--acceptance", str(folder / "out-of-drafts")],
        [*simulated, json.dumps(DRAFTS | {"acceptance": str(bad)}), *out],
        ["replay", str(bad)],
    ))  # fmt: skip


def fit_case(rng: random.Random, valid: Valid, folder: Path) -> list[str]:
    """Profiles of measured steps, and the runs beside them."""
    import gzip

    bad = folder / "bad.jsonl"
    content = changed(rng, gzip.decompress(valid.profile.read_bytes()))
    bad.write_bytes(content if rng.random() < 0.5 else gzip.compress(content))
    return ["fit", str(valid.real), "--profile", str(bad), "--out", str(folder / "out")]


def sampling_case(rng: random.Random, valid: Valid, folder: Path) -> Work:
    """Fields of SamplingParams; what cannot be is said by name, and who runs beside it is unharmed."""
    from twinserve.policies import SamplingParams

    names = rng.sample([one.name for one in fields(SamplingParams)], rng.randint(1, 2))
    return partial(sample_beside, valid.model, {name: junk_of(rng, name) for name in names}, rng.random() < 0.5)


def junk_of(rng: random.Random, name: str) -> Any:
    if name == "stop_token_ids":
        return rng.choice([*JUNK, (rng.choice(JUNK),)])
    if name == "logit_bias":
        return rng.choice([*JUNK, ((5, rng.choice(JUNK)),), ((rng.choice(JUNK), 1.0),)])
    return rng.choice([*JUNK, 1e-46, -2, 2.5, 5, 1 << 70, 1e-30])


def sample_beside(model: Path, values: dict[str, Any], at_once: bool) -> int:
    """In a process of its own: serve a request with such parameters beside another; 2 if it is refused in words."""
    from twinserve.engine.llm import LLM
    from twinserve.policies import SamplingParams
    from twinserve.settings.build_core import Settings
    from twinserve.settings.errors import InputError

    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    try:
        params = SamplingParams(**({"max_tokens": 4} | values))
    except ValueError as error:
        assert any(str(error).startswith(f"{name} ") for name in values) and "\n" not in str(error), error
        return _refused(error)
    settings = Settings(num_gpu_blocks=64, max_model_len=64)
    with closing(LLM(str(model), settings=settings, threads=1)) as llm:
        alone = llm.generate([[5, 6, 7]], plain)[0].token_ids
        try:
            found = llm.generate([[5, 6, 7], [8, 9]], [plain, params])
            assert found[0].token_ids == alone, found
        except InputError as error:
            assert llm.generate([[5, 6, 7]], plain)[0].token_ids == alone
            return _refused(error)
    return 0


def body_case(rng: random.Random, valid: Valid, folder: Path) -> Work:
    """The body of a request to a server with the engine behind it."""
    path = rng.choice(sorted(BODIES))
    body = json.dumps(changed_value(rng, BODIES[path])).encode()
    return partial(post, valid.url, path, changed(rng, body) if rng.random() < 0.3 else body)


def post(url: str, path: str, body: bytes) -> int:
    """In a process of its own: send a body; 2 if it is refused in the form that clients know."""
    import httpx

    answer = httpx.post(f"{url}{path}", content=body, headers={"content-type": "application/json"}, timeout=60)
    if answer.status_code == 200:
        return 0
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text)
    return _refused(ValueError(answer.json()["error"]["message"].replace("\n", " ")))


def _refused(error: ValueError) -> int:
    import sys

    print("twinserve:", error, file=sys.stderr)
    return 2
