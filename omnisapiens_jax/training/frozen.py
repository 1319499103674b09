"""States of the frozen thinker, computed once and kept on disk: an epoch of what stands on top of them then costs no forward of it.

A sample's states depend on the parameters, on how its row was made, and on its files. The first two name the folder that they lie in, the
last is their stamp; so whoever asks with the same thinker finds them, whatever the run, the mesh or the batch that they were made in.

Where the decoder is trained, what it reads may still be frozen: the table of embeddings and the towers. That is a site too, `embeddings`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.atlas.store import Arrays, Field, Store
from omnisapiens_jax.models.behaviour import media_starts
from omnisapiens_jax.models.heads import own_tokens, pool
from omnisapiens_jax.models.thinker import Batch, Thinker
from omnisapiens_jax.parallel.mesh import local_rows, meet, put_batch
from omnisapiens_jax.processing.example import IGNORED
from omnisapiens_jax.training.data import Split
from omnisapiens_jax.training.journal import console, progress

_FORMAT = 1  # raise it when a kept array would mean something else
_ROUND = 16  # answers are padded to a multiple of so many tokens

Kind = Literal["pooled", "answers", "depth", "embeddings"]
_WHOLE = ("depth", "embeddings")  # kinds that keep all tokens


@dataclasses.dataclass(frozen=True)
class Site:
    """Where in the thinker its states are taken.

    Attributes:
      kind: `pooled` is the mean of the penultimate states, which the heads read; `answers` the last states, normed, that predict the
        tokens of an answer; `depth` the states of all tokens that the first layers have made; `embeddings` what the first layer reads.
      depth: how many layers; the decoder's number of them less one for `pooled`, all of them for `answers`, none for `embeddings`.
      width: of the states.
      dtype: they are computed in.
    """

    kind: Kind
    depth: int
    width: int
    dtype: Any

    @property
    def fields(self) -> dict[str, Field]:
        """What is kept of a sample."""
        number, states = Field((), np.dtype(np.int32)), Field((None, self.width), np.dtype(self.dtype))
        fields = {"domain": number, "label": number}
        if self.kind == "pooled":
            return fields | {"pooled": Field((self.width,))}
        if self.kind == "answers":
            return fields | {"states": states, "targets": Field((None,), np.dtype(np.int32))}
        whole = {name: Field(shape, np.dtype(np.int32)) for name, shape in _OF_TOKENS.items()}
        return fields | {"states": states, "media_starts": Field((2,), np.dtype(np.int32))} | whole

    def reads(self, params: nnx.State) -> nnx.State:
        """Those of a thinker's parameters that the states depend on."""
        if self.kind != "embeddings":
            return params
        return nnx.filter_state(params, lambda path, _: path[0] in ("audio", "vision") or path[:2] == ("decoder", "embed_tokens"))

    def states(self, thinker: Thinker, batch: Batch) -> dict[str, jax.Array]:
        """What a learner reads of a batch: `domain [B]`, `label [B]`, `media_starts [B, 2]` and, by kind, `pooled [B, D]`; or `states
        [B, T, D]` with `targets [B, T]`, negative where none is trained; or `states` with `positions [B, 3, T]`, `segment_ids [B, T]` and
        `labels [B, T]`."""
        found = {name: batch[name] for name in ("domain", "label")}
        decoder, row = thinker.decoder, (batch["positions"], batch["segment_ids"])
        if self.kind == "answers":
            targets = jnp.where(batch["labels"][:, 1:] >= 0, batch["labels"][:, 1:], IGNORED)
            return found | {"states": thinker(batch).last[:, :-1], "targets": targets}
        states = decoder.through(thinker.embed(batch), *row, stop=self.depth)
        if self.kind == "pooled":
            return found | {"pooled": pool(states, own_tokens(batch["segment_ids"], batch["domain"]))}
        kept = {"states": states, "media_starts": media_starts(batch)}
        return found | kept | {name: batch[name] for name in ("positions", "segment_ids", "labels")}

    def rows(self, found: Mapping[str, np.ndarray]) -> list[Arrays]:
        """What is kept of each row of `states`."""
        count = len(found["domain"])
        kept: list[Arrays] = [{name: found[name][i] for name in ("domain", "label")} for i in range(count)]
        for i, row in enumerate(kept):
            if self.kind == "pooled":
                row["pooled"] = found["pooled"][i]
            elif self.kind == "answers":
                trained = found["targets"][i] >= 0
                row |= {"states": found["states"][i][trained], "targets": found["targets"][i][trained]}
            else:
                real = found["segment_ids"][i] > 0
                row |= {"states": found["states"][i][real], "media_starts": found["media_starts"][i]}
                row |= {"positions": found["positions"][i][:, real].T, "labels": found["labels"][i][real]}
        return kept

    def collate(self, rows: list[Arrays | None], length: int) -> dict[str, np.ndarray]:
        """A batch of what was kept, as `states` gives it, its rows `length` tokens long; None for a masked row.

        Embeddings are `embedded`, as `Thinker.embed` reads them.
        """
        count = len(rows)
        batch: dict[str, np.ndarray] = {name: np.full(count, -1, np.int32) for name in ("domain", "label")}
        if self.kind == "pooled":
            batch["pooled"] = np.zeros((count, self.width), np.float32)
        else:
            batch["states"] = np.zeros((count, length, self.width), self.dtype)
        if self.kind == "answers":
            batch["targets"] = np.full((count, length), IGNORED, np.int32)
        if self.kind in _WHOLE:
            batch |= {"positions": np.zeros((count, 3, length), np.int32), "segment_ids": np.zeros((count, length), np.int32)}
            batch |= {"labels": np.full((count, length), IGNORED, np.int32), "media_starts": np.zeros((count, 2), np.int32)}
        for i, row in enumerate(rows):
            if row is None:
                continue
            for name in ("domain", "label", "pooled", "media_starts"):
                if name in batch:
                    batch[name][i] = row[name]
            if "states" in batch:
                size = len(row["states"])
                batch["states"][i, :size] = row["states"]
                for name in ("targets", "labels"):
                    if name in batch:
                        batch[name][i, :size] = row[name]
            if "positions" in batch:
                batch["positions"][i, :, :size], batch["segment_ids"][i, :size] = row["positions"].T, 1
        if self.kind == "embeddings":
            batch["embedded"] = batch.pop("states")
        return batch


_OF_TOKENS = {"positions": (None, 3), "labels": (None,)}


class FrozenStates:
    """The kept states of a split's samples."""

    def __init__(self, site: Site, store: Store, ids: np.ndarray):
        """`ids` are the samples that have some, rising."""
        self.site, self.store, self.ids = site, store, ids

    @functools.cached_property
    def _longest(self) -> int:
        return max((len(self.store[sample]["targets"]) for sample in self.ids.tolist()), default=1)

    def batch(self, ids: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
        """Of the samples `ids [B]`, -1 for a masked row, in rows of a bucket of so many `tokens`."""
        length = -(-self._longest // _ROUND) * _ROUND if self.site.kind == "answers" else tokens
        return self.site.collate([None if sample < 0 else self.store[sample] for sample in ids.tolist()], length)


@functools.partial(jax.jit, static_argnums=0)
def _digests(shapes: tuple[str, ...], leaves: list[jax.Array]) -> jax.Array:
    """Two sums `[leaves, 2]` of every leaf's bits, each weighed by its place with odd factors: they change with any one of the bits."""

    def digest(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed = (bits + jnp.uint32(0x9E3779B9)) * (2 * place + 1)
        turned = (bits ^ (place * jnp.uint32(0x85EBCA6B))) * jnp.uint32(0xC2B2AE35)
        return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(turned ^ (turned >> 15), dtype=jnp.uint32)])

    return jnp.stack([digest(leaf) for leaf in leaves])


def identity(params: nnx.State) -> str:
    """A digest of parameters: of their names, shapes, dtypes and every bit of them, the same on any mesh."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = tuple(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}" for path, leaf in flat)
    sums = np.asarray(_digests(names, [leaf for _, leaf in flat]))
    return hashlib.sha256("\n".join(names).encode() + sums.astype("<u4").tobytes()).hexdigest()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _states(site: Site, graph: nnx.GraphDef, params: nnx.State, batch: Batch) -> dict[str, jax.Array]:
    return site.states(nnx.merge(graph, params), batch)


def encode(
    site: Site, graph: nnx.GraphDef, params: nnx.State, wanted: Split, open_split: Callable[[np.ndarray], Split], mesh: Mesh, cache: Path
) -> FrozenStates:
    """The states of the samples of a split; what an earlier run has kept is not computed again, however that run ended.

    Args:
      site: where in the thinker.
      graph: its structure.
      params: its parameters.
      wanted: the samples.
      open_split: the same rows as `wanted`, but only the samples that it is given.
      mesh: to compute on.
      cache: directory below which states are kept; all processes must see the same.
    """
    key = f"{_FORMAT} {identity(site.reads(params))} {site} {wanted.identity}"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    stamps = {sample: wanted.source.stamp(sample) for sample in wanted.pipeline.planner.index.ids.tolist()}
    store = Store(folder, site.fields)
    meet(f"{folder.name} is open")  # before anyone adds to it: all must find the same to be missing
    if store.damaged:
        console.print(f"{store.damaged} records of {folder} are damaged or were cut off: those samples are encoded again")
    if missing := store.missing(stamps):
        split = open_split(np.asarray(missing))
        steps = split.steps_per_epoch
        with store.adding() as add:
            for _, batch in progress(split.pipeline.batches(0, steps), f"encoding {split.name}", total=steps):
                found = {name: local_rows(array) for name, array in _states(site, graph, params, put_batch(batch, mesh)).items()}
                for sample, arrays in zip(batch["index"].tolist(), site.rows(found), strict=True):
                    if sample >= 0:
                        add(sample, stamps[sample], arrays)
        split.tell_faults()
        meet(f"{folder.name} is filled")
        store = Store(folder, site.fields)
    lacking = {*store.missing(stamps)}
    return FrozenStates(site, store, np.asarray([sample for sample in stamps if sample not in lacking], np.int64))
