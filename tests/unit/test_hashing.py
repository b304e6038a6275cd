"""Values that keep their hash."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

from cupyflash.plan.device import DEVICES


def test_a_value_of_another_process_is_found() -> None:
    """Strings have other hashes there, so a hash that was kept must not travel."""
    spec = DEVICES["H200"]
    hash(spec)
    code = """
import pickle, sys
sys.path.insert(0, sys.argv[1])
from cupyflash.plan.device import DEVICES
spec = pickle.loads(sys.stdin.buffer.read())
print(spec == DEVICES["H200"], spec in {DEVICES["H200"]: 0})
"""
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    answer = subprocess.run(command, input=pickle.dumps(spec), capture_output=True, check=True)
    assert answer.stdout.split() == [b"True", b"True"]
