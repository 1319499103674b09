"""Tensors that a run divided over its devices, put together from the parts in the files of its ranks (`torch_files` reads those)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from omnisapiens_jax.processing.tensors import ConversionError, File, StoredTensor, Tensor
from omnisapiens_jax.processing.torch_files import ShardedTensor


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A tensor whose pieces lie in several files, one after the other along one of its axes."""

    name: str
    pieces: tuple[Tensor, ...]
    axis: int
    shape: tuple[int, ...]

    @property
    def file(self) -> File:
        """Where the first piece lies."""
        return self.pieces[0].file

    @property
    def made_of(self) -> tuple[Tensor, ...]:
        """All pieces."""
        return tuple(stored for piece in self.pieces for stored in piece.made_of)

    @property
    def dtype(self) -> np.dtype:
        """Of all pieces."""
        return self.pieces[0].dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Its values, or those of some rows of its first axis."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.axis:
            return np.concatenate([piece.read(start, stop) for piece in self.pieces], axis=self.axis)
        found, begin = [], 0
        for piece in self.pieces:
            end = begin + piece.shape[0]
            if start < end and begin < stop:
                found.append(piece.read(max(start - begin, 0), min(stop, end) - begin))
            begin = end
        return np.concatenate(found) if found else np.empty((0, *self.shape[1:]), self.dtype)


def join_shards(name: str, ranks: Sequence[StoredTensor | ShardedTensor]) -> Tensor:
    """The whole of a tensor of which each rank of a run saved its part.

    Raises:
      ConversionError: the ranks disagree about how it was divided, or their parts do not make the whole.
    """
    first = ranks[0]
    if isinstance(first, StoredTensor):  # not divided: every rank has it
        if any(not isinstance(rank, StoredTensor) or (rank.shape, rank.dtype) != (first.shape, first.dtype) for rank in ranks):
            raise ConversionError(f"{first.file}: the ranks disagree about {name}")
        return first
    placed = {rank.place: rank.local for rank in ranks if isinstance(rank, ShardedTensor) and rank.shards == first.shards}
    mesh = tuple(max(indices) + 1 for indices in zip(*placed, strict=True))
    if len(placed) < len(ranks) or math.prod(mesh) != len(ranks):
        raise ConversionError(f"{first.local.file}: {name} is not divided over the {len(ranks)} ranks whose files are there")
    parts = np.empty(mesh, object)
    for place, local in placed.items():
        parts[place] = local
    # The innermost axis of the mesh first: what it divides was divided last.
    for axis in reversed(first.shards):
        joined = np.empty(parts.shape[:-1], object)
        for place in np.ndindex(joined.shape):
            joined[place] = parts[place][0] if axis is None else _join(name, tuple(parts[place]), axis)
        parts = joined
    whole: Tensor = parts.item()
    if whole.shape != first.shape:
        raise ConversionError(f"{first.local.file}: the parts of {name} make {whole.shape}, not {first.shape}")
    return whole


def _join(name: str, pieces: tuple[Tensor, ...], axis: int) -> JoinedTensor:
    if len({(piece.dtype, piece.shape[:axis], piece.shape[axis + 1 :]) for piece in pieces}) != 1:
        raise ConversionError(f"{pieces[0].file}: the parts of {name} do not fit together along axis {axis}")
    shape = list(pieces[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return JoinedTensor(name, pieces, axis, tuple(shape))
