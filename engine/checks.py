"""What a model and a device can serve of what was asked for; refused, where they cannot, before weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from twinserve.engine.capability import Capability
from twinserve.engine.device_queue import usable_device
from twinserve.engine.float8 import FLOAT8
from twinserve.engine.graphs.step_sizes import GraphOptions
from twinserve.engine.layers.choice import AttentionChoice, choose_attention
from twinserve.engine.models.config import ModelConfig
from twinserve.engine.models.sharded_decoder import check_size, part_of
from twinserve.engine.models.source import ModelSource
from twinserve.engine.options import EngineOptions
from twinserve.engine.parallel.shards import Shard
from twinserve.engine.quantization.float8_product import ALIGNED
from twinserve.settings.build_core import Settings
from twinserve.settings.errors import InputError


@dataclass(frozen=True)
class RunnerConfig:
    """What a runner of a model's steps is made from, beside the weights.

    Attributes:
        options: as they were given.
        model: the shape of the model.
        device: runs the steps.
        attention: the backend, and whether the steps are graphs.
        kv_cache_dtype: of the pool.
        settings: of the policies, with `max_model_len` and `block_size` decided; `num_gpu_blocks` may be open until the
            weights are loaded.
        graph_options: what is switched off in steps that are graphs; None is nothing.
    """

    options: EngineOptions
    model: ModelConfig
    device: torch.device
    attention: AttentionChoice
    kv_cache_dtype: torch.dtype
    settings: Settings
    graph_options: GraphOptions | None = None

    @classmethod
    def checked(
        cls, source: ModelSource, options: EngineOptions, settings: Settings, graph_options: GraphOptions | None = None
    ) -> RunnerConfig:
        """The config of what was asked for, where the model and the device can serve it.

        Raises:
            InputError: they cannot, or the device is not there.
        """
        if settings.pipeline_parallel_size > 1:
            value = settings.pipeline_parallel_size
            raise InputError("expected 1 on the engine", field="pipeline_parallel_size", value=value)
        device, model = usable_device(options.device), source.config
        kv_cache_dtype = FLOAT8 if options.kv_cache_dtype == "fp8" else source.dtype
        own = _own_part(source, options, settings)
        if device.type == "cuda":
            check_device(source, own, device, kv_cache_dtype)
        asked = settings.block_size if "block_size" in settings.model_fields_set else None
        group = own.num_heads // own.num_kv_heads
        attention = choose_attention(
            options.attention, model.head_dim, source.dtype, device, asked, options.execution, group
        )
        if graph_options is not None and not attention.graphs:
            raise InputError("expected None where steps are no graphs", field="graph_options", value=graph_options)
        if options.kv_cache_dtype == "fp8" and attention.name != "triton":
            raise InputError(f"expected auto with {attention.name}", field="kv_cache_dtype", value="fp8")
        settings = _within_model(settings, model, attention.block_size)
        return cls(options, model, device, attention, kv_cache_dtype, settings, graph_options)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        assert self.settings.max_model_len is not None, self.settings
        return self.settings.max_model_len

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, once that is known."""
        assert self.settings.num_gpu_blocks is not None, self.settings
        return self.settings.num_gpu_blocks

    def with_blocks(self, num_blocks: int) -> RunnerConfig:
        """This config with a pool of `num_blocks`."""
        return replace(self, settings=self.settings.model_copy(update={"num_gpu_blocks": num_blocks}))


def check_device(source: ModelSource, own: ModelConfig, device: torch.device, kv_cache_dtype: torch.dtype) -> None:
    """Refuse a model in numbers that a CUDA device cannot multiply.

    Args:
        own: the shape of what the device has of the model.

    Raises:
        InputError: it cannot.
    """
    Capability.of(device).check_formats(source.dtype, kv_cache_dtype, source.quantization)
    if source.quantization != "fp8":
        return
    heads = own.num_heads * own.head_dim
    sizes = {
        "the hidden layer": own.hidden_size,
        "the intermediate layer": own.intermediate_size,
        "the attention's output": heads,
        "the attention's input": heads + 2 * own.num_kv_heads * own.head_dim,
    }
    for name, size in sizes.items():
        if size % ALIGNED:
            problem = f"expected weights of 16 bits, or int8: CUDA takes multiples of {ALIGNED}, {name} is {size}"
            raise InputError(problem, field="quantization", value="fp8")


def _own_part(source: ModelSource, options: EngineOptions, settings: Settings) -> ModelConfig:
    """The shape of what one of the ranks that share the model has of it.

    Raises:
        InputError: so many cannot share it, or there are not so many devices, or somebody else starts processes.
    """
    size, field = options.tensor_parallel_size, "tensor_parallel_size"
    if size == 1:
        return source.config
    check_size(source.config, size)
    if settings.speculative_config is not None:
        raise InputError("expected 1 with speculative_config", field=field, value=size)
    if not source.is_splittable:
        raise InputError("expected 1 with a Decoder, which has its weights already", field=field, value=size)
    if options.device.startswith("cuda"):
        if options.device != "cuda":
            problem = f"expected cuda: the ranks take cuda:0 to cuda:{size - 1}"
            raise InputError(problem, field="device", value=options.device)
        if size > (count := torch.cuda.device_count()):
            raise InputError(f"but torch finds {count} CUDA devices", field=field, value=size)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise InputError("expected 1 under torchrun: the ranks are started here", field=field, value=size)
    return part_of(source.config, Shard(0, size))


def _within_model(settings: Settings, model: ModelConfig, block_size: int) -> Settings:
    """`settings` with what the model and the attention decide."""
    limit = model.max_model_len
    max_model_len = settings.max_model_len or limit
    if max_model_len > limit:
        problem = f"expected at most {limit}, the model's max_position_embeddings"
        if limit != model.max_position_embeddings:
            problem += " as its rope scaling makes them"
        raise InputError(problem, field="max_model_len", value=max_model_len)
    decided = {"max_model_len": max_model_len, "block_size": block_size}
    return Settings.load(settings.model_dump() | decided)
