"""Fleets on the command line: what they write, what they refuse, and that equal commands give equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLEET = """
block_size = 16
num_gpu_blocks = 500

[fleet]
router = "least-outstanding"
die = ["0:0.003:0.05"]

[[fleet.group]]
replicas = 2

[[fleet.group]]
num_gpu_blocks = 200
max_num_seqs = 4
"""


def assert_refused(result, words: str) -> None:
    """One line on stderr, and nothing else."""
    assert (result.code, result.out) == (2, "")
    [line] = result.err.splitlines()
    assert line.startswith("twinserve: ") and words in line, line


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("--latency", "roofline:llama-3-8b@h100:dp=2", "--autoscale", '{"metric": "waiting", "target": 1}'),
            "kv_tier and autoscale with dp",
        ),
        (("--autoscale", "x"), 'JSON such as {"metric": "waiting", "target": 4}'),
        (("--autoscale", '{"metric": "load", "target": 1}'), "autoscale.metric is 'load', expected"),
        (("--autoscale", '{"metric": "waiting", "target": 0}'), "autoscale.target is 0"),
        (("--autoscale", '{"metric": "waiting", "target": 1, "least": 3}'), "expected at most 2"),
        (
            ("--autoscale", '{"metric": "waiting", "target": 1}', "--die", "0:1:2"),
            "expected none of it beside autoscale",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, "--replicas", 2, *options), words)


def test_a_rule_is_json_on_the_command_line_and_a_table_in_a_file(twinserve, trace, latency, tmp_path):
    config = tmp_path / "scale.toml"
    config.write_text(
        "max_num_seqs = 1\n[fleet]\nreplicas = 2\n[fleet.autoscale]\nmetric = 'waiting'\ntarget = 1.0\n"
        "period_s = 0.01\ncold_start_s = 0.001\n"
    )
    rule = '{"metric": "waiting", "target": 1.0, "period_s": 0.01, "cold_start_s": 0.001}'
    found = [
        json.loads(twinserve("sim", trace, "--latency", latency, *how, "--json").out)
        for how in (("--replicas", 2, "--max-num-seqs", 1, "--autoscale", rule), ("--config", config))
    ]
    for summary in found:
        del summary["wall_s"]
    assert found[0] == found[1] and len(found[0]["leases"]) == 2 and found[0]["replica_s"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-tier", "cpu:1:1"), "NAME:GB:GB_S:LATENCY_US, such as cpu:200:50:10"),
        (("--kv-tier", "cpu:0:1:1"), "NAME:GB:GB_S:LATENCY_US, such as cpu:200:50:10"),
        (("--kv-tier", "cpu:1:1:1:mine"), "with :shared behind it"),
        (("--kv-tier", "cpu:1:1:1"), "kv_bytes_per_token is missing"),
        (("--kv-tier", "cpu:1e-9:1:1", "--kv-bytes-per-token", 9), "expected room for a block of 144 bytes"),
        (
            ("--kv-tier", "cpu:1:1:1", "--kv-bytes-per-token", 9, "--no-enable-prefix-caching"),
            "enable_prefix_caching is 'False', expected True beside kv_tier",
        ),
    ],
)
def test_tiers_that_cannot_be_are_refused(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, *options), words)


def test_tiers_are_an_option_and_a_list_in_a_file_and_the_summary_counts_what_came_of_each(
    twinserve, trace, latency, tmp_path
):
    config = tmp_path / "tiers.toml"
    config.write_text("num_gpu_blocks = 8\n[fleet]\nkv_bytes_per_token = 9.0\nkv_tier = ['cpu:1:1:1', 'ssd:1:1:1']\n")
    tiers = ("--num-gpu-blocks", 8, "--kv-bytes-per-token", 9, "--kv-tier", "cpu:1:1:1", "--kv-tier", "ssd:1:1:1")
    found = [
        json.loads(twinserve("sim", trace, "--latency", latency, *how, "--json").out)
        for how in (tiers, ("--config", config))
    ]
    for summary in found:
        del summary["wall_s"]
    assert found[0] == found[1] and [tier["name"] for tier in found[0]["tiers"]] == ["cpu", "ssd"]
    assert found[0]["tiers"][0]["stored_blocks"] > 0


PAIR = ("--prefill-replicas", 1, "--decode-replicas", 1)
SPLIT = """
num_gpu_blocks = 500

[fleet]
kv_bytes_per_token = 1000.0

[[fleet.group]]
role = "prefill"
max_num_seqs = 2

[[fleet.group]]
replicas = 2
role = "decode"
"""


def test_kv_is_handed_over_to_no_other_model(twinserve, trace, tmp_path):
    groups = [
        f'[[fleet.group]]\nrole = "{role}"\nlatency = "roofline:{model}"\n'
        for role, model in (("prefill", "llama-3-8b@h100"), ("decode", "qwen3-0.6b@h100"), ("both", "qwen3-0.6b@h100"))
    ]
    config = tmp_path / "split.toml"
    config.write_text("".join(groups))
    refused = twinserve("sim", trace, "--config", config)
    assert refused.code == 2 and "expected prefill and decode replicas of one model" in refused.err.splitlines()[-1]
    config.write_text("".join(groups[1:]).replace('"decode"', '"prefill"') + groups[1])
    assert twinserve("sim", trace, "--config", config).code == 0


def test_a_split_fleet_from_options_and_from_a_file_is_replayed_compared_and_reported(
    twinserve, trace, latency, tmp_path
):
    config = tmp_path / "split.toml"
    config.write_text(SPLIT)
    options = ("--prefill-replicas", 1, "--decode-replicas", 2, "--kv-bytes-per-token", 1000, "--kv-gb-s", 0.001)
    for name, how in (("options", options), ("file", ("--config", config))):
        out = tmp_path / name
        result = twinserve("sim", trace, "--latency", latency, *how, "--out", out, "--json")
        assert result.code == 0, result.err
        summary = json.loads(result.out)
        assert summary["finished"] == summary["requests"] > 0
        assert summary["handed_over"] == summary["transfers"] > 0 and summary["transfer_bytes"] > 0
        split = json.loads((out / "run.json").read_text())["facts"]["fleet"]["split"]
        assert split["roles"] == ["prefill", "decode", "decode"] and split["router"] == {"name": "least-outstanding"}
        assert json.loads(twinserve("replay", out, "--json").out)["exact"]
        page = tmp_path / f"{name}.html"
        assert twinserve("report", out, "--out", page).code == 0 and page.stat().st_size > 10_000
    assert twinserve("compare", tmp_path / "file", tmp_path / "options").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prefill-replicas", 1), "decode_replicas is 0, expected replicas for decode beside those for prefill"),
        (("--decode-replicas", 1), "prefill_replicas is 0, expected replicas for prefill beside those for decode"),
        ((*PAIR,), "kv_bytes_per_token is missing, expected bytes"),
        ((*PAIR, "--kv-bytes-per-token", 9, "--kv-layerwise"), "kv_layerwise is True, expected latencies"),
        ((*PAIR, "--kv-gb-s", 0), "kv_gb_s is 0.0, expected"),
        ((*PAIR, "--decode-router", "x"), "decode_router is 'x'"),
        (
            (*PAIR, "--kv-bytes-per-token", 9, "--no-scheduler-reserve-full-isl"),
            "scheduler_reserve_full_isl is 'False', expected True on a replica for prefill",
        ),
    ],
)  # fmt: skip
def test_what_a_split_fleet_cannot_be_is_refused(twinserve, trace, latency, options, words):
    assert_refused(twinserve("sim", trace, "--latency", latency, *options), words)


def test_a_fleet_is_replayed_compared_and_reported(twinserve, trace, latency, config, tmp_path):
    out, alone = tmp_path / "fleet", tmp_path / "alone"
    result = twinserve("sim", trace, "--latency", latency, "--config", config, "--out", out, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["finished"] == summary["requests"] > 0
    assert sorted(folder.name for folder in (out / "replicas").iterdir()) == ["0", "0.1", "1", "2"]
    run = json.loads((out / "run.json").read_text())
    assert run["facts"]["fleet"]["router"] == {"name": "least-outstanding"}
    assert [entry["settings"]["num_gpu_blocks"] for entry in run["facts"]["fleet"]["replicas"]] == [500, 500, 200]
    assert run["facts"]["fleet"]["outages"] == [{"replica": 0, "from_ns": 3 * 10**6, "to_ns": 5 * 10**7}]

    replayed = json.loads(twinserve("replay", out, "--json").out)
    assert replayed["exact"] and replayed["recorded"] == summary["steps"]
    one = json.loads(twinserve("replay", out / "replicas" / "1", "--json").out)
    assert one["exact"] and 0 < one["recorded"] < summary["steps"]

    twinserve("sim", trace, "--latency", latency, "--out", alone)
    assert twinserve("compare", out, alone).code == 0
    page = tmp_path / "page.html"
    assert twinserve("report", out, alone, "--out", page).code == 0
    assert "fleet" in page.read_text()


def test_a_difference_in_a_replica_is_found(twinserve, trace, latency, config, tmp_path):
    out = tmp_path / "fleet"
    twinserve("sim", trace, "--latency", latency, "--config", config, "--out", out)
    path = out / "replicas" / "1" / "steps.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"waiting": row["waiting"] + 1})
    path.write_text("\n".join(lines) + "\n")
    result = twinserve("replay", out)
    assert result.code == 1
    assert f"replica 1, decision {row['decision']}: waiting is" in result.out


def test_options_override_the_file(twinserve, trace, latency, config, tmp_path):
    out = tmp_path / "fleet"
    arguments = ("--latency", latency, "--config", config, "--router", "random", "--router-seed", 5, "--out", out)
    assert twinserve("sim", trace, *arguments).code == 0
    fleet = json.loads((out / "run.json").read_text())["facts"]["fleet"]
    assert fleet["router"] == {"name": "random", "seed": 5}


def test_step_by_step_gives_the_same_summary(twinserve, trace, latency, config):
    arguments = ("sim", trace, "--latency", latency, "--config", config, "--json")
    summaries = [json.loads(twinserve(*arguments, *more).out) for more in ((), ("--step-by-step",))]
    for summary in summaries:
        del summary["wall_s"], summary["events"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--replicas", 0), "replicas is 0, expected"),
        (("--replicas", 2, "--router", "nearest"), "nearest"),
        (("--replicas", 2, "--die", "1-3"), "die.0 is '1-3', expected: REPLICA:FROM:TO in seconds"),
        (("--replicas", 2, "--die", "2:0:1"), "outage 2:0:1, expected a replica from 0 to 1"),
        (("--replicas", 2, "--die", "1:3:2"), "outage 1:3:2, expected 0 <= from < to"),
        (("--replicas", 2, "--die", "0:1:", "--die", "1:2:"), "every replica dies and none comes back"),
        (("--die", "0:1:"), "every replica dies and none comes back"),
        (("--max-lead-tokens", -1), "max_lead_tokens is -1"),
        (("--replicas", 2, "--latency-from", "somewhere"), "latency_from is 'somewhere', expected none"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(twinserve, trace, tmp_path, arguments, words):
    assert_refused(twinserve("sim", trace, *arguments, "--out", tmp_path / "run"), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fleet", "words"),
    [
        ("fleet = 3", "fleet is 3, expected a table"),
        ("[fleet]\nrouters = 'random'", "fleet.routers is 'random'"),
        ("[fleet]\nreplicas = 2\n[[fleet.group]]\nreplicas = 3", "replicas is 2, expected 3"),
        ("[fleet]\n[[fleet.group]]\nreplicas = 0", "fleet.group.0.replicas is 0"),
        ("[fleet]\n[[fleet.group]]\nblocks = 4", "blocks is 4"),
        ("[fleet]\n[[fleet.group]]\nlatency = 'none'", "latency is 'none'"),
        ("[fleet]\ndie = ['x']", "fleet.die.0 is 'x'"),
    ],
)
def test_a_table_that_cannot_be_is_refused(twinserve, trace, tmp_path, fleet, words):
    path = tmp_path / "fleet.toml"
    path.write_text(fleet)
    assert_refused(twinserve("sim", trace, "--config", path), words)


def test_the_same_command_writes_the_same_bytes_in_any_number_of_processes(trace, latency, config, tmp_path):
    def start(name: str, hash_seed: str) -> subprocess.Popen:
        arguments = ["--latency", latency, "--config", config, "--router", "random", "--out", tmp_path / name]
        command = [sys.executable, "-m", "twinserve", "sim", str(trace), *map(str, arguments)]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        return subprocess.Popen(
            command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    at_once = [start("first", "1"), start("second", "2")]
    assert [process.wait() for process in at_once] == [0, 0]
    assert start("third", "3").wait() == 0
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / name for name in ("first", "second", "third"))
    ]
    assert len(contents[0]) == 13
    assert contents[0] == contents[1] == contents[2]


def test_a_latency_beside_groups_that_have_their_own_is_refused(twinserve, trace, tmp_path):
    file = tmp_path / "fleet.toml"
    own = '[[fleet.group]]\nreplicas = 2\nlatency = "roofline:llama-3-8b@h100"\n'
    file.write_text(own)
    how = ("sim", trace, "--config", file)
    assert "not fitted" in twinserve(*how).err
    refused = twinserve(*how, "--latency", "roofline:llama-3-8b@h200")
    assert refused.code == 2 and "latency is 'roofline:llama-3-8b@h200', expected none: each group" in refused.err
    file.write_text(own + "[[fleet.group]]\nreplicas = 1\n")
    assert twinserve(*how, "--latency", "roofline:llama-3-8b@h200").code == 0, "one group has none"
