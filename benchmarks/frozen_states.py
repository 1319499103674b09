"""An epoch with the states of what is frozen kept, and one that computes them: `python benchmarks/frozen_states.py`.

Of adapters and of behaviour attention on the frozen thinker, and (`towers`) of LoRA on the decoder behind frozen towers, on all classified
rows of the atlas. The same plan, learner and steps, side by side: epochs of the one and of the other in turn, after one of each that
compiles. Both begin with the same parameters, so their losses must be equal to the rounding of float32. `mini` on its miniature atlas, or
any other with --atlas.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import runpy
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from omnisapiens_jax.models.bam import MODALITIES
from omnisapiens_jax.models.thinker import Batch
from omnisapiens_jax.parallel.mesh import make_mesh, on_mesh, put_batch
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import bam, jobs, sft
from omnisapiens_jax.training.adapt import Adapting, gather, make_learner
from omnisapiens_jax.training.bam import Feed
from omnisapiens_jax.training.data import Atlas, Split
from omnisapiens_jax.training.losses import CLASSES
from omnisapiens_jax.training.state import TrainState, create_state, fresh_optimizer, make_optimizer, parameters, thinker_config

BAR = 20.0  # times as fast
TOLERANCE = 1e-5  # relative: rows are encoded in batches of other lengths


@dataclasses.dataclass(frozen=True)
class Race:
    """One epoch, in two ways: `feeds` by name, the cached one first, and what makes a step of a batch of either."""

    feeds: Mapping[str, Feed | Split]
    begin: Callable[[], TrainState]
    step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    rows: int
    length: int  # steps of an epoch


def epochs(race: Race, mesh: Mesh, kind: str, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each epoch and the losses of all steps, `cached` and `computed`."""
    states = {name: race.begin() for name in race.feeds}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in race.feeds}
    for number in range(rounds + 1):
        for name, feed in race.feeds.items():
            begun, losses = time.perf_counter(), []
            for _, batch in feed.batches(number * race.length, (number + 1) * race.length):
                states[name], metrics = race.step(states[name], put_batch(batch, mesh))
                losses.append(metrics["loss"])
            jax.block_until_ready(losses)
            found[name][1].extend(map(float, losses))
            if number:
                found[name][0].append(time.perf_counter() - begun)
            print(f"{kind} {name} epoch {number}: {time.perf_counter() - begun:.2f} s", flush=True)
    return found


def of_adapters(config: ConfigDict, mesh: Mesh, folder: Path) -> Race:
    """Adapters or behaviour attention of one dataset, on the frozen thinker."""
    (group,) = bam.groups(config.bam)
    graph, state = create_state(config.model, config.seed, mesh)
    run = Adapting(config, folder, mesh, Atlas(config, thinker_config(config.model)), graph, parameters(state))
    material = gather(run, group.task, group.datasets).encoded()
    cached = material.feed(config.atlas.train, group.datasets, train=True)
    learner = make_learner(run, group, cached, ["video"])
    graph, trained, rest = nnx.split(learner, bam.trainable("adapters+heads"), ...)
    optimizer, fixed = bam.make_optimizer(run.settings, double_step=False), material.fixed
    how = (0, 1, tuple(run.settings.drop[modality] for modality in MODALITIES))
    step = functools.partial(bam.step, (fixed.site, graph, fixed.graph), group.task, optimizer, how)

    def begin() -> TrainState:
        own = jax.tree.map(jnp.copy, (trained, rest))
        return fresh_optimizer(TrainState(jnp.zeros((), jnp.int32), own[0], own[1], ()), optimizer, mesh)

    return Race(
        {"cached": cached, "computed": dataclasses.replace(cached, split=dataclasses.replace(cached.split, kept=None))},
        begin,
        lambda state, batch: step(state, fixed.params, batch),
        len(cached.planner.index),
        cached.split.steps_per_epoch,
    )


def of_towers(config: ConfigDict, mesh: Mesh, folder: Path) -> Race:
    """The first supervised stage with LoRA on the decoder, whose frozen towers' states are kept."""
    graph, state = create_state(config.model, config.seed, mesh)
    run = jobs.Run(config, folder, mesh, Atlas(config, thinker_config(config.model)), graph)
    cached, _ = run.splits(config.sft, state, jobs.LABELS)
    optimizer = make_optimizer(config.sft.optim, config.sft.steps)
    dropout = sft.Dropout(config.model.lora.dropout, config.seed)
    step = functools.partial(sft.sft_step, graph, optimizer, 1, objective=CLASSES, dropout=dropout)
    return Race(
        {"cached": cached, "computed": dataclasses.replace(cached, kept=None)},
        lambda: fresh_optimizer(jax.tree.map(jnp.copy, state), optimizer, mesh),
        jax.jit(step, donate_argnums=0),
        len(cached.pipeline.planner.index),
        cached.steps_per_epoch,
    )


def race_of(kind: str, arguments: argparse.Namespace, mesh: Mesh, folder: Path) -> Race:
    """What is timed of a kind."""
    job = "sft" if kind == "towers" else "bam"
    config = runpy.run_path(str(resource(f"configs/{job}.py")))["get_config"]("mini")
    config.atlas.update({"path": arguments.atlas, "samples": arguments.samples, "cache_bytes": 0, "descriptors": True})
    if kind == "towers":
        config.model.lora.rank = 32
        config.sft.cached = True
        return of_towers(config, mesh, folder)
    config.bam.update({"kind": kind, "datasets": arguments.dataset})
    return of_adapters(config, mesh, folder)


def main() -> None:
    """Prints the table; an exit status other than 0 says that a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atlas", default="", help="folder of an atlas with descriptors (the miniature one, made on first use)")
    parser.add_argument("--samples", type=int, default=1000, help="of the miniature atlas")
    parser.add_argument("--dataset", default="meld_emotion")
    parser.add_argument("--rounds", type=int, default=3, help="epochs timed")
    parser.add_argument("--kinds", nargs="+", default=["adapter", "attention", "towers"])
    arguments = parser.parse_args()
    table = Table(
        "kind", "rows", "cached, s", "computed, s", "times", "losses differ by", title=f"An epoch on {jax.devices()[0].device_kind}"
    )
    good = True
    for kind in arguments.kinds:
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        with on_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            race = race_of(kind, arguments, mesh, Path(folder))
            found = epochs(race, mesh, kind, arguments.rounds)
        cached, computed = (float(np.median(found[name][0])) for name in ("cached", "computed"))
        both = [np.asarray(found[name][1]) for name in ("cached", "computed")]
        apart = float(np.max(np.abs(both[0] - both[1]) / np.abs(both[1])))
        table.add_row(kind, str(race.rows), f"{cached:.3f}", f"{computed:.3f}", f"{computed / cached:.1f}", f"{apart:.1e}")
        good &= apart <= TOLERANCE and (kind != "adapter" or computed >= BAR * cached)
    Console(width=120).print(table)
    if not good:
        raise SystemExit(f"missed: adapters at least {BAR:g} times as fast, losses equal to {TOLERANCE:g}")


if __name__ == "__main__":
    main()
