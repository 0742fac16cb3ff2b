"""The demo, with a tiny model in place of the real one, and the data that it ships with."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import twinserve.commands.demo as demo
from twinserve.sim.fit import FittedLatency, StepSample
from twinserve.sim.latency import StepFeatures
from twinserve.traces.runs.record import load_record
from twinserve.traces.runs.replay import replay
from twinserve.worlds.workload import load_workload

torch = pytest.importorskip("torch")


def test_the_bundled_trace_is_what_our_own_generator_makes(twinserve, tmp_path):
    made_by = json.loads((demo.DATA / "demo.jsonl").read_text().splitlines()[0])["made_by"]
    names = {"num_requests": "requests", "num_system_prompts": "system_prompts"}
    options = [
        part for name, value in made_by.items() for part in ("--" + names.get(name, name).replace("_", "-"), value)
    ]
    result = twinserve("trace", "make", "--out", tmp_path / "again.jsonl", *options)
    assert result.code == 0, result.err
    assert (tmp_path / "again.jsonl").read_bytes() == (demo.DATA / "demo.jsonl").read_bytes()


@pytest.fixture
def tiny_model(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from twinserve.engine.llm import LLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(demo, "load_llm", lambda options, settings, *, progress: LLM(model, settings=settings))
    # The tiny model is some twenty times as fast as the real one, so its arrivals may be as well.
    serves(monkeypatch, rate_scale=20.0)
    monkeypatch.setattr(demo, "SHAPES", 8)


def serves(monkeypatch, **changes):
    """Let the demo serve its trace with these changes."""
    monkeypatch.setattr(demo, "load_workload", lambda path, _: load_workload(path, changes))


def test_the_demo_runs_both_worlds_replays_exactly_and_writes_its_page(tiny_model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "LIMITS", {"output_tok_s": 1e9})
    assert demo.run_demo(tmp_path / "demo")
    real = load_record(tmp_path / "demo" / "real")
    assert replay(real).is_exact
    assert len(real.requests) == 60 and all(row["finish_reason"] == "length" for row in real.requests)
    assert any(len(row["admitted"]) > 1 for row in real.steps), "bursts"
    assert sum(row["cached_tokens"] for row in real.requests) > 1000, "shared prefixes"
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["latency.json", "real", "report.html", "sim"]
    assert str(Path("demo") / "report.html") in capsys.readouterr().out


def test_the_demo_fails_beyond_its_limit_and_replaces_an_earlier_ones_results(
    tiny_model, monkeypatch, tmp_path, capsys
):
    out = tmp_path / "demo"
    (out / "real").mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    serves(monkeypatch, limit=4)
    monkeypatch.setattr(demo, "LIMITS", {"tpot_s.mean": 0.0})
    for name in ("MOST_SPREAD", "MOST_CHANGE", "MOST_CORES"):
        monkeypatch.setattr(demo, name, 1e9)  # however busy this machine is
    assert not demo.run_demo(out)
    assert "tpot_s.mean: the error is" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"


def steps_that_take(*factors):
    """The steps of two shapes, each repeated once a factor."""
    shapes = [StepFeatures(0, rows, 0, rows, 100 * rows, 100 * rows, rows) for rows in (1, 2)]
    return [StepSample(shape, 10_000, round(1_000_000 * factor)) for shape in shapes for factor in factors]


QUIET, LOUD, LOUDER = (1.0, 1.0, 1.1), (1.0, 1.0, 2.0), (1.0, 1.0, 4.0)


@pytest.mark.parametrize(
    ("profiles", "cores", "within", "taken", "words"),
    [
        ([QUIET, (1.1, 1.0, 1.1)], [0.0, 0.0, 0.1], 1.25, [0, 1], None),
        ([LOUD, QUIET, QUIET], [0.0] * 4, 1.0, [1, 2], None),
        ([QUIET, QUIET, QUIET], [0.6, 0.1, 0.0, 0.1], 1.0, [1, 2], None),
        (
            [QUIET, LOUDER, LOUD],
            [0.0] * 4,
            1.0,
            [0, 2],
            "after the run a step's slowest repeat took 2.0 times as long as its fastest, expected at most 1.15",
        ),
        (
            [QUIET, QUIET, QUIET],
            [0.6, 0.9, 0.0, 0.0],
            1.0,
            [0, 2],
            "before the run other processes kept 0.6 cores busy, expected at most 0.1",
        ),
        (
            [LOUD, QUIET, QUIET],
            [0.0, 2.0, 0.0, 0.0],
            1.0,
            [0, 2],
            "before the run a step's slowest repeat took 2.0 times as long as its fastest, expected at most 1.15",
        ),
        (
            [QUIET, QUIET],
            [0.0, 0.3, 0.0],
            1.0,
            [0, 1],
            "during the run other processes kept 0.3 cores busy, expected at most 0.1",
        ),
        (
            [QUIET, (2.0, 2.0, 2.2)],
            [0.0] * 3,
            1.0,
            [0, 1],
            "after the run steps took 1.99 times as long as before it, expected at most 1.25 either way",
        ),
        (
            [QUIET, QUIET],
            [0.0] * 3,
            1.9,
            [0, 1],
            "during the run steps of as many rows took 1.90 times as long at times, expected at most 1.25",
        ),
    ],
)
def test_where_the_machine_was_busy_steps_are_measured_again_and_it_is_told(
    tiny_model, latency, monkeypatch, tmp_path, capsys, profiles, cores, within, taken, words
):
    """`cores`: what others kept busy during each measurement and the run, in order; `taken`: those that count."""
    measured, counted, fitted = [], iter(cores), []

    def measure(llm, **_):
        measured.append(steps_that_take(*profiles[len(measured)]))
        return measured[-1]

    serves(monkeypatch, limit=4)
    monkeypatch.setattr(demo, "measure_steps", measure)
    monkeypatch.setattr(demo, "others_cores", lambda before, after: next(counted))
    monkeypatch.setattr(demo, "change_within", lambda run: within)
    monkeypatch.setattr(demo, "fit_steps", lambda llm, samples: fitted.extend(samples) or FittedLatency.load(latency))
    monkeypatch.setattr(demo, "LIMITS", {"tpot_s.mean": 0.0})
    assert demo.run_demo(tmp_path / "demo") == (words is not None), "noise is said, and is no failure"
    assert len(measured) == len(profiles) and next(counted, None) is None
    assert list(map(id, fitted)) == [id(sample) for place in taken for sample in measured[place]]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("the machine was busy")]
    said = [] if words is None else [f"the machine was busy, which is no fault of the simulation: {words}"]
    assert lines == said


def test_a_machine_that_slows_down_during_the_run_is_noticed_by_steps_of_as_many_rows():
    def run(*steps):
        names = ("start_ns", "end_ns", "tokens", "prompt_tokens", "decode_tokens")
        return SimpleNamespace(steps=[dict(zip(names, step, strict=True)) for step in steps])

    steady = [(0, 100 + place, 4, 0, 4) for place in range(20)]
    more = [(0, 900, 8, 0, 8)] * 10  # other rows take as long as they take
    prompts, nothing, seldom = [(0, 10**place, 8, 7, 1) for place in range(10)], (0, 0, 0, 0, 0), (0, 1, 2, 0, 2)
    assert demo.change_within(run(*steady, *more, *prompts, *[nothing] * 10, seldom)) == pytest.approx(1.16, abs=0.02)
    slowed = [(1000, 1000 + 2 * end, *rest) for _, end, *rest in steady]
    assert demo.change_within(run(*steady[:15], *slowed)) > 1.9
    assert demo.change_within(run(seldom, (0, 5, 2, 0, 2))) == 1.0, "too few say nothing"


def test_other_processes_that_compute_beside_the_run_are_noticed(monkeypatch, tmp_path):
    before = demo._clocks()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(1.0)
        after = demo._clocks()  # once it is waited for, its time is this process's
        other.kill()
    assert demo.others_cores(before, after) > 0.3, "a process of another kept a core busy"
    assert demo.others_cores((0.0, 5.0, 100.0), (10.0, 9.0, 109.0)) == pytest.approx(0.5)
    monkeypatch.setattr(demo, "STAT", tmp_path / "nothing")
    assert demo.others_cores(demo._clocks(), demo._clocks()) == 0.0, "nothing is known of them"
