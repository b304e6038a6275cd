"""How many cubins the run compiled, in its summary."""

from __future__ import annotations

import pytest

COMPILED = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if text := config.stash.get(COMPILED, ""):
        terminalreporter.write_line(text)
