"""On the benchmark's length distribution the chosen shapes waste no more than what is asked for."""

from __future__ import annotations

import numpy as np

from benchmarks.padding import CONFIG, MAX_TOKENS, SIGNATURES, distribution, waste
from omnisapiens_jax.atlas.bucketing import MAX_BUCKETS, SlotCost, choose_buckets, choose_row
from omnisapiens_jax.atlas.plan import PlanConfig, Planner


def test_the_distribution_is_the_reported_one() -> None:
    index, patches = distribution(100_299)
    for name, rows in SIGNATURES.items():
        assert abs((index.signatures == index.names.index(name)).sum() - rows) < 10
    films = index.signatures == index.names.index("text_video_audio")
    assert np.median(patches[films]) // 4 == 360 and index.sizes[:, 2].max() == 250 and (index.sizes[:, 0] <= MAX_TOKENS).all()


def test_buckets_waste_at_most_15_percent_of_text_and_sound() -> None:
    index, patches = distribution(100_299)
    plan = PlanConfig(batch_size=64)
    buckets = choose_buckets(index, plan, SlotCost.of(CONFIG).raised(index.sizes))
    assert len(buckets) <= MAX_BUCKETS
    assert (waste(Planner(index, buckets, plan).epoch(0), index, patches)[:3] < 0.15).all()


def test_packed_rows_waste_at_most_8_percent_of_text_and_sound() -> None:
    index, patches = distribution(20_000)
    row = choose_row(index, SlotCost.of(CONFIG).raised(index.sizes), tokens=MAX_TOKENS)
    plan = PlanConfig(batch_size=8, mode="packed")
    assert (waste(Planner(index, (row,), plan).epoch(0), index, patches)[:3] < 0.08).all()
