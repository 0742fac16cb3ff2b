"""What serves behind the interface: a model on the engine, or a simulated replica; both one Core that lives on."""

from __future__ import annotations

import hashlib
import itertools
import random
import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from twinserve.engine.live import BuildCore, Follower, Following, Live
from twinserve.policies import CoreListener, SamplingParams, Sequence
from twinserve.serving.parts import PartMaker
from twinserve.serving.protocol import ApiError, Generation
from twinserve.serving.recording import LiveRecord
from twinserve.serving.simulated import LiveReplicas, StandInTokenizer, stand_in
from twinserve.settings.build_core import Settings
from twinserve.sim.routers import Router
from twinserve.sim.speculation import acceptance_of
from twinserve.traces.generator import LengthSpec
from twinserve.traces.request import Part, Request
from twinserve.worlds.run import ReplicaSpec, with_drafting

if TYPE_CHECKING:
    from twinserve.engine.llm import LLM
    from twinserve.engine.logprobs import TokenLogprobs

STAND_IN_TOKENS = 128
"""Of a simulated answer whose length neither the request nor a law says."""


@dataclass(frozen=True)
class Ask:
    """One answer that is asked for.

    Attributes:
        prompt: its tokens.
        params: how the answer is chosen.
        max_tokens: the most tokens of it.
        session: the conversation it belongs to.
        priority: smaller is more urgent.
        salt: requests of different salts never share blocks.
        prompt_logprobs: how many log-probabilities are asked for of each token of the prompt; None is none.
    """

    prompt: list[int]
    params: SamplingParams
    max_tokens: int
    session: int | None = None
    priority: int = 0
    salt: str = ""
    prompt_logprobs: int | None = None


class Backend(ABC):
    """One Core that lives on, and what turns requests into its sequences.

    Args:
        name: of the model, as clients say it.
        settings: of the policies, as in use.
        tokenizer: None if the model has none; then prompts are token ids, and answers have no text.
        record: hears of each request before it comes in, and of what Core says.

    Attributes:
        live: the Core, once `start` has been called.
        eos_token_id: the token that ends a text; None if none does.
        vocab_size: token ids are below it.
    """

    live: Live
    eos_token_id: int | None = None
    vocab_size = 1 << 32

    def __init__(self, name: str, settings: Settings, tokenizer: Any, record: LiveRecord | None = None):
        self.name, self.settings, self.tokenizer, self.record = name, settings, tokenizer, record
        self._secret = secrets.token_bytes(16)
        self._numbers = itertools.count()
        self._parts = PartMaker(settings.block_size)
        self._said: dict[Sequence, tuple[Part, ...]] = {}

    @property
    def max_model_len(self) -> int | None:
        """The most tokens of prompt and answer together; None is no limit."""
        return self.settings.max_model_len

    @property
    def num_waiting(self) -> int:
        """Requests that have come in and were never scheduled yet."""
        return sum(seq.first_scheduled_ns is None and not seq.is_finished for seq in self._said)

    @abstractmethod
    def start(self, listeners: Seq[CoreListener]) -> None:
        """Begin to serve, heard by `listeners`."""

    @abstractmethod
    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        """The most tokens of an answer for which a request asks so many, or leaves it open."""

    @abstractmethod
    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        """How the tokens of one choice are chosen.

        Raises:
            ApiError: the body asks for something that this backend cannot do.
        """

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

    @abstractmethod
    def tokens(self, seq: Sequence, start: int) -> list[int]:
        """The tokens of an answer that are known, from its `start`-th on."""

    def logprobs(self, seq: Sequence) -> dict[int, TokenLogprobs]:
        """The log-probabilities of its tokens, by their places; those who ask have been let through by `check`."""
        raise NotImplementedError

    @abstractmethod
    def _sequence(self, request: Request, ask: Ask) -> Sequence:
        """The sequence of a request, which the record has been told of by the time it comes in."""

    def _concealed(self, salt: str, alone: int | None) -> str:
        """A salt as it is known beyond this process, where it may be a secret.

        Args:
            alone: the number of a request that computes all of its prompt, and so shares no block with any other.
        """
        if not salt and alone is None:
            return ""
        return hashlib.blake2b(f"{alone} {salt}".encode(), key=self._secret, digest_size=8).hexdigest()

    def submit(self, asks: Seq[Ask], follower: Follower) -> list[Sequence]:
        """Let requests in, all of them before the next decision.

        Raises:
            RunError: nothing is served any more.
        """
        numbered = [(next(self._numbers), ask) for ask in asks]
        made = [(number, ask, self._parts.parts(number, ask.prompt)) for number, ask in numbered]
        seqs: list[Sequence] = []

        def make(now_ns: int) -> list[Sequence]:
            for number, ask, parts in made:
                salt = self._concealed(ask.salt, None if ask.prompt_logprobs is None else number)
                labels = {"session": ask.session, "priority": ask.priority, "salt": salt}
                request = Request(number, now_ns, parts, ask.max_tokens, **labels)  # type: ignore[arg-type]
                seqs.append(self._sequence(request, ask))
            return seqs

        self.live.submit(make, follower)
        self._said |= {seq: parts for seq, (_, _, parts) in zip(seqs, made, strict=True)}
        return seqs

    def ended(self, seq: Sequence, ask: Ask) -> None:
        """Take note that an answer has ended, so that it is known again in a later prompt."""
        self._parts.answered(seq.seq_id, ask.prompt, self._said.pop(seq), self.tokens(seq, 0))


class EngineBackend(Backend):
    """A model on the engine.

    Args:
        takes_defaults: what a request leaves open is sampled as the model's generation config says.
    """

    def __init__(self, llm: LLM, record: LiveRecord | None = None, *, takes_defaults: bool = True):
        super().__init__(llm.name, llm.settings, llm.tokenizer, record)
        self.eos_token_id, self.vocab_size = llm.eos_token_id, llm.config.vocab_size
        self._llm = llm
        self._defaults: dict[str, Any] = dict(llm.sampling_defaults) if takes_defaults else {}

    def start(self, listeners: Seq[CoreListener]) -> None:
        self.live = self._llm.live([*listeners, *(self.record.recorders if self.record else ())])

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        assert self.max_model_len is not None
        return asked or self.max_model_len - num_prompt_tokens

    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        if body.stop_token_ids:
            self.check_prompt(body.stop_token_ids)
        try:
            return self._llm.with_stops(body.sampling_params(self._defaults, max_tokens, choice))
        except ValueError as error:
            raise ApiError(str(error)) from error

    def tokens(self, seq: Sequence, start: int) -> list[int]:
        return seq.token_ids[seq.num_prompt_tokens + start :]

    def logprobs(self, seq: Sequence) -> dict[int, TokenLogprobs]:
        return self._llm.runner.logprobs.get(seq, {})

    def ended(self, seq: Sequence, ask: Ask) -> None:
        super().ended(seq, ask)
        self._llm.runner.logprobs.pop(seq, None)
        self._llm.runner.prompt_asks.pop(seq, None)

    def _sequence(self, request: Request, ask: Ask) -> Sequence:
        seq = request.to_sequence(ask.params, ask.prompt)
        if ask.prompt_logprobs is not None:
            self._llm.runner.prompt_asks[seq] = ask.prompt_logprobs
        if self.record is not None:
            self.record.recorders[0].expect(request, seq.sampling_params)
        return seq


class SimulatedBackend(Backend):
    """Simulated replicas; their answers say nothing, and are as long as they are asked to be.

    Args:
        replicas: the settings of the first are those of the endpoint.
        router: which replica serves a request.
        lengths: how long answers would be if nothing cut them short; None is as long as is asked for.
        seed: of the lengths.
        time_scale: a simulated second takes so many on the wall.
    """

    live: LiveReplicas

    def __init__(
        self,
        name: str,
        replicas: Seq[ReplicaSpec],
        router: Router,
        *,
        lengths: LengthSpec | None = None,
        seed: int = 0,
        time_scale: float = 1.0,
        record: LiveRecord | None = None,
    ):
        super().__init__(name, replicas[0].settings, StandInTokenizer(), record)
        self._replicas, self._router, self._lengths, self._time_scale = replicas, router, lengths, time_scale
        self._random = random.Random(seed)

    def start(self, listeners: Seq[CoreListener]) -> None:
        recorders = self.record.recorders if self.record else []

        def build(number: int, spec: ReplicaSpec) -> BuildCore:
            own = recorders[number : number + 1]
            return lambda listener: spec.settings.build_core(listener=Following([*own, listener]))

        def routed(seq: Sequence, request: Request, number: int) -> None:
            if recorders:
                recorders[number].expect(request, seq.sampling_params)

        self.live = LiveReplicas(
            [build(number, spec) for number, spec in enumerate(self._replicas)],
            [with_drafting(spec.latency, spec.settings) for spec in self._replicas],
            self._router,
            listeners,
            acceptances=[acceptance_of(spec.settings.speculative_config) for spec in self._replicas],
            time_scale=self._time_scale,
            routed=routed,
        )
        self.live.start()

    def max_tokens(self, asked: int | None, num_prompt_tokens: int) -> int:
        room = 1 << 20 if self.max_model_len is None else self.max_model_len - num_prompt_tokens
        return asked or (min(STAND_IN_TOKENS, room) if self._lengths is None else room)

    def params(self, body: Generation, max_tokens: int, choice: int) -> SamplingParams:
        if body.num_logprobs is not None or body.num_prompt_logprobs is not None:
            raise ApiError("logprobs are not served by a simulation, which has no probabilities", param="logprobs")
        return body.sampling_params({}, max_tokens, choice)

    def tokens(self, seq: Sequence, start: int) -> list[int]:
        return stand_in(seq.seq_id, range(start, seq.num_completion_tokens))

    def _sequence(self, request: Request, ask: Ask) -> Sequence:
        if self._lengths is not None and not ask.params.ignore_eos:
            drawn = max(ask.params.min_tokens, self._lengths.draw(self._random))
            request = replace(request, max_tokens=min(request.max_tokens, drawn))
        seq = request.to_sequence(ask.params)
        self.live.requests[seq] = request
        return seq
