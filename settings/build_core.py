"""Settings: every switch of the policies, under vLLM's names where vLLM has it, and the Core they describe."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from twinserve.orders import CacheAware, Loading, Priority, ShortestJob
from twinserve.orders.loading import Source
from twinserve.policies import (
    BlockManager,
    Core,
    CoreListener,
    FirstCome,
    PrefixCache,
    Scheduler,
    VllmAdmission,
)
from twinserve.policies.orders import Admission, Order, Victim
from twinserve.policies.vllm_rules import VllmRules
from twinserve.settings.config import read_toml, validated
from twinserve.settings.limits import MOST, MOST_BLOCKS, MOST_REPLICAS
from twinserve.settings.own_class import RULES, build, pinned
from twinserve.settings.speculative import SpeculativeConfig, parsed
from twinserve.settings.vllm_versions import CHANGED, NEWEST, UNSAID, Version, build_rules

SCHEDULING_POLICIES = ("fcfs", "priority", "shortest", "cache-aware")
BY_HAND = "by hand"
"""So a record's rule begins where its settings do not name it."""


@runtime_checkable
class HearsRules(Protocol):
    """A listener that wants to know by which rules a Core decides."""

    def built(self, rules: dict[str, str | None]) -> None:
        """What decides, by the names of RULES: as the settings say it, or BY_HAND and the name of its class."""


def pinned_rule(text: str | None, info: ValidationInfo) -> str | None:
    """A validator of RULES: a class of one's own gets the sha256 of its file, see `own_class.pinned`."""
    if text is None:
        return None
    return pinned(text, SCHEDULING_POLICIES if info.field_name == "scheduling_policy" else ())


def _said_by_version(index: int) -> str:
    return f"{CHANGED[index].words}; none: as vllm_version has it"


class Settings(BaseModel):
    """What the policies are told. The defaults are vLLM's: mixed batches, chunked prefill, prefix caching."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    composition: Literal["mixed", "prefill-first"] = Field(
        default="mixed", description="a step: prompts beside decodes, as vLLM; or prompts alone, before any decode"
    )
    max_num_seqs: int = Field(default=256, ge=1, le=MOST, description="requests that run at once")
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=MOST, description="the budget: tokens of a step")
    enable_chunked_prefill: bool = Field(default=True, description="a long prompt may be cut over several steps")
    vllm_version: Version = Field(default=NEWEST, description="whose rules decide")
    max_num_active_seqs: int | None = Field(
        default=None, ge=1, le=MOST, description="running requests, in place of max_num_seqs and no more than it"
    )
    long_prefill_token_threshold: int = Field(
        default=0, ge=0, le=MOST, description="the most tokens of one prompt in a step; 0: as many as the budget leaves"
    )
    long_prefill_token_threshold_adaptive: bool = Field(
        default=False, description="the threshold is at least the budget divided by the requests that run or wait"
    )
    long_prefill_token_threshold_binds_alone: bool | None = Field(default=None, description=_said_by_version(2))
    prefill_schedule_interval: int = Field(
        default=1,
        ge=1,
        le=MOST,
        description="steps from one with prompt work to the next, unless the queue does not drain",
    )
    self_preemption_ends_pass: bool | None = Field(default=None, description=_said_by_version(0))
    victim_before_skips: bool | None = Field(default=None, description=_said_by_version(1))
    max_num_partial_prefills: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="running requests that may have prompt tokens left to compute; vLLM no longer has it",
    )
    scheduling_policy: str = Field(default="fcfs", description=f"{', '.join(SCHEDULING_POLICIES)}, or FILE.py:CLASS")
    scheduling_ageing: int = Field(
        default=0,
        ge=0,
        le=MOST,
        description="so many later arrivals outweigh one priority, or one token of a shortest job",
    )
    admission: str | None = Field(default=None, description="FILE.py:CLASS: who fits, in place of vLLM's rule")
    victim: str | None = Field(
        default=None, description="FILE.py:CLASS: who is preempted, in place of the order's rule"
    )
    max_model_len: int | None = Field(
        default=None, ge=1, le=MOST, description="tokens of prompt and answer; longer ones are refused or cut short"
    )
    block_size: int = Field(default=16, ge=1, le=MOST, description="tokens in a KV block; with flash 256 unless given")
    num_gpu_blocks: int | None = Field(
        default=None,
        ge=1,
        le=MOST_BLOCKS,
        description="usable KV blocks; none: what the device's memory holds, or without end where that is not known",
    )
    enable_prefix_caching: bool = Field(
        default=True, description="prompts that begin alike share the KV blocks of what is alike"
    )
    prefix_caching_hash_algo: Literal["xxh64", "xxh3_128"] = Field(
        default="xxh64", description="how blocks are hashed: 64 or 128 bits"
    )
    prefix_caching_seed: int = Field(default=0, ge=0, le=MOST, description="of the hashes of blocks")
    scheduler_reserve_full_isl: bool = Field(
        default=True, description="a request starts only when blocks for its whole prompt are free"
    )
    watermark: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="share of the pool that stays free when a request starts"
    )
    pipeline_depth: int = Field(
        default=0, ge=0, le=1, description="1: a step is decided while the one before it runs (vLLM's async scheduling)"
    )
    pipeline_parallel_size: int = Field(
        default=1,
        ge=1,
        le=MOST_REPLICAS,
        description="stages of a pipeline, each on devices of its own; as the latency has it",
        json_schema_extra={"is_option": False},
    )
    speculative_config: SpeculativeConfig | None = Field(
        default=None, description="drafts of speculative decoding, as JSON with vLLM's names; none: no drafts"
    )

    _pinned = field_validator(*RULES)(pinned_rule)
    _parsed = field_validator("speculative_config", mode="before")(parsed)

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
        if (self.max_num_active_seqs or 0) > self.max_num_seqs:
            raise ValueError(
                f"max_num_active_seqs is {self.max_num_active_seqs}, expected at most max_num_seqs "
                f"({self.max_num_seqs})"
            )
        if self.scheduling_ageing and self.scheduling_policy not in ("priority", "shortest"):
            raise ValueError(
                f"scheduling_ageing is {self.scheduling_ageing}, expected 0 unless scheduling_policy is priority or "
                "shortest"
            )
        if self.watermark and self.num_gpu_blocks is None:
            raise ValueError(f"watermark is {self.watermark}, expected num_gpu_blocks beside it")
        if self.admission is not None and self.watermark:
            raise ValueError(f"watermark is {self.watermark}, expected 0 beside admission")
        self._check_speculation()
        is_vllms = self.composition == "mixed" and self.scheduling_policy in ("fcfs", "priority")
        if self.pipeline_parallel_size > 1 and not (self.pipeline_depth and is_vllms):
            raise ValueError(
                f"pipeline_parallel_size is {self.pipeline_parallel_size}, expected pipeline_depth 1, composition "
                "'mixed' and scheduling_policy fcfs or priority beside it, as vLLM schedules a pipeline"
            )
        if self.admission is not None and not self.scheduler_reserve_full_isl:
            raise ValueError("scheduler_reserve_full_isl is False, expected True beside admission")
        return self

    def _check_speculation(self) -> None:
        """Refuse drafts beside what does not go with them."""
        config = self.speculative_config
        if config is None:
            return
        if self.composition != "mixed":
            raise ValueError(f"composition is {self.composition!r}, expected 'mixed' with speculative_config")
        if config.method == "ngram" and self.pipeline_depth:
            raise ValueError("the method is 'ngram', expected 'ngram_gpu' with pipeline_depth 1")
        most = config.num_speculative_tokens
        if self.max_model_len is not None and most + 2 > self.max_model_len:
            raise ValueError(
                f"num_speculative_tokens is {most}, expected at most max_model_len ({self.max_model_len}) - 2"
            )
        if self.max_num_batched_tokens < most + 2:
            raise ValueError(f"max_num_batched_tokens is {self.max_num_batched_tokens}, expected at least {most + 2}")

    @model_serializer(mode="wrap")
    def _true(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a class that derives from this one decides is not known from its values, so they do not say it."""
        derived = {} if type(self) is Settings else {"scheduling_policy": f"{BY_HAND}: {type(self).__name__}"}
        return dump(self) | derived

    @classmethod
    def load(
        cls,
        values: dict[str, Any],
        path: Path | None = None,
        *,
        beside: Collection[str] = (),
        defaults: dict[str, Any] | None = None,
    ) -> Settings:
        """Settings from `values`, over those of the TOML file `path`.

        Args:
            beside: tables of the file that are no settings.
            defaults: hold where neither says otherwise, in place of the model's own.

        Raises:
            InputError: a value is unknown, of the wrong kind, out of range, or contradicts another.
        """
        table = {} if path is None else read_toml(path)
        table = (defaults or {}) | {name: value for name, value in table.items() if name not in beside}
        return validated(cls, table, values, path)

    @classmethod
    def recorded(cls, values: dict[str, Any], path: Path) -> Settings:
        """The settings of a run record, whose file is `path`; one that is older than `vllm_version` means 0.24's rules.

        Raises:
            InputError: as `load`.
        """
        return validated(cls, {"vllm_version": UNSAID} | values, {}, path, within="settings.")

    def build_rules(self) -> VllmRules:
        """The rules that differ between versions of vLLM: those of `vllm_version`, but for what is set by itself."""
        return build_rules(
            self.vllm_version,
            adaptive=self.long_prefill_token_threshold_adaptive,
            prefill_schedule_interval=self.prefill_schedule_interval,
            **{rule.setting: getattr(self, rule.setting) for rule in CHANGED},
        )

    def build_order(self) -> Order:
        """A waiting queue in the order of `scheduling_policy`.

        Raises:
            InputError: it names a class of one's own that cannot be used; likewise for the other rules.
        """
        if self.scheduling_policy == "priority":
            return Priority(ageing=self.scheduling_ageing)
        if self.scheduling_policy == "shortest":
            return ShortestJob(ageing=self.scheduling_ageing)
        if self.scheduling_policy == "cache-aware":
            return CacheAware()
        if self.scheduling_policy == "fcfs":
            return FirstCome()
        return build(self.scheduling_policy, "scheduling_policy", Order)

    def build_admission(self) -> Admission:
        """The rule whether the next one fits: that of `admission`, or vLLM's."""
        if self.admission is not None:
            return build(self.admission, "admission", Admission)
        return VllmAdmission(
            reserve_full_prompt=self.scheduler_reserve_full_isl,
            watermark_blocks=int(self.watermark * (self.num_gpu_blocks or 0)),
        )

    def build_victim(self) -> Victim | None:
        """The rule who is preempted; None is the order's own."""
        return None if self.victim is None else build(self.victim, "victim", Victim)

    def check_rules(self) -> None:
        """Refuse classes of one's own that cannot be used, before long work begins.

        Raises:
            InputError: there is one.
        """
        drafting = [] if self.speculative_config is None else [self.speculative_config.build_length]
        for build_rule in (self.build_order, self.build_admission, self.build_victim, *drafting):
            build_rule()

    @property
    def most_drafts(self) -> int:
        """Drafts of a sequence in a step, at most."""
        return 0 if self.speculative_config is None else self.speculative_config.num_speculative_tokens

    def build_core(
        self,
        *,
        eos_token_id: int | None = None,
        listener: CoreListener | None = None,
        order: Order | None = None,
        victim: Victim | None = None,
        source: Source | None = None,
    ) -> Core:
        """A Core with these policies and nothing in it; the same for every world.

        Args:
            listener: hears the run; one that HearsRules is told what decides.
            order: a waiting queue of one's own, in place of `scheduling_policy`. A record says that it was handed in,
                and is not replayed without it.
            victim: a rule of one's own who is preempted, in place of `victim`; likewise.
            source: says what of the KV of sequences lies elsewhere, and is loaded before they are admitted; the waiting
                queue is a `Loading` then.

        Raises:
            InputError: the settings name a class of one's own that cannot be used.
        """
        handed = {name: rule for name, rule in (("scheduling_policy", order), ("victim", victim)) if rule is not None}
        if isinstance(listener, HearsRules):
            named = self.model_dump(include=set(RULES))
            listener.built(named | {name: f"{BY_HAND}: {type(rule).__name__}" for name, rule in handed.items()})
        config = self.speculative_config
        waiting = self.build_order() if order is None else order
        scheduler = Scheduler(
            BlockManager(self.num_gpu_blocks, self.block_size),
            self.max_num_active_seqs or self.max_num_seqs,
            composition=self.composition,
            max_num_batched_tokens=self.max_num_batched_tokens,
            enable_chunked_prefill=self.enable_chunked_prefill,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            max_num_partial_prefills=self.max_num_partial_prefills,
            max_model_len=self.max_model_len,
            pipeline_parallel_size=self.pipeline_parallel_size,
            prefix_cache=(
                PrefixCache(
                    hash=self.prefix_caching_hash_algo,
                    seed=self.prefix_caching_seed,
                    hash_lookahead_tokens=0 if config is None else config.hash_lookahead_tokens,
                )
                if self.enable_prefix_caching
                else None
            ),
            order=waiting if source is None else Loading(waiting, source),
            admission=self.build_admission(),
            victim=self.build_victim() if victim is None else victim,
            rules=self.build_rules(),
            speculation=None if config is None else config.build_speculation(is_async=self.pipeline_depth > 0),
        )
        depth = self.pipeline_depth if self.pipeline_parallel_size == 1 else self.pipeline_parallel_size
        return Core(scheduler, pipeline_depth=depth, eos_token_id=eos_token_id, listener=listener)
