"""Records of speculative runs: what came of drafts is a fact, and from it every decision is made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from latencies import Uneven

import twinserve.traces.runs
from twinserve.engine.live import Following
from twinserve.policies import SamplingParams
from twinserve.serving.metrics import ServerMetrics
from twinserve.settings.build_core import Settings
from twinserve.sim.replica import simulate
from twinserve.sim.speculation import AcceptanceLaw
from twinserve.traces.generator import LengthSpec, generate
from twinserve.traces.runs.metrics import summarize
from twinserve.traces.runs.record import RunRecord, RunRecorder, load_record
from twinserve.traces.runs.replay import replay

K = 4
KINDS = {
    "ngram": ({"method": "ngram"}, {}),
    "draft model, short of blocks": ({"method": "draft_model", "model": "draft"}, {"num_gpu_blocks": 24}),
    "by batch size": ({"method": "ngram", "num_speculative_tokens_per_batch_size": [[1, 3, 4], [4, 9, 2]]}, {}),
    "ahead": ({"method": "ngram_gpu"}, {"pipeline_depth": 1, "num_gpu_blocks": 24}),
    "ahead, eagle": ({"method": "eagle3"}, {"pipeline_depth": 1, "num_gpu_blocks": 60}),
    "a short model": ({"method": "draft_model", "model": "draft"}, {"max_model_len": 120}),
}


def record_of(folder: Path, kind: str, law: AcceptanceLaw, metrics: ServerMetrics | None = None) -> RunRecord:
    """The record of a simulation of conversations with drafts, which a server's page hears as well."""
    config, others = KINDS[kind]
    settings = Settings.load(
        {"num_gpu_blocks": 200, "max_num_seqs": 8, "max_num_batched_tokens": 64}
        | others
        | {"speculative_config": config | {"num_speculative_tokens": K}}
    )
    requests = generate(
        seed=3,
        num_requests=40,
        rate=8,
        prompt_tokens=LengthSpec.parse("lognormal:60:1.0:1:110"),
        output_tokens=LengthSpec.parse("lognormal:60:1.0:1:200"),
        turns=2,
        think_time_s=0.5,
    )
    with RunRecorder(folder, world="sim", settings=settings.model_dump(), facts={}) as recorder:
        core = settings.build_core(listener=Following([recorder] if metrics is None else [recorder, metrics]))
        if metrics is not None:
            metrics.watch([core], settings)
        params = SamplingParams(ignore_eos=True)
        simulate(
            requests,
            core,
            Uneven(),
            params=params,
            announce=lambda request: recorder.expect(request, params),
            acceptance=law,
        )
        recorder.close()
    return load_record(folder)


LAW = AcceptanceLaw((0.8, 0.7, 0.6), concentration=3.0, found_share=0.7, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_speculative_run_is_decided_again_from_its_record(tmp_path, kind):
    record = record_of(tmp_path / "run", kind, LAW)
    result = replay(record)
    assert result.is_exact, result.difference
    assert sum(len(row.get("runs", ())) for row in record.steps) > 100
    if KINDS[kind][1].get("num_gpu_blocks") == 24:
        assert record.run["summary"]["preemptions"] > 0


@pytest.mark.parametrize("kind", ["ngram", "ahead"])
def test_rows_are_as_the_schema_says(tmp_path, kind):
    record = record_of(tmp_path / "run", kind, LAW)
    schema = json.loads((Path(twinserve.traces.runs.__file__).parent / "record.schema.json").read_text())
    for name, rows in (("request", record.requests), ("step", record.steps)):
        validator = Draft202012Validator(schema | {"$ref": f"#/$defs/{name}"})
        for row in json.loads(json.dumps(rows)):
            validator.validate(row)


def first_with(record: RunRecord, field: str, number: int = 5) -> dict[str, Any]:
    """A step's row that has a field, not one of the very first."""
    return [row for row in record.steps if field in row][number]


def test_a_run_that_was_longer_or_kept_otherwise_than_recorded_is_noticed(tmp_path):
    record = record_of(tmp_path / "run", "ngram", LAW)
    row = first_with(record, "runs")
    request, made, kept = row["runs"][0]
    drafts = dict(row["drafts"])[request]
    other = made - 1 if made > 1 else made + 1
    assert 1 <= other <= 1 + drafts
    row["runs"][0] = (request, other, kept)
    result = replay(record)
    assert result.difference is not None and result.difference.decision == row["decision"]
    assert result.difference.field == "runs"
    row["runs"][0] = (request, other, other)  # consistent in itself: what follows differs
    result = replay(record)
    assert result.difference is not None and result.difference.decision > row["decision"]
    row["runs"][0] = (request, drafts + 2, kept)
    result = replay(record)
    assert result.difference is not None and result.difference.field == f"runs of request {request}"


def test_other_proposals_and_other_drafts_than_recorded_are_noticed(tmp_path):
    record = record_of(tmp_path / "run", "ngram", LAW)
    row = first_with(record, "proposed")
    proposed = row.pop("proposed")
    result = replay(record)
    assert result.difference is not None and result.difference.decision == row["decision"] + 1
    row["proposed"] = proposed
    assert replay(record).is_exact
    row = first_with(record, "drafts")
    row["drafts"][0] = (row["drafts"][0][0], row["drafts"][0][1] + 1)
    difference = replay(record).difference
    assert difference is not None and (difference.decision, difference.field) == (row["decision"], "drafts")


def test_other_numbers_of_drafts_to_ask_for_are_noticed_by_the_digest_alone(tmp_path):
    record = record_of(tmp_path / "run", "ahead", LAW)
    for row in record.steps:
        for name in set(row) - {"decision", "seen", "aborted", "committed", "decided_ns", "digest", "runs", "proposed"}:
            del row[name]
    assert replay(record).is_exact
    record.run["settings"]["speculative_config"]["num_speculative_tokens"] = K - 1
    assert not replay(record).is_exact


@pytest.mark.parametrize("kind", KINDS)
def test_a_summary_says_what_came_of_drafts_whether_made_as_the_run_goes_on_or_from_its_rows(tmp_path, kind):
    record = record_of(tmp_path / "run", kind, LAW)
    summary = record.run["summary"]
    again = summarize(record.requests, record.steps, world="sim")
    assert {name: again[name] for name in summary} == summary
    speculation = summary["speculation"]
    runs = [(dict(row["drafts"])[seq_id], made) for row in record.steps for seq_id, made, _ in row.get("runs", ())]
    assert speculation["drafts"] == len(runs)
    assert speculation["draft_tokens"] == sum(drafts for drafts, _ in runs)
    assert speculation["accepted_tokens"] == sum(made - 1 for _, made in runs)
    assert speculation["wasted_tokens"] == sum(drafts + 1 - made for drafts, made in runs)
    assert speculation["tokens_per_step"] == sum(made for _, made in runs) / len(runs)
    first = [made > 1 for _, made in runs]
    assert speculation["acceptance_by_position"][0] == sum(first) / len(first)
    own = [(row.get("draft_tokens", 0), row.get("accepted_tokens", 0)) for row in record.requests]
    assert sum(drafts for drafts, _ in own) <= speculation["draft_tokens"]
    assert sum(accepted for _, accepted in own) <= speculation["accepted_tokens"]
    if kind == "ngram":  # nothing is computed for a request that has ended
        assert [sum(column) for column in zip(*own, strict=True)] == [
            speculation["draft_tokens"],
            speculation["accepted_tokens"],
        ]


def test_a_run_without_drafts_says_nothing_of_them(tmp_path):
    settings = Settings.load({"num_gpu_blocks": 200})
    with RunRecorder(tmp_path / "run", world="sim", settings=settings.model_dump(), facts={}) as recorder:
        simulate(
            generate(
                seed=0,
                num_requests=3,
                rate=1,
                prompt_tokens=LengthSpec.parse("fixed:9"),
                output_tokens=LengthSpec.parse("fixed:9"),
            ),
            settings.build_core(listener=recorder),
            Uneven(),
        )
        assert "speculation" not in recorder.close()
    assert not any({"asked", "drafts", "runs", "proposed"} & set(row) for row in load_record(tmp_path / "run").steps)


@pytest.mark.parametrize("kind", KINDS)
def test_a_servers_page_counts_drafts_as_vllm_does_and_as_the_record_has_them(tmp_path, kind):
    metrics = ServerMetrics("model")
    record = record_of(tmp_path / "run", kind, LAW, metrics)
    page = dict(line.rsplit(" ", 1) for line in metrics.page().decode().splitlines() if not line.startswith("#"))
    labels = 'engine="0",model_name="model"'

    def value(name: str, more: str = "", prefix: str = "vllm:") -> float:
        return float(page[f"{prefix}spec_decode_num_{name}_total{{{labels}{more}}}"])

    counted = [
        (drafts, made - 1)
        for row in record.steps
        for (_, drafts), (_, made, kept) in zip(row.get("drafts", ()), row.get("runs", ()), strict=True)
        if kept
    ]
    assert len(counted) > 100 and max(right for _, right in counted) == K
    assert value("drafts") == len(counted) == value("drafts", prefix="twinserve:")
    assert value("draft_tokens") == sum(drafts for drafts, _ in counted)
    assert value("accepted_tokens") == sum(right for _, right in counted)
    by_position = [value("accepted_tokens_per_pos", f',position="{position}"') for position in range(K)]
    assert by_position == [sum(right > position for _, right in counted) for position in range(K)]
    assert sum("accepted_tokens_per_pos_total{" in name for name in page) == 2 * K
    if kind == "ahead":
        speculation = record.run["summary"]["speculation"]
        assert speculation["draft_tokens"] > value("draft_tokens"), "of requests that had ended, which vLLM leaves out"


def test_a_page_of_drafts_has_every_position_before_the_first_and_one_without_drafts_none():
    pages = {}
    for name, values in (("drafts", {"method": "ngram", "num_speculative_tokens": K}), ("none", None)):
        metrics, settings = ServerMetrics("model"), Settings.load({"speculative_config": values})
        metrics.watch([settings.build_core(listener=metrics)], settings)
        pages[name] = metrics.page().decode()
    assert all(f'position="{position}"}} 0.0' in pages["drafts"] for position in range(K))
    assert "spec_decode" not in pages["none"]
