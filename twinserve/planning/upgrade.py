"""What another version of vLLM makes of a trace: both versions simulated, and each change between them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from twinserve.planning.paired import PairedDifference, paired_difference
from twinserve.planning.parallel import Workers
from twinserve.planning.point import Point
from twinserve.planning.sweep import Store, load_plan, run_points
from twinserve.settings.errors import InputError
from twinserve.settings.vllm_versions import CHANGED, VERSIONS, Version
from twinserve.traces.runs.compare import METRICS
from twinserve.worlds.vllm_like import OWN, Like, like_of


@dataclass(frozen=True)
class Change:
    """One change by itself, or all of them: how the metrics differ from those of the version before.

    Attributes:
        name: the setting that changed, "defaults" for those of the machine, or the version.
        words: what it is about.
        values: what was set beside the older version.
        differences: of every metric.
    """

    name: str
    words: str
    values: dict[str, Any]
    differences: list[PairedDifference] = field(repr=False)

    @property
    def moved(self) -> list[PairedDifference]:
        """The metrics that are not what they were."""
        return [row for row in self.differences if row.difference]


def find_changes(
    values: dict[str, Any],
    before: Version,
    after: Version,
    workers: Workers,
    *,
    store: Store | None = None,
    advance: Callable[[], None] | None = None,
) -> list[Change]:
    """What each change from one version to another does alone, and, last, what all do together.

    Args:
        values: fields of a point, as a plan has them, with `seeds`; neither a version nor a vLLM of one to be like.

    Raises:
        InputError: the versions are the same, a value cannot be used, or a point cannot be computed.
    """
    if before == after:
        raise InputError(f"expected another version than {before}", field="to", value=after)
    if "vllm_version" in values:
        raise InputError("expected none beside from and to", field="vllm_version", value=values["vllm_version"])
    old, new = _like_at(values, before), _like_at(values, after)
    common = values | {"like": OWN}
    base = old | common | {"vllm_version": before}
    variants: list[tuple[str, str, dict[str, Any]]] = []
    for rule in CHANGED:
        if rule.at(before) != rule.at(after) and rule.setting not in values:
            variants.append((rule.setting, rule.words, {rule.setting: rule.at(after)}))
    defaults = {name: value for name, value in new.items() if old[name] != value and name not in values}
    if defaults:
        variants.append(("defaults", "of this machine", defaults))
    variants.append((f"vLLM {after}", "all together", defaults | {"vllm_version": after}))
    sides: list[list[Point]] = [load_plan(None, base | changes).points for _, _, changes in [("", "", {}), *variants]]
    points = [point for side in sides for point in side]
    results = iter(run_points(points, store or Store(), workers, advance=advance))
    summaries = [[next(results)["summary"] for _ in side] for side in sides]
    changes = []
    for (name, words, chosen), found in zip(variants, summaries[1:], strict=True):
        changes.append(Change(name, words, chosen, [paired_difference(m, summaries[0], found) for m in METRICS]))
    return changes


def _like_at(values: dict[str, Any], version: Version) -> dict[str, Any]:
    """The defaults of a version on the machine that is meant, without the version itself."""
    like = like_of(values.get("like"), values.get("latency"))
    if like is None:
        return {}
    settings = Like(version, like.device, like.use).settings
    return {name: value for name, value in settings.items() if name != "vllm_version"}


def version_of(text: str, name: str) -> Version:
    """A version that is held.

    Raises:
        InputError: it is not.
    """
    for version in VERSIONS:
        if text == version:
            return version
    raise InputError(f"expected one of {', '.join(VERSIONS)}", field=name, value=text)
