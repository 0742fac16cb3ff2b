"""Which of vLLM's rules hold in which version: one table, from which Settings, the oracle and `upgrade` build."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twinserve.policies.vllm_rules import LongPrefillThreshold, PrefillInterval, VllmRules

Version = Literal["0.24", "0.33"]
VERSIONS: dict[Version, str] = {"0.24": "2026-06-29", "0.33": "2026-11-01"}
"""The versions whose rules are held, oldest first, and when they were built."""
NEWEST = list(VERSIONS)[-1]
UNSAID: Version = "0.24"
"""What a record means that does not say its version: it is older than the setting."""


@dataclass(frozen=True)
class ChangedRule:
    """A rule that vLLM changed: the setting that chooses it, its value before and since, and what it is about."""

    setting: str
    since: Version
    before: bool
    value: bool
    words: str

    @property
    def date(self) -> str:
        """When the version was built that changed it."""
        return VERSIONS[self.since]

    def at(self, version: Version) -> bool:
        """Its value in a version."""
        return self.value if list(VERSIONS).index(version) >= list(VERSIONS).index(self.since) else self.before


CHANGED = (
    ChangedRule(
        "self_preemption_ends_pass",
        since="0.33",
        before=True,
        value=False,
        words="a request that has to preempt itself ends the pass over the running ones",
    ),
    ChangedRule(
        "victim_before_skips",
        since="0.33",
        before=True,
        value=False,
        words="a victim that stood before the request and had no tokens in the step costs the next one its turn",
    ),
    ChangedRule(
        "long_prefill_token_threshold_binds_alone",
        since="0.33",
        before=True,
        value=False,
        words="long_prefill_token_threshold cuts the prompt of a request that is alone, too",
    ),
)


def nearest_version(version: str) -> Version:
    """The newest version held that is no newer than `version`, such as "0.24.0"; the oldest for older ones."""
    numbers = tuple(int(part) for part in version.split(".")[:2])
    held = [name for name in VERSIONS if tuple(map(int, name.split("."))) <= numbers]
    return held[-1] if held else next(iter(VERSIONS))


def build_rules(
    version: Version, *, adaptive: bool = False, prefill_schedule_interval: int = 1, **chosen: bool | None
) -> VllmRules:
    """New rule objects of a version for one Scheduler.

    Args:
        adaptive: `long_prefill_token_threshold_adaptive`.
        chosen: by the names of CHANGED, what holds in place of the version's; None is the version's.
    """
    given = {name: value for name, value in chosen.items() if value is not None}
    value = {rule.setting: rule.at(version) for rule in CHANGED} | given
    return VllmRules(
        PrefillInterval(prefill_schedule_interval),
        value["self_preemption_ends_pass"],
        value["victim_before_skips"],
        LongPrefillThreshold(binds_alone=value["long_prefill_token_threshold_binds_alone"], adaptive=adaptive),
    )
