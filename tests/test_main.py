"""The command line, before anything is run."""

from __future__ import annotations

import pytest

from omnisapiens_jax import main
from omnisapiens_jax.resources import resource

RL = str(resource("configs/rl.py"))


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--config=rl"], [f"--config={RL}"]),
        (["--config=rl:7b", "--config.rl.steps=3"], [f"--config={RL}:7b", "--config.rl.steps=3"]),
        (["--config", "rl", "--workdir", "rl"], [f"--config={RL}", "--workdir", "rl"]),
        (["--config=own/rl.py:3b", "--workdir=rl"], ["--config=own/rl.py:3b", "--workdir=rl"]),
    ],
)
def test_a_bare_name_is_a_config_of_the_package(given: list[str], read: list[str]) -> None:
    assert main._arguments(given) == read


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    known = "bam, evaluate, generative, qa, rl, sft, text, transfer"
    with pytest.raises(SystemExit, match=rf"no config 'foo' travels with the package; known: {known}\. .*--config=\./foo\.py"):
        main._arguments(["--config=foo"])
