"""What vLLM would serve with: its defaults by version, device and use, and a command line of `vllm serve`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain
from twinserve.settings.speculative import METHODS, SpeculativeConfig
from twinserve.settings.vllm_versions import NEWEST, VERSIONS, Version
from twinserve.sim.devices import DEVICES, GIB, Device

OWN = "own"
"""In place of a vLLM: the defaults of `Settings`, whatever the device."""
SOURCE = "EngineArgs.get_batch_defaults, vllm/engine/arg_utils.py"

Use = Literal["server", "offline"]


@dataclass(frozen=True)
class BatchDefaults:
    """What vLLM serves with on devices of at least so many GiB, if nothing else is asked for.

    Attributes:
        least_gib: of the device's memory.
        but: devices that count as smaller ones, by name.
        server_tokens, offline_tokens: `max_num_batched_tokens` of `vllm serve`, and of the class `LLM`.
    """

    least_gib: int
    but: tuple[str, ...]
    max_num_seqs: int
    server_tokens: int
    offline_tokens: int


_HOPPER = BatchDefaults(70, ("A100",), 1024, 8192, 16384)
_OTHERS = BatchDefaults(0, (), 256, 2048, 8192)
BATCH_DEFAULTS: dict[Version, tuple[BatchDefaults, ...]] = {
    "0.24": (_HOPPER, _OTHERS),
    "0.33": (BatchDefaults(160, (), 1024, 16384, 16384), _HOPPER, _OTHERS),
}
"""By version, the first that fits is in force; as SOURCE has them. All else is alike on every device: asynchronous
scheduling, chunked prefill, prefix caching, blocks of 16 tokens, and the whole prompt must fit."""


@dataclass(frozen=True)
class Like:
    """A vLLM to be like: `vllm-0.33@h200`, or `vllm-0.33@h200:offline`."""

    version: Version
    device: Device
    use: Use = "server"

    @classmethod
    def parse(cls, text: str) -> Like:
        """Read `vllm-VERSION@DEVICE[:server|offline]`.

        Raises:
            InputError: it is not written so, or the version or the device is not known.
        """
        head, _, use = text.partition(":")
        name, _, device = head.partition("@")
        version = name.removeprefix("vllm-")
        if not name.startswith("vllm-") or version not in VERSIONS or use not in ("", "server", "offline"):
            versions = " or ".join(f"vllm-{known}" for known in VERSIONS)
            raise InputError(f"expected {versions}, @DEVICE, and :offline for no server", field="like", value=text)
        if device.lower() not in DEVICES:
            raise InputError(f"expected a device of {', '.join(DEVICES)}", field="like", value=text)
        return cls(version, DEVICES[device.lower()], cast(Use, use or "server"))

    @property
    def defaults(self) -> BatchDefaults:
        """The row of the table that is in force."""
        gib = self.device.memory_bytes / GIB
        fitting = (row for row in BATCH_DEFAULTS[self.version] if gib >= row.least_gib)
        return next(row for row in fitting if self.device.name not in row.but)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that differ from those of `Settings`, or may."""
        row = self.defaults
        return {
            "vllm_version": self.version,
            "max_num_seqs": row.max_num_seqs,
            "max_num_batched_tokens": row.server_tokens if self.use == "server" else row.offline_tokens,
            "pipeline_depth": 1,
        }

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.settings.items() if name != "vllm_version")
        return f"like vLLM {self.version} on {self.device.name}, {self.use}: {values}, unless set ({SOURCE})"


def like_of(text: str | None, latency: str | None) -> Like | None:
    """The vLLM that settings are to be like: the one asked for, or else the newest as a server on the device of a
    roofline; None for OWN, and where no device is known.

    Raises:
        InputError: see `Like.parse`.
    """
    if text is not None:
        return None if text == OWN else Like.parse(text)
    if latency is None or not latency.startswith("roofline:"):
        return None
    device = latency.partition("@")[2].partition(":")[0].lower()
    return Like(NEWEST, DEVICES[device]) if device in DEVICES else None


_SWITCHES = {
    "enable-prefix-caching": "enable_prefix_caching",
    "enable-chunked-prefill": "enable_chunked_prefill",
    "scheduler-reserve-full-isl": "scheduler_reserve_full_isl",
    "long-prefill-token-threshold-adaptive": "long_prefill_token_threshold_adaptive",
    "async-scheduling": "pipeline_depth",
}
_NUMBERS = {
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "max-num-active-seqs": "max_num_active_seqs",
    "max-model-len": "max_model_len",
    "block-size": "block_size",
    "long-prefill-token-threshold": "long_prefill_token_threshold",
    "prefill-schedule-interval": "prefill_schedule_interval",
    "num-gpu-blocks-override": "num_gpu_blocks",
    "watermark": "watermark",
}
_UNMODELLED = {("max-model-len", "auto"), ("max-model-len", "-1")}
"""What vLLM works out from the memory that is left, which the settings do not know."""
_POLICY = "scheduling-policy"
_DRAFTS = "speculative-config"
_OF_DRAFTS = {"spec-method": "method", "spec-model": "model", "spec-tokens": "num_speculative_tokens"}
_FLAG = re.compile(r"-[^0-9.]")
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def read_vllm_args(text: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that a command line of `vllm serve` sets, and its flags that are not modelled.

    `vllm serve` and a model's name in front may stand there or not. Numbers may be written as vLLM takes them, `8k` for
    8,000 and `8K` for 8,192. One block less than `--num-gpu-blocks-override` can be used, as vLLM never gives out one.
    `--speculative-config` may stand there as JSON, field by field behind a dot, or as `--spec-method` and its like; in
    the JSON the fields of ours may stand that vLLM has not. Prompt lookup on the host ("ngram") turns asynchronous
    scheduling off, as in vLLM.

    Raises:
        InputError: a flag that is modelled has no value, or one that it cannot have.
    """
    settings: dict[str, Any] = {}
    unmodelled: list[str] = []
    drafts: dict[str, Any] = {}
    for word, flag, value in _flags(text):
        on = flag.removeprefix("no-")
        if on in _SWITCHES and value is None:
            is_on = flag == on
            settings[_SWITCHES[on]] = int(is_on) if on == "async-scheduling" else is_on
        elif flag in _NUMBERS and (flag, value) not in _UNMODELLED:
            number = _number(flag, value)
            settings[_NUMBERS[flag]] = number - 1 if flag == "num-gpu-blocks-override" else number
        elif flag == _POLICY:
            if value not in ("fcfs", "priority"):
                raise InputError(f"--{flag} is {value}, expected fcfs or priority", field="vllm_args", value=text)
            settings["scheduling_policy"] = value
        elif flag in (_DRAFTS, "sc", *_OF_DRAFTS) or flag.startswith(f"{_DRAFTS}."):
            drafts |= _of_drafts(flag, value)
        else:
            unmodelled.append(word)
    if drafts:
        modelled, others = _modelled_drafts(drafts)
        unmodelled += others
        if modelled is not None:
            settings["speculative_config"] = modelled
            if modelled["method"] == "ngram":
                settings.setdefault("pipeline_depth", 0)
    return settings, unmodelled


def _of_drafts(flag: str, value: str | None) -> dict[str, Any]:
    """What one flag says of drafts, by vLLM's names."""
    head, _, name = flag.partition(".")
    if name := _OF_DRAFTS.get(head, name.replace("-", "_")):
        try:
            return {name: json.loads(value or "")}
        except (ValueError, RecursionError):
            return {name: value}
    try:
        values = json.loads(value or "")
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON object for --{_DRAFTS} ({error})", field="vllm_args", value=value) from error
    if not isinstance(values, dict):
        raise InputError(f"expected a JSON object for --{_DRAFTS}", field="vllm_args", value=value)
    return {name.replace("-", "_"): given for name, given in values.items()}


def _modelled_drafts(values: dict[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The setting `speculative_config` of what vLLM is told, None for a method that is not modelled; and the names of
    what is not modelled of it."""
    method = values.get("method")
    if method not in METHODS:
        said = "without a method" if method is None else f"with the method {method}"
        return None, [f"--{_DRAFTS} {said}"]
    modelled = {name: value for name, value in values.items() if name in SpeculativeConfig.model_fields}
    if method != "draft_model":
        modelled.pop("model", None)  # of a head; what it costs is `draft_latency`
    bounds = {name for name in ("prompt_lookup_min", "prompt_lookup_max") if name in modelled}
    if len(bounds) == 1:  # one alone is both, as in vLLM
        modelled |= dict.fromkeys(("prompt_lookup_min", "prompt_lookup_max"), modelled[bounds.pop()])
    return modelled, [f"--{_DRAFTS}.{name}" for name in values if name not in modelled]


def _flags(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Each flag of a command line: as it is written, by vLLM's name without dashes in front, and its value."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InputError(f"expected a command line: {error}", field="vllm_args", value=text) from error
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not _FLAG.match(word):
            continue
        written, equals, value = word.partition("=")
        flag = written.lstrip("-").replace("_", "-")
        takes_none = flag.removeprefix("no-") in _SWITCHES
        if not equals and not takes_none and place < len(words) and not _FLAG.match(words[place]):
            value, equals = words[place], "="
            place += 1
        yield written, flag, value if equals else None


def _number(flag: str, text: str | None) -> int | float:
    """A number as vLLM writes it."""
    factor = _SUFFIXES.get((text or "")[-1:], 1)
    try:
        digits = plain((text or "")[:-1] if factor > 1 else text or "")
        return float(digits) if flag == "watermark" else round(float(digits) * factor) if factor > 1 else int(digits)
    except (ValueError, OverflowError) as error:
        raise InputError(f"expected a number for --{flag}", field="vllm_args", value=text) from error
