"""Atomic Orbax checkpoints of what a run learns, restored onto whatever mesh the target's shardings name."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from omnisapiens_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one stage of a run. A checkpoint is there whole or not at all; the newest `keep` stay.

    Frozen parameters are not written: `config.model` says where they came from, and beside LoRA they would be nearly all of the bytes.
    """

    def __init__(self, directory: Path, *, keep: int = 2):
        """`directory` is made if it is missing."""
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, facts: dict[str, Any]) -> None:
        """Writes `state` and the JSON-able `facts` that belong to it, in the place of a checkpoint that a killed run left at `step`."""
        if step in self._manager.all_steps():
            self._manager.delete(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(_flat(_learnt(state))), facts=ocp.args.JsonSave(facts))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint, in the structure, dtypes and shardings of `like`, whose frozen parameters it keeps."""
        learnt = _learnt(like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(learnt))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        leaves = [restored["state"][name] for name in _flat(learnt)]
        state = jax.tree.unflatten(jax.tree.structure(learnt), leaves)
        return state._replace(frozen=like.frozen), restored["facts"]


def _learnt(state: TrainState) -> TrainState:
    return state._replace(frozen=nnx.State({}))


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that a checkpoint does not depend on the classes that hold them."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
