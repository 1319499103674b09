"""The rooms of the package import one way: a room knows only the rooms below it, and the low ones know few libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = "omnisapiens_jax"

# Lowest first. Single files of the package's root are rooms too.
ROOMS = (
    "resources",
    "parallel",
    "models",
    "processing",
    "defaults",
    "pages",
    "atlas",
    "convert",
    "generation",
    "rl",
    "evaluation",
    "training",
    "plan",
    "predict",
    "main",
    "__init__",  # the package's face: what it offers it imports when it is asked for
)
# What a room may import beyond the standard library, numpy and lower rooms; a room that is not here may import any dependency.
LIBRARIES = {"resources": set[str](), "defaults": {"ml_collections"}, "models": {"jax", "flax"}}
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
FOREIGN = {"torch", "tensorflow", "transformers", "peft"}  # the core runs without them
OUTSIDE = {"configs", "data", "tools", "benchmarks", "notebooks", "tests"}  # what stands above the package


def room_of(module: str) -> str:
    """The room of a module of the package: `omnisapiens_jax.models.audio` -> `models`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Every module `source` imports, relative ones resolved; `from omnisapiens_jax import models` counts as `omnisapiens_jax.models`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
            base = ".".join([*(parents if node.level else []), *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == PACKAGE else (base,)


def broken_rules(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What `source`, as the text of `module`, imports although its room may not."""
    room = room_of(module)
    found = []
    for name in imports_of(source, module, is_package=is_package):
        top = name.split(".")[0]
        if top == PACKAGE:
            if room_of(name) in ROOMS and ROOMS.index(room_of(name)) > ROOMS.index(room):
                found.append(f"{module} imports {name}, a room above {room}")
        elif top in FOREIGN | OUTSIDE:
            found.append(f"{module} imports {top}, which no room may")
        elif room in LIBRARIES and top not in LIBRARIES[room] | {"numpy"} | set(sys.stdlib_module_names):
            found.append(f"{module} imports {top}; {room} may import {sorted(LIBRARIES[room] | {'numpy'})} and the standard library")
        elif room == "processing" and top in DEVICE:
            found.append(f"{module} imports {top}, but processing runs on the host")
    return found


def modules() -> list[tuple[str, Path]]:
    """Every module of the package as (dotted name, file)."""
    named = []
    for path in sorted((REPO / PACKAGE).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        named.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return named


def test_every_file_stands_in_a_known_room() -> None:
    unknown = {name for name, _ in modules() if room_of(name) not in ROOMS}
    assert not unknown, f"{sorted(unknown)}: give the room its place in ROOMS, lowest first"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_room_imports_only_what_lies_below(module: str, path: Path) -> None:
    assert broken_rules(path.read_text(), module, is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("models.audio", "from omnisapiens_jax.processing import mel"),
        ("models.audio", "from ..rl import loss"),
        ("models.audio", "from omnisapiens_jax import training"),
        ("models.audio", "import optax"),
        ("processing.mel", "import jax.numpy as jnp"),
        ("atlas.plan", "def lazily():\n    import omnisapiens_jax.main"),
        ("training.sft", "from torch import nn"),
        ("atlas.sources", "from data import generate"),
    ],
)
def test_each_rule_bites(module: str, line: str) -> None:
    assert len(broken_rules(line, f"{PACKAGE}.{module}")) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("processing.example", "from omnisapiens_jax.models.config import ThinkerConfig\nimport numpy as np"),
        ("models.audio", "from . import layers\nfrom .config import AudioConfig\nimport jax\nimport dataclasses"),
        ("training.rl", "from omnisapiens_jax import resources\nimport optax, jax"),
    ],
)
def test_what_is_allowed_passes(module: str, line: str) -> None:
    assert broken_rules(line, f"{PACKAGE}.{module}") == []


def test_host_code_starts_without_jax() -> None:
    """Also through what they import: a data worker must not pay for jax."""
    names = [name for name, _ in modules() if room_of(name) in ("__init__", "resources", "processing")]
    names += [f"{PACKAGE}.models.config", f"{PACKAGE}.atlas.workers", f"{PACKAGE}.atlas.ablation"]
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(sorted({'jax', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
