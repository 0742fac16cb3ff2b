"""What the HTTP interface knows of what serves behind it: a model on the engine, or simulated replicas."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from twinserve.engine.endings import with_stops
from twinserve.policies import SamplingParams
from twinserve.serving.messages import Ask
from twinserve.serving.protocol import ApiError, Generation
from twinserve.serving.simulated import StandInTokenizer
from twinserve.settings.build_core import Settings
from twinserve.traces.generator import LengthSpec

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM

STAND_IN_TOKENS = 128
"""Of a simulated answer whose length neither the request nor a law says."""


class Backend(ABC):
    """What serves, as far as bodies are made into asks by it; it can be sent to another process.

    Args:
        name: of the model, as clients say it.
        settings: of the policies, as in use.
        tokenizer: None if the model has none; then prompts are token ids, and answers have no text.

    Attributes:
        eos_token_id: the token that ends a text; None if none does.
        vocab_size: token ids are below it.
    """

    eos_token_id: int | None = None
    vocab_size = 1 << 32

    def __init__(self, name: str, settings: Settings, tokenizer: Any):
        self.name, self.settings, self.tokenizer = name, settings, tokenizer

    @property
    def max_model_len(self) -> int | None:
        """The most tokens of prompt and answer together; None is no limit."""
        return self.settings.max_model_len

    @abstractmethod
    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        """The most tokens of an answer for which a request asks so many, or leaves it open."""

    @abstractmethod
    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        """How the tokens of one choice are chosen.

        Raises:
            ApiError: the body asks for something that this backend cannot do.
        """

    def length(self, ask: Ask) -> int:
        """The tokens after which an answer ends in any case: by "length" if they are all that was asked for."""
        return ask.max_tokens

    def check_prompt(self, prompt: Seq[int]) -> None:
        """Refuse token ids that there are not.

        Raises:
            ApiError: there is one.
        """
        if not prompt:
            raise ApiError("the prompt has no tokens", param="prompt")
        for token_id in (min(prompt), max(prompt)):
            if not 0 <= token_id < self.vocab_size:
                raise ApiError(f"token id {token_id}, expected ids from 0 to {self.vocab_size - 1}", param="prompt")


class EngineBackend(Backend):
    """A model on the engine.

    Args:
        takes_defaults: what a request leaves open is sampled as the model's generation config says.
    """

    def __init__(self, llm: LLM, *, takes_defaults: bool = True):
        super().__init__(llm.name, llm.settings, llm.tokenizer)
        self.eos_token_id, self.vocab_size = llm.eos_token_id, llm.config.vocab_size
        self._eos_token_ids = llm.eos_token_ids
        self._defaults: dict[str, Any] = dict(llm.sampling_defaults) if takes_defaults else {}

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        assert self.max_model_len is not None
        return asked or self.max_model_len - num_prompt_tokens

    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        if body.stop_token_ids:
            self.check_prompt(body.stop_token_ids)
        try:
            params = body.sampling_params(self._defaults, max_tokens, choice)
            return with_stops(params, self._eos_token_ids, self.vocab_size)
        except ValueError as error:
            raise ApiError(str(error)) from error


class SimulatedBackend(Backend):
    """Simulated replicas; their answers say nothing, and are as long as they are asked to be.

    Args:
        lengths: how long answers would be if nothing cut them short; None is as long as is asked for.
        seed: of the lengths.
    """

    def __init__(self, name: str, settings: Settings, *, lengths: LengthSpec | None = None, seed: int = 0):
        super().__init__(name, settings, StandInTokenizer())
        self._lengths, self._random = lengths, random.Random(seed)

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        room = 1 << 20 if self.max_model_len is None else self.max_model_len - num_prompt_tokens
        return asked or (min(STAND_IN_TOKENS, room) if self._lengths is None else room)

    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        if body.num_logprobs is not None or body.num_prompt_logprobs is not None:
            raise ApiError("logprobs are not served by a simulation, which has no probabilities", param="logprobs")
        return body.sampling_params({}, max_tokens, choice)

    def length(self, ask: Ask) -> int:
        if self._lengths is None or ask.params.ignore_eos:
            return ask.max_tokens
        return min(ask.max_tokens, max(ask.params.min_tokens, self._lengths.draw(self._random)))
