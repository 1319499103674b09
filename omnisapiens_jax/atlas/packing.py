"""Several samples in one row: which ones, so that tokens, sound and frames of a row fill up together and nothing is lost."""

from __future__ import annotations

import numpy as np

from omnisapiens_jax.processing.example import ADDED

POOL = 256  # samples a row may choose from: more of them leave the awkward ones for the end
_SEGMENTS = -1  # the budget that counts samples: a limit, not something to be filled
_BITS = 16  # a share of a row is counted in 1 / 65536
_FAR = np.iinfo(np.int64).max


def pack(sizes: np.ndarray, shape: np.ndarray, *, pool: int = POOL) -> list[np.ndarray]:
    """Rows of samples, each sample in one of them.

    A row begins with the sample that has waited longest. Then comes, again and again, the one of the next `pool` samples that leaves the
    least room (the smallest squared distance between what is left of the budgets and what it takes, each as a share of the row: the norm
    heuristic of vector bin packing, Panigrahy et al. 2011), until none fits. So no sample waits for more than `pool` rows, rows
    follow the order given up to that, and the time is linear in the number of samples.

    Args:
        sizes: `[N, 7]` int, the fields of `Bucket`; each must fit `shape` alone.
        shape: `[7]` of a row: tokens, audio chunks, audio tokens, frames and segments are budgets that add up, windows and their patches
            are bounds.
        pool: how far ahead a row looks.

    Returns:
        Positions in `sizes`, one array a row.
    """
    # Budgets lead and samples follow, so that one comparison runs over all samples at once; whole numbers, so that every host packs alike.
    take, limit = sizes[:, ADDED].T.astype(np.int64), shape[ADDED].astype(np.int64)[:, None]
    share = (take[:_SEGMENTS] << _BITS) // np.maximum(limit[:_SEGMENTS], 1)
    weight = (share**2).sum(0)
    waiting, following = np.arange(min(pool, len(sizes))), min(pool, len(sizes))
    rows = []
    while len(waiting):
        needs, shares, weights = take[:, waiting], share[:, waiting], weight[waiting]
        stays = np.ones(len(waiting), bool)
        row, room, left, chosen = [], limit, np.full((len(share), 1), 1 << _BITS), 0
        while True:
            row.append(chosen)
            stays[chosen] = False
            room, left = room - needs[:, chosen, None], left - shares[:, chosen, None]
            fits = (needs <= room).all(0) & stays
            apart = weights - 2 * (shares * left).sum(0)  # |shares - left|^2, less |left|^2, which is the same for all
            chosen = int(np.where(fits, apart, _FAR).argmin())
            if not fits[chosen]:
                break
        rows.append(waiting[row])
        more = min(len(row), len(sizes) - following)
        waiting, following = np.concatenate([waiting[stays], np.arange(following, following + more)]), following + more
    return rows
