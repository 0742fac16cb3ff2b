"""The model that the benchmarks of the seven cycles measure, in each of the ways in which they run it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sizes import SIZES, Job, Sizes
from torch import nn

from twinserve.commands.progress import say
from twinserve.engine.kv_cache import bytes_per_block
from twinserve.engine.llm import LLM
from twinserve.engine.models import ModelConfig
from twinserve.engine.models.dummy import SHAPES, shape_names
from twinserve.engine.models.loader import DTYPES
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Subject:
    """A model to measure; every call loads it anew.

    Attributes:
        name: what it is called in results.
        source: a folder, or a shape that ships.
        is_random: its weights are random, and it has no tokenizer.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
    """

    name: str
    source: str
    is_random: bool
    device: str
    dtype: str
    sizes: Sizes

    @classmethod
    def of(
        cls,
        name: str = DEFAULT_MODEL,
        *,
        load_format: str = "auto",
        device: str = "cpu",
        dtype: str | None = None,
    ) -> Subject:
        """A model by name.

        Args:
            name: as `twinserve --model`; with `load_format="dummy"` a shape that ships, or a folder with config.json.
            dtype: None is float32 on a CPU, where it is fastest, and bfloat16 on CUDA.

        Raises:
            InputError: there is no such model, or no such device.
        """
        if device not in SIZES:
            raise InputError(f"expected one of {', '.join(SIZES)}", field="device", value=device)
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("expected cpu: torch finds no CUDA device", field="device", value=device)
        is_random, source = load_format == "dummy", name
        if not is_random:
            from twinserve.engine.hub import resolve_model

            source = str(resolve_model(name, progress=say))
        dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        return cls(Path(name).name, source, is_random, device, dtype, SIZES[device])

    @property
    def folder(self) -> Path:
        """The Hugging Face folder; without weights where these are random."""
        return SHAPES / self.source if self.is_random and self.source in shape_names() else Path(self.source)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.load(self.folder)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return bytes_per_block(self.config, 1, DTYPES[self.dtype])

    def transformers_model(self) -> nn.Module:
        """The model as transformers makes it, for generation without the engine; no token ends a text."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        dtype = DTYPES[self.dtype]
        model: Any
        if self.is_random:
            with torch.device(self.device):
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder), dtype=dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
            model.to(self.device)
        model.generation_config.eos_token_id = None
        return model.eval().requires_grad_(False)

    def tokenizer(self) -> Any:
        """The model's tokenizer, or one that stands in for it; no token ends a text."""
        if not any(self.folder.glob("tokenizer*")):
            return NumberTokenizer(self.config.vocab_size)
        from transformers import AutoTokenizer

        return EndlessTokenizer(AutoTokenizer.from_pretrained(self.folder))

    @contextmanager
    def engine(self, jobs: Seq[Job], *, attention: str = "sdpa", **options: Any) -> Iterator[LLM]:
        """The paged engine for a while, with a pool of KV blocks that `jobs` fill when all of them run at once.

        Args:
            options: of the policies (`Settings`), and `dtype` and `quantization` of the model.
        """
        model_options = {name: options.pop(name) for name in ("dtype", "quantization") if name in options}
        block_size = 256 if attention == "flash" else 16
        blocks = sum(-(-(len(job.prompt) + job.max_tokens) // block_size) for job in jobs)
        settings = Settings(
            block_size=block_size,
            num_gpu_blocks=blocks,
            max_num_batched_tokens=self.sizes.max_num_batched_tokens,
            **options,
        )
        llm = LLM(
            self.source,
            name=self.name,
            device=self.device,
            load_format="dummy" if self.is_random else "auto",
            settings=settings,
            attention=attention,
            execution="eager",  # the cycles build the paged engine up to here; what graphs add is measured by itself
            **{"dtype": self.dtype, **model_options},
        )
        try:
            yield llm
        finally:
            llm.close()


class NumberTokenizer:
    """Texts of numbers, for models without a tokenizer: "7" is token 7, any other word a token by its checksum."""

    eos_token_id = None

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        numbers = (int(word) if word.isdecimal() else zlib.crc32(word.encode()) for word in text.split())
        return [number % self._vocab_size for number in numbers]

    def decode(self, token_ids: Iterable[int]) -> str:
        return " ".join(map(str, token_ids))


class EndlessTokenizer:
    """A tokenizer none of whose tokens ends a text, so that as many are generated as were asked for."""

    eos_token_id = None

    def __init__(self, tokenizer: Any):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
