"""The commands that need no model: what they print, what they write, how they exit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from vllm_log import write_log

from twinserve.traces.request import Part, Request

SUMMARY_KEYS = {
    "world", "requests", "finished", "refused", "shortened", "duration_s", "output_tok_s", "total_tok_s", "ttft_s",
    "tpot_s", "itl_s", "e2e_s", "cached_tokens", "preemptions", "device_wait_share", "steps",
    "events", "wall_s",
}  # fmt: skip


def test_sim_prints_its_summary_as_json_alone_and_writes_a_record_that_replays(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    result = twinserve("sim", trace, "--latency", latency, "--out", out, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary.keys() >= SUMMARY_KEYS
    assert (summary["world"], summary["requests"], summary["finished"]) == ("sim", 12, 12)
    assert set(summary["ttft_s"]) == {"mean", "p50", "p90", "p95", "p99"}
    assert summary["cached_tokens"] > 0, "the system prompt is shared"
    replayed = twinserve("replay", out)
    assert (replayed.code, replayed.out.split(":")[0]) == (0, "exact")


def test_sim_says_what_it_assumes(twinserve, trace, latency):
    result = twinserve("sim", trace, "--latency", latency)
    assert "latency: round numbers on no device" in result.err
    assert "no context limit" in result.err and "a pool without end" in result.err
    bounded = twinserve("sim", trace, "--latency", latency, "--max-model-len", 4096, "--num-gpu-blocks", 64)
    assert "no context limit" not in bounded.err and "a pool without end" not in bounded.err


def test_sim_wants_a_latency_names_those_that_ship_and_says_which_it_uses(twinserve, trace):
    result = twinserve("sim", trace)
    assert result.code == 2 and "latency is missing, expected --latency roofline:MODEL@DEVICE" in result.err
    shipped = "smollm2-135m-cpu-2-threads"
    assert shipped in result.err
    result = twinserve("sim", trace, "--latency", shipped)
    assert result.code == 0 and "smollm2-135m on CPU, 2 threads, shipped" in result.err, result.err


def test_the_same_simulation_writes_the_same_bytes_but_for_its_wall_time(twinserve, trace, latency, tmp_path):
    records = []
    for name in ("first", "second"):
        twinserve("sim", trace, "--latency", latency, "--out", tmp_path / name)
        run = json.loads((tmp_path / name / "run.json").read_text())
        assert run["summary"]["wall_s"] is None, "the record has nothing of the machine's clock"
        records.append([run] + [(tmp_path / name / file).read_bytes() for file in ("requests.jsonl", "steps.jsonl")])
    assert records[0] == records[1]


def test_recorded_step_times_give_the_recorded_run_again(twinserve, trace, latency, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "first")
    twinserve("sim", trace, "--latency-from", tmp_path / "first", "--out", tmp_path / "second")
    assert (tmp_path / "first" / "steps.jsonl").read_bytes() == (tmp_path / "second" / "steps.jsonl").read_bytes()
    result = twinserve("compare", tmp_path / "second", tmp_path / "first", "--max-error", "ttft_s.p99=0")
    assert result.code == 0, result.err


def test_replay_exits_with_1_and_names_the_first_difference(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    twinserve("sim", trace, "--latency", latency, "--out", out, "--max-num-seqs", 3)
    run = json.loads((out / "run.json").read_text())
    run["settings"]["max_num_seqs"] = 1
    (out / "run.json").write_text(json.dumps(run))
    result = twinserve("replay", out)
    assert result.code == 1
    assert "decision " in result.out and "the record has" in result.out
    as_json = json.loads(twinserve("replay", out, "--json").out)
    assert not as_json["exact"] and as_json["difference"]["field"]


def test_compare_exits_with_1_beyond_the_limit(twinserve, trace, latency, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "wide")
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "narrow", "--max-num-seqs", 1)
    result = twinserve("compare", tmp_path / "wide", tmp_path / "narrow", "--max-error", "e2e_s.mean=0.1", "--json")
    assert result.code == 1
    assert json.loads(result.out)["e2e_s.mean"]["error"] < -0.1
    assert "e2e_s.mean: the error is" in result.err


def test_every_error_beyond_its_limit_is_said_also_one_that_is_not_defined(twinserve, trace, latency, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "wide")
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "narrow", "--max-num-seqs", 1)
    limits = ("--max-error", "preemptions=0.1", "--max-error", "e2e_s.mean=0.1", "--max-error", "cached_tokens=0.1")
    result = twinserve("compare", tmp_path / "wide", tmp_path / "narrow", *limits)
    assert result.code == 1
    first, second = result.err.splitlines()
    assert first.startswith("e2e_s.mean: the error is -") and first.endswith("%, expected within 10.0%")
    assert second == "preemptions: the error is undefined, expected within 10.0%", "there were none"


def test_a_run_in_which_nothing_finished_has_a_summary(twinserve, trace, latency):
    result = twinserve("sim", trace, "--latency", latency, "--max-model-len", 1)
    assert (result.code, "12 refused" in result.out, "tokens/s" in result.out) == (3, True, False)
    assert "0 steps; took" in " ".join(result.out.split())


def test_the_devices_waits_are_printed_and_compared_and_older_summaries_have_none(twinserve, trace, latency, tmp_path):
    out = tmp_path / "new"
    share = json.loads(twinserve("sim", trace, "--latency", latency, "--out", out, "--json").out)["device_wait_share"]
    assert share > 0
    printed = " ".join(twinserve("sim", trace, "--latency", latency).out.split())
    assert f"the device waited for the host {share:.1%} of the time" in printed
    shutil.copytree(out, tmp_path / "old")
    run = json.loads((out / "run.json").read_text())
    del run["summary"]["device_wait_share"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(run))
    row = json.loads(twinserve("compare", out, out, "--json").out)["device_wait_share"]
    assert (row["sim"], row["real"], row["error"]) == (share, share, 0.0)
    row = json.loads(twinserve("compare", out, tmp_path / "old", "--json").out)["device_wait_share"]
    assert (row["sim"], row["real"], row["error"]) == (share, None, None)


def test_a_transformed_trace_is_counted_in_the_summary_and_the_record(twinserve, trace, latency, tmp_path):
    out = tmp_path / "run"
    result = twinserve(
        "sim", trace, "--latency", latency, "--limit", 8, "--max-prompt-tokens", 40, "--json", "--out", out
    )
    summary = json.loads(result.out)
    assert [summary[name] for name in ("requests", "shortened", "capped", "dropped")] == [8, 0, 8, 4]
    log = json.loads((out / "run.json").read_text())["facts"]["trace"]["transforms"]
    assert [entry["transform"] for entry in log] == ["limit", "cap_prompt_tokens"]


def test_settings_come_from_a_file_and_options_override_them(twinserve, trace, latency, tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text("max_num_seqs = 2\nblock_size = 32\n")
    out = tmp_path / "run"
    twinserve("sim", trace, "--latency", latency, "--config", config, "--block-size", 8, "--out", out)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert (settings["max_num_seqs"], settings["block_size"]) == (2, 8)


def test_report_writes_a_page_from_records(twinserve, trace, latency, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "run")
    result = twinserve("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert result.code == 0, result.err
    assert "<html" in (tmp_path / "page.html").read_text()[:500]


def test_the_module_runs_as_the_command_does(trace, latency):
    command = [sys.executable, "-m", "twinserve", "sim", str(trace), "--latency", str(latency), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["finished"] == 12


@pytest.mark.parametrize(
    "command", ["sim", "run", "replay", "compare", "report", "profile", "trace", "model", "generate"]
)
def test_every_command_has_help(twinserve, command):
    result = twinserve(command, "--help")
    assert result.code == 0 and "Usage: twinserve" in result.out


@pytest.fixture
def vllm_log(tmp_path):
    requests = [Request(i, i * 4_000_000, (Part(i, 0, 5 + 37 * (i % 6)),), 6 + i % 9) for i in range(60)]
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "max_model_len": 512, "num_gpu_blocks": 80}
    return write_log(tmp_path / "log", requests, settings | {"pipeline_depth": 1}, cost=slow_device)


def slow_device(features):
    return 100_000 + 10_000 * features.seqs, 400_000, 1_500_000 + 9_000 * features.tokens, 300_000


def test_a_vllm_log_is_replayed_imported_fitted_and_simulated_with_the_fit(twinserve, vllm_log, trace, tmp_path):
    replayed = twinserve("replay", vllm_log, "--json")
    result = json.loads(replayed.out)
    assert replayed.code == 0 and result["exact"] and result["equal"] == result["recorded"] > 60
    imported = twinserve("record", "import", vllm_log, tmp_path / "run")
    assert imported.code == 0 and "60 requests" in imported.err
    assert twinserve("replay", tmp_path / "run").out == twinserve("replay", vllm_log).out
    fitted = twinserve("fit", vllm_log, "--out", tmp_path / "fitted.json", "--json")
    assert fitted.code == 0, fitted.err
    again = twinserve("fit", tmp_path / "run", "--out", tmp_path / "again.json", "--json")
    regimes = [json.loads(run.out)["regimes"] for run in (fitted, again)]
    assert regimes[0] == regimes[1], "the record says what the log said"
    assert "eager" in twinserve("fit", vllm_log, "--out", tmp_path / "table.json").out
    simulated = twinserve("sim", trace, "--latency", tmp_path / "fitted.json", "--json")
    assert simulated.code == 0 and json.loads(simulated.out)["finished"] == 12


def test_a_fit_from_a_simulation_or_over_a_file_is_refused(twinserve, trace, latency, vllm_log, tmp_path):
    twinserve("sim", trace, "--latency", latency, "--out", tmp_path / "sim")
    refused = twinserve("fit", tmp_path / "sim", "--out", tmp_path / "fitted.json")
    assert refused.code == 2 and "expected the record of a real run" in refused.err
    taken = twinserve("fit", vllm_log, "--out", latency)
    assert taken.code == 2 and "exists already" in taken.err


def test_a_roofline_says_what_it_is_made_of_and_gives_the_pool(twinserve, trace, tmp_path):
    result = twinserve("sim", trace, "--latency", "roofline:llama-3-8b@h100:tp=2", "--out", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert "latency: roofline of llama-3-8b on 2 x H100, shares measured" in result.err
    assert "num_gpu_blocks" in result.err and "a pool without end" not in result.err
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["settings"]["num_gpu_blocks"] > 50_000
    assert run["facts"]["latency"]["about"]["basis"] == "shares measured"
    datasheet = twinserve("sim", trace, "--latency", "roofline:smollm2-135m@l4", "--num-gpu-blocks", 500)
    assert "datasheet" in datasheet.err and "num_gpu_blocks" not in datasheet.err


def test_a_model_that_its_device_cannot_hold_is_refused(twinserve, trace):
    result = twinserve("sim", trace, "--latency", "roofline:llama-3-70b@rtx4090")
    assert result.code == 2 and "leaves no room for KV" in result.err and len(result.err.splitlines()) == 1


FORCED = {
    "trace make": ("--out", "OUT", "--requests", 4),
    "trace convert": ("TRACE", "OUT"),
    "sim": ("TRACE", "--latency", "roofline:llama-3-8b@h100", "--out", "OUT"),
    "report": ("RUN", "--out", "OUT"),
    "export": ("RUN", "--format", "csv", "--out", "OUT"),
}


@pytest.mark.parametrize("name", FORCED)
def test_what_is_there_is_replaced_where_that_is_asked_for(twinserve, trace, tmp_path, name):
    run, out = tmp_path / "run", tmp_path / "out"
    assert twinserve("sim", trace, "--latency", "roofline:llama-3-8b@h100", "--out", run).code == 0
    words = [{"TRACE": trace, "RUN": run, "OUT": out}.get(word, word) for word in (*name.split(), *FORCED[name])]
    assert twinserve(*words).code == 0
    before = os.lstat(out).st_ino
    assert twinserve(*words).code == 2 and os.lstat(out).st_ino == before
    again = twinserve(*words, "--force")
    assert again.code == 0, again.err
    assert os.lstat(out).st_ino != before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_simulations_are_compared_under_their_own_names(twinserve, trace, tmp_path):
    for name in ("one", "other"):
        assert twinserve("sim", trace, "--latency", "llama-3-8b-h200", "--out", tmp_path / name).code == 0
    compared = twinserve("compare", tmp_path / "one", tmp_path / "other")
    assert compared.code == 0, compared.err
    head = "".join(compared.out.partition("ttft_s.mean")[0].replace("┃", "").split())
    assert "difference" in head and "simulated" not in head


def test_a_table_has_as_many_columns_as_are_asked_for_and_nothing_is_cut(twinserve, trace, tmp_path, monkeypatch):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'trace = "{trace}"\nlatency = "roofline:llama-3-8b@h100"\n[grid]\nmax_num_seqs = [4, 8]\n')
    monkeypatch.setenv("COLUMNS", "60")
    swept = twinserve("sweep", plan, "--out", tmp_path / "sweep", "--jobs", 1)
    assert swept.code == 0, swept.err
    assert "…" not in swept.out and max(map(len, swept.out.splitlines()[:-1])) <= 60
    objective = ("--objective", "mean TTFT <= 1 s", "--tolerance", 0.5, "--jobs", 1)
    found = twinserve("capacity", trace, "--latency", "roofline:llama-3-8b@h100", *objective)
    (line,) = [line for line in found.out.splitlines() if "rate, requests/s" in line]
    assert line.replace("│", " ").split()[-1].replace(",", "").replace(".", "").isdigit(), (
        "one case alone is a line a value"
    )
