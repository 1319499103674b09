"""The core needs neither torch nor tensorflow: importing all of it brings in none of them."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import omnisapiens_jax

REPO = Path(__file__).resolve().parents[1]
FOREIGN = ("torch", "tensorflow", "transformers", "sentence_transformers")


def test_importing_every_module_brings_in_no_foreign_framework() -> None:
    names = [module.name for module in pkgutil.walk_packages(omnisapiens_jax.__path__, "omnisapiens_jax.")]
    names = [name for name in names if "._resources" not in name]
    code = (
        f"import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint([f for f in {FOREIGN} if f in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_core_declares_no_foreign_framework() -> None:
    declared = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("-", "_") for requirement in declared}
    assert not names & {*FOREIGN, "tensorflow_datasets", "peft", "accelerate"}
