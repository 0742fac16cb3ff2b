"""Faults on the CPU. See `engine_faults`."""

from __future__ import annotations

import engine_faults
import pytest

every_depth = pytest.mark.parametrize("pipeline_depth", [0, 1])


@every_depth
def test_out_of_memory_ends_its_run_alone(llama, serving, monkeypatch, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth, max_model_len=128)
    engine_faults.check_out_of_memory_ends_its_run_alone(llm, monkeypatch)


@every_depth
def test_what_cannot_be_served_is_refused_and_the_others_are_unharmed(llama, serving, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth, max_model_len=128)
    engine_faults.check_what_cannot_be_served_is_refused(llm)


def test_an_abort_while_its_token_is_in_flight(llama, serving):
    llm = serving(llama, pipeline_depth=1, max_model_len=128)
    engine_faults.check_abort_while_its_token_is_in_flight(llm)


@every_depth
def test_logits_that_are_no_numbers_end_their_request_alone(llama, serving, pipeline_depth):
    llm = serving(llama, pipeline_depth=pipeline_depth, max_model_len=128, block_size=16, num_gpu_blocks=256)
    engine_faults.check_logits_that_are_no_numbers_end_their_request_alone(llm)


def test_ids_beyond_the_vocabulary_are_refused(llama, serving):
    llm = serving(llama, max_model_len=128, block_size=16)
    engine_faults.check_ids_beyond_the_vocabulary_are_refused(llm)


def test_every_temperature_draws(llama, serving):
    llm = serving(llama, max_model_len=128, block_size=16, num_gpu_blocks=256)
    engine_faults.check_every_temperature_draws(llm)
