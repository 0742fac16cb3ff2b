"""EngineOptions: what the engine is told beside the policies' settings. It is checked without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from twinserve.settings.config import read_table, validated

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "triton", "flash", "sdpa"]
Execution = Literal["auto", "graphs", "eager"]
Quantization = Literal["none", "int8", "fp8"]

GPU_MEMORY_UTILIZATION = 0.9

RUNNER_SETTINGS = ("block_size", "num_gpu_blocks", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
"""The settings of the policies that what runs the steps is made for, so that a step's cost can hang on them."""


class EngineOptions(BaseModel):
    """What serves: a model, how it is kept and how its steps are run.

    They are checked before anything is loaded. What hangs on the model's shape or on the device (an attention backend
    that has no kernel for it) is refused by `LLM`, before it loads weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = Field(default="smollm2-135m", description="smollm2-135m, a Hugging Face folder, or a hub id")
    device: str = Field(default="cpu", description="cpu, cuda or cuda:N")
    dtype: Dtype = Field(
        default="auto",
        description="of the weights, once loaded, and of what layers give; auto: the checkpoint's own on CUDA, float32 "
        "on a CPU",
    )
    attention: Attention = Field(
        default="auto",
        description="triton (in graphs), flash (flash-attn), sdpa (torch), or auto: what can serve, in that order",
    )
    execution: Execution = Field(
        default="auto", description="graphs (CUDA graphs of fused kernels), eager (by torch), or auto: graphs on CUDA"
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto, or dummy: random weights; the model is a folder with config.json or a shape that ships",
    )
    quantization: Quantization = Field(
        default="none",
        description="none: as the checkpoint is; int8: linear layers and embedding of a byte a weight, and a scale a "
        "row; on CUDA the weights of a step of more than 256 rows are written out in 16 bits, which takes several "
        "times as long as plain ones; fp8: linear layers but the output projection in e4m3, with a scale a row, and "
        "what they are given rounded likewise; on CUDA beside bfloat16 alone",
    )
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        default="auto", description="auto: as dtype; fp8: a byte a number (e4m3, unscaled), with triton alone"
    )
    gpu_memory_utilization: float = Field(
        default=GPU_MEMORY_UTILIZATION,
        gt=0,
        lt=1,
        description="share of a CUDA device's memory that weights, steps and KV take together",
    )
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="devices that share the model, cuda:0 and on; on a CPU processes"
    )
    seed: int = Field(
        default=0, ge=0, lt=1 << 63, description="of random weights, and of draws for requests without their own"
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", value):
            raise ValueError("cpu, cuda or cuda:N")
        return value

    @classmethod
    def load(cls, values: dict[str, Any], path: Path | None = None) -> EngineOptions:
        """Options from `values`, over the table `engine` of the TOML file `path`.

        Raises:
            InputError: a value is unknown, of the wrong kind, or out of range.
        """
        return validated(cls, read_table(path, "engine"), values, path, within="engine.")
