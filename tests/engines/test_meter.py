"""The meter: counters that wrap, counters that are not there, and a GPU's counter through a stand-in for the driver's library."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mllm_fl.engines.meter import Footprint, Meter, Nvml, Rapl, peaks


def zone(root: Path, name: str, kind: str, microjoules: int) -> Path:
    """One powercap zone as the kernel lays it out."""
    folder = root / name
    folder.mkdir(parents=True)
    for file, text in (("name", kind), ("energy_uj", microjoules), ("max_energy_range_uj", 1000)):
        (folder / file).write_text(f"{text}\n")
    return folder


def test_packages_and_their_memory_are_added_and_a_counter_may_begin_again(tmp_path: Path) -> None:
    package, memory = zone(tmp_path, "intel-rapl:0", "package-0", 900), zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    rapl = Rapl(tmp_path)
    for folder, value in ((package, 100), (memory, 50), (core, 999)):  # the package's counter ran over 1000
        (folder / "energy_uj").write_text(str(value))
    assert rapl.lap() == 250e-6
    assert rapl.lap() == 0.0
    (memory / "energy_uj").unlink()
    assert rapl.lap() is None


def test_a_machine_without_counters_has_no_energy_and_no_estimate(tmp_path: Path) -> None:
    assert Rapl(tmp_path / "absent").lap() is None
    zone(tmp_path, "intel-rapl:0", "psys", 5)  # the whole machine, packages included: it would count them twice
    assert Rapl(tmp_path).lap() is None
    assert Nvml(object()).lap() is None


class Driver:
    """Two GPUs that have used 1,000 and 2,000 millijoules more at each reading."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.used = status, {1: 0, 2: 0}

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, i: int, device: Any) -> int:  # noqa: N802
        device._obj.value = i + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, out: Any) -> int:  # noqa: N802
        assert device.value is not None
        self.used[device.value] += 1000 * device.value
        out._obj.value = self.used[device.value]
        return self.status


def test_gpus_are_added_by_the_driver_s_own_counter() -> None:
    nvml = Nvml(Driver())
    assert (nvml.lap(), nvml.lap()) == (3.0, 3.0)
    assert Nvml(Driver(status=3)).lap() is None  # a GPU that does not count


def test_a_lap_has_both_energies_and_the_peaks() -> None:
    row = Meter((lambda: 1.5, lambda: None)).lap()
    assert (row["cpu_joules"], row["gpu_joules"]) == (1.5, None)
    assert set(row) == {"cpu_joules", "gpu_joules", "peak_bytes", "peak_workers_bytes", "peak_gpu_bytes"}
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        high = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        now = peaks()["peak_bytes"]
        assert now is not None and abs(now / 1024 - high) < 0.2 * high


def test_workers_are_those_that_live() -> None:
    if sys.platform != "linux":
        pytest.skip("children are listed on Linux alone")
    with subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(80 << 20); print(); input()"], stdin=-1, stdout=-1
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        found = peaks()["peak_workers_bytes"]
        child.communicate(b"\n")
    assert found is not None and found > 80 << 20


def test_a_footprint_is_the_most_that_was_held_together_and_not_what_was_held_at_the_end() -> None:
    if sys.platform != "linux":
        pytest.skip("Linux alone tells it")
    code = "x = bytearray(b'1' * (60 << 20)); print(flush=True); input(); del x; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None and child.stdin is not None
        with Footprint(lambda: [child.pid, 0]) as most:
            child.stdout.readline()
            while most.together < 60 << 20:
                time.sleep(0.01)
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
        with Footprint(lambda: [child.pid]) as later:
            pass
        child.communicate(b"\n")
    assert later.together < 60 << 20 <= most.together == most.each[0]
    assert most.each[1] == 0  # no such process
