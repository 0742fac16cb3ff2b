"""The policies against the slow model, call by call, whatever the calls and the settings."""

from __future__ import annotations

import pytest
from machines import check_calls, check_storms, kinds

every_kind = pytest.mark.parametrize(("machine", "depth", "simulated", "drafting"), kinds(drafting=False))


@every_kind
def test_storms_of_calls_have_the_effect_they_have_on_the_slow_model(machine, depth, simulated, drafting):
    check_storms(machine, depth, simulated, drafting)


@every_kind
def test_every_call_has_the_effect_it_has_on_the_slow_model(machine, depth, simulated, drafting):
    check_calls(machine, depth, simulated, drafting)
