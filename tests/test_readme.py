"""README names only what exists: goals of make, scripts, modules, configs and settings."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path

import pytest

from benchmarks.learning import BEGIN, END
from benchmarks.supervised import MARKERS
from omnisapiens_jax import main
from omnisapiens_jax.resources import resource

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```\n(.*?)^```\n", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_can_be_run(command: list[str]) -> None:
    program, *arguments = command
    if program == "make":
        goals = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(goals)
        return
    assert program == "python"
    if arguments[0] != "-m":
        assert (REPO / arguments[0]).is_file()
        return
    assert importlib.util.find_spec(arguments[1])
    if arguments[1] != "omnisapiens_jax.main":
        return  # the others take files
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in map(main._bundled, arguments[2:]))
    path, _, size = flags.pop("config").partition(":")
    assert flags.pop("workdir")
    config = runpy.run_path(str(REPO / path))["get_config"](*filter(None, [size]))
    for name in flags:
        assert name.startswith("config.")
        setting = config
        for part in name.split(".")[1:]:
            assert part in setting, f"{name}: the config has no {part!r}"
            setting = setting[part]


def test_what_stands_in_the_table_of_places_exists() -> None:
    layout = README.split("## Layout")[1].split("\n## ")[0]
    places = re.findall(r"^\| `([^`]+)` \|", layout, re.MULTILINE)
    assert len(places) > 10
    for place in places:
        assert (REPO / place.replace("…", "omnisapiens_jax")).exists(), place


def test_links_lead_somewhere_and_the_tables_have_their_places() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (REPO / target).exists(), target
    assert all(README.count(marker) == 1 for marker in (BEGIN, END, *MARKERS))


@pytest.mark.parametrize("size", ["mini", "3b", "7b"])
def test_every_config_is_made_in_every_size(size: str) -> None:
    for path in sorted(resource("configs").glob("*.py")):
        assert runpy.run_path(str(path))["get_config"](size).size == size
