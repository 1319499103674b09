"""Which few shapes a run compiles: buckets picked from the sizes of its samples so that little of a batch is padding."""

from __future__ import annotations

import dataclasses

import numpy as np

from omnisapiens_jax.atlas.plan import Index, Plan, PlanConfig
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import Bucket

MAX_BUCKETS = 8
_WORTH = 0.01  # a further bucket must save this share of a whole epoch's cost, else it is not worth a compilation
_CANDIDATES = 384  # distinct sizes the search starts from


@dataclasses.dataclass(frozen=True)
class SlotCost:
    """Multiply-adds of one slot of each kind: what a padded slot wastes."""

    token: float
    audio_chunk: float
    patch: float

    @classmethod
    def of(cls, config: ThinkerConfig) -> SlotCost:
        """Costs of the matrix products of a thinker (attention scores left out: they are small at these lengths)."""
        text, audio, vision = config.text, config.audio, config.vision
        heads = 2 * text.num_heads + 2 * text.num_kv_heads
        return cls(
            token=text.num_layers * text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size),
            audio_chunk=audio.chunk_tokens * audio.num_layers * (4 * audio.d_model**2 + 2 * audio.d_model * audio.ffn_dim)
            + 3 * audio.d_model * (audio.chunk_frames * audio.num_mel_bins + audio.chunk_tokens * audio.d_model),
            patch=vision.depth * (4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size),
        )

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Cost of shapes `[..., 6]` (the fields of `Bucket`) -> `[...]`."""
        tokens, chunks, _, frames, windows, patches = np.moveaxis(sizes.astype(np.float64), -1, 0)
        return self.token * tokens + self.audio_chunk * chunks + self.patch * frames * windows * patches


def choose_buckets(
    index: Index, plan: PlanConfig, cost: SlotCost, *, count: int = MAX_BUCKETS, token_multiple: int = 16
) -> tuple[Bucket, ...]:
    """At most `count` joint buckets that hold every batch of the plan, cheapest first.

    Starts from the distinct sizes, merges the two whose joint maximum adds the least padding until `count` are left, and goes on while
    a merge costs less than 1 % of an epoch. Mixed plans are served from the sizes of whole batches, and the joint maximum of all samples
    is always among theirs.

    Args:
        index: the sizes.
        plan: the batch size and mode.
        cost: price of a slot.
        count: the most buckets.
        token_multiple: token lengths are rounded up to it, which attention kernels like.
    """
    if not len(index):
        raise ValueError("no samples to choose buckets for: the index is empty")
    sizes = index.sizes.astype(np.int64)
    largest = sizes.max(0)
    if plan.mode == "mixed":
        rng = np.random.default_rng(plan.seed)
        draws = rng.integers(len(sizes), size=(512, plan.batch_size))
        sizes = np.concatenate([sizes[draws].max(1), largest[None]])
    sizes[:, 0] += -sizes[:, 0] % token_multiple
    shapes = _agglomerate(sizes, cost, count, plan.batch_size if plan.mode == "homogeneous" else 1)
    while True:  # a sample may fit a cheaper bucket than the one it was merged into, and leave that one smaller
        home = _cheapest(shapes, sizes)
        tighter = np.stack([sizes[home == b].max(0) for b in np.unique(home)])
        tighter = tighter[np.argsort(cost(tighter), kind="stable")]
        if np.array_equal(tighter, shapes):
            return tuple(Bucket(*shape) for shape in shapes.tolist())
        shapes = tighter


def padding_share(plan: Plan, index: Index, cost: SlotCost) -> float:
    """Share of an epoch's cost that goes into padding, masked slots included: 0 when every slot holds a sample of its bucket's size."""
    shapes = np.array([dataclasses.astuple(bucket) for bucket in plan.buckets])
    spent = cost(shapes)[plan.bucket].sum() * plan.ids[0].size
    planned = np.isin(index.ids, plan.ids)
    return float(1 - cost(index.sizes[planned]).sum() / spent)


def _cheapest(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The first of the shapes `[K, 6]` (cheapest first) that holds each size `[M, 6]` -> `[M]`."""
    return (shapes[None] >= sizes[:, None]).all(-1).argmax(1)


def _agglomerate(sizes: np.ndarray, cost: SlotCost, count: int, batch_size: int) -> np.ndarray:
    """Sizes `[M, 6]` -> shapes `[K, 6]` ordered by cost, K <= count."""
    step, coarse = 1, sizes
    while len(np.unique(coarse, axis=0)) > _CANDIDATES:
        step *= 2
        coarse = -(-sizes // step) * step
    shapes, members = np.unique(coarse, axis=0, return_counts=True)
    exact = np.stack([sizes[(coarse == shape).all(1)].max(0) for shape in shapes])
    shapes, members = exact, members.astype(np.float64)
    total = float((members * cost(shapes)).sum())
    while len(shapes) > 1:
        joint = np.maximum(shapes[:, None], shapes[None])
        price = members * cost(shapes)
        rise = (members[:, None] + members[None]) * cost(joint) - price[:, None] - price[None]
        if len(shapes) <= count:  # few enough: what counts now is whole batches, the last of a bucket being partly empty
            batches = np.ceil(members / batch_size) * batch_size
            price = batches * cost(shapes)
            together = np.ceil((members[:, None] + members[None]) / batch_size) * batch_size
            rise = together * cost(joint) - price[:, None] - price[None]
        np.fill_diagonal(rise, np.inf)
        a, b = np.unravel_index(np.argmin(rise), rise.shape)
        if len(shapes) <= count and rise[a, b] > _WORTH * total:
            break
        shapes[a], members[a] = joint[a, b], members[a] + members[b]
        shapes, members = np.delete(shapes, b, axis=0), np.delete(members, b)
    return shapes[np.argsort(cost(shapes), kind="stable")]
