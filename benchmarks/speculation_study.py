"""The page on when speculation pays: from recorded runs with drafts and without, each of which is decided again.

    python benchmarks/speculation_study.py [--results FOLDER] [--page FILE] [--check]

Reads FOLDER/CARD/speculation.tar.xz, which benchmarks/speculation_runs.py wrote, and writes the page, and
FOLDER/CARD/draft-study.json; with --check it writes neither, and exits with 1 if one would change. Where the archive
has profiles of the engine, each run is simulated by what is fitted to them, and the page says what the twin would have
said; and where FOLDER/cpu/lookup-texts.json is there, which benchmarks/speculation_texts.py writes, its table too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pages import percent, prose, table
from result_files import RESULTS, load_json, write_json
from speculation_twin import METRICS, errors, predicted_tok_s, simulated, summed

from twinserve.sim.profiles import Profile
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.run import fit_profile

PAGE = RESULTS.parents[1] / "docs" / "studies" / "speculation.md"


def main() -> int:
    parsing = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parsing.add_argument("--results", type=Path, default=RESULTS)
    parsing.add_argument("--page", type=Path, default=PAGE)
    parsing.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    arguments = parsing.parse_args()
    (archive,) = sorted(arguments.results.glob("*/speculation.tar.xz"))
    found, path = measured(archive), archive.parent / "draft-study.json"
    beside = arguments.results / "cpu" / "lookup-texts.json"
    text = page_of(found, load_json(beside) if beside.exists() else None)
    if arguments.check:
        is_same = path.exists() and load_json(path) == json.loads(json.dumps(found))
        return 0 if is_same and arguments.page.read_text(encoding="utf-8") == text else 1
    write_json(path, found)
    arguments.page.write_text(text, encoding="utf-8")
    return 0


def measured(path: Path, only: Collection[str] = ()) -> dict[str, Any]:
    """What each run of an archive took, and what came of its drafts.

    Args:
        only: names of runs; none are all.

    Raises:
        RuntimeError: a run was not decided again as it was.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(path) as archive:
            archive.extractall(scratch, filter="data")
        folder = Path(scratch) / "speculation"
        about = load_json(folder / "about.json")
        runs: list[dict[str, Any]] = []
        traffic: list[dict[str, Any]] = []
        decisions, options = 0, about["options"]
        profiles = profiles_of(folder)
        twins = {drafts: fit_profile(profile) for drafts, profile in profiles.items()}
        for k, rate in [(0, 0.0), *((k, rate) for k in options["drafts"] for rate in options["acceptance"])]:
            for batch in (*options["batches"], None):
                name = f"k{k}-a{rate}-{'traffic' if batch is None else f'n{batch}'}"
                if (only and name not in only) or (batch is None and not (folder / name).exists()):
                    continue
                record = load_record(folder / name)
                again = replay(record)
                if not again.is_exact:
                    raise RuntimeError(f"{name}: {again.equal} of {again.recorded} decisions were made again")
                decisions += again.recorded
                summary = record.run["summary"]
                made = {"drafts": k, "acceptance": rate, "requests": summary["requests"], "steps": summary["steps"]}
                made["output_tok_s"] = round(summary["output_tok_s"], 1)
                if k and batch is not None:
                    made["step_ms"] = step_ms(record, batch)
                if (latency := twins.get(k > 0)) is not None:
                    made["errors"] = errors(record, simulated(record, latency, record.path if k else None))
                    if batch is not None:
                        made["twin_tok_s"] = predicted_tok_s(record, latency, rate)
                (traffic if batch is None else runs).append(made)
    launches = prompt_launches_ms(profiles[True]) if True in profiles else {}
    found = {"about": about, "decisions": decisions, "runs": runs}
    return found | ({"traffic": traffic} if traffic else {}) | ({"prompt_launches": launches} if launches else {})


def step_ms(record: RunRecord, batch: int) -> float:
    """The median time of a run's steps of decodes in which all its requests take part."""
    whole = [step for step in record.steps if not step["prompt_tokens"] and step["sampled"] == batch]
    return round(statistics.median((step["end_ns"] - step["start_ns"]) / 1e6 for step in whole), 3)


def prompt_launches_ms(profile: Profile) -> dict[str, float]:
    """Of the profiled steps with prompts, the median time of their launches and on the device."""
    samples = [one for one in profile.samples if one.features.prompt_tokens]
    return {
        name: round(statistics.median(getattr(one, name) for one in samples) / 1e6, 1)
        for name in ("launch_ns", "device_ns")
    }


def profiles_of(folder: Path) -> dict[bool, Profile]:
    """The profiles of the engine, with drafts (True) and without; nothing where none were made."""
    return {not path.name.startswith("profile-k0."): Profile.load(path) for path in folder.glob("profile-k*.jsonl.gz")}


def break_even(points: list[tuple[int, float]]) -> str:
    """Up to how many requests drafts pay: of (requests, times as fast), where the line between two points crosses 1."""
    if points[0][1] <= 1:
        return "never"
    for (few, above), (many, below) in zip(points, points[1:], strict=False):
        if below <= 1:
            return f"{few + (many - few) * (above - 1) / (above - below):.0f}"
    return f"beyond {points[-1][0]}"


class Rates:
    """Tokens a second of each case, and what follows from them.

    Args:
        runs: of a study.
        name: of the field that holds the rate: what was measured, or what the twin says.
    """

    def __init__(self, found: dict[str, Any], name: str) -> None:
        options = found["about"]["options"]
        self._drafts, self._batches = options["drafts"], options["batches"]
        self._rates = {(run["drafts"], run["acceptance"], run["requests"]): run[name] for run in found["runs"]}

    def times(self, k: int, rate: float) -> list[float]:
        """By requests at once, how many times as fast as without drafts."""
        return [self._rates[k, rate, batch] / self._rates[0, 0.0, batch] for batch in self._batches]

    def crossings(self, rate: float) -> list[str]:
        """By drafts, up to how many requests they pay."""
        return [break_even(list(zip(self._batches, self.times(k, rate), strict=True))) for k in self._drafts]

    def winners(self, rate: float) -> list[int]:
        """By requests at once, how many drafts are fastest."""
        choices = [0, *self._drafts]
        return [max(choices, key=lambda k: self._rates[k, rate if k else 0.0, batch]) for batch in self._batches]

    def loss(self, rate: float, choices: list[int]) -> float:
        """What is lost at most, as a share of the fastest, where so many drafts are taken, by requests at once."""
        lost = []
        for batch, best, k in zip(self._batches, self.winners(rate), choices, strict=True):
            fastest, taken = (self._rates[one, rate if one else 0.0, batch] for one in (best, k))
            lost.append(1 - taken / fastest)
        return max(lost)


def both(measured: list[Any], twin: list[Any] | None) -> list[str]:
    """Cells with what was measured and, behind it in brackets, what the twin says."""
    if twin is None:
        return [str(value) for value in measured]
    return [f"{value} ({said})" for value, said in zip(measured, twin, strict=True)]


def page_of(found: dict[str, Any], texts: dict[str, Any] | None = None) -> str:
    """The page; `texts` are the results of runs with prompt lookup."""
    about, runs = found["about"], found["runs"]
    options, draft = about["options"], about["draft"]
    real = Rates(found, "output_tok_s")
    twin = Rates(found, "twin_tok_s") if all("twin_tok_s" in run for run in runs) else None
    rows, crossings, best = [], [], []
    for rate in options["acceptance"]:
        for k in options["drafts"]:
            said = None if twin is None else [f"{times:.2f}" for times in twin.times(k, rate)]
            rows.append([f"{rate:g}", str(k), *both([f"{times:.2f}" for times in real.times(k, rate)], said)])
        crossings.append([f"{rate:g}", *both(real.crossings(rate), None if twin is None else twin.crossings(rate))])
        best.append([f"{rate:g}", *both(real.winners(rate), None if twin is None else twin.winners(rate))])
    heads = [f"{batch} at once" for batch in options["batches"]]
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
            "drafts in a step" + (":" if twin is None else "; in brackets what the twin says, see below:")
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
        *(twin_lines(found, real, twin) if twin is not None else []),
        *prose(
            "Prompt lookup has no passes of a model to pay for; "
            "[the page beside the cycles](../cycles/speculation.md) has its figures."
        ),
        *(text_lines(texts) if texts is not None else []),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


def twin_lines(found: dict[str, Any], real: Rates, twin: Rates) -> list[str]:
    """What the twin says, and how far it is off."""
    options, traffic = found["about"]["options"], found.get("traffic", [])
    alike, cases, lost = 0, 0, 0.0
    for rate in options["acceptance"]:
        chosen = twin.winners(rate)
        alike += sum(one == other for one, other in zip(chosen, real.winners(rate), strict=True))
        lost, cases = max(lost, real.loss(rate, chosen)), cases + len(chosen)
    lines = [
        "## By the twin",
        "",
        *prose(
            "The twin has seen none of these runs: a latency model is fitted to steps that were measured before, "
            "without drafts and with them ([latency.md](../latency.md)), and the acceptance is the given probability, "
            f"drawn anew in simulations of which the mean is taken. It names the fastest number of drafts in "
            f"{alike} of {cases} cases" + (f"; where it names another, {lost:.1%} is lost at most." if lost else ".")
        ),
        *prose(
            "Given what was accepted, by how much the simulated run is off, the mean of its size and the most. Steps "
            "of as many requests and drafts compute the same whatever is accepted, and yet their median took up to "
            f"{paces(found):.0%} longer in one run than in another, a few seconds apart: that much no model can know."
        ),
    ]
    groups = {f"{k} drafts": [run for run in found["runs"] if run["drafts"] == k] for k in (0, *options["drafts"])}
    rows = []
    for name, runs in groups.items():
        sizes = [[abs(run["errors"][metric]) for run in runs] for metric in METRICS]
        rows.append([name, *(f"{sum(own) / len(own):.1%}, {max(own):.1%}" for own in sizes)])
    lines += table(["runs at once", *METRICS.values()], rows, numbers=True)
    if traffic:
        lines += prose(
            f"{traffic[0]['requests']} requests of many lengths, {options['rate']:g} a second, by what was accepted:"
        )
        rows = [
            [f"{run['drafts']} drafts, {run['acceptance']:g}", *(percent(run["errors"][metric]) for metric in METRICS)]
            for run in traffic
        ]
        lines += table(["traffic", *METRICS.values()], rows, numbers=True)
        launches = found["prompt_launches"]
        lines += prose(
            "The times to the first token are the worst. A launch waits for the step before it where sequences have "
            f"left since, and while the profile was made a step with prompts so took {launches['launch_ns']} ms to be "
            f"launched, at the median, beside {launches['device_ns']} ms on the device, all of which the model takes "
            "for the host's work. The wait is not counted any more; this profile was made before that."
        )
    return lines


def paces(found: dict[str, Any]) -> float:
    """By how much the slowest of the runs that differ only in what is accepted is slower than the fastest, at most."""
    times: dict[tuple[int, int], list[float]] = {}
    for run in found["runs"]:
        if run["drafts"]:
            times.setdefault((run["drafts"], run["requests"]), []).append(run["step_ms"])
    return max(max(same) / min(same) for same in times.values()) - 1


def text_lines(texts: dict[str, Any]) -> list[str]:
    """How far the twin is off on runs with prompt lookup."""
    cases, options = texts["cases"], texts["options"]
    decisions = sum(run["decisions"]["equal"] for runs in cases.values() for run in runs)
    paces = sorted(run["pace"] for runs in cases.values() for run in runs)
    rows = [
        [f"{name}, {way}", f"{statistics.fmean(run['tokens_per_step'] for run in runs):.2f}"]
        + [summed(runs, way, metric) for metric in METRICS]
        for name, runs in cases.items()
        for way in runs[0]["errors"]
    ]
    return [
        "## Prompt lookup by the twin",
        "",
        *prose(
            f"{texts['model']} on a {texts['device']} looks drafts up and serves lists whose lines repeat, and prose, "
            f"{options['requests']} requests of each in {options['rounds']} rounds (`{texts['command']}`, commit "
            f"{texts['commit']}); {decisions:,} decisions are made again, which is all of them. The latency model is "
            "fitted to steps measured in each round; what is accepted is as recorded, request by request, or by a "
            f"law {texts.get('law', 'that was fitted to it')}. The load average was {min(texts['load'])} to "
            f"{max(texts['load'])}; a run's steps took {paces[0]:.2f} to {paces[-1]:.2f} times what the model says of "
            "all rounds together, and that taken out, by the run's own steps, is beside it (machine as fast). Medians "
            "of the rounds, and the range:"
        ),
        *table(["text, what is accepted", "tokens a step", *METRICS.values()], rows, numbers=True),
    ]


if __name__ == "__main__":
    sys.exit(main())
