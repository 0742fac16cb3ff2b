"""Prices of GPU-hours: one for all, or one a kind."""

from __future__ import annotations

import json

import pytest

from twinserve.planning.prices import Prices
from twinserve.settings.errors import InputError


def test_a_fleet_of_unlike_gpus_costs_the_sum_of_their_prices():
    for value in ({"H100": 2.5, "l4": 0.5}, "h100=2.5, L4=0.5"):
        prices = Prices.of(value)
        assert prices.per_hour({"h100": 4, "l4": 3}) == 4 * 2.5 + 3 * 0.5
        with pytest.raises(InputError, match="expected a price of a100 too"):
            prices.per_hour({"a100": 1})


def test_one_price_is_that_of_all_kinds_without_one_of_their_own():
    assert Prices.of(2).per_hour({"h100": 1, "": 2}) == Prices.of("2").per_hour({"l4": 3}) == 6
    assert Prices.of("2,l4=1").per_hour({"h100": 1, "l4": 1}) == 3


@pytest.mark.parametrize("value", [0, -1, True, "x", "h100=", {"h100": "dear"}, [2], float("nan"), None])
def test_what_is_no_price_is_refused(value):
    with pytest.raises(InputError, match="price_per_gpu_hour.* is .*expected a number > 0"):
        Prices.of(value)


def test_a_price_that_is_none_is_named_by_its_kind():
    with pytest.raises(InputError, match=r"^price_per_gpu_hour\.h100 is '0'"):
        Prices.of("2,h100=0")
    with pytest.raises(InputError, match="^price_per_gpu_hour is '0'"):
        Prices.of("0")


def test_a_sweep_of_a_mixed_fleet_is_charged_by_kind(twinserve, tmp_path, trace):
    path = tmp_path / "plan.toml"
    path.write_text(
        f'trace = "{trace}"\nall_at_zero = true\nprice_per_gpu_hour = {{ h100 = 2.0, l4 = 0.5 }}\n'
        '[[group]]\nlatency = "roofline:smollm2-135m@h100:tp=3"\n'
        '[[group]]\nreplicas = 2\nlatency = "roofline:smollm2-135m@l4"\n'
    )
    result = twinserve("sweep", path, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)
    assert row["cost"]["total"] == pytest.approx(7.0 / 3600 / row["summary"]["total_tok_s"] * 1e6)
    assert "Price: 2 a GPU-hour of h100, 0.5 a GPU-hour of l4." in result.err
