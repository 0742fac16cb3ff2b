"""A record that is not whole, or not of one piece, is refused by every command, with the row where it ends."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import twinserve.traces.runs
from twinserve.settings.errors import InputError
from twinserve.traces.lines import Line
from twinserve.traces.runs.compare import compare
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.traces.runs.rows import check_output, check_request, check_run, check_step

SCHEMA = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
JUNK = (
    None,
    True,
    -1,
    1.5,
    "x",
    "",
    [],
    [1],
    [[1]],
    [[1, 2, 3, 4]],
    [[{}, 5, [1]]],
    {},
    {"a": 1},
    [None],
    [-1],
    [[-1]],
)


@pytest.fixture
def real(record_run) -> Path:
    path = record_run("real", real=True, abort_share=0.02, num_gpu_blocks=30, max_model_len=250).path
    edit_run(path, facts__tokens={"vocab_size": 1000, "first_id": 1}, facts__eos_token_id=0)
    return path


def cut(path: Path, keep: int) -> None:
    """Keep so many lines of a file, packed or not."""
    packed = path.suffix == ".gz"
    content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
    content = b"".join(content.splitlines(keepends=True)[:keep])
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)


def num_lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


def edit_run(folder: Path, **changes) -> None:
    """Change a run.json; a dotted name leads into it, `...` takes a field away."""
    run = json.loads((folder / "run.json").read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        inner = run
        for step in way:
            inner = inner[step]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    (folder / "run.json").write_text(json.dumps(run))


@pytest.mark.parametrize("name", ["steps", "requests"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_file_that_ends_early_is_refused_with_the_row_where_it_ends(real, name, share):
    whole = json.loads((real / "run.json").read_text())["summary"][name]
    rows = int(num_lines(real / f"{name}.jsonl") * share)
    cut(real / f"{name}.jsonl", rows)
    with pytest.raises(InputError, match=rf"{name}.jsonl:{rows}: .*ends here after \d+ {name}, expected {whole}"):
        load_record(real)


@pytest.mark.parametrize("keep", [0, 1, 30])
def test_outputs_that_end_early_are_refused(real, keep):
    cut(real / "outputs.jsonl.gz", keep)
    with pytest.raises(InputError, match=r"requests.jsonl:\d+: output_tokens is \d+, expected 0"):
        load_record(real)


def test_a_line_that_stands_twice_is_refused(real):
    content = gzip.decompress((real / "outputs.jsonl.gz").read_bytes())
    (real / "outputs.jsonl.gz").write_bytes(gzip.compress(content + content.splitlines(keepends=True)[0]))
    with pytest.raises(InputError, match=r"outputs.jsonl.gz:61: id is \d+, expected a request of requests.jsonl, and "):
        load_record(real)


@pytest.mark.parametrize("name", ["steps.jsonl", "requests.jsonl", "outputs.jsonl.gz", "run.json"])
def test_a_file_of_another_run_is_refused_or_the_replay_differs(record_run, real, name):
    other = record_run("other", seed=9, real=True, abort_share=0.05, num_gpu_blocks=30, max_model_len=250).path
    shutil.copy(other / name, real / name)
    try:
        result = replay(load_record(real))
    except InputError as error:
        assert str(error).startswith(str(real))
    else:
        assert result.difference is not None


@pytest.mark.parametrize("metric", ["finished", "refused", "aborted", "output_tokens", "preemptions", "cached_tokens"])
def test_a_summary_that_contradicts_the_rows_is_refused(real, metric):
    value = json.loads((real / "run.json").read_text())["summary"][metric]
    edit_run(real, **{f"summary__{metric}": value + 1})
    with pytest.raises(
        InputError, match=rf"run.json: summary.{metric} is {value + 1}, .*expected {value}, as requests"
    ):
        load_record(real)


@pytest.mark.parametrize("metric", ["duration_s", "ttft_s__p99", "e2e_s__mean", "output_tok_s"])
def test_a_summary_whose_times_contradict_the_rows_is_refused(real, metric):
    edit_run(real, **{f"summary__{metric}": 1e6})
    with pytest.raises(InputError, match=f"summary.{metric.replace('__', '.')} is 1000000.0, .*not of one piece"):
        load_record(real)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"summary": ...}, "run.json: summary is missing"),
        ({"summary__duration_s": ...}, "run.json: summary.duration_s is missing"),
        ({"summary__itl_s": "1"}, "summary.itl_s is '1', expected"),
        ({"summary__ttft_s__p99": ""}, "summary.ttft_s.p99 is '', expected"),
        ({"summary__ttft_s__p50": []}, "summary.ttft_s.p50 is [], expected"),
        ({"summary__steps": True}, "summary.steps is True, expected"),
        ({"summary__dropped": "few"}, "summary.dropped is 'few', expected"),
        ({"world": "dream"}, "world is 'dream', expected"),
        ({"facts__trace": "x"}, "facts.trace is 'x', expected"),
        ({"facts__tokens": {"vocab_size": 0}}, "facts.tokens.vocab_size is 0, expected"),
        ({"facts__eos_token_id": "x"}, "facts.eos_token_id is 'x', expected"),
        ({"device": 5}, "device is 5, expected"),
    ],
)
def test_what_is_wrong_in_run_json_is_named(real, changes, words):
    edit_run(real, **changes)
    with pytest.raises(InputError) as error:
        load_record(real)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_runs_that_do_not_say_what_they_replayed_are_not_compared(real):
    record = load_record(real)
    with pytest.raises(InputError, match=r"run.json: facts.trace is missing"):
        compare(record, record)


def test_a_replay_says_how_many_requests_were_left_unanswered(real):
    for number, line in enumerate(lines := (real / "requests.jsonl").read_text().splitlines()):
        row = json.loads(line)
        if row["finish_reason"] == "abort":
            lines[number] = json.dumps(row | {"finish_reason": None})
    (real / "requests.jsonl").write_text("\n".join(lines) + "\n")
    aborted = json.loads((real / "run.json").read_text())["summary"]["aborted"]
    edit_run(real, summary__aborted=0)
    result = replay(load_record(real))
    assert aborted and result.is_exact and result.unanswered == aborted


def test_a_prompt_that_holds_answers_which_the_record_lacks_is_refused(real):
    lines = (real / "requests.jsonl").read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if any(part[0] < 0 for part in json.loads(line)["prompt"]))
    row = json.loads(lines[number])
    row["prompt"] = [
        [-1001, start, length] if text < 0 else [text, start, length] for text, start, length in row["prompt"]
    ]
    lines[number] = json.dumps(row)
    (real / "requests.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"expected parts of texts and of answers .* for request {row['id']}"):
        replay(load_record(real))


# --- fields ---


def rows_of(record_run) -> dict[str, list[dict]]:
    runs = [record_run("sim", max_model_len=250), record_run("with tokens", real=True, abort_share=0.02)]
    found: dict[str, list[dict]] = {"request": [], "step": [], "run": []}
    for run in runs:
        for name, kind in (("requests", "request"), ("steps", "step")):
            found[kind] += [json.loads(line) for line in (run.path / f"{name}.jsonl").read_text().splitlines()[:3]]
        found["run"].append(json.loads((run.path / "run.json").read_text()))
    whole = {"end_ns": [900, 910, 920], "start_ns": [100], "grown": [[2, 5, [17]]]}
    found["step"].append(found["step"][0] | {"count": 4, "repeats": whole})
    return found


@pytest.mark.parametrize(("kind", "check"), [("request", check_request), ("step", check_step), ("run", check_run)])
def test_what_the_published_schema_refuses_is_refused(record_run, kind, check):
    """A field missing, and each field of each row with values of other kinds; a limit of 63 bits is ours alone."""
    validator = Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})
    tried = 0
    for row in rows_of(record_run)[kind]:
        check(Line(Path("file"), 1, row))
        required = SCHEMA["$defs"][kind]["required"]
        read = [name for name in row if name not in ("schema", "versions")]
        changed = [{n: v for n, v in row.items() if n != name} for name in read if name in required]
        changed += [row | {name: copy.deepcopy(value)} for name in read for value in JUNK]
        for candidate in changed:
            if validator.is_valid(candidate):
                continue
            with pytest.raises(InputError) as error:
                check(Line(Path("file"), 1, candidate))
            assert str(error.value).startswith("file:1: ") and "\n" not in str(error.value)
            tried += 1
    assert tried > 100


def test_outputs_are_numbers():
    for row in ({"id": 1}, {"id": "x", "tokens": []}, {"id": 1, "tokens": [1.5]}, {"id": 1, "tokens": [], "prompt": 3}):
        with pytest.raises(InputError, match="^file:1: "):
            check_output(Line(Path("file"), 1, row))
