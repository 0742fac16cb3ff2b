"""Policies of one's own: named by settings they decide and are replayed; handed in otherwise, the record says so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import own_rules
import pytest
from latencies import Uneven
from own_rules import FirstAdmitted, LastCome

from twinserve.orders import CacheAware
from twinserve.policies import BlockManager, Core, PrefixCache, SamplingParams, Scheduler
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.sim.replica import simulate
from twinserve.traces.request import Part, Request
from twinserve.traces.runs.fleet_record import FleetRecorder, load_fleet
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record
from twinserve.traces.runs.replay import replay

SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "num_gpu_blocks": 40}


@pytest.fixture
def file(tmp_path) -> Path:
    return Path(shutil.copy(own_rules.__file__, tmp_path / "mine.py"))


def requests() -> list[Request]:
    """A burst, more than what fits."""
    return [Request(number, 0, (Part(number, 0, 20 + 7 * number),), 30 + 11 * (number % 4)) for number in range(16)]


def recorded(folder: Path, settings: Settings, build: Callable[..., Core]) -> RunRecord:
    """The record of a simulation whose Core `build` makes."""
    params = SamplingParams(ignore_eos=True)
    with RunRecorder(folder, world="sim", settings=settings.model_dump(), facts={}) as recorder:
        core = build(listener=recorder)
        simulate(requests(), core, Uneven(), announce=lambda request: recorder.expect(request, params))
        recorder.close()
    return load_record(folder)


# --- named by settings ---


def test_settings_build_what_they_name(file):
    values = {"scheduling_policy": f"{file}:LastCome(window=3)", "victim": f"{file}:FirstAdmitted"}
    settings = Settings.load(SMALL | values | {"admission": f"{file}:Roomy(spare=5)"})
    order, victim, admission = settings.build_order(), settings.build_victim(), settings.build_admission()
    assert [type(rule).__name__ for rule in (order, victim, admission)] == ["LastCome", "FirstAdmitted", "Roomy"]
    assert (order.window, admission.spare) == (3, 5)
    assert settings.build_order() is not order, "a fresh one for each Core"
    assert settings.build_core().scheduler.admission.spare == 5


def test_settings_are_those_of_their_dump_and_hold_the_files_sha256(file):
    settings = Settings.load(SMALL | {"scheduling_policy": f"{file}:LastCome( window = 3 )"})
    assert re.fullmatch(re.escape(f"{file}:LastCome(window=3)@") + "[0-9a-f]{64}", settings.scheduling_policy)
    assert Settings.load(json.loads(json.dumps(settings.model_dump()))) == settings
    file.write_text(file.read_text() + "\n")
    with pytest.raises(InputError, match="scheduling_policy is .*, expected: .*mine.py with sha256 .*, it has"):
        Settings.load(settings.model_dump())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"scheduling_policy": "fifo"},
            "scheduling_policy is 'fifo', expected: fcfs, priority, shortest, cache-aware, F",
        ),
        ({"victim": "none.py:Last"}, "victim is 'none.py:Last', expected: a file that can be read (none.py: No such"),
        ({"victim": "fcfs"}, "victim is 'fcfs', expected: FILE.py:CLASS or FILE.py:CLASS(name=value, ...)"),
        ({"admission": "{file}:Roomy(9)"}, "expected: FILE.py:CLASS or FILE.py:CLASS(name=value, ...)"),
        ({"admission": "{file}:Roomy(spare=1)", "watermark": 0.1}, "watermark is 0.1, expected 0 beside admission"),
        (
            {"admission": "{file}:Roomy(spare=1)", "scheduler_reserve_full_isl": False},
            "scheduler_reserve_full_isl is False, expected True beside admission",
        ),
        ({"scheduling_policy": "{file}:LastCome", "scheduling_ageing": 3}, "scheduling_ageing is 3, expected 0 unless"),
    ],
)
def test_what_settings_cannot_hold_is_refused(file, values, words):
    values = {name: value.format(file=file) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(InputError, match=re.escape(words)):
        Settings.load(SMALL | values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"scheduling_policy": "{file}:Roomy(spare=1)"},
            "expected a class with __iter__, __len__, peek, pop_next, push",
        ),
        ({"victim": "{file}:LastCome"}, "victim is 'LastCome', expected a class with choose"),
        ({"admission": "{file}:LastCome"}, "admission is 'LastCome', expected a class with lacks"),
        ({"admission": "{file}:Roomy"}, "can be built (TypeError: Roomy.__init__() missing 1 required keyword-only"),
        ({"victim": "{file}:Nobody"}, "expected a class of this file: LastCome, FirstAdmitted, Roomy, Modulo"),
    ],
)
def test_what_cannot_be_built_is_refused_when_the_core_is(file, values, words):
    settings = Settings.load(SMALL | {name: value.format(file=file) for name, value in values.items()})
    with pytest.raises(InputError, match=re.escape(words)):
        settings.build_core()


NAMED = [
    {"scheduling_policy": "{file}:LastCome"},
    {"scheduling_policy": "{file}:LastCome(window=3)", "victim": "{file}:FirstAdmitted"},
    {"admission": "{file}:Roomy(spare=8)"},
    {"victim": "{file}:FirstAdmitted", "pipeline_depth": 1},
]


@pytest.mark.parametrize("values", NAMED, ids=lambda values: "+".join(values))
def test_a_run_by_named_rules_differs_from_vllms_and_is_replayed_by_the_same_file_alone(tmp_path, file, values):
    usual = recorded(tmp_path / "usual", Settings.load(SMALL), Settings.load(SMALL).build_core)
    values = {name: value.format(file=file) if isinstance(value, str) else value for name, value in values.items()}
    settings = Settings.load(SMALL | values)
    own = recorded(tmp_path / "own", settings, settings.build_core)
    assert own.run["settings"] == settings.model_dump() and replay(own).is_exact
    assert own.steps != usual.steps

    content = file.read_text()
    file.write_text(content + "# changed\n")
    with pytest.raises(InputError, match=r"own/run.json: settings\.\w+ is .*, expected: .*mine.py with sha256"):
        replay(own)
    file.unlink()
    with pytest.raises(InputError, match=r"own/run.json: settings\.\w+ is .*, expected: a file that can be read"):
        replay(own)
    file.write_text(content)
    assert replay(own).is_exact


# --- handed in as objects ---


class ByOverride(Settings):
    """Settings whose order is another than they say."""

    def build_order(self) -> Any:
        return LastCome()


class WithoutChange(Settings):
    """Settings that are as they say, which nobody can know."""


def hand_made(listener: Any = None, **how: Any) -> Core:
    scheduler = Scheduler(
        BlockManager(40, 16),
        4,
        composition="mixed",
        max_num_batched_tokens=128,
        enable_chunked_prefill=True,
        prefix_cache=PrefixCache(),
        order=LastCome(),
    )
    return Core(scheduler, listener=listener, **how)


PLAIN = Settings.load(SMALL)
HANDED: dict[str, tuple[Settings, Callable[..., Core], dict[str, str]]] = {
    "an order": (
        PLAIN,
        lambda **how: PLAIN.build_core(order=LastCome(), **how),
        {"scheduling_policy": "by hand: LastCome"},
    ),
    "an order of a kind that settings can name": (
        Settings.load(SMALL | {"scheduling_policy": "cache-aware"}),
        lambda **how: PLAIN.build_core(order=CacheAware(window=2), **how),
        {"scheduling_policy": "by hand: CacheAware"},
    ),
    "a victim": (
        PLAIN,
        lambda **how: PLAIN.build_core(victim=FirstAdmitted(), **how),
        {"scheduling_policy": "fcfs", "victim": "by hand: FirstAdmitted"},
    ),
    "a subclass": (
        ByOverride(**SMALL),
        ByOverride(**SMALL).build_core,
        {"scheduling_policy": "by hand: ByOverride"},
    ),
    "a subclass that changes nothing": (
        WithoutChange(**SMALL),
        WithoutChange(**SMALL).build_core,
        {"scheduling_policy": "by hand: WithoutChange"},
    ),
    "a Core": (PLAIN, hand_made, {"scheduling_policy": "by hand"}),
}


@pytest.mark.parametrize("what", HANDED)
def test_what_was_handed_in_is_said_and_a_replay_without_it_is_refused(tmp_path, what):
    settings, build, said = HANDED[what]
    record = recorded(tmp_path / "run", settings, build)
    assert record.run["settings"] == settings.model_dump() | said
    [(name, value)] = [(name, value) for name, value in said.items() if value.startswith("by hand")]
    words = f"run.json: settings.{name} is '{value}', expected a class that settings can name: replay() takes this one"
    with pytest.raises(InputError, match=re.escape(words)):
        replay(record)
    assert replay(record, build_core=build).is_exact


def test_a_subclass_is_not_silently_taken_for_settings():
    with pytest.raises(InputError, match="scheduling_policy is 'by hand: ByOverride', expected: fcfs, "):
        Settings.load(ByOverride(**SMALL).model_dump() | {"max_num_seqs": 3})
    assert isinstance(ByOverride(**SMALL).build_core().scheduler.waiting, LastCome)
    assert PLAIN.model_dump()["scheduling_policy"] == "fcfs"


def test_a_fleet_one_of_whose_replicas_has_a_rule_that_was_handed_in_says_so_too(tmp_path):
    settings = PLAIN.model_dump()
    with FleetRecorder(tmp_path / "fleet", settings=settings, facts={}, device="none") as recorder:
        for replica, order in enumerate((None, LastCome())):
            listener = recorder.begin(replica, 0, settings=settings, facts={}, device="none")
            PLAIN.build_core(listener=listener, order=order)
        recorder.close()
    said = [load_record(tmp_path / "fleet" / "replicas" / name).run["settings"] for name in "01"]
    assert said == [settings, settings | {"scheduling_policy": "by hand: LastCome"}]
    assert load_fleet(tmp_path / "fleet").run["settings"] == said[1]
