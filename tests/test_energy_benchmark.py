"""The energy benchmark: what it integrates, what it fits, and who reads the power."""

import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import energy
import pytest

from twinserve.settings.errors import InputError
from twinserve.sim.devices import Power
from twinserve.sim.power import Use

LAW = Power(idle_w=75, active_w=120, joules_per_byte=5e-11, joules_per_operation=4e-13, source="made up")


def window(name: str, seconds: float, busy_s: float, moved: float, computed: float, off: float = 0.0) -> dict:
    joules = Use(busy_s, moved, computed).joules(LAW, seconds) * (1 + off)
    return {
        "name": name, "seconds": seconds, "busy_s": busy_s, "bytes": moved, "operations": computed, "joules": joules,
    }  # fmt: skip


WINDOWS = [
    window("idle", 6, 0, 0, 0),
    window("decodes", 6, 5, 1.5e13, 4e13),
    window("prompts", 7, 6, 3e12, 2.5e15),
    window("both", 8, 8, 1e13, 1e15),
    window("few", 6, 1, 3e12, 2e13),
]


def test_a_law_is_found_from_windows_that_follow_it():
    power = energy.fitted(WINDOWS, "here")
    assert power.source == "here"
    for name in ("idle_w", "active_w", "joules_per_byte", "joules_per_operation"):
        assert getattr(power, name) == pytest.approx(getattr(LAW, name), rel=2e-3)
    held_out = [window("other", 9, 4, 8e12, 9e14, off=-0.2)]
    assert energy.errors_of(power, held_out) == {"other": pytest.approx(0.25, abs=0.01)}


def test_the_table_is_one_of_the_devices_file():
    import tomllib

    table = tomllib.loads(energy.table_of("h200", LAW))["power"]["h200"]
    assert Power(**table) == LAW


def readings(times_s: list[float], watts: list[float]) -> energy.Readings:
    made = energy.Readings.__new__(energy.Readings)
    made.times_s, made.watts, made._period_s = times_s, watts, 1.0
    return made


def test_energy_is_the_area_below_the_power_between_two_times():
    ramp = readings([0, 1, 2, 3, 4, 5], [100, 100, 200, 200, 100, 100])
    assert ramp.joules(0.5, 4.5) == (pytest.approx(50 + 150 + 200 + 150 + 50), 4)
    with pytest.raises(InputError, match="expected three readings"):
        ramp.joules(0.5, 2.5)


def test_nvml_is_asked_where_it_is_there_and_left_behind(monkeypatch):
    calls = []
    stand_in = types.SimpleNamespace(
        nvmlInit=lambda: calls.append("init"),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetHandleByIndex=lambda index: f"card {index}",
        nvmlDeviceGetPowerUsage=lambda handle: 351_500 if handle == "card 2" else 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    with energy.power_reader(2) as (read, how):
        assert read() == 351.5 and how.startswith("NVML")
    assert calls == ["init", "shutdown"]


def test_nvidia_smi_is_asked_else_and_one_that_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="expected pynvml"), energy.power_reader(0):
        pass
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 80.5\necho 90.25\nexec /bin/sleep 60\n")
    command.chmod(0o755)
    with energy.power_reader(0) as (read, how):
        deadline = time.monotonic() + 60
        while read() != 90.25 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read() == 90.25 and how.startswith("nvidia-smi")
