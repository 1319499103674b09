"""One of two processes that train together: `python -m tests.parallel.two_processes HOST:PORT,N,I sft|grpo DIR` (empty: one alone)."""

from __future__ import annotations

import functools
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Four devices for each of two processes, eight for one that runs alone.
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 if sys.argv[1] else 8}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from orbax.checkpoint import multihost  # noqa: E402

from omnisapiens_jax.parallel.mesh import all_rows, on_mesh, put_batch, start  # noqa: E402

if TYPE_CHECKING:
    from tests.training.world import World


def main(processes: str, stage: str, folder: Path) -> None:
    """Gradients of an SFT step, or two steps of GRPO and an evaluation; what came of it goes to `folder`."""
    start(processes)
    if processes:
        begin_together()
    from tests.training import world

    assert jax.device_count() == 8
    config = world.config(mesh=(2, 2, 2), atlas__buckets=1, rl__steps=2, rl__reward__similarity=0.5, rl__record_every=1, rl__save_every=1)
    here = world.world(config)
    with on_mesh(here.mesh):
        {"sft": sft_gradients, "grpo": grpo}[stage](config, here, folder)


def begin_together() -> None:
    """Lets a program begin when both processes have compiled it.

    Both compile the same programs in the same order, on a busy machine at different speeds, and gloo waits 30 seconds for its peers.
    """
    barrier, numbers = multihost.get_barrier_sync_fn(), itertools.count()

    def compiled(event: str, duration_secs: float, **facts: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            barrier(key=f"compiled-{next(numbers)}", timeout_ms=600_000)

    jax.monitoring.register_event_duration_secs_listener(compiled)


def sft_gradients(config: ConfigDict, here: World, folder: Path) -> None:
    from omnisapiens_jax.atlas.recipe import target_text
    from omnisapiens_jax.training import sft

    train = here.run(folder).atlas.split(config.atlas.train, batch_size=8, target=target_text, shuffle=True)
    batch = put_batch(next(train.pipeline.batches(0, 1))[1], here.mesh)
    loss, _, grads = jax.jit(functools.partial(sft.sft_gradients, here.graph, 1))(here.state, batch)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)}
    arrays = all_rows(leaves | {"loss": loss})
    if jax.process_index() == 0:
        np.savez(folder / "sft.npz", **arrays)


def grpo(config: ConfigDict, here: World, folder: Path) -> None:
    from omnisapiens_jax.training import rl
    from tests.training import test_killed

    run = here.run(folder)
    prompts = run.atlas.split(config.atlas.train, batch_size=8, target=None, shuffle=True)
    generator, tokenizer = run.generator(config.rl.rollouts, 1.0), run.atlas.tokenizer
    state = rl.improve(config.rl, 0, folder / "rl", here.graph, here.state, generator, prompts, tokenizer, test_killed.cosine, here.mesh)
    run.evaluate("after", state, run.held_out())


if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
