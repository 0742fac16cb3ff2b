"""What a benchmark of one of the seven cycles finds: rows, cases, figures and expectations, and its JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from environment import commit, device_folder, versions
from quantities import duration, figure, quantity, speed_up
from result_files import write_json
from subject import Subject
from timing import in_turns, spread
from work import serve, yardstick, yardstick_in_words

from twinserve.engine.device_queue import device_name
from twinserve.engine.kv_cache import bytes_per_block
from twinserve.engine.llm import LLM
from twinserve.engine.quantization import measure_memory

WHAT_IS_MEASURED_IN_MEMORY = "weights and KV at its fullest, counted; 1 MB is 10**6 bytes"
ENGINE_TIMING = (
    "from token ids to token ids: every decision, every step of the model and the choice of each token; not loading "
    "the model, nor text to tokens and back"
)
YARDSTICK = "the requests that every cycle serves"
BEFORE = "the same requests as the cycle before serves them"
OVER_BEFORE = "their speed-up over the cycle before"


def case(name: str, repeats_s: Seq[float], tokens: int | None = None) -> dict[str, Any]:
    """A measurement; its throughput counts `tokens` for each repeat, None being none."""
    seconds = spread(repeats_s)
    return {"name": name, **seconds} | (
        {} if tokens is None else {"tokens": tokens, "tokens_per_s": tokens / seconds["median_s"]}
    )


def reaches(one: Mapping[str, Any], limit: float) -> bool | None:
    """Whether a comparison is at least `limit`: in every turn, in none, or, None, here and there."""
    return True if one["least"] >= limit else False if one["most"] < limit else None


@dataclass
class Findings:
    """What a benchmark finds; each line is printed as soon as it is there.

    Attributes:
        row: of the table: the yardstick's seconds and throughput, and beside them, as "before", those of the cycle
            before, which served it in turns with this one.
        cases, figures: what the guide's section lists: times, and what is no time or follows from them.
        expectations: what the guide expects, what was seen instead, and whether that meets it; None where it cannot be
            said.
    """

    subject: Subject
    repeats: int
    row: dict[str, Any] = field(default_factory=dict)
    cases: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    expectations: list[dict[str, Any]] = field(default_factory=list)

    def turns(
        self, ways: Mapping[str, Callable[[], object]], tokens: Mapping[str, int] | None = None
    ) -> list[dict[str, Any]]:
        """Measure ways to do a work, which take turns.

        Args:
            ways: the work, by name.
            tokens: that each makes.

        Returns:
            The case of each.
        """
        measured = in_turns(ways, self.repeats, self.subject.device)
        counted = tokens or {}
        return [self.case(name, seconds, counted.get(name)) for name, seconds in measured.items()]

    def case(self, name: str, repeats_s: Seq[float], tokens: int | None = None) -> dict[str, Any]:
        """Keep a measurement, and print it."""
        self.cases.append(case(name, repeats_s, tokens))
        show(name, duration(self.cases[-1]))
        return self.cases[-1]

    def figure(self, name: str, value: float | str, unit: str = "") -> None:
        """Keep a figure, and print it."""
        self.keep(figure(name, value, unit))

    def keep(self, one: dict[str, Any]) -> dict[str, Any]:
        """Keep a figure that is there already, and print it."""
        self.figures.append(one)
        show(one["name"], quantity(one))
        return one

    def expect(self, text: str, seen: str, met: bool | None) -> None:
        """Keep what the guide expects, and print it."""
        self.expectations.append({"text": text, "seen": seen, "met": met})
        if seen:
            show(f"the guide: {text}", seen + ("" if met is None else f" ({'yes' if met else 'no'})"))

    def serve_yardstick(self, own: Callable[[], object], before: Callable[[], object] | None = None) -> None:
        """Measure the requests that every cycle serves, as this one does and, in turns with it, the one before.

        Args:
            before: None where nothing comes before, or where it is the same.
        """
        ways = ({} if before is None else {BEFORE: before}) | {YARDSTICK: own}
        tokens = self.subject.sizes.requests * self.subject.sizes.output
        measured = in_turns(ways, self.repeats, self.subject.device)
        rows = {name: case(name, seconds, tokens) for name, seconds in measured.items()}
        for name, one in rows.items():
            show(name, duration(one))
        mine = rows[YARDSTICK]
        self.row = {key: mine[key] for key in ("repeats_s", "mean_s", "median_s", "tokens_per_s")}
        self.row["output_tokens"] = tokens
        if before is not None:
            other = rows[BEFORE]
            over = speed_up(OVER_BEFORE, other, mine)
            self.row["before"] = {key: other[key] for key in ("repeats_s", "mean_s", "median_s")} | {"speed_up": over}
            show(over["name"], quantity(over))


def served(llm: LLM, subject: Subject, **changes: Any) -> tuple[Callable[[], object], Callable[[], float]]:
    """The yardstick by the paged engine: a call that serves it, and one that then says its memory in MB.

    Args:
        changes: of the settings of the policies.
    """
    jobs, most_blocks = yardstick(subject), 0

    def serve_it() -> None:
        nonlocal most_blocks
        most_blocks = max(most_blocks, serve(llm, jobs, **changes))

    def memory_mb() -> float:
        model = llm.runner.model
        return (
            measure_memory(model)
            + most_blocks * bytes_per_block(model.config, llm.settings.block_size, model.dtype) / 1e6
        )

    return serve_it, memory_mb


def show(name: str, text: str) -> None:
    """A line of the table that a benchmark prints."""
    print(f"  {name:<68} {text}", flush=True)


def result(
    findings: Findings, cycle: int, benchmark: str, what: str, *, memory_mb: float, timing: str
) -> dict[str, Any]:
    """What a benchmark returns.

    Args:
        memory_mb: that the yardstick takes.
        timing: what the row's seconds and those of the cases include.
    """
    subject = findings.subject
    return {
        "cycle": cycle,
        "benchmark": benchmark,
        "what": what,
        **environment(subject),
        "yardstick": yardstick_in_words(subject.sizes),
        "timing": timing,
        **findings.row,
        "memory_mb": memory_mb,
        "memory_is": WHAT_IS_MEASURED_IN_MEMORY,
        "figures": findings.figures,
        "expectations": findings.expectations,
        "cases": findings.cases,
    }


def environment(subject: Subject) -> dict[str, Any]:
    """Where and on what it was measured."""
    on_cuda = subject.device == "cuda"
    facts: dict[str, Any] = {
        "device": device_folder(subject.device),
        "model": subject.name,
        "weights": "random" if subject.is_random else "as published",
        "dtype": subject.dtype,
        "machine": device_name(subject.device),
    }
    if on_cuda:
        facts["card"] = torch.cuda.get_device_name()
    return facts | {"versions": versions(), "commit": commit()}


def write(values: dict[str, Any], folder: Path) -> Path:
    """Write a benchmark's JSON; its path below `folder`."""
    path = folder / values["device"] / f"cycle{values['cycle']}-{values['model']}.json"
    write_json(path, values)
    return path
