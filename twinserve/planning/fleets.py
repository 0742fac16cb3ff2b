"""Fleets as settings describe them: how many replicas, what each is, which router, and who dies when."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from twinserve.settings.build_core import Settings, pinned_rule
from twinserve.settings.config import read_table, validated
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_FLEET_BLOCKS, MOST_REPLICAS, plain
from twinserve.settings.own_class import RULES, build, pinned
from twinserve.sim.disaggregation import BOTH, Disaggregation
from twinserve.sim.fit import FittedLatency
from twinserve.sim.fleet import Outage, Restart, check_outages, check_restarts
from twinserve.sim.latency import LatencyModel
from twinserve.sim.links import Link
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.routers import ROUTERS, SEEDED, PrefixAffine, Router
from twinserve.sim.scaling import Scaling
from twinserve.sim.slowness import Slowdown
from twinserve.sim.tiers import Tier, TierPlan
from twinserve.worlds.run import ReplicaSpec, choose_latency, run_fleet, run_sim, with_pool, with_stages
from twinserve.worlds.vllm_like import like_of
from twinserve.worlds.workload import Workload


def _ns(seconds: str) -> int:
    return round(float(seconds) * 1e9)


def _end_ns(seconds: str) -> int | None:
    """Of what lasts for good where nothing is said."""
    return _ns(seconds) if seconds else None


def _reader(kind: type, form: str, make: Callable[[list[str]], Any]) -> Callable[[object], Any]:
    """Reads values of some kind from texts with colons; one of the kind is taken as it is.

    Args:
        form: how a text looks, said where one looks otherwise.
        make: from the parts of a text; a ValueError if they are none.
    """

    def read(text: object) -> Any:
        if isinstance(text, kind):
            return text
        try:
            return make(list(map(plain, text.split(":") if isinstance(text, str) else ())))
        except (ValueError, OverflowError) as error:
            raise ValueError(form) from error

    return read


def _outage(parts: list[str]) -> Outage:
    replica, start, end = parts
    return Outage(int(replica), _ns(start), _end_ns(end))


def _restart(parts: list[str]) -> tuple[str, int, int]:
    replica, start, down = parts
    from_ns, down_ns = _ns(start), _ns(down)
    if not (replica == "all" or replica.isdigit()) or from_ns < 0 or down_ns < 0:
        raise ValueError(parts)
    return replica, from_ns, down_ns


def _slowdown(parts: list[str]) -> Slowdown:
    replica, start, end, factor = parts
    found = Slowdown(int(replica), _ns(start), _end_ns(end), float(factor))
    is_after = found.to_ns is None or found.to_ns > found.from_ns
    if not (found.replica >= 0 and found.from_ns >= 0 and is_after and 0 < found.factor <= 1e6):
        raise ValueError(parts)
    return found


def _tier(parts: list[str]) -> Tier:
    name, *numbers = parts[:4]
    gb, gb_s, latency_us = map(float, numbers)
    is_possible = name and 0 < gb <= 1e9 and 0 < gb_s <= 1e6 and 0 <= latency_us <= 1e9
    if not is_possible or parts[4:] not in ([], ["shared"]):
        raise ValueError(parts)
    return Tier(name, gb * 1e9, Link(gb_s * 1e9, round(latency_us * 1000)), is_shared=len(parts) > 4)


parse_tier = _reader(
    Tier, "NAME:GB:GB_S:LATENCY_US, such as cpu:200:50:10, or with :shared behind it for one of all replicas", _tier
)
parse_outage = _reader(
    Outage, "REPLICA:FROM:TO in seconds, such as 3:60:120, or 3:60: for one that stays down", _outage
)
parse_restart = _reader(
    tuple, "REPLICA:FROM:DOWN in seconds, such as 3:60:45, or all:60:45, one after another", _restart
)
parse_slowdown = _reader(
    Slowdown, "REPLICA:FROM:TO:FACTOR in seconds, such as 3:60:120:2.5, or 3:60::2 for good", _slowdown
)


def check_loading(settings: Settings, role: str, *, has_tiers: bool) -> None:
    """Refuse what does not go with KV that comes from elsewhere, or is kept for it.

    Raises:
        InputError: there is such a setting.
    """
    if role == BOTH and not has_tiers:
        return
    place = "beside kv_tier" if has_tiers else f"on a replica for {role}"
    wants: dict[str, Any] = {"scheduler_reserve_full_isl": True, "speculative_config": None, "admission": None}
    for name, wanted in (wants | {"enable_prefix_caching": True} if has_tiers else wants).items():
        if (value := getattr(settings, name)) != wanted:
            raise InputError(f"expected {wanted} {place}", field=name, value=str(value))


OF_SIMULATIONS = (
    "prefill_replicas",
    "decode_replicas",
    "decode_router",
    "kv_gb_s",
    "kv_latency_us",
    "kv_layerwise",
    "kv_bytes_per_token",
    "kv_tier",
    "autoscale",
)
"""Options that a live server does not have."""


class Autoscale(BaseModel):
    """See `Scaling`; times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    metric: Literal["waiting", "outstanding", "kv-use"]
    target: float = Field(gt=0, le=1e9)
    least: int = Field(default=1, ge=1, le=MOST_REPLICAS)
    period_s: float = Field(default=15.0, gt=0, le=86_400)
    cold_start_s: float = Field(default=60.0, ge=0, le=86_400)
    cool_down_s: float = Field(default=300.0, ge=0, le=86_400)
    tolerance: float = Field(default=0.1, ge=0, lt=1)

    @property
    def scaling(self) -> Scaling:
        """The rule."""
        period, start, settle = (
            round(seconds * 1e9) for seconds in (self.period_s, self.cold_start_s, self.cool_down_s)
        )
        return Scaling(self.metric, self.target, self.least, max(1, period), start, settle, self.tolerance)


def _autoscale(value: object) -> object:
    """A table, as JSON on the command line."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError('JSON such as {"metric": "waiting", "target": 4}') from error


class ReplicaGroup(BaseModel):
    """Replicas that are alike; settings of their own are beside these fields."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    replicas: int = Field(default=1, ge=1, le=MOST_REPLICAS)
    role: Literal["both", "prefill", "decode"] = "both"
    latency: str | None = None
    scheduling_policy: str | None = None
    admission: str | None = None
    victim: str | None = None

    _pinned = field_validator(*RULES)(pinned_rule)

    @property
    def settings(self) -> dict[str, Any]:
        """Its own settings."""
        return self.model_dump(exclude={"replicas", "role", "latency"}, exclude_unset=True)


class FleetOptions(BaseModel):
    """A fleet. Its names are options of the command line; `group` stands in a file alone."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    replicas: int | None = Field(default=None, ge=1, le=MOST_REPLICAS, description="replicas behind a router")
    router: str = Field(
        default="round-robin", description=f"which replica serves a request: {', '.join(ROUTERS)}, or FILE.py:CLASS"
    )
    router_seed: int = Field(default=0, description="of random and power-of-two: another seed, other choices")
    max_lead_tokens: int = Field(
        default=32_768,
        ge=0,
        description="of prefix-affine: passed over with so many outstanding tokens more than the least loaded",
    )
    die: list[Annotated[Outage, BeforeValidator(parse_outage)]] = Field(
        default=[], description="REPLICA:FROM:TO, in seconds: a replica is down; without TO for good"
    )
    failover_s: float = Field(
        default=0.0, ge=0, le=86_400, description="seconds until the router knows that a replica is down"
    )
    restart: list[Annotated[tuple[str, int, int], BeforeValidator(parse_restart)]] = Field(
        default=[], description="REPLICA:FROM:DOWN, in seconds: drained, down, back empty; all: one after another"
    )
    slow: list[Annotated[Slowdown, BeforeValidator(parse_slowdown)]] = Field(
        default=[], description="REPLICA:FROM:TO:FACTOR, in seconds: a replica takes so many times as long"
    )
    prefill_replicas: int = Field(
        default=0, ge=0, le=MOST_REPLICAS, description="replicas that compute prompts and first tokens alone"
    )
    decode_replicas: int = Field(
        default=0, ge=0, le=MOST_REPLICAS, description="replicas that go on behind the first tokens of those"
    )
    decode_router: str = Field(
        default="least-outstanding", description="which of them goes on with a request; as router"
    )
    kv_gb_s: float = Field(
        default=50.0, gt=0, le=1e6, description="of KV between replicas: 10^9 bytes a second of each one's port"
    )
    kv_latency_us: float = Field(
        default=20.0, ge=0, le=1e9, description="and microseconds until the last byte is there"
    )
    kv_layerwise: bool = Field(
        default=False, description="each layer's KV is sent while the next ones are computed, not all of it at the end"
    )
    kv_bytes_per_token: float | None = Field(
        default=None, gt=0, le=1e9, description="of all layers; none: as the latency's model has it"
    )
    kv_tier: list[Annotated[Tier, BeforeValidator(parse_tier)]] = Field(
        default=[],
        description="NAME:GB:GB_S:LATENCY_US[:shared]: where cached blocks go for which the pool has no room, and from "
        "there to the next; per replica, or one of all",
    )
    autoscale: Annotated[Autoscale | None, BeforeValidator(_autoscale)] = Field(
        default=None,
        description="JSON, metric (waiting, outstanding or kv-use) and target, or least, period_s, cold_start_s, "
        "cool_down_s, tolerance too: so many replicas are up, and no more than the fleet's number",
    )
    group: list[ReplicaGroup] = Field(
        default=[],
        description="in a file, a table for each kind of replica: how many, their latency, settings of their own",
    )

    @field_validator("router", "decode_router")
    @classmethod
    def _pinned(cls, text: str) -> str:
        return pinned(text, tuple(ROUTERS))

    @classmethod
    def load(cls, values: dict[str, Any], path: Path | None = None) -> FleetOptions:
        """Options from `values`, over the table `fleet` of the TOML file `path`.

        Raises:
            InputError: a value is unknown, of the wrong kind, out of range, or contradicts another.
        """
        options = validated(cls, read_table(path, "fleet"), values, path, within="fleet.")
        count = options.num_replicas
        if options.group and options.replicas not in (None, count):
            raise InputError(f"expected {count}, as many as the groups have", field="replicas", value=options.replicas)
        options.check_roles()
        options.check_scaling()
        try:
            check_outages(options.die, count, options.roles)
            check_restarts(options.restarts, options.die, count)
            for slowdown in options.slow:
                if slowdown.replica >= count:
                    raise ValueError(f"slow is {slowdown.replica}, expected a replica from 0 to {count - 1}")
        except ValueError as error:
            raise InputError(str(error)) from error
        return options

    def check_roles(self) -> None:
        """Refuse replicas that compute prompts alone beside none that go on with them, and the other way round.

        Raises:
            InputError: there are such.
        """
        for name in ("prefill_replicas", "decode_replicas"):
            if self.group and (value := getattr(self, name)):
                raise InputError("expected none of it beside groups, which say their role", field=name, value=value)
        for role, other in (("prefill", "decode"), ("decode", "prefill")):
            if role in self.roles and other not in self.roles:
                place = "fleet.group" if self.group else f"{other}_replicas"
                raise InputError(f"expected replicas for {other} beside those for {role}", field=place, value=0)

    def check_scaling(self) -> None:
        """Refuse what does not go with a number of replicas that changes.

        Raises:
            InputError: there is such.
        """
        if self.autoscale is None:
            return
        for name in ("die", "restart", "slow", "group", "prefill_replicas"):
            if getattr(self, name):
                raise InputError("expected none of it beside autoscale", field=name, value=str(getattr(self, name)))
        if self.autoscale.least > self.num_replicas:
            problem = f"expected at most {self.num_replicas}, as many as the fleet has"
            raise InputError(problem, field="autoscale.least", value=self.autoscale.least)

    @property
    def roles(self) -> tuple[str, ...]:
        """What each replica does."""
        if self.group:
            return tuple(group.role for group in self.group for _ in range(group.replicas))
        split = ("prefill",) * self.prefill_replicas + ("decode",) * self.decode_replicas
        return split + (BOTH,) * (self.replicas or (0 if split else 1))

    @property
    def ports(self) -> str:
        """In words, what KV goes over; what nobody gave is assumed."""
        figures = {"kv_gb_s": f"{self.kv_gb_s:g} GB/s", "kv_latency_us": f"{self.kv_latency_us:g} us"}
        told = (text if name in self.model_fields_set else f"{text} (assumed)" for name, text in figures.items())
        return f"ports of {' and '.join(told)}"

    @property
    def is_fleet(self) -> bool:
        """Was a fleet asked for, and not a replica alone?"""
        return bool(self.model_fields_set)

    @property
    def restarts(self) -> list[Restart]:
        """Which replicas are drained and restarted."""
        every = tuple(range(self.num_replicas))
        return [Restart(every if of == "all" else (int(of),), *times) for of, *times in self.restart]

    @property
    def num_replicas(self) -> int:
        """How many replicas there are."""
        return len(self.roles)

    def build_router(self) -> Router:
        """A fresh router.

        Raises:
            InputError: it is a class of one's own that cannot be used.
        """
        return self._built("router")

    def _built(self, field: str) -> Router:
        name = getattr(self, field)
        if name in SEEDED:
            return SEEDED[name](self.router_seed)
        if name == "prefix-affine":
            return PrefixAffine(self.max_lead_tokens)
        return ROUTERS[name]() if name in ROUTERS else build(name, field, Router)

    @property
    def router_facts(self) -> dict[str, Any]:
        """What says which router it is."""
        return self._facts_of(self.router)

    def _facts_of(self, name: str) -> dict[str, Any]:
        if name in SEEDED:
            return {"name": name, "seed": self.router_seed}
        parameters = {"prefix-affine": {"max_lead_tokens": self.max_lead_tokens}}
        return {"name": name, **parameters.get(name, {})}

    def build_split(self, replicas: list[ReplicaSpec]) -> Disaggregation | None:
        """Who computes prompts and who goes on with them; None where all do both.

        Raises:
            InputError: how large the KV of a token is, or how many layers there are, is not known; or KV is of another
                size where it is handed over to.
        """
        if set(self.roles) == {BOTH}:
            return None
        sizes = tuple(self._kv_bytes(spec) for spec in replicas)
        if len({size for size, role in zip(sizes, self.roles, strict=True) if role != BOTH}) > 1:
            problem = "expected prefill and decode replicas of one model, whose KV is alike"
            raise InputError(problem, field="fleet.group")
        shapes = {spec.latency.shape.num_layers for spec in replicas if isinstance(spec.latency, RooflineLatency)}
        if self.kv_layerwise and len(shapes) != 1:
            raise InputError(
                "expected latencies of one model's layers, as those of roofline:MODEL@DEVICE", field="kv_layerwise",
                value=True,
            )  # fmt: skip
        link = Link(self.kv_gb_s * 1e9, round(self.kv_latency_us * 1000))
        return Disaggregation(
            self.roles, sizes, link, self._built("decode_router"), min(shapes) if self.kv_layerwise else None
        )

    def build_tiers(self, replicas: list[ReplicaSpec]) -> TierPlan | None:
        """The tiers behind the prefix caches; None where there are none.

        Raises:
            InputError: how large the KV of a token is, is not known; or a shared one would hold blocks of two sizes.
        """
        if not self.kv_tier:
            return None
        sizes = tuple(self._kv_bytes(spec) * spec.settings.block_size for spec in replicas)
        kinds = {(spec.settings.block_size, size) for spec, size in zip(replicas, sizes, strict=True)}
        for tier in self.kv_tier:
            if tier.is_shared and len(kinds) > 1:
                raise InputError("expected replicas whose blocks are alike", field="kv_tier", value=tier.name)
            if tier.capacity_bytes < max(sizes):
                problem = f"expected room for a block of {max(sizes):,.0f} bytes"
                raise InputError(problem, field="kv_tier", value=f"{tier.name}:{tier.capacity_bytes / 1e9:g}")
        return TierPlan(tuple(self.kv_tier), sizes)

    def _kv_bytes(self, spec: ReplicaSpec) -> float:
        if self.kv_bytes_per_token is not None:
            return self.kv_bytes_per_token
        if isinstance(spec.latency, RooflineLatency):
            return spec.latency.shape.kv_bytes_per_token()
        raise InputError(
            f"is missing, expected bytes: of {spec.latency_facts['name']} it is not known", field="kv_bytes_per_token"
        )

    def build_replicas(
        self,
        settings: dict[str, Any],
        config: Path | None = None,
        latency: str | None = None,
        latency_from: Path | None = None,
        like: str | None = None,
    ) -> tuple[list[ReplicaSpec], list[str]]:
        """The replicas, those of each group with its own settings over the common ones, and what was assumed, in words.

        Data-parallel ranks are replicas here.

        Args:
            settings: of all replicas, over those of the TOML file `config`.
            latency: of the groups that name none.
            latency_from: a run record whose own step times are used, by a replica that is alone.
            like: see `like_of`; what it says holds where settings, group and file say nothing.

        Raises:
            InputError: a setting or a latency cannot be used.
        """
        if self.is_fleet and latency_from is not None:
            raise InputError(
                "expected none: a fleet has no one run's steps", field="latency_from", value=str(latency_from)
            )
        specs: list[ReplicaSpec] = []
        words: dict[str, None] = {}
        alike = [{"role": role, "replicas": len(list(of))} for role, of in groupby(self.roles)]
        for group in self.group or map(ReplicaGroup.model_validate, alike):
            vllm = like_of(like, group.latency or latency)
            chosen = Settings.load(
                settings | group.settings,
                config,
                beside=("engine", "serve", "fleet"),
                defaults=vllm.settings if vllm else None,
            )
            chosen.check_rules()
            model, facts = choose_latency(group.latency or latency, latency_from)
            chosen, pool = with_pool(with_stages(chosen, model), model)
            if vllm is not None:
                words[str(vllm)] = None
            if isinstance(model, FittedLatency):
                model = model.at(chosen.max_num_seqs, chosen.max_num_batched_tokens, chosen.most_drafts)
            spec = ReplicaSpec(chosen, model, facts)
            words[f"latency: {spec.latency_words} ({facts['identity']})"] = None
            if chosen.max_model_len is None:
                words["no context limit: max_model_len is not given"] = None
            if pool is not None:
                words[pool] = None
            specs += [spec] * group.replicas * self._ranks_of(model)
        split = self.build_split(specs)
        self.build_tiers(specs)
        for spec, role in zip(specs, self.roles, strict=False):
            check_loading(spec.settings, role, has_tiers=bool(self.kv_tier))
        if split is not None:
            way = "layer by layer" if self.kv_layerwise else "when a prompt is computed"
            words[
                f"KV goes from prefill to decode replicas {way}, {max(split.bytes_per_token):,.0f} bytes a token over "
                f"{self.ports}"
            ] = None
        blocks = sum(spec.settings.num_gpu_blocks or 0 for spec in specs)
        if blocks > MOST_FLEET_BLOCKS:
            expected = f"expected at most {MOST_FLEET_BLOCKS} KV blocks in all pools together, they have {blocks}"
            raise InputError(f"{expected} (TWINSERVE_MOST_FLEET_BLOCKS)", field="replicas", value=len(specs))
        return specs, list(words)

    def _ranks_of(self, latency: LatencyModel) -> int:
        """How many ranks a replica has, each with a scheduler of its own: the router chooses among them.

        Raises:
            InputError: some would be down or slow without the others.
        """
        if not isinstance(latency, RooflineLatency) or latency.split.data == 1:
            return 1
        if self.die or self.restart or self.slow:
            raise InputError("expected none of die, restart and slow with dp", field="latency", value=latency.name)
        if set(self.roles) != {BOTH} or self.kv_tier or self.autoscale:
            problem = "expected none of prefill and decode replicas, kv_tier and autoscale with dp"
            raise InputError(problem, field="latency", value=latency.name)
        return latency.split.data

    def serve(
        self, workload: Workload, replicas: list[ReplicaSpec], *, seed: int = 0, **options: Any
    ) -> dict[str, Any]:
        """Simulate a workload on the replicas; the summary. See `run_sim` and `run_fleet`, whose options it takes.

        Args:
            seed: is added to that of a random router.
        """
        if not self.is_fleet and len(replicas) == 1:
            (alone,) = replicas
            return run_sim(workload, alone.settings, alone.latency, latency_facts=alone.latency_facts, **options)
        seeded = self.model_copy(update={"router_seed": self.router_seed + seed})
        router, facts = seeded.build_router(), seeded.router_facts
        return run_fleet(
            workload,
            replicas,
            router,
            router_facts=facts,
            outages=self.die,
            failover_ns=round(self.failover_s * 1e9),
            restarts=self.restarts,
            slowdowns=self.slow,
            split=seeded.build_split(replicas),
            decode_router_facts=seeded._facts_of(self.decode_router),
            tiers=self.build_tiers(replicas),
            scaling=None if self.autoscale is None else self.autoscale.scaling,
            **options,
        )
