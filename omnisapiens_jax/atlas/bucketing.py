"""Which few shapes a run compiles: buckets, or the row of packed samples, picked from the sizes of its samples to waste little."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from omnisapiens_jax.atlas.packing import pack
from omnisapiens_jax.atlas.plan import Index, Plan, PlanConfig
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import Bucket

MAX_BUCKETS = 8
_WORTH = 0.003  # a further bucket must save this share of a whole epoch's cost, else it is not worth a compilation
_MERGED, _MOVED = 384, 4096  # distinct sizes that the two parts of the search work with
_LEAST = 0.5  # what the media slots of a kind cost at least, beside all tokens: see `SlotCost.raised`
_TRIED = 2000  # samples that a shape of row is tried on


@dataclasses.dataclass(frozen=True)
class SlotCost:
    """Multiply-adds of one slot of each kind: what a padded slot wastes."""

    token: float
    audio_chunk: float
    audio_token: float
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
            audio_token=audio.d_model * audio.output_dim,
            patch=vision.depth * (4 * vision.hidden_size**2 + 3 * vision.hidden_size * vision.intermediate_size),
        )

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Cost of shapes `[..., 7]` (the fields of `Bucket`) -> `[...]`."""
        tokens, chunks, sounds, frames, windows, patches, _ = np.moveaxis(sizes.astype(np.float64), -1, 0)
        return self.token * tokens + self.audio_chunk * chunks + self.audio_token * sounds + self.patch * frames * windows * patches

    def raised(self, sizes: np.ndarray) -> SlotCost:
        """Prices for choosing shapes for samples `[N, 7]`: chunks and audio tokens cost, all together, at least half of what tokens do.

        By multiply-adds alone sound is nearly free beside a large decoder, and a quarter of its slots would stay empty. But the host
        fills, keeps and sends every slot, and a mel chunk is a thousand times the bytes of a token.
        """
        tokens, chunks, sounds = sizes[:, :3].astype(np.float64).sum(0)
        floor = _LEAST * self.token * tokens
        return dataclasses.replace(
            self,
            audio_chunk=max(self.audio_chunk, floor / max(chunks, 1.0)),
            audio_token=max(self.audio_token, floor / max(sounds, 1.0)),
        )


def choose_buckets(
    index: Index, plan: PlanConfig, cost: SlotCost, *, count: int = MAX_BUCKETS, token_multiple: int = 16
) -> tuple[Bucket, ...]:
    """At most `count` joint buckets that hold every batch of the plan, cheapest first.

    Starts from the distinct sizes, merges the two whose joint maximum adds the least padding until `count` are left, and goes on while
    a merge costs next to nothing; then moves one side of one bucket at a time while that lowers the cost of an epoch. Mixed plans are
    served from the sizes of whole batches, and the joint maximum of all samples is always among theirs.

    Args:
        index: the sizes.
        plan: the batch size and mode.
        cost: price of a slot.
        count: the most buckets.
        token_multiple: token lengths are rounded up to it, which attention kernels like.
    """
    if not len(index):
        raise ValueError("no samples to choose buckets for: the index is empty")
    if plan.mode == "packed":
        raise ValueError("a packed plan has one shape of row: choose_row")
    if count < 1:
        raise ValueError(f"{count} buckets: there must be at least one")
    sizes = index.sizes.astype(np.int64)
    largest = sizes.max(0)
    if plan.mode == "mixed":
        rng = np.random.default_rng(plan.seed)
        draws = rng.integers(len(sizes), size=(512, plan.batch_size))
        sizes = np.concatenate([sizes[draws].max(1), largest[None]])
    sizes[:, 0] += -sizes[:, 0] % token_multiple
    sizes, members = np.unique(sizes, axis=0, return_counts=True)
    shapes = _agglomerate(*_coarse(sizes, members, _MERGED), cost, count, plan.batch_size if plan.mode == "homogeneous" else 1)
    shapes = _refined(shapes, *_coarse(sizes, members, _MOVED), cost)
    while True:  # a sample may fit a cheaper bucket than the one it was merged into, and leave that one smaller
        home = _cheapest(shapes, sizes)
        tighter = np.stack([sizes[home == b].max(0) for b in np.unique(home)])
        tighter = tighter[np.argsort(cost(tighter), kind="stable")]
        if np.array_equal(tighter, shapes):
            return tuple(Bucket(*shape) for shape in shapes.tolist())
        shapes = tighter


def choose_row(index: Index, cost: SlotCost, *, tokens: int) -> Bucket:
    """The shape of a packed row of so many `tokens`: budgets of sound and frames in the proportion in which the samples need them.

    Some samples are packed into rows with a little more or less of each, and the cheapest is taken. Frames have the windows of the largest.

    Args:
        index: the sizes; mixtures are taken to need about the same.
        cost: price of a slot.
        tokens: length of a row, raised to that of the longest sample.
    """
    if not len(index):
        raise ValueError("no samples to choose a row for: the index is empty")
    largest = index.sizes.max(0).astype(np.int64)
    tried = index.sizes[np.random.default_rng(0).permutation(len(index))[:_TRIED]].astype(np.int64)
    length = max(tokens, int(largest[0]))
    needed = tried.mean(0) / tried[:, 0].mean() * length
    shape = largest.copy()
    shape[0], shape[-1] = length, length // int(index.sizes[:, 0].min())

    def price(shape: np.ndarray) -> float:
        return float(cost(shape)) * len(pack(tried, shape))

    best = np.inf
    for sound, frames in itertools.product((0.98, 1.0, 1.02, 1.05, 1.1), (1.0, 1.1, 1.2)):
        shape[1:4] = np.maximum(np.round(needed[1:4] * (sound, sound, frames)), largest[1:4])
        if (found := price(shape)) < best:
            best, chosen = found, shape.copy()
    return Bucket(*chosen.tolist())


def padding_share(plan: Plan, index: Index, cost: SlotCost) -> float:
    """Share of an epoch's cost that goes into padding, masked slots included: 0 when every slot holds a sample of its bucket's size."""
    shapes = np.array([dataclasses.astuple(bucket) for bucket in plan.buckets])
    spent = cost(shapes)[plan.bucket].sum() * np.prod(plan.ids.shape[1:3])
    return float(1 - cost(index.sizes[planned(plan, index)]).sum() / spent)


def planned(plan: Plan, index: Index) -> np.ndarray:
    """The places in the index of all samples of an epoch, one as often as it is planned."""
    return np.searchsorted(index.ids, plan.ids[plan.ids >= 0])


def _cheapest(shapes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The first of the shapes `[K, 7]` (cheapest first) that holds each size `[M, 7]` -> `[M]`."""
    return (shapes[None] >= sizes[:, None]).all(-1).argmax(1)


def _coarse(sizes: np.ndarray, members: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sizes `[M, 7]` and how many have them `[M]`, neighbours merged until at most so many are left."""
    step = 1
    while True:
        shapes, group = np.unique(-(-sizes // step), axis=0, return_inverse=True)
        if len(shapes) <= most:
            break
        step *= 2
    joint = np.zeros_like(shapes)
    np.maximum.at(joint, group.ravel(), sizes)
    return joint, np.bincount(group.ravel(), weights=members)


def _agglomerate(shapes: np.ndarray, members: np.ndarray, cost: SlotCost, count: int, batch_size: int) -> np.ndarray:
    """Sizes `[M, 7]` of so many members `[M]` -> shapes `[K, 7]` ordered by cost, K <= count."""
    total = float((members * cost(shapes)).sum())

    def rise(some: np.ndarray, size: int) -> np.ndarray:
        """What an epoch costs more when each of `some` `[S]` is merged with each of all: `[S, M]`, in whole batches of `size`."""
        mine, all_of_them = (np.ceil(m / size) * size * cost(s) for m, s in ((members[some], shapes[some]), (members, shapes)))
        joint = cost(np.maximum(shapes[some, None], shapes[None]))
        more = np.ceil((members[some, None] + members[None]) / size) * size * joint - mine[:, None] - all_of_them[None]
        more[np.arange(len(some)), some] = np.inf
        return more

    merged, dead = rise(np.arange(len(shapes)), 1), np.zeros(len(shapes), bool)
    for _ in range(len(shapes) - count):
        a, b = np.unravel_index(np.argmin(merged), merged.shape)
        shapes[a], members[a], dead[b] = np.maximum(shapes[a], shapes[b]), members[a] + members[b], True
        merged[a] = merged[:, a] = np.where(dead, np.inf, rise(np.array([a]), 1)[0])
        merged[b] = merged[:, b] = np.inf
    shapes, members = shapes[~dead], members[~dead]
    while len(shapes) > 1:  # few enough: what counts now is whole batches, the last of a bucket being partly empty
        merged = rise(np.arange(len(shapes)), batch_size)
        a, b = np.unravel_index(np.argmin(merged), merged.shape)
        if merged[a, b] > _WORTH * total:
            break
        shapes[a], members[a] = np.maximum(shapes[a], shapes[b]), members[a] + members[b]
        shapes, members = np.delete(shapes, b, axis=0), np.delete(members, b)
    return shapes[np.argsort(cost(shapes), kind="stable")]


def _refined(shapes: np.ndarray, sizes: np.ndarray, members: np.ndarray, cost: SlotCost) -> np.ndarray:
    """Moves one side of one shape at a time, to wherever a size ends, as long as an epoch of the `sizes` `[M, 7]` gets cheaper."""
    holds = (shapes[None] >= sizes[:, None]).all(-1)  # [M, K]
    price = np.where(holds, cost(shapes), np.inf)
    best, before = float((members * price.min(1)).sum()), np.inf
    while best < before * (1 - 1e-4):
        before = best
        for b, side in itertools.product(range(len(shapes)), range(shapes.shape[1])):
            others = np.delete(price, b, axis=1).min(1, initial=np.inf)
            levels = np.unique(sizes[:, side])
            moved = np.repeat(shapes[b][None], len(levels), axis=0)
            moved[:, side] = levels
            inside = (np.delete(shapes[b][None] >= sizes, side, axis=1).all(1))[:, None] & (sizes[:, side, None] <= levels)
            prices = np.where(inside, cost(moved), np.inf)  # [M, L]
            totals = (members[:, None] * np.minimum(others[:, None], prices)).sum(0)
            if (found := float(totals.min())) < best:
                best, level = found, int(totals.argmin())
                shapes[b], price[:, b] = moved[level], prices[:, level]
    return shapes[np.argsort(cost(shapes), kind="stable")]
