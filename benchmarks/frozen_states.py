"""An epoch of adapters with the frozen thinker's states kept, and one that computes them: `python benchmarks/frozen_states.py`.

The same plan, learner and steps, side by side: epochs of the one and of the other in turn, after one of each that compiles. Both begin with
the same parameters, so their losses must be equal to the rounding of float32. `mini` on its miniature atlas, or any other with --atlas.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import runpy
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from omnisapiens_jax.models.bam import MODALITIES
from omnisapiens_jax.parallel.mesh import make_mesh, on_mesh, put_batch
from omnisapiens_jax.resources import resource
from omnisapiens_jax.training import bam
from omnisapiens_jax.training.adapt import Adapting, gather, make_learner
from omnisapiens_jax.training.bam import Feed, Fixed, Group
from omnisapiens_jax.training.data import Atlas
from omnisapiens_jax.training.state import TrainState, create_state, fresh_optimizer, parameters, thinker_config

BAR = 20.0  # times as fast
TOLERANCE = 1e-5  # relative: rows are encoded in batches of other lengths


def epochs(run: Adapting, group: Group, fixed: Fixed, cached: Feed, kind: str, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each epoch and the losses of all steps, `cached` and `computed`."""
    feeds = {"cached": cached, "computed": dataclasses.replace(cached, states=None)}
    learner = make_learner(run, group, cached, ["video"])
    graph, trained, rest = nnx.split(learner, bam.trainable("adapters+heads"), ...)
    optimizer = bam.make_optimizer(run.settings, double_step=False)
    how = (0, 1, tuple(run.settings.drop[modality] for modality in MODALITIES))
    step = functools.partial(bam.step, (fixed.site, graph, fixed.graph), group.task, optimizer, how)
    states = {}
    for name in feeds:
        own = jax.tree.map(jnp.copy, (trained, rest))
        states[name] = fresh_optimizer(TrainState(jnp.zeros((), jnp.int32), own[0], own[1], ()), optimizer, run.mesh)
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in feeds}
    length = cached.split.steps_per_epoch
    for number in range(rounds + 1):
        for name, feed in feeds.items():
            begun, losses = time.perf_counter(), []
            for _, batch in feed.batches(number * length, (number + 1) * length):
                states[name], metrics = step(states[name], fixed.params, put_batch(batch, run.mesh))
                losses.append(metrics["loss"])
            jax.block_until_ready(losses)
            found[name][1].extend(map(float, losses))
            if number:
                found[name][0].append(time.perf_counter() - begun)
            print(f"{kind} {name} epoch {number}: {time.perf_counter() - begun:.2f} s", flush=True)
    return found


def main() -> None:
    """Prints the table; an exit status other than 0 says that a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atlas", default="", help="folder of an atlas with landmarks (the miniature one, made on first use)")
    parser.add_argument("--samples", type=int, default=1000, help="of the miniature atlas")
    parser.add_argument("--dataset", default="meld_emotion")
    parser.add_argument("--rounds", type=int, default=3, help="epochs timed")
    parser.add_argument("--kinds", nargs="+", default=["adapter", "attention"])
    arguments = parser.parse_args()
    table = Table(
        "kind", "rows", "cached, s", "computed, s", "times", "losses differ by", title=f"An epoch on {jax.devices()[0].device_kind}"
    )
    good = True
    for kind in arguments.kinds:
        config = runpy.run_path(str(resource("configs/bam.py")))["get_config"]("mini")
        config.atlas.update({"path": arguments.atlas, "samples": arguments.samples, "cache_bytes": 0})
        config.bam.update({"kind": kind, "datasets": arguments.dataset})
        (group,) = bam.groups(config.bam)
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        with on_mesh(mesh), tempfile.TemporaryDirectory() as folder:
            graph, state = create_state(config.model, config.seed, mesh)
            atlas = Atlas(config, thinker_config(config.model))
            run = Adapting(config, Path(folder), mesh, atlas, graph, parameters(state))
            material = gather(run, group.task, group.datasets).encoded()
            feed = material.feed(config.atlas.train, group.datasets, train=True)
            found = epochs(run, group, material.fixed, feed, kind, arguments.rounds)
        cached, computed = (float(np.median(found[name][0])) for name in ("cached", "computed"))
        both = [np.asarray(found[name][1]) for name in ("cached", "computed")]
        apart = float(np.max(np.abs(both[0] - both[1]) / np.abs(both[1])))
        rows = len(feed.split.pipeline.planner.index)
        table.add_row(kind, str(rows), f"{cached:.3f}", f"{computed:.3f}", f"{computed / cached:.1f}", f"{apart:.1e}")
        good &= apart <= TOLERANCE and (kind != "adapter" or computed >= BAR * cached)
    Console(width=120).print(table)
    if not good:
        raise SystemExit(f"missed: adapters at least {BAR:g} times as fast, losses equal to {TOLERANCE:g}")


if __name__ == "__main__":
    main()
