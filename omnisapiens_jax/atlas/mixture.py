"""A mixture of datasets: how often an epoch draws from each, and which samples."""

from __future__ import annotations

import numpy as np


def shares(counts: np.ndarray, temperature: float) -> np.ndarray:
    """Draws `[K]` of each of K groups in an epoch of `counts.sum()` draws, in proportion to `counts ** (1 / temperature)`.

    At temperature 1 these are the counts; as it grows the groups become equal. Rounded by largest remainder, so that they add up.
    """
    weights = counts ** (1 / temperature)
    exact = counts.sum() * weights / weights.sum()
    whole = np.floor(exact).astype(np.int64)
    behind = np.argsort(whole - exact, kind="stable")[: counts.sum() - whole.sum()]
    whole[behind] += 1
    return whole


def draw(groups: np.ndarray, temperature: float, seed: int, epoch: int) -> np.ndarray:
    """The positions `[N]`, ascending and some of them several times, that an epoch draws from N samples of `groups` `[N]`.

    A group's samples are gone through in a shuffled order, then in another, and an epoch goes on where the one before stopped: over a run
    the samples of a group are drawn equally often, up to one. Yet an epoch is a function of its number alone.
    """
    drawn = []
    names, counts = np.unique(groups, return_counts=True)
    for name, count, share in zip(names.tolist(), counts.tolist(), shares(counts, temperature).tolist(), strict=True):
        members = np.flatnonzero(groups == name)
        first, last = epoch * share, (epoch + 1) * share
        rounds = range(first // count, -(-last // count))
        order = np.concatenate([np.random.default_rng((seed, name, turn, 1)).permutation(count) for turn in rounds])
        drawn.append(members[order[first - rounds.start * count :][:share]])
    return np.sort(np.concatenate(drawn))
