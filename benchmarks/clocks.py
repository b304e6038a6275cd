"""What the GPU's clocks do while it works, asked of NVML, the library behind nvidia-smi."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["Clocks", "summarize_clocks"]

_LIBRARY = "libnvidia-ml.so.1"
_SM_CLOCK, _MEMORY_CLOCK, _GPU_TEMPERATURE = 1, 2, 0
_SUCCESS = 0


class Clocks:
    """Of one GPU; where NVML can't be asked, samples are empty.

    Parameters
    ----------
    bus_id : str
        The GPU's address on the bus, as CUDA tells it: the two count GPUs differently.
    library : object, optional
        In the place of NVML.
    """

    def __init__(self, bus_id: str, library: Any = None) -> None:
        self._library, self._device = library, ctypes.c_void_p()
        if library is None:
            try:
                self._library = ctypes.CDLL(_LIBRARY)
            except OSError:
                return
        if self._library.nvmlInit_v2() != _SUCCESS or (
            self._library.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(self._device)) != _SUCCESS
        ):
            self._library = None

    def sample(self) -> dict[str, float]:
        """sm_mhz, memory_mhz, watts and celsius of this moment, as far as they are told."""
        if self._library is None:
            return {}
        asked = {
            "sm_mhz": (self._library.nvmlDeviceGetClockInfo, (_SM_CLOCK,), 1.0),
            "memory_mhz": (self._library.nvmlDeviceGetClockInfo, (_MEMORY_CLOCK,), 1.0),
            "watts": (self._library.nvmlDeviceGetPowerUsage, (), 1e-3),
            "celsius": (self._library.nvmlDeviceGetTemperature, (_GPU_TEMPERATURE,), 1.0),
        }
        found = {}
        for name, (function, arguments, unit) in asked.items():
            value = ctypes.c_uint()
            if function(self._device, *arguments, ctypes.byref(value)) == _SUCCESS:
                found[name] = value.value * unit
        return found


def summarize_clocks(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each number that was told."""
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: statistics.median([sample[name] for sample in samples if name in sample]) for name in names}
