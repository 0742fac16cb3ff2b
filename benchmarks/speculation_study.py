"""The page on when speculation pays: from recorded runs with drafts and without, each of which is decided again.

    python benchmarks/speculation_study.py [--results FOLDER] [--page FILE] [--check]

Reads FOLDER/CARD/speculation.tar.xz, which benchmarks/speculation_runs.py wrote, and writes the page, and
FOLDER/CARD/draft-study.json; with --check it writes neither, and exits with 1 if one would change.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from pages import prose, table
from result_files import RESULTS, load_json, write_json

from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay

PAGE = RESULTS.parents[1] / "docs" / "studies" / "speculation.md"


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--results", type=Path, default=RESULTS)
    parsing.add_argument("--page", type=Path, default=PAGE)
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parsing.parse_args()
    (archive,) = sorted(arguments.results.glob("*/speculation.tar.xz"))
    found, path = measured(archive), archive.parent / "draft-study.json"
    text = page_of(found)
    if arguments.check:
        is_same = path.exists() and load_json(path) == json.loads(json.dumps(found))
        return 0 if is_same and arguments.page.read_text(encoding="utf-8") == text else 1
    write_json(path, found)
    arguments.page.write_text(text, encoding="utf-8")
    return 0


def measured(path: Path) -> dict[str, Any]:
    """What each run of an archive took, and what came of its drafts.

    Raises:
        RuntimeError: a run was not decided again as it was.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
        folder = Path(scratch) / "speculation"
        about = load_json(folder / "about.json")
        runs, decisions = [], 0
        options = about["options"]
        for k, rate in [(0, 0.0), *((k, rate) for k in options["drafts"] for rate in options["acceptance"])]:
            for batch in options["batches"]:
                name = f"k{k}-a{rate}-n{batch}"
                record = load_record(folder / name)
                again = replay(record)
                if not again.is_exact:
                    raise RuntimeError(f"{name}: {again.equal} of {again.recorded} decisions were made again")
                decisions += again.recorded
                summary = record.run["summary"]
                made = {"drafts": k, "acceptance": rate, "requests": batch, "steps": summary["steps"]}
                runs.append(made | {"output_tok_s": round(summary["output_tok_s"], 1)})
    return {"about": about, "decisions": decisions, "runs": runs}


def break_even(points: list[tuple[int, float]]) -> str:
    """Up to how many requests drafts pay: of (requests, times as fast), where the line between two points crosses 1."""
    if points[0][1] <= 1:
        return "never"
    for (few, above), (many, below) in zip(points, points[1:], strict=False):
        if below <= 1:
            return f"{few + (many - few) * (above - 1) / (above - below):.0f}"
    return f"beyond {points[-1][0]}"


def page_of(found: dict[str, Any]) -> str:
    """The page."""
    about, runs = found["about"], found["runs"]
    options = about["options"]
    rate_of = {(run["drafts"], run["acceptance"], run["requests"]): run["output_tok_s"] for run in runs}
    batches = options["batches"]
    draft = about["draft"]

    def times(k: int, rate: float, batch: int) -> float:
        return rate_of[k, rate, batch] / rate_of[0, 0.0, batch]

    rows, crossings, best = [], [], []
    for rate in options["acceptance"]:
        for k in options["drafts"]:
            rows.append([f"{rate:g}", str(k), *(f"{times(k, rate, batch):.2f}" for batch in batches)])
        own = [break_even([(batch, times(k, rate, batch)) for batch in batches]) for k in options["drafts"]]
        crossings.append([f"{rate:g}", *own])
        choices = [0, *options["drafts"]]
        winners = [max(choices, key=lambda k: rate_of[k, rate if k else 0.0, batch]) for batch in batches]
        best.append([f"{rate:g}", *map(str, winners)])
    heads = [f"{batch} at once" for batch in batches]
    lines = [
        "# When speculation pays",
        "",
        *prose(
            f"`python benchmarks/speculation_study.py` writes this page. One {about['device'].upper()} serves "
            f"{options['model']} with random weights in {options['dtype']}; a model of {draft['layers']} layers and a "
            f"hidden size of {draft['hidden']} drafts for it, with random weights too, so that which drafts are "
            f"accepted is drawn, each with the given probability. Requests of {options['prompt_tokens']} tokens in and "
            f"{options['output_tokens']} out come at once and all of them run; each case was served once "
            f"(`{about['command'].split(' --commit')[0]}`, commit {about['commit']}). All {found['decisions']:,} "
            f"decisions of these runs are "
            f"made again from their records."
        ),
        *prose(
            "Tokens a second, as times those without drafts, by the probability that a draft is accepted and the "
            "drafts in a step:"
        ),
        *table(["acceptance", "drafts", *heads], rows, numbers=True),
        *prose(
            "A step of few tokens takes as long as reading the weights, so drafts cost little where few requests run. "
            "With more of them, the tokens that are computed in vain take time of their own, and every pass of the "
            "small model is paid by all: the requests at once up to which drafts pay, between the measured numbers on "
            "a straight line:"
        ),
        *table(["acceptance", *(f"{k} drafts" for k in options["drafts"])], crossings, numbers=True),
        *prose("The number of drafts that was fastest; 0 is none:"),
        *table(["acceptance", *heads], best, numbers=True),
        *prose(
            "Prompt lookup has no passes of a model to pay for; "
            "[the page beside the cycles](../cycles/speculation.md) has its figures. A simulation of such runs counts "
            "rows with drafts as prompts are counted, which is what steps kernel by kernel do; these graphs attend to "
            "them as to decodes, so these runs are not held against the simulator yet."
        ),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(main())
