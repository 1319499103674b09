"""The bridge to the oracle: transformers on torch, in an environment of its own, asked through a process and answered in `.npz`.

`tests/oracle_scripts/NAME.py` holds a function of keyword arguments that returns a dict of arrays, and ends with

    if __name__ == "__main__":
        serve(run)          # from _serve import serve

A test calls it as `run_oracle("NAME", seed=1, tokens=np.array(...))`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = REPO / "tests" / "oracle_scripts"
VARIABLE = "OMNISAPIENS_ORACLE_PYTHON"


def oracle_python() -> Path:
    """The oracle's interpreter: $OMNISAPIENS_ORACLE_PYTHON, else `.venv-oracle`; skips the test when there is neither.

    Raises:
        FileNotFoundError: the variable is set, but to no interpreter. (`make test` sets it, so there nothing is skipped in silence.)
    """
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).exists():
            raise FileNotFoundError(f"${VARIABLE} is {named}, which does not exist; `make venvs` builds one")
        return Path(named)
    built = REPO / ".venv-oracle" / "bin" / "python"
    if not built.exists():
        pytest.skip(f"NOT COMPARED WITH TRANSFORMERS: no {built} (run `make venvs`) and no ${VARIABLE}")
    return built


def run_oracle(script: str, *, timeout: float = 540.0, python: Path | None = None, **arguments: object) -> dict[str, np.ndarray]:
    """Runs `tests/oracle_scripts/<script>.py` in the oracle's environment and returns the arrays it answers.

    Args:
        script: name of the script, without `.py`.
        timeout: seconds.
        python: interpreter of another environment than the oracle's.
        **arguments: keyword arguments of the script's function: numpy arrays travel as `.npz`, everything else as JSON
            (so a tuple arrives as a list).

    Raises:
        FileNotFoundError: there is no such script.
        RuntimeError: the script failed; carries what it wrote to stderr.
    """
    path = SCRIPTS / f"{script}.py"
    if not path.exists():
        raise FileNotFoundError(f"no oracle script {path}; there are {sorted(p.stem for p in SCRIPTS.glob('[!_]*.py'))}")
    python = python or oracle_python()
    arrays = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in arguments.items() if name not in arrays}
    with tempfile.TemporaryDirectory(prefix="oracle-") as folder:
        (Path(folder) / "arguments.json").write_text(json.dumps(plain))
        np.savez(Path(folder) / "arguments.npz", **arrays)  # pyright: ignore[reportArgumentType]
        done = subprocess.run([python, path, folder], env=_environment(), capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"oracle script {path.name} failed ({done.returncode}) under {python}:\n{done.stdout}{done.stderr}")
        with np.load(Path(folder) / "answer.npz") as answer:
            return dict(answer)


def _environment() -> dict[str, str]:
    # Two threads that sleep when idle: OpenMP's busy waiting slows everything else on a small machine. PYTHONPATH would mix environments.
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {
        "OMP_NUM_THREADS": str(min(2, os.cpu_count() or 1)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
