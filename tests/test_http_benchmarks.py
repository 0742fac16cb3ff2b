"""The benchmarks of HTTP: what each writes, with little to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_judge import judge_of

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for the server and one for its clients")
def test_open_streams_are_read_to_their_ends(tmp_path):
    run("http_streams.py", "--streams", 6, "--tokens", 20, "--out", tmp_path / "streams.json")
    result = json.loads((tmp_path / "streams.json").read_text())
    assert (result["streams"], result["whole"], result["tokens"]) == (6, 6, 20)
    assert result["simulated_itl_s"] > 0 and result["lag_s"].keys() == {"simulation_lag_s", "stream_lag_s"}


def test_recorded_traffic_is_decided_again_and_simulated_to_the_same_numbers(tmp_path):
    run("live_record.py", "--hours", 0.01, "--out", tmp_path / "kept", "--results", tmp_path / "live.json")
    result = json.loads((tmp_path / "live.json").read_text())
    assert result["requests"] == result["whole_answers"] == 72
    assert result["replay"]["exact"] and result["replay"]["equal"] > 1000
    assert result["simulated_again"]["last_digest_is_equal"]
    assert all(row["sim"] == row["live"] for row in result["simulated_again"]["metrics"].values())
    assert (tmp_path / "kept" / "live" / "segments" / "000000").is_dir()


def test_what_http_costs_is_told_beside_the_twin(tmp_path):
    judge_of("llama").model.save_pretrained(tmp_path / "tiny")
    # A prompt takes two steps of other sizes, so that a fit knows two, whatever comes when.
    sizes = "--max-num-batched-tokens 16 --max-num-seqs 2 --max-model-len 64 --num-gpu-blocks 64"
    lengths = "--streams 5 --prompt-tokens 24 --output-tokens 12"
    run(
        "http_overhead.py",
        "--model",
        tmp_path / "tiny",
        *sizes.split(),
        *lengths.split(),
        "--repeats",
        2,
        "--out",
        tmp_path,
    )
    result = json.loads((tmp_path / "cpu" / "http-overhead.json").read_text())
    assert len(result["repeats"]) == 2
    for repeat in result["repeats"]:
        run_tok_s, http_tok_s = (repeat[world]["full_tok_s"] for world in ("run", "http"))
        assert repeat["overhead"] == pytest.approx(1 - http_tok_s / run_tok_s) and run_tok_s > 0
        assert repeat["replay"]["exact"] and repeat["replay"]["equal"] > 0
        assert repeat["twin"]["cached_tokens"] == {"sim": 0, "real": 0}
        assert repeat["twin"]["ttft_s.mean"]["sim"] > 0 and repeat["seen_tok_s"] > 0
