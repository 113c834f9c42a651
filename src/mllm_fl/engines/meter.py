"""What a run draws from its machine between two readings: energy where the machine counts it, and the peak of memory.

Energy is that of whole chips, other programs' work included: processor packages and their memory from the kernel's powercap counters
(RAPL; Linux lets only root read them), GPUs from NVML's own counter. What cannot be read is None, never an estimate.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")


class Rapl:
    """Joules of all processor packages and their memory since the last reading, from ``root``'s wrapping microjoule counters."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._last: dict[Path, int] = {}
        for zone in sorted(root.glob("*-rapl:*")) if root.is_dir() else ():
            name = _text(zone / "name")
            if name is not None and (
                name.startswith("package") or name == "dram"
            ):  # core and uncore are inside package
                value = _text(zone / "energy_uj")
                if value is not None:
                    self._last[zone] = int(value)

    def lap(self) -> float | None:
        """Joules since the last call; None where nothing can be read."""
        total = 0
        for zone, before in self._last.items():
            value, top = _text(zone / "energy_uj"), _text(zone / "max_energy_range_uj")
            if value is None:
                return None
            self._last[zone] = int(value)
            used = int(value) - before
            total += used if used >= 0 else used + int(top or 0)  # the counter began again
        return total / 1e6 if self._last else None


class Nvml:
    """Joules of all GPUs since the last reading, from the driver's counter (Volta and later). ``library``: a stand-in for tests."""

    def __init__(self, library: Any = None) -> None:
        self._devices: list[ctypes.c_void_p] = []
        try:
            self._nvml = library if library is not None else ctypes.CDLL("libnvidia-ml.so.1")
            count = ctypes.c_uint()
            if self._nvml.nvmlInit_v2() == 0 and self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0:
                for i in range(count.value):
                    device = ctypes.c_void_p()
                    if self._nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) == 0:
                        self._devices.append(device)
        except (OSError, AttributeError):
            pass
        self._last = self._read()

    def lap(self) -> float | None:
        """Joules since the last call; None without GPUs that count."""
        now, before = self._read(), self._last
        self._last = now
        return None if now is None or before is None else (now - before) / 1e3

    def _read(self) -> int | None:
        total = 0
        for device in self._devices:
            millijoules = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)) != 0:
                return None
            total += millijoules.value
        return total if self._devices else None


class Meter:
    """Counts from its making on; :meth:`lap` is a row's worth."""

    def __init__(self, counters: Sequence[Callable[[], float | None]] | None = None) -> None:
        self._cpu, self._gpu = counters if counters is not None else (Rapl().lap, Nvml().lap)

    def lap(self) -> dict[str, float | int | None]:
        """Joules since the last call (``cpu_joules``, ``gpu_joules``) and the peaks of memory so far, in bytes."""
        return {"cpu_joules": self._cpu(), "gpu_joules": self._gpu(), **peaks()}


def peaks() -> dict[str, float | int | None]:
    """Largest resident memory so far of this process, of its living children together, and largest allocation on the GPU; bytes.

    Children's peaks need not coincide, and pages that they share count in each: their sum is an upper bound. Linux alone tells it.
    """
    out: dict[str, float | int | None] = {"peak_bytes": None, "peak_workers_bytes": None, "peak_gpu_bytes": None}
    try:
        import resource
    except ImportError:  # not on Windows
        return out
    unit = 1 if sys.platform == "darwin" else 1024
    out["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    tasks = Path("/proc/self/task")
    children = [c for t in (tasks.iterdir() if tasks.is_dir() else ()) for c in (_text(t / "children") or "").split()]
    high = [_text(Path(f"/proc/{c}/status")) for c in children]
    found = [int(line.split()[1]) * 1024 for text in high if text for line in text.splitlines() if line[:6] == "VmHWM:"]
    out["peak_workers_bytes"] = sum(found) or None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        out["peak_gpu_bytes"] = int(torch.cuda.max_memory_allocated())
    return out


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


class Footprint:
    """The most memory that some processes held together while this was open, looked at every ``LOOK`` seconds (Linux alone tells it).

    ``together``: bytes, pages that several processes share divided by their users (PSS), so that nothing counts twice; 0 where the
    system does not tell. ``each``: the same by process, in the order that ``pids`` gave them, at that moment.
    """

    LOOK = 0.1

    def __init__(self, pids: Callable[[], Sequence[int]]) -> None:
        self.together, self.each = 0, [0]
        self._pids, self._over = pids, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Footprint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(self.LOOK):
            self._look()

    def _look(self) -> None:
        each = [_pss(pid) for pid in self._pids()]
        if sum(each) > self.together:
            self.together, self.each = sum(each), each


def _pss(pid: int) -> int:
    text = _text(Path(f"/proc/{pid}/smaps_rollup")) or ""
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
