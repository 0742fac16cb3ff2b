"""Real runs with drafts, of an H200, fitted and simulated: those that the fit has not seen are predicted."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from twinserve.settings.build_core import Settings
from twinserve.sim.recorded_steps import fit_records, kernels_of
from twinserve.traces.runs.record import RunRecord, load_record
from twinserve.worlds.run import about_runs, choose_latency, run_sim, with_drafting
from twinserve.worlds.workload import load_workload

ARCHIVE = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200" / "speculation.tar.xz"
SEEN = [f"k4-a{rate}-n{batch}" for rate in (0.5, 0.9) for batch in (1, 16, 64)]
OTHERS = ["k4-a0.7-n16", "k4-a0.8-n64"]
BOUND = 0.1
"""Less than the runs of the archive differ among themselves, see docs/studies/speculation.md."""


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, RunRecord]:
    """Runs with 4 drafts a row."""
    folder = tmp_path_factory.mktemp("drafted")
    with tarfile.open(ARCHIVE) as archive:
        wanted = {f"speculation/{name}" for name in (*SEEN, *OTHERS)}
        members = [one for one in archive if one.name in wanted or str(Path(one.name).parent) in wanted]
        archive.extractall(folder, members, filter="data")
    return {name: load_record(folder / "speculation" / name) for name in (*SEEN, *OTHERS)}


def simulated(record: RunRecord, latency) -> dict:
    """The summary of a simulation with what was accepted."""
    values = record.run["settings"]
    said = {"acceptance": str(record.path), "synthetic_acceptance_rate": None}
    values = values | {"speculative_config": values["speculative_config"] | said}
    settings = Settings.load({name: value for name, value in values.items() if value is not None})
    model = with_drafting(latency, settings)
    return run_sim(load_workload(record.path, {}), settings, model, latency_facts={"name": "x", "identity": "x"})


def test_runs_with_drafts_are_fitted_and_others_predicted(records):
    seen = [records[name] for name in SEEN]
    kernels = kernels_of(seen[0])
    assert (kernels.single, kernels.waits, kernels.decodes[-1], kernels.tokens[-1]) == (5, False, 320, 2048)
    latency = fit_records(seen, about_runs(seen))
    assert latency.data["about"]["speculative_config"]["num_speculative_tokens"] == 4
    assert latency.data["range"]["decode"]["drafts"] == [4, 256]
    for name in OTHERS:
        served = records[name].run["summary"]
        twin = simulated(records[name], latency)
        assert twin["speculation"] == served["speculation"], "what was accepted is what was recorded"
        for metric, statistic in (("tpot_s", "mean"), ("tpot_s", "p99"), ("e2e_s", "mean")):
            assert twin[metric][statistic] == pytest.approx(served[metric][statistic], rel=BOUND), (name, metric)


def test_a_runs_own_steps_take_as_long_as_they_took(records):
    """Each was launched before it was known what the one before it gives."""
    for name in SEEN[0], SEEN[3]:
        record = records[name]
        twin, served = simulated(record, choose_latency(None, record.path)[0]), record.run["summary"]
        assert twin["steps"] == served["steps"]
        assert twin["duration_s"] == pytest.approx(served["duration_s"], rel=0.01)
        assert twin["tpot_s"]["mean"] == pytest.approx(served["tpot_s"]["mean"], rel=0.01)
