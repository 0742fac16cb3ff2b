"""SmolLM2-135M as it is fetched: its tokenizer, its words, and the tokens of transformers however they are batched.

The model is taken from the cache. Where it is not there, TWINSERVE_FETCH=1 in the environment lets the tests fetch it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from engine_judge import GREEDY, NEAR_TIE
from guide_models import subject
from transformers import AutoTokenizer

from twinserve.engine.hub import chat_prompt, fetch
from twinserve.engine.hub.package_index import is_fetched
from twinserve.engine.llm import LLM
from twinserve.policies import SamplingParams
from twinserve.settings.build_core import Settings
from twinserve.traces.request import Part, Request, TokenMaker

NAME = "smollm2-135m"
QUESTIONS = [
    "What is the capital of France?",
    "Count from 1 to 10.",
    "Write a haiku about the sea.",
    "Explain in two sentences what a cache is.",
    "Write a Python function that adds two numbers.",
    "Name three colours of the rainbow.",
    "Who wrote Hamlet?",
    "What is 17 plus 25?",
]


@pytest.fixture(scope="module")
def folder():
    if not is_fetched(NAME) and os.environ.get("TWINSERVE_FETCH") != "1":
        pytest.skip(f"{NAME} is not in the cache: TWINSERVE_FETCH=1 lets the tests fetch it")
    return fetch(NAME)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """The model as transformers runs it."""
    return subject("smollm2").model


@pytest.fixture
def serving(folder):
    """Makes LLMs of the folder with some settings, and closes them."""
    made = []

    def make(token_maker=None, **settings) -> LLM:
        defaults = {"block_size": 16, "num_gpu_blocks": 256, "max_model_len": 2048}
        made.append(LLM(folder, token_maker=token_maker, settings=Settings.load(defaults | settings)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@dataclass(frozen=True)
class Prompts(TokenMaker):
    """Gives the requests of a trace the prompts of real texts, by their ids."""

    prompts: Sequence[list[int]] = ()

    def token_ids(self, request, answers):
        return self.prompts[request.id]


@pytest.fixture(scope="module")
def checked() -> set[tuple[int, ...]]:
    """Texts that were found right."""
    return set()


def check_greedy(reference, prompt: list[int], tokens: list[int]) -> None:
    """Assert that each of `tokens` is what the reference finds most probable after all that is before it.

    Where the two best logits are within NEAR_TIE of each other the assertion would mean nothing, so that fails as well.
    """
    logits = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2)
    assert tokens == best.indices[:, 0].tolist()
    assert (best.values[:, 0] - best.values[:, 1]).min() > NEAR_TIE


def test_texts_become_the_tokens_that_the_model_was_trained_on(tokenizer):
    assert tokenizer.tokenize("In 2024, 12 cafés") == ["In", "Ġ", "2", "0", "2", "4", ",", "Ġ", "1", "2", "Ġcaf", "Ã©s"]
    text = "It's 3.14 and 2²; don't\tpanic!\n\n  漢字 ½ नमस्ते 🚀🚀 Привет ------ '''```\"\"\" we'VE"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # Of a tokenizer that was found equal to the original one by the checksum that llama.cpp keeps of it.
    checksum = hashlib.sha256(str(ids).encode()).hexdigest()
    assert checksum == "bea213ad35a2740f7986e2aae83489c6515e44c75894725272a182931adf510f"
    special = [getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")]
    assert special == [1, 2, 2, 0]


def test_a_question_is_put_as_the_model_was_trained_to_be_asked(tokenizer):
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 42")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_knows_the_capital_of_france(serving):
    llm = serving()
    params = SamplingParams(temperature=0.0, max_tokens=30)
    (completion,) = llm.generate([chat_prompt(llm.tokenizer, "What is the capital of France?")], params)
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"


def test_eight_questions_at_once_get_the_tokens_of_transformers(serving, tokenizer, reference):
    prompts = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for prompt, completion in zip(prompts, serving().generate(prompts, params), strict=True):
        assert len(completion.token_ids) == 12
        check_greedy(reference, prompt, completion.token_ids)


@pytest.mark.parametrize("pipeline_depth", [0, 1])
def test_chunks_prefix_hits_and_preemptions_change_no_token(
    serving, tokenizer, reference, checked, watcher, pipeline_depth
):
    told = "Here is all you know: Paris is in France, Rome is in Italy and Madrid is in Spain. "
    prompts = [chat_prompt(tokenizer, told + question) for question in QUESTIONS[:6]]
    requests = [Request(i, 0, (Part(i, 0, len(prompt)),), 12) for i, prompt in enumerate(prompts)]
    llm = serving(
        Prompts(tokenizer.vocab_size, first_id=3, prompts=prompts),
        num_gpu_blocks=14,
        max_num_seqs=8,
        max_num_batched_tokens=40,
        pipeline_depth=pipeline_depth,
    )
    sequences = llm.run_trace(requests, params=GREEDY, recorder=watcher)
    assert watcher.chunks and watcher.mixed_steps and watcher.hit_tokens and watcher.preemptions
    assert len(sequences) == 6
    for seq in sequences:
        assert len(seq.completion_token_ids) == 12
        if tuple(seq.token_ids) not in checked:  # at the other depth
            check_greedy(reference, prompts[seq.seq_id], seq.completion_token_ids)
            checked.add(tuple(seq.token_ids))
