"""Servers in threads of this process, and their clients."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from engine_judge import judge_of
from shell import fitted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from twinserve.engine.llm import LLM
from twinserve.policies import Core
from twinserve.serving.backends import EngineBackend
from twinserve.serving.hosts import EngineHost, Host, Model
from twinserve.serving.options import ServeOptions
from twinserve.serving.recording import LiveRecord, RecordOptions
from twinserve.serving.run import Service, SimulatedModel
from twinserve.settings.build_core import Settings
from twinserve.sim.routers import LeastOutstanding
from twinserve.traces.runs.segments import KeptTokens
from twinserve.worlds.run import ReplicaSpec

FACTS: dict[str, Any] = {"name": "round numbers", "identity": "test"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens 0 to 2, of which 2 ends a text, and a token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + place for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")
    fast.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


@dataclass
class TinyModel:
    """A tiny random model on the engine, with a token a byte."""

    settings: dict[str, Any] = field(default_factory=dict)
    llm: LLM | None = None
    is_apart = True

    def host(self, record: RecordOptions | None) -> Host:
        settings = Settings.load({"block_size": 16, "num_gpu_blocks": 256} | self.settings)
        how: dict[str, Any] = {"tokenizer": byte_tokenizer(), "name": "tiny", "settings": settings}
        self.llm = LLM(judge_of("llama").model, **how, threads=1)  # two teams of threads wait for each other
        kept = None
        if record is not None:
            kept = LiveRecord.of_engine(record, self.llm.settings, self.llm.facts(), self.llm.device_name)
        return EngineHost(EngineBackend(self.llm), self.llm, kept)


def simulated(time_scale: float = 1.0, lengths: Any = None, replicas: int = 1, **settings: Any) -> SimulatedModel:
    """Replicas whose steps cost round numbers."""
    chosen = Settings.load({"num_gpu_blocks": 256, "max_model_len": 1024} | settings)
    specs = [ReplicaSpec(chosen, fitted(), FACTS)] * replicas
    return SimulatedModel("round", specs, LeastOutstanding(), lengths, time_scale)


class Running:
    """A service that serves until it is stopped."""

    def __init__(
        self,
        model: Model,
        record: Path | None = None,
        *,
        segment_bytes: int = 64 << 20,
        segment_s: float = 60.0,
        tokens: KeptTokens | None = None,
        **options: Any,
    ):
        kept = None if record is None else RecordOptions(record, tokens, segment_bytes, segment_s)
        self.service = Service(ServeOptions(port=0, **options), model, record=kept, say=lambda line: None)
        self.counts: Counter[str] | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.counts = self.service.run()
        except BaseException as error:
            self.error = error

    def wait(self, *, for_host: bool = True) -> Running:
        while self._thread.is_alive() and (self.service.url is None or (for_host and self.service.host is None)):
            time.sleep(0.01)
        return self

    @property
    def url(self) -> str:
        assert self.service.url is not None
        return self.service.url

    @property
    def cores(self) -> list[Core]:
        assert self.service.host is not None
        return self.service.host.live.cores

    @property
    def core(self) -> Core:
        (core,) = self.cores
        return core

    def client(self, kind: type = openai.OpenAI, **options: Any) -> Any:
        return kind(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60} | options)

    def settle(self) -> None:
        """Wait until nothing is served any more."""
        while not all(core.is_idle for core in self.cores):
            time.sleep(0.01)

    def stop(self) -> Counter[str] | None:
        self.service.stop()
        self._thread.join()
        if self.error is not None:
            raise self.error
        return self.counts
