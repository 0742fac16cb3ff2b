"""Files and calls of people who do this job, each with what has to come of it.

`python tests/cases/test_cases.py` prints what came, as a table, and has exit status 1 where something else did. The
environment variable TWINSERVE_CASES names the folder of the files; without it nothing is tried.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
sys.path.insert(0, str(Path(__file__).parents[1]))

LATENCY = "smollm2-135m-cpu-2-threads"
SMALL = ("--num-gpu-blocks", "64", "--max-num-seqs", "8")
Came = tuple[int, str, str]


def command(*words: object) -> Came:
    """Exit status, stdout and stderr of a command, run in this process."""
    from twinserve.cli import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["twinserve", *map(str, words)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = argv
    return 0, out.getvalue(), err.getvalue()


def refused(came: Came, *words: str) -> str:
    """The one line by which something was refused, with these words in it."""
    code, out, err = came
    lines = [line for line in err.splitlines() if line.startswith("twinserve: ")]
    assert (code, out) == (2, "") and lines == err.splitlines()[-1:], came
    assert all(word in lines[0] for word in words), lines[0]
    return "refused: " + re.sub(r"\S*/", "", lines[0].removeprefix("twinserve: "))


def stated(path: Path, **expected: object) -> str:
    """What `trace stat` says of a file, some of which is expected."""
    code, out, err = command("trace", "stat", path, "--json")
    assert code == 0, err
    said = json.loads(out)
    found = {
        "format": said["trace"]["format"], "requests": said["requests"], "sessions": said["sessions"],
        "prompts": said["prompt_tokens"]["total"], "outputs": said["output_tokens"]["total"],
        "span_s": round(said["span_s"], 3), "hits_of_16": said["reuse"]["16"]["hit_tokens"],
    } | {name: count for kind in said["trace"]["handled"].values() for name, count in kind.items()}  # fmt: skip
    found |= {name: count for name, count in said["trace"]["notes"].items() if name == "arrival_not_said"}
    assert {name: found.get(name) for name in expected} == expected, found
    return "read: " + ", ".join(f"{name} {value}" for name, value in expected.items())


def model(folder: Path) -> Path:
    """A Hugging Face folder of a tiny model."""
    pytest.importorskip("torch")
    from valid import make_model

    make_model(folder / "model")
    return folder / "model"


def of_booleans(cases: Path, folder: Path) -> str:
    """`logprobs=True` is refused by name where it is made, and vLLM's words mean what they mean there."""
    from twinserve.policies import SamplingParams

    with pytest.raises(ValueError, match="^logprobs is True, expected an integer") as error:
        SamplingParams(logprobs=True)  # type: ignore[arg-type]
    every, endless = SamplingParams(top_k=-1), SamplingParams(max_tokens=None)
    assert every.top_k in (-1, 0) and endless.max_tokens is None
    return f"refused where it is made: {error.value}; top_k=-1 and max_tokens=None are taken as vLLM takes them"


def of_half_an_emoji(cases: Path, folder: Path) -> str:
    """A lone surrogate is U+FFFD, and nobody's answer is lost."""
    from contextlib import closing

    tiny = model(folder)
    from twinserve.engine.llm import LLM
    from twinserve.policies import SamplingParams
    from twinserve.settings.build_core import Settings

    greedy = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with closing(LLM(str(tiny), settings=Settings(num_gpu_blocks=64), threads=1)) as llm:
        answers = [
            answer.token_ids for answer in llm.generate(["The sky is", "nice \ud83d day", "nice \ufffd day"], greedy)
        ]
    assert [len(answer) for answer in answers] == [3, 3, 3] and answers[1] == answers[2]
    (folder / "few.toml").write_text("num_gpu_blocks = 64\n")
    code, _, err = command("generate", "caf\udce9", "--max-tokens", 3, "--model", tiny, "--config", folder / "few.toml")
    assert code == 0, err
    return "answered, as with U+FFFD in its place; so does `generate`"


def of_a_tokenizer_model_alone(cases: Path, folder: Path) -> str:
    """With sentencepiece it is read; without, one line asks for it."""
    pytest.importorskip("torch")
    pytest.importorskip("sentencepiece")
    from twinserve.engine.models.source import load_tokenizer
    from twinserve.settings.errors import InputError

    (folder / "tokenizer.model").write_bytes((cases / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("The sky", add_special_tokens=False)).strip()
    find = importlib.util.find_spec
    with (
        mock.patch.dict(sys.modules, {"sentencepiece": None}),
        mock.patch(
            "importlib.util.find_spec", lambda name, *more: None if name == "sentencepiece" else find(name, *more)
        ),
        pytest.raises(InputError) as error,
    ):
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and "needs the package sentencepiece" in str(error.value)
    return "read; without sentencepiece refused: tokenizer.model: needs the package sentencepiece"


def of_experts(cases: Path, folder: Path) -> str:
    """21.8 G parameters, and a pool of what they leave."""
    from twinserve.sim.roofline import RooflineLatency

    priced = RooflineLatency.parse(f"{cases / 'ernie-4.5-moe'}@h100")
    billions, blocks = priced.shape.num_parameters / 1e9, priced.num_blocks(16)
    assert billions == pytest.approx(21.83, rel=0.001) and 32_000 < blocks < 36_000
    return f"priced: {billions:.2f} G parameters, {blocks} blocks of 16 on an H100"


def of_what_convert_writes(cases: Path, folder: Path) -> str:
    """A prompt of 12,000 parts goes through every written format and comes back."""
    from twinserve.traces.readers import read_trace, write_trace
    from twinserve.traces.request import Part, Request

    parts = tuple(Part(7_000_000 + number, 0, 16) for number in range(12_000))
    write_trace(folder / "trace.jsonl", [Request(0, 0, parts, 5)], {})
    for form in ("ours", "mooncake", "azure"):
        assert command("trace", "convert", folder / "trace.jsonl", folder / form, "--format", form)[0] == 0
        assert tuple(read_trace(folder / form).requests[0].parts) == parts
        stated(folder / form, requests=1, prompts=192_000)
    return "read again: ours, mooncake, azure, each 192,000 tokens in 12,000 parts"


def of_times_since_1970(cases: Path, folder: Path) -> str:
    """A real run begins at once."""
    path = cases / "mooncake_epoch_ms.jsonl"
    stated(path, format="mooncake", requests=6, span_s=3.5)
    served = command("run", path, "--model", model(folder), "--limit", 2, "--max-output-tokens", 2, *SMALL, "--json")
    assert served[0] == 0, served[2]
    summary = json.loads(served[1])
    assert summary["finished"] == 2 and summary["duration_s"] < 120
    return "served: the first request at 0, and when that was is kept (epoch_ns)"


def of_a_week(cases: Path, folder: Path) -> str:
    """What lies behind the limit or the window's end is counted and not read."""
    rows = "".join(f"2024-05-10 00:{n // 60:02}:{n % 60:02}.5,{n + 1},5\r\n" for n in range(600))
    (folder / "week.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\r\n" + rows + "no row\r\n" * 200_000)
    for options in (("--limit", 100), ("--window-s", "0:100")):
        code, out, err = command("trace", "stat", folder / "week.csv", "--json", *options)
        assert code == 0 and json.loads(out)["requests"] == 100, err
    refused(command("trace", "stat", folder / "week.csv"), ":602: ", "expected 3 columns")
    return "--limit 100 and --window-s 0:100: 100 requests, 200,500 rows behind them not read"


def of_a_byte_order_mark(cases: Path, folder: Path) -> str:
    """Settings with a byte order mark are read; a field spelt vLLM's way is asked after."""
    assert command("trace", "make", "--out", folder / "trace", "--requests", 5)[0] == 0
    sim = ("sim", folder / "trace", "--latency", LATENCY, "--config")
    code, _, err = command(*sim, cases / "settings_bom.toml", "--out", folder / "run")
    assert code == 0, err
    assert json.loads((folder / "run" / "run.json").read_text())["settings"]["max_num_seqs"] == 8
    (folder / "vllm.toml").write_text("max-num-seqs = 8\n")
    asked = refused(command(*sim, folder / "vllm.toml"), "max-num-seqs is 8", "did you mean max_num_seqs")
    return f"read: max_num_seqs 8; beside it {asked}"


def of_untimed(name: str, **expected: object) -> Callable[[Path, Path], str]:
    """A file that does not say when requests come: lengths are read, a replay asks for a rate."""

    def check(cases: Path, folder: Path) -> str:
        read = stated(cases / name, **expected)
        sim = ("sim", cases / name, "--latency", LATENCY)
        refused(command(*sim), "does not say when requests come: expected session_rate")
        assert command(*sim, "--session-rate", 2)[0] == 0
        return f"{read}; replayed with --session-rate, else refused"

    return check


def of_file(name: str, **expected: object) -> Callable[[Path, Path], str]:
    """A file that is read, and simulated."""

    def check(cases: Path, folder: Path) -> str:
        read = stated(cases / name, **expected)
        code, _, err = command("sim", cases / name, "--latency", LATENCY)
        assert code in (0, 3), err
        return read

    return check


def of_refusal(name: str, *words: str) -> Callable[[Path, Path], str]:
    """A file that is refused for the right reason."""
    return lambda cases, folder: refused(command("trace", "stat", cases / name), *words)


CASES: dict[str, tuple[str, Callable[[Path, Path], str]]] = {
    "1": ("guidellm: a sample", of_refusal("guidellm_0.3_sampled.json", "holds a sample, 8 of 400 requests")),
    "2": (
        "vLLM: a failure without a reason",
        of_file("vllm_bench_failed_without_reason.json", format="vllm-bench", requests=2, outputs=20, failed=1),
    ),
    "3": ("logprobs=True", of_booleans),
    "4": ("half of an emoji", of_half_an_emoji),
    "5": ("tokenizer.model alone", of_a_tokenizer_model_alone),
    "6": ("ernie-4.5-moe", of_experts),
    "7": ("a column twice", of_refusal("azure_column_twice.csv", "'ContextTokens' stands 2 times")),
    "8": ("what convert writes", of_what_convert_writes),
    "9": ("milliseconds since 1970", of_times_since_1970),
    "10": ("a week of rows", of_a_week),
    "11": ("AIBrix's workload", of_refusal("aibrix_workload.jsonl", "is an AIBrix workload", "which is not read")),
    "12": (
        "Azure 2025, with images",
        of_file("azure_2025_multimodal.csv", format="azure", requests=4, prompts=2761, span_s=7.063, images_left_out=2),
    ),
    "13": ("AIPerf's sessions", of_file("aiperf_sessions.jsonl", format="aiperf", requests=4, sessions=2)),
    "13b": ("Bailian", of_file("bailian_blksz_16.jsonl", format="bailian", requests=3, sessions=2, prompts=196)),
    "13c": (
        "AIPerf's fixed schedule",
        of_file("aiperf_fixed_schedule.jsonl", format="aiperf", requests=3, unknown_output_served_as_one=3),
    ),
    "14": ("WEKA a line each", of_file("weka_conversation_a_line.jsonl", format="weka", requests=4, sessions=2)),
    "14b": (
        "WEKA, part-filled blocks",
        of_file("weka_part_filled_ids.json", format="weka", requests=2, id_of_a_part_filled_block=2),
    ),
    "15": ("settings with a byte order mark", of_a_byte_order_mark),
    "16": (
        "vLLM --append-result",
        of_file("vllm_bench_append_result.json", format="vllm-bench", requests=6, results_one_after_the_other=2),
    ),
    "16b": (
        "SGLang, a rate a line",
        of_untimed("sglang_bench_two_rates.jsonl", format="sglang-bench", requests=6, arrival_not_said=6, span_s=0.0),
    ),
    "17": (
        "ShareGPT_V3",
        of_untimed("sharegpt_v3_like.json", format="sharegpt-v3", requests=2, sessions=2, arrival_not_said=2),
    ),
}


@pytest.fixture(scope="module")
def cases() -> Path:
    folder = os.environ.get("TWINSERVE_CASES")
    if folder is None:
        pytest.skip("TWINSERVE_CASES is unset: it names a folder of files as people have them")
    return Path(folder)


@pytest.mark.parametrize("number", CASES)
def test_a_case_comes_out_as_it_should(cases, tmp_path, number):
    CASES[number][1](cases, tmp_path)


def test_every_file_of_the_folder_belongs_to_a_case(cases):
    text = Path(__file__).read_text()
    names = {path.name for path in cases.iterdir()} - {"README.md"}
    assert names and {name for name in names if name not in text} == set()


def main() -> int:
    """Print what came of each case."""
    folder, status = Path(os.environ["TWINSERVE_CASES"]), 0
    print("| # | case | outcome |\n| --- | --- | --- |")
    for number, (words, check) in CASES.items():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                came = check(folder, Path(scratch))
            except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
                came, status = f"**{type(error).__name__}: {error}**", 1
        print(f"| {number} | {words} | {' '.join(came.split())[:300]} |", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
