"""The oracle's side of `tests/oracle.py`: arguments in, a dict of arrays out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


def serve(function: Callable[..., dict[str, np.ndarray]]) -> None:
    """Calls `function` with the arguments found in the folder named on the command line and leaves its answer there."""
    folder = Path(sys.argv[1])
    arguments = json.loads((folder / "arguments.json").read_text())
    with np.load(folder / "arguments.npz") as arrays:
        arguments.update(arrays)
    np.savez(folder / "answer.npz", **{name: np.asarray(value) for name, value in function(**arguments).items()})
