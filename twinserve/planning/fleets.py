"""Fleets as settings describe them: how many replicas, what each is, which router, and who dies when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from twinserve.settings.build_core import Settings, pinned_rule
from twinserve.settings.config import read_table, validated
from twinserve.settings.errors import InputError
from twinserve.settings.limits import MOST_FLEET_BLOCKS, MOST_REPLICAS, plain
from twinserve.settings.own_class import RULES, build, pinned
from twinserve.sim.fit import FittedLatency
from twinserve.sim.fleet import Outage, Restart, check_outages, check_restarts
from twinserve.sim.latency import LatencyModel
from twinserve.sim.roofline import RooflineLatency
from twinserve.sim.routers import ROUTERS, SEEDED, PrefixAffine, Router
from twinserve.sim.slowness import Slowdown
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


parse_outage = _reader(
    Outage, "REPLICA:FROM:TO in seconds, such as 3:60:120, or 3:60: for one that stays down", _outage
)
parse_restart = _reader(
    tuple, "REPLICA:FROM:DOWN in seconds, such as 3:60:45, or all:60:45, one after another", _restart
)
parse_slowdown = _reader(
    Slowdown, "REPLICA:FROM:TO:FACTOR in seconds, such as 3:60:120:2.5, or 3:60::2 for good", _slowdown
)


class ReplicaGroup(BaseModel):
    """Replicas that are alike; settings of their own are beside these fields."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    replicas: int = Field(default=1, ge=1, le=MOST_REPLICAS)
    latency: str | None = None
    scheduling_policy: str | None = None
    admission: str | None = None
    victim: str | None = None

    _pinned = field_validator(*RULES)(pinned_rule)

    @property
    def settings(self) -> dict[str, Any]:
        """Its own settings."""
        return self.model_dump(exclude={"replicas", "latency"}, exclude_unset=True)


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
    group: list[ReplicaGroup] = Field(
        default=[],
        description="in a file, a table for each kind of replica: how many, their latency, settings of their own",
    )

    @field_validator("router")
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
        try:
            check_outages(options.die, count)
            check_restarts(options.restarts, options.die, count)
            for slowdown in options.slow:
                if slowdown.replica >= count:
                    raise ValueError(f"slow is {slowdown.replica}, expected a replica from 0 to {count - 1}")
        except ValueError as error:
            raise InputError(str(error)) from error
        return options

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
        return sum(group.replicas for group in self.group) if self.group else self.replicas or 1

    def build_router(self) -> Router:
        """A fresh router.

        Raises:
            InputError: it is a class of one's own that cannot be used.
        """
        if self.router in SEEDED:
            return SEEDED[self.router](self.router_seed)
        if self.router == "prefix-affine":
            return PrefixAffine(self.max_lead_tokens)
        return ROUTERS[self.router]() if self.router in ROUTERS else build(self.router, "router", Router)

    @property
    def router_facts(self) -> dict[str, Any]:
        """What says which router it is."""
        if self.router in SEEDED:
            return {"name": self.router, "seed": self.router_seed}
        parameters = {"prefix-affine": {"max_lead_tokens": self.max_lead_tokens}}
        return {"name": self.router, **parameters.get(self.router, {})}

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
        for group in self.group or [ReplicaGroup(replicas=self.num_replicas)]:
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
            **options,
        )
