"""The setting `speculative_config`: vLLM's names where vLLM has them, and the Speculation that it describes."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from twinserve.policies import Batch, Speculation
from twinserve.settings.errors import InputError
from twinserve.settings.own_class import OwnClass, build, pinned

_Nanoseconds = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
METHODS = {
    "ngram": (False, 0, 0),
    "ngram_gpu": (False, 0, 0),
    "draft_model": (True, 1, 0),
    "eagle3": (True, 0, 1),
}
"""What a method sets in vLLM's scheduler: does its proposer write KV behind a row, its `draft_slots`, and the tokens
behind a block that the key of the block covers (`PrefixCache.hash_lookahead_tokens`)."""


class DraftLength(Protocol):
    """Says how many drafts to ask for. `most` is the largest answer, at least 1."""

    most: int

    def choose(self, batch: Batch) -> int:
        """Drafts to propose for each sequence that samples in this batch, from 0 to `most`."""


class VllmDraftLength:
    """vLLM's `num_speculative_tokens`, or by its `num_speculative_tokens_per_batch_size`: that has rows `(first, last,
    drafts)`, each for batches of so many sequences, and of those behind it up to the next row; no number is above the
    first. Of no sequences, as many as there may be.

    Raises:
        ValueError: a row cannot be, overlaps another, or none is for a batch of one.
    """

    def __init__(self, most: int, table: Seq[tuple[int, int, int]] = ()):
        if most < 1:
            raise ValueError(f"num_speculative_tokens is {most}, expected an integer >= 1")
        self.most, self.table = most, sorted(table)
        before = 0
        for first, last, drafts in self.table:
            if not (before < first <= last and drafts >= 0) or (before == 0 and first != 1):
                expected = f"first {'> ' * (before > 0)}{max(1, before)}, last >= first and drafts >= 0"
                raise ValueError(f"a row of the table is {(first, last, drafts)}, expected {expected}")
            before = last

    def choose(self, batch: Batch) -> int:
        reached = [drafts for first, _, drafts in self.table if first <= len(batch)]
        return min(self.most, reached[-1]) if reached else self.most


class _OwnDraftLength:
    """A rule of one's own, whose answers are looked at.

    Args:
        text: the class, see `own_class.build`.
        most: the largest that `most` of the class may be.

    Raises:
        InputError: it cannot be used; and `choose`, if it raises, or answers what cannot be.
    """

    def __init__(self, text: str, most: int):
        self._own = OwnClass.parse(text)
        self._length: DraftLength = build(text, "draft_length", DraftLength)
        self.most = self._whole(self._length.most, "most", 1, most)

    def choose(self, batch: Batch) -> int:
        try:
            asked = self._length.choose(batch)
        except Exception as error:
            raise self._refused(f"choose to answer ({type(error).__name__}: {error})") from error
        return self._whole(asked, "choose to answer", 0, self.most)

    def _whole(self, value: object, what: str, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self._refused(f"{what} an integer from {least} to {most}, it is {value!r}")
        return value

    def _refused(self, expected: str) -> InputError:
        own = self._own
        return InputError(f"expected {expected}", path=own.path, field="draft_length", value=own.call)


class SpeculativeConfig(BaseModel):
    """How drafts are proposed and how many.

    Attributes:
        method: who proposes: an earlier place of the text with the same last tokens ("ngram"; "ngram_gpu" is vLLM's
            name of the same where decisions run ahead of results), a smaller model, or EAGLE-3's head.
        num_speculative_tokens: the most drafts of a sequence in a step.
        num_speculative_tokens_per_batch_size: rows of first and last batch size and the drafts to ask for there.
        draft_length: FILE.py:CLASS, a rule of one's own how many drafts to ask for.
        model: of "draft_model", what its weights are loaded from.
        prompt_lookup_max, prompt_lookup_min: the most and the fewest last tokens that "ngram" looks for.
        synthetic_acceptance_rate: each draft is taken for right with this probability, whatever it is; for
            measurements of speed, as the tokens are not the model's then.
        acceptance: what comes of drafts in a simulation, where that rate does not say it: the record of a speculative
            run, or a law that `twinserve fit --acceptance` has written.
        draft_latency: what steps of the model that drafts cost in a simulation, as `--latency` says it; none: nothing.
        lookup_ns: nanoseconds that prompt lookup takes in a simulation, of a sequence and of a token of its text; none:
            nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Literal["ngram", "ngram_gpu", "draft_model", "eagle3"]
    num_speculative_tokens: int = Field(ge=1, le=256)
    num_speculative_tokens_per_batch_size: list[list[int]] | None = None
    draft_length: str | None = None
    model: str | None = None
    prompt_lookup_max: int = Field(default=5, ge=1, le=256)
    prompt_lookup_min: int = Field(default=5, ge=1, le=256)
    synthetic_acceptance_rate: float | None = Field(default=None, ge=0.0, le=1.0)
    acceptance: str | None = None
    draft_latency: str | None = None
    lookup_ns: tuple[_Nanoseconds, _Nanoseconds] | None = Field(default=None, strict=False)

    @field_validator("draft_length")
    @classmethod
    def _pinned(cls, text: str | None) -> str | None:
        return None if text is None else pinned(text)

    @model_validator(mode="after")
    def _consistent(self) -> SpeculativeConfig:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min is {self.prompt_lookup_min}, expected at most prompt_lookup_max "
                f"({self.prompt_lookup_max})"
            )
        if self.model is not None and self.method != "draft_model":
            raise ValueError(f"model is {self.model}, expected none with the method {self.method}")
        if self.draft_latency is not None and self.method not in ("draft_model", "eagle3"):
            raise ValueError(f"draft_latency is {self.draft_latency}, expected none with the method {self.method}")
        if self.lookup_ns is not None and self.method not in ("ngram", "ngram_gpu"):
            raise ValueError(f"lookup_ns is {self.lookup_ns}, expected none with the method {self.method}")
        if self.acceptance is not None and self.synthetic_acceptance_rate is not None:
            raise ValueError("acceptance is given, expected none beside synthetic_acceptance_rate")
        if self.draft_length is not None and self.num_speculative_tokens_per_batch_size is not None:
            raise ValueError("num_speculative_tokens_per_batch_size is given, expected none beside draft_length")
        for row in self.num_speculative_tokens_per_batch_size or ():
            if len(row) != 3:
                raise ValueError(
                    f"a row of the table is {row}, expected first and last batch size and a number of drafts"
                )
        if self.draft_length is None:
            self.build_length()
        return self

    def build_length(self) -> DraftLength:
        """The rule how many drafts to ask for.

        Raises:
            InputError: it is a class of one's own that cannot be used.
        """
        if self.draft_length is not None:
            return _OwnDraftLength(self.draft_length, self.num_speculative_tokens)
        rows = [(first, last, drafts) for first, last, drafts in self.num_speculative_tokens_per_batch_size or ()]
        return VllmDraftLength(self.num_speculative_tokens, rows)

    def build_speculation(self, *, is_async: bool) -> Speculation:
        """What the scheduler is told of it."""
        length, (has_lookahead, draft_slots, _) = self.build_length(), METHODS[self.method]
        is_fixed = self.draft_length is None and not self.num_speculative_tokens_per_batch_size
        choose = None if is_fixed else length.choose
        return Speculation(length.most, choose, length.most if has_lookahead else 0, draft_slots, is_async)

    @property
    def hash_lookahead_tokens(self) -> int:
        """Tokens behind a block that its key in the prefix cache covers."""
        return METHODS[self.method][2]


def parsed(value: Any) -> Any:
    """A value of the setting, a text being JSON; ValueError if it is not."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a JSON object ({error})") from error
