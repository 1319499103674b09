"""Atomic Orbax checkpoints of any pytree, restored onto whatever mesh the target's shardings name."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

Tree = TypeVar("Tree")


class Checkpoints:
    """The checkpoints of one stage of a run. A checkpoint is there whole or not at all; the newest `keep` stay."""

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

    def save(self, step: int, tree: Any, facts: dict[str, Any]) -> None:
        """Writes `tree` and the JSON-able `facts` that belong to it, in the place of a checkpoint that a killed run left at `step`."""
        if step in self._manager.all_steps():
            self._manager.delete(step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(_flat(tree)), facts=ocp.args.JsonSave(facts))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]]:
        """The newest checkpoint, in the structure, dtypes and shardings of `like`."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flat(like))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore())
        restored = self._manager.restore(self.latest, args=args)
        leaves = [restored["state"][name] for name in _flat(like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), restored["facts"]


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that a checkpoint does not depend on the classes that hold them."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
