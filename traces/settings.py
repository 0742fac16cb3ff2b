"""Settings: every switch of the policies, under vLLM's names where vLLM has it, and the Core they describe."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from twinserve.policies import (
    BlockManager,
    CacheAware,
    Core,
    CoreListener,
    FirstCome,
    PrefixCache,
    Priority,
    Scheduler,
    ShortestJob,
    VllmAdmission,
)
from twinserve.policies.orders import Order, Victim
from twinserve.traces.errors import InputError

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        InputError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"expected TOML: {error}", path=path) from error


def read_table(path: Path | None, name: str) -> dict[str, Any]:
    """The table `name` of a TOML file; empty where it has none, or where there is no file.

    Raises:
        InputError: the file cannot be read, is not TOML, or has something else by that name.
    """
    table = {} if path is None else read_toml(path).get(name, {})
    if not isinstance(table, dict):
        raise InputError("expected a table", path=path, field=name, value=table)
    return table


def validated(
    model: type[Model], table: dict[str, Any], values: dict[str, Any], path: Path | None, *, within: str = ""
) -> Model:
    """A pydantic model from `values` over those of `table`, which the file `path` holds.

    Args:
        within: the place of the table in the file, such as "fleet."; stands before a field.

    Raises:
        InputError: a value is unknown, of the wrong kind, out of range, or contradicts another.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return model(**(table | given))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        is_given = first["loc"][:1] and first["loc"][0] in given
        source = None if is_given else path
        message = first["msg"].removeprefix("Value error, ")
        if field is None:
            raise InputError(message, path=source) from error
        field = field if source is None else within + field
        raise InputError(f"expected: {message}", path=source, field=field, value=first["input"]) from error


class Settings(BaseModel):
    """What the policies are told. The defaults are vLLM's: mixed batches, chunked prefill, prefix caching."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    composition: Literal["mixed", "prefill-first"] = "mixed"
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int = Field(default=2048, ge=1)
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = Field(default=0, ge=0)
    max_num_partial_prefills: int | None = Field(
        default=None, ge=1, description="running requests that may have prompt tokens left to compute"
    )
    scheduling_policy: Literal["fcfs", "priority", "shortest", "cache-aware"] = "fcfs"
    scheduling_ageing: int = Field(
        default=0, ge=0, description="so many later arrivals outweigh one priority, or one token of a shortest job"
    )
    max_model_len: int | None = Field(default=None, ge=1)
    block_size: int = Field(default=16, ge=1, description="tokens in a KV block; with flash 256 unless given")
    num_gpu_blocks: int | None = Field(default=None, ge=1, description="usable KV blocks; none: a pool without end")
    enable_prefix_caching: bool = True
    prefix_caching_hash_algo: Literal["xxh64", "xxh3_128"] = "xxh64"
    prefix_caching_seed: int = Field(default=0, ge=0)
    scheduler_reserve_full_isl: bool = True
    watermark: float = Field(default=0.0, ge=0.0, lt=1.0)
    pipeline_depth: int = Field(default=0, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, expected at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence can decode"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < (self.max_model_len or 0):
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, expected at least max_model_len "
                f"({self.max_model_len}) when enable_chunked_prefill is off"
            )
        if self.scheduling_ageing and self.scheduling_policy not in ("priority", "shortest"):
            raise ValueError(
                f"scheduling_ageing is {self.scheduling_ageing}, expected 0 unless scheduling_policy is priority or "
                "shortest"
            )
        if self.watermark and self.num_gpu_blocks is None:
            raise ValueError(f"watermark is {self.watermark}, expected num_gpu_blocks beside it")
        return self

    @classmethod
    def load(cls, values: dict[str, Any], path: Path | None = None, *, beside: Collection[str] = ()) -> Settings:
        """Settings from `values`, over those of the TOML file `path`.

        Args:
            beside: tables of the file that are no settings.

        Raises:
            InputError: a value is unknown, of the wrong kind, out of range, or contradicts another.
        """
        table = {} if path is None else read_toml(path)
        return validated(cls, {name: value for name, value in table.items() if name not in beside}, values, path)

    def build_order(self) -> Order:
        """A waiting queue in the order of `scheduling_policy`."""
        if self.scheduling_policy == "priority":
            return Priority(ageing=self.scheduling_ageing)
        if self.scheduling_policy == "shortest":
            return ShortestJob(ageing=self.scheduling_ageing)
        return CacheAware() if self.scheduling_policy == "cache-aware" else FirstCome()

    def build_core(
        self,
        *,
        eos_token_id: int | None = None,
        listener: CoreListener | None = None,
        order: Order | None = None,
        victim: Victim | None = None,
    ) -> Core:
        """A Core with these policies and nothing in it; the same for every world.

        Args:
            order: a waiting queue of one's own, in place of `scheduling_policy`.
            victim: a rule of one's own who is preempted, in place of the order's.
        """
        scheduler = Scheduler(
            BlockManager(self.num_gpu_blocks, self.block_size),
            self.max_num_seqs,
            composition=self.composition,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_num_partial_prefills=self.max_num_partial_prefills,
            max_model_len=self.max_model_len,
            prefix_cache=(
                PrefixCache(hash=self.prefix_caching_hash_algo, seed=self.prefix_caching_seed)
                if self.enable_prefix_caching
                else None
            ),
            order=self.build_order() if order is None else order,
            admission=VllmAdmission(
                reserve_full_prompt=self.scheduler_reserve_full_isl,
                watermark_blocks=int(self.watermark * (self.num_gpu_blocks or 0)),
            ),
            victim=victim,
        )
        return Core(scheduler, pipeline_depth=self.pipeline_depth, eos_token_id=eos_token_id, listener=listener)
