"""Runs that stop at chosen places and go on, in one process: `test_resume` does it with SIGKILL and the real main."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnisapiens_jax.parallel.mesh import on_mesh, shardings
from omnisapiens_jax.rl.replay import load_rollout
from omnisapiens_jax.training import jobs, rl, sft, state
from omnisapiens_jax.training.checkpoints import Checkpoints
from omnisapiens_jax.training.journal import Journal, read_metrics
from tests.training import world


class Killed(BaseException):
    """Nothing in the package catches it."""


def cosine(predictions: Sequence[str], golds: Sequence[str]) -> np.ndarray:
    """Stands for the sentence embedder: a number in [0, 1] of every text, so that rewards differ."""
    return np.asarray([zlib.crc32(text.encode()) % 1000 / 1000 for text in predictions], np.float32)


def go(workdir: Path, here: world.World, begin: state.TrainState) -> None:
    """A warm start and GRPO, as the `rl` job runs them."""
    run, config = here.run(workdir), here.config
    with on_mesh(here.mesh):
        policy = run.fit(config.warm_start, "warm_start", jax.tree.map(jnp.copy, begin))
        prompts = run.atlas.split(config.atlas.train, batch_size=config.rl.prompts, target=None, shuffle=True)
        generator, tokenizer = run.generator(config.rl.rollouts, 1.0), run.atlas.tokenizer
        rl.improve(config.rl, 0, workdir / "rl", here.graph, policy, generator, prompts, tokenizer, cosine, here.mesh)


def metrics(workdir: Path, stage: str) -> list[dict[str, float]]:
    rows = read_metrics(workdir / stage / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def here() -> world.World:
    return world.world(world.config(atlas__buckets=1, rl__reward__similarity=0.5, rl__record_every=2, rl__optim__lr=1e-2))


@pytest.fixture(scope="module")
def alone(here: world.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("alone")
    go(workdir, here, here.state)
    rewards = {row["reward"] for row in metrics(workdir, "rl")}
    assert len(rewards) > 1 and all(row["grad_norm"] > 0 for row in metrics(workdir, "rl"))
    return workdir


def test_killed_everywhere(here: world.World, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, save, done = Journal.write, Checkpoints.save, []

    def deadly_write(self: Journal, step: int, values: Any) -> dict[str, float]:
        written = write(self, step, values)
        if (place := (self._path.parent.name, step)) in [("warm_start", 0), ("warm_start", 2), ("rl", 0), ("rl", 2)] and place not in done:
            done.append(place)
            raise Killed
        return written

    def deadly_save(self: Checkpoints, step: int, tree: Any, facts: dict[str, Any]) -> None:
        save(self, step, tree, facts)
        if (place := (self._manager.directory.name, step)) == ("best", 4) and place not in done:
            done.append(place)  # the new minimum is kept, the state that knows of it is not
            raise Killed

    monkeypatch.setattr(Journal, "write", deadly_write)
    monkeypatch.setattr(Checkpoints, "save", deadly_save)
    for _ in range(5):
        with pytest.raises(Killed):
            go(tmp_path, here, here.state)
        for stage in tmp_path.glob("*/metrics.jsonl"):
            with stage.open("a") as file:
                file.write('{"step": 3, "loss": 0.')  # a line that the kill cut off
    assert len(done) == 5
    go(tmp_path, here, here.state)
    for stage in ("warm_start", "rl"):
        assert metrics(tmp_path, stage) == metrics(alone, stage)
        assert [row["step"] for row in metrics(tmp_path, stage)] == list(range(4))
    for name in ("000000.npz", "000002.npz"):
        ours, theirs = (load_rollout(folder / "rl" / "rollouts" / name) for folder in (tmp_path, alone))
        assert ours.texts == theirs.texts
        np.testing.assert_array_equal(ours.log_probs, theirs.log_probs)


def test_a_finished_run_has_nothing_to_do(here: world.World, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in alone.rglob("metrics.jsonl")}
    monkeypatch.setattr(Journal, "write", lambda *_: pytest.fail("a step was made again"))
    go(alone, here, here.state)
    assert {path: path.read_bytes() for path in alone.rglob("metrics.jsonl")} == before


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    first, second = world.config(), world.config(rl__steps=5, seed=1)
    jobs.claim(tmp_path / "run", second)
    jobs.claim(tmp_path / "run", first)  # the other ended before it made anything: its place is free
    (tmp_path / "run" / "rl").mkdir()
    jobs.claim(tmp_path / "run", first)
    with pytest.raises(ValueError, match=r"run holds a run with another config \(differs in rl, seed\): name another --workdir"):
        jobs.claim(tmp_path / "run", second)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
    jobs.claim(tmp_path / "run", world.config(atlas__on_error="skip"))  # what the error of a bad row advises


def test_a_workdir_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/run cannot be written to \(Not a directory\): name another --workdir"):
        jobs.claim(tmp_path / "file" / "run", world.config())


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("job", "dream", "unknown config.job 'dream'; known: rl, bam, transfer, generative, sft, qa, evaluate"),
        ("warm_start.rows", "half", "unknown config.warm_start.rows 'half'; known: all, third, rest, none"),
        ("rl.rows", "none", "unknown config.rl.rows 'none'; known: all, third, rest"),
        ("model.remat", "some", "unknown config.model.remat 'some'; known: none, full, dots"),
        ("processing.format_prompt", "loud", "unknown config.processing.format_prompt 'loud'; known: none, think"),
        ("rl.updates", 3, r"config.rl.prompts 8 does not divide over the 3 updates .* make it a multiple of 24"),
        ("mesh.data", 3, "mesh data=3 x fsdp=1 x tensor=1 needs 3 devices; there are 8"),
        ("blanked", ("smell",), "unknown config.blanked 'smell'; known: text, audio, video"),
        ("rl.steps", 0, "config.rl.steps 0 must be at least 1"),
        ("rl.save_every", 0, "config.rl.save_every 0 must be at least 1"),
        ("warm_start.eval_every", 0, "config.warm_start.eval_every 0 must be at least 1"),
        ("rl.rollouts", 0, "config.rl.rollouts 0 must be at least 1"),
        ("generation.max_tokens", 0, "config.generation.max_tokens 0 must be at least 1"),
        ("atlas.buckets", 0, "config.atlas.buckets 0 must be at least 1"),
        ("rl.reward.buffer", 0, "needs a buffer of at least 1 token, not 0"),
        ("model.lora.dropout", 1.0, "config.model.lora.dropout 1.0 is a probability, from 0 to less than 1"),
        ("rl.temperature", 0.0, "config.rl.temperature 0.0 must be above 0"),
        ("rl.optim.schedule", "linear", "unknown optim.schedule 'linear'; known: constant, cosine"),
        ("rl.loss.aggregation", "sum", "unknown aggregation 'sum'"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_done(setting: str, value: Any, told: str, tmp_path: Path) -> None:
    made = world.config()
    made.update_from_flattened_dict({"mesh.data": -1, setting: value})
    with pytest.raises(ValueError, match=told):
        jobs.run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("saved", "restored"), [((2, 2, 2), (1, 8, 1)), ((2, 2, 2), (1, 1, 1))])
def test_a_checkpoint_fits_any_mesh(here: world.World, saved: world.Mesh3, restored: world.Mesh3, tmp_path: Path) -> None:
    def on(shape: world.Mesh3, policy: state.TrainState) -> state.TrainState:
        return jax.device_put(policy, shardings(policy, world.mesh_of(shape)))

    optimizer = state.make_optimizer(here.config.rl.optim, 4)
    policy = here.state._replace(opt_state=jax.eval_shape(optimizer.init, here.state.trainable))
    random = np.random.default_rng(0)
    policy = jax.tree.map(lambda leaf: random.integers(0, 99, leaf.shape).astype(leaf.dtype), policy)
    empty = jax.tree.map(np.zeros_like, policy)._replace(frozen=policy.frozen)  # frozen parameters come from where the model does
    first, other = on(saved, policy), on(restored, empty)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, first, {"next_step": 3})
        found, facts = checkpoints.restore(other)
    assert facts == {"next_step": 3}
    for ours, theirs, place in zip(*map(jax.tree.leaves, (found, first, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
        assert ours.sharding == place.sharding
    places = [leaf.sharding.spec for leaf in jax.tree.leaves(first.opt_state)]
    assert sum(any(spec) for spec in places) > 20  # the moments lie where their parameters lie


def test_gradients_that_are_not_finite(here: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is skipped and counted; five in a row end the run, which says so, and the parameters stay what they were."""
    made = world.config(atlas__buckets=1, warm_start__steps=12, warm_start__eval_every=20)
    run = here.run(tmp_path)
    honest = sft.sft_gradients

    def broken(graph: Any, micro: int, policy: state.TrainState, batch: dict[str, jax.Array], *how: Any) -> Any:
        loss, tokens, grads = honest(graph, micro, policy, batch, *how)
        bad = (policy.step == 1) | (policy.step >= 4)
        return loss, tokens, jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)

    apply = state.apply_gradients

    def watched(*args: Any) -> Any:
        after, values = apply(*args)
        return after, values | {"norm": state.optax.global_norm(after.trainable)}

    monkeypatch.setattr(sft, "sft_gradients", broken)
    monkeypatch.setattr(sft, "apply_gradients", watched)
    with on_mesh(here.mesh), pytest.raises(FloatingPointError, match="step 8: the gradients of the last 5 updates were not finite"):
        run.fit(made.warm_start, "warm_start", jax.tree.map(jnp.copy, here.state))
    rows = read_metrics(tmp_path / "warm_start" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 1, 2, 3, 4, 5, 6]
    norms = [row["norm"] for row in rows]
    assert norms[1] == norms[0] != norms[2] and len(set(norms[3:])) == 1 and np.isfinite(norms).all()


def test_a_validation_loss_that_is_never_finite(here: world.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = world.config(atlas__buckets=1)
    monkeypatch.setattr(sft, "validate", lambda *_: {"validation_loss": float("nan")})
    with on_mesh(here.mesh), pytest.raises(FloatingPointError, match="the validation loss was never finite in 4 steps"):
        here.run(tmp_path).fit(made.warm_start, "warm_start", jax.tree.map(jnp.copy, here.state))
