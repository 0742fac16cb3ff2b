"""Defaults by version and device, and command lines of `vllm serve`: what they set, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from twinserve.planning.fleets import FleetOptions
from twinserve.planning.point import Point
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError
from twinserve.worlds.vllm_like import Like, like_of, read_vllm_args

RECORDS = os.environ.get("TWINSERVE_RECORDS")


@pytest.mark.parametrize(
    ("text", "max_num_seqs", "max_num_batched_tokens"),
    [
        ("vllm-0.33@h200", 1024, 8192),
        ("vllm-0.33@h200:offline", 1024, 16384),
        ("vllm-0.33@H100:server", 1024, 8192),
        ("vllm-0.24@h100:offline", 1024, 16384),
        ("vllm-0.33@a100", 256, 2048),
        ("vllm-0.33@a100:offline", 256, 8192),
        ("vllm-0.33@l4", 256, 2048),
        ("vllm-0.33@mi300x", 1024, 16384),
        ("vllm-0.24@mi300x", 1024, 8192),
    ],
)
def test_a_vllm_serves_with_the_defaults_of_its_version_device_and_use(text, max_num_seqs, max_num_batched_tokens):
    like = Like.parse(text)
    assert like.settings == {
        "vllm_version": text[5:9],
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "pipeline_depth": 1,
    }
    assert f"max_num_batched_tokens {max_num_batched_tokens}" in str(like) and "arg_utils.py" in str(like)


@pytest.mark.skipif(RECORDS is None, reason="TWINSERVE_RECORDS does not name a folder of recorded vLLM runs")
def test_what_a_recorded_vllm_chose_on_its_device_is_what_it_is_like():
    run = json.loads((Path(RECORDS or "") / "vllm-0.24.0-h100" / "azure-0.80" / "run.json").read_text())["settings"]
    assert "H100" in run["gpu"] and not run["engine_args"]
    chosen = Like.parse("vllm-0.24@h100:offline").settings
    assert {name: run[name] for name in ("max_num_seqs", "max_num_batched_tokens")}.items() <= chosen.items()
    assert run["async_scheduling"] and run["max_concurrent_batches"] == chosen["pipeline_depth"] + 1
    settings = Settings()
    for name in ("block_size", "enable_prefix_caching", "enable_chunked_prefill", "scheduler_reserve_full_isl"):
        assert run[name] == getattr(settings, name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vllm-0.30@h100", "expected vllm-0.24 or vllm-0.33"),
        ("sglang@h100", "expected vllm-0.24 or vllm-0.33"),
        ("vllm-0.33@h100:both", ":offline for no server"),
        ("vllm-0.33@abacus", "expected a device of a100, h100"),
        ("vllm-0.33", "expected a device of"),
    ],
)
def test_what_is_no_vllm_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        Like.parse(text)


def test_without_a_word_the_newest_vllm_on_a_rooflines_device_is_meant_and_nothing_where_no_device_is_known():
    assert like_of(None, "roofline:llama-3-8b@H200:tp=2") == Like.parse("vllm-0.33@h200")
    assert like_of(None, "smollm2-135m-cpu-2-threads") is None and like_of(None, None) is None
    assert like_of("own", "roofline:llama-3-8b@h200") is None
    assert like_of("vllm-0.24@a100", "roofline:llama-3-8b@h200") == Like.parse("vllm-0.24@a100")


def test_a_replica_has_these_defaults_and_what_is_set_goes_before_them(tmp_path):
    roofline = "roofline:llama-3-8b@h100"
    (replica,), words = FleetOptions().build_replicas({}, latency=roofline)
    assert (replica.settings.max_num_seqs, replica.settings.max_num_batched_tokens) == (1024, 8192)
    assert any(line.startswith("like vLLM 0.33 on H100, server: max_num_seqs 1024") for line in words)
    config = tmp_path / "c.toml"
    config.write_text("max_num_batched_tokens = 4096\n")
    (replica,), _ = FleetOptions().build_replicas({"max_num_seqs": 7}, config, latency=roofline)
    chosen = replica.settings
    assert (chosen.max_num_seqs, chosen.max_num_batched_tokens, chosen.pipeline_depth) == (7, 4096, 1)
    (replica,), words = FleetOptions().build_replicas({}, latency=roofline, like="own")
    assert replica.settings.max_num_seqs == Settings().max_num_seqs
    assert not [line for line in words if line.startswith("like")]


def test_a_point_of_a_sweep_says_in_its_settings_what_it_is_like():
    values = {"trace": "t", "latency": "roofline:llama-3-8b@h100"}
    assert Point.of(values).settings.max_num_batched_tokens == 8192
    assert Point.of(values | {"like": "vllm-0.33@l4"}).settings.max_num_batched_tokens == 2048
    assert Point.of(values | {"like": "own"}).settings == Settings()
    assert Point.of(values | {"max_num_seqs": 5}).settings.max_num_seqs == 5


def test_a_command_line_of_vllm_serve_is_taken_as_it_is():
    text = (
        "vllm serve meta-llama/Llama-3-8B --max-num-seqs 512 --max_num_batched_tokens=8K --max-model-len 32k "
        "--no-enable-prefix-caching --enable-chunked-prefill --scheduling-policy priority -tp 2 --port 8000 "
        "--num-gpu-blocks-override 1001 --no-async-scheduling --long-prefill-token-threshold 256 "
        "--long-prefill-token-threshold-adaptive --prefill-schedule-interval 4 --max-num-active-seqs 64 "
        "--watermark 0.01 --enforce-eager"
    )
    settings, unmodelled = read_vllm_args(text)
    assert settings == {
        "max_num_seqs": 512,
        "max_num_batched_tokens": 8192,
        "max_model_len": 32000,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "scheduling_policy": "priority",
        "num_gpu_blocks": 1000,
        "pipeline_depth": 0,
        "long_prefill_token_threshold": 256,
        "long_prefill_token_threshold_adaptive": True,
        "prefill_schedule_interval": 4,
        "max_num_active_seqs": 64,
        "watermark": 0.01,
    }
    assert unmodelled == ["-tp", "--port", "--enforce-eager"]
    assert Settings.load(settings).max_num_seqs == 512


@pytest.mark.parametrize(
    ("text", "unmodelled"),
    [
        ("-O3 --max_num_seqs=4 --seed -1", ["-O3", "--seed"]),
        ("--max-model-len -1 --max-num-seqs 4", ["--max-model-len"]),
        ("--max-model-len=auto --max-num-seqs 4 --lora_modules a b", ["--max-model-len", "--lora_modules"]),
    ],
)
def test_flags_that_are_not_modelled_are_named_as_they_are_written(text, unmodelled):
    assert read_vllm_args(text) == ({"max_num_seqs": 4}, unmodelled)


@pytest.mark.parametrize(
    ("text", "expected", "unmodelled"),
    [
        (
            """--speculative-config '{"method": "ngram_gpu", "num-speculative-tokens": 3, "prompt_lookup_max": 4}'""",
            {"method": "ngram_gpu", "num_speculative_tokens": 3, "prompt_lookup_min": 4, "prompt_lookup_max": 4},
            [],
        ),
        (
            """-sc='{"method": "eagle3", "model": "a/b", "num_speculative_tokens": 2, "revision": "b"}'""",
            {"method": "eagle3", "num_speculative_tokens": 2},
            ["--speculative-config.model", "--speculative-config.revision"],
        ),
        (
            "--speculative-config.method draft_model --speculative_config.model=a/b --spec-tokens 5",
            {"method": "draft_model", "model": "a/b", "num_speculative_tokens": 5},
            [],
        ),
        ("--spec-method suffix --spec-tokens 5", None, ["--speculative-config with the method suffix"]),
        ("""-sc '{"model": "a/b"}'""", None, ["--speculative-config without a method"]),
    ],
)
def test_drafts_of_a_command_line_are_a_setting_as_far_as_they_are_modelled(text, expected, unmodelled):
    settings, others = read_vllm_args(f"{text} --max-num-seqs 4")
    assert settings == {"max_num_seqs": 4} | ({} if expected is None else {"speculative_config": expected})
    assert others == unmodelled
    Settings.load(settings)


def test_prompt_lookup_on_the_host_turns_asynchronous_scheduling_off_unless_it_is_asked_for():
    text = """--speculative-config '{"method": "ngram", "num_speculative_tokens": 3}'"""
    settings, _ = read_vllm_args(text)
    assert Like.parse("vllm-0.33@h100").settings["pipeline_depth"] == 1
    assert Settings.load(Like.parse("vllm-0.33@h100").settings | settings).pipeline_depth == 0
    settings, _ = read_vllm_args(f"{text} --async-scheduling")
    with pytest.raises(InputError, match="expected 'ngram_gpu' with pipeline_depth 1"):
        Settings.load(settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--speculative-config '{method: ngram}'", "expected a JSON object for --speculative-config"),
        ("-sc 5", "expected a JSON object for --speculative-config"),
        ("--max-num-seqs -1 --max-num-seqs=four", "expected a number for --max-num-seqs"),
        ("--max-num-seqs", "expected a number for --max-num-seqs"),
        ("--max-num-seqs many", "expected a number for --max-num-seqs"),
        ("--scheduling-policy fair", "expected fcfs or priority"),
        ("--model 'a", "expected a command line"),
    ],
)
def test_a_command_line_that_means_nothing_is_refused(text, expected):
    with pytest.raises(InputError, match=expected):
        read_vllm_args(text)
