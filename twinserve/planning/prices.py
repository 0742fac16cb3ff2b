"""What an hour of GPUs costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from twinserve.settings.errors import InputError
from twinserve.settings.limits import plain


def kind_of(name: str) -> str:
    """What a GPU goes by here: its name in small letters without spaces."""
    return name.lower().replace(" ", "")


@dataclass(frozen=True)
class Prices:
    """Prices of an hour of a GPU, in any currency.

    Attributes:
        by_kind: of a GPU of each kind, by the device's name in small letters without spaces; under "", of any other.
    """

    by_kind: dict[str, float]

    @classmethod
    def of(cls, value: Any) -> Prices:
        """From a number, a table of numbers by kind, or text such as "2.5" or "h100=2.5,l4=0.8".

        Raises:
            InputError: it is none of these, or a price is not above 0.
        """
        if isinstance(value, str):
            parts = [part.rpartition("=") for part in value.split(",")]
            value = {kind.strip(): number for kind, _, number in parts}
        elif not isinstance(value, dict):
            value = {"": value}
        prices = {}
        for kind, given in value.items():
            try:
                price = 0.0 if isinstance(given, bool) else float(plain(str(given)))
            except (TypeError, ValueError):
                price = 0.0
            if not 0 < price < float("inf"):
                field = f"price_per_gpu_hour{f'.{kind}' if kind else ''}"
                raise InputError("expected a number > 0, or one by kind of GPU", field=field, value=given)
            prices[kind_of(kind)] = price
        return cls(prices)

    def per_hour(self, gpus: dict[str, int]) -> float:
        """What an hour of so many GPUs of each kind costs.

        Raises:
            InputError: a kind has no price.
        """
        total = 0.0
        for kind, count in gpus.items():
            price = self.by_kind.get(kind, self.by_kind.get(""))
            if price is None:
                raise InputError(f"expected a price of {kind or 'a GPU whose kind is not known'} too", field="price")
            total += count * price
        return total

    def __str__(self) -> str:
        return ", ".join(f"{price:g} a GPU-hour{f' of {kind}' if kind else ''}" for kind, price in self.by_kind.items())
