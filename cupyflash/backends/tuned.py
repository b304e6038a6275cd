"""What `cupyflash.tune` found on a GPU, kept on disk beside the compiled kernels.

One file for each device and version of the library, since another version has other kernels: JSON, for each key of a
selector the fastest kernel's name, what was asked and the times of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..build.cache import default_cache, digest
from ..plan.device import DeviceSpec
from ..version import __version__

__all__ = ["load", "path_for", "save"]


def path_for(device: DeviceSpec) -> Path:
    """The device's file, whether it is there or not."""
    return default_cache().folder / f"tuned-{digest(__version__, repr(device))}.json"


def load(device: DeviceSpec) -> dict[str, str]:
    """Names of the fastest kernels by selector's key; empty where nothing was found, or can't be read."""
    try:
        path = path_for(device)
    except OSError:  # there is no cache; who needs it says so
        return {}
    return {key: entry["kernel"] for key, entry in _read(path).items()}


def save(device: DeviceSpec, key: str, kernel: str, about: Mapping[str, Any]) -> None:
    """Adds what was found, or puts it in the place of what was found before.

    Raises
    ------
    OSError
        The cache can't be written.
    """
    path = path_for(device)
    with default_cache().lock(digest(path.name)):
        entries = _read(path) | {key: {"kernel": kernel, **about}}
        # Renamed into place: a reader sees the old file or the new one.
        handle, name = tempfile.mkstemp(prefix=".tuned-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"version": __version__, "device": device.name, "found": entries}, file, indent=1)
            os.replace(name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["found"]
        return {key: entry for key, entry in found.items() if isinstance(entry["kernel"], str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, cut off, or somebody else's
        return {}
