"""Stands in for pip, which tests must not call."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def pip(monkeypatch: pytest.MonkeyPatch, *sources: Path) -> list[tuple[list[str], str]]:
    """Copies the source whose name the requirement begins with where it is told to; fails as pip does offline if there is none.

    Returns: command and content of the requirements file of each call so far.
    """
    calls: list[tuple[list[str], str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        calls.append((command, wanted))
        found = [source for source in sources if source.name.replace("_", "-").startswith(wanted.split("==")[0])]
        if not found:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")
        (Path(command[command.index("--dest") + 1]) / found[0].name).write_bytes(found[0].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls
