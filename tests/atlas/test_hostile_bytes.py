"""Whatever a file holds, its row becomes an example or a counted fault, and the run goes on."""

import pytest

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import MASKED, PlanConfig, Planner
from tests.atlas.hostile import Hostile
from tests.atlas.toys import CONFIG, recipe

KINDS = ("wav", "mp4", "png", "parquet")
BOUNDS = {"workers": 2, "deadline": 20.0, "memory": 2**30}


def feed(kind: str, count: int) -> None:
    source, how = Hostile(kind, count), recipe()
    index, faults = length_index(source, how, on_error="skip", **BOUNDS)
    assert 0 < len(index) < count and len(index) + len(faults) == count
    config = PlanConfig(batch_size=16)
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG)), config)
    pipeline = Pipeline(source, how, planner, PipelineConfig("skip", **BOUNDS), faults=faults)
    fed = [i for _, batch in pipeline.batches(0, planner.steps_per_epoch) for i in batch["index"].tolist() if i != MASKED]
    print(kind, len(fed), "fed;", dict(pipeline.faults.counts()))
    assert sorted([*fed, *(fault.row for fault in pipeline.faults)]) == [*range(count)]
    assert all(fault.reason for fault in pipeline.faults)


@pytest.mark.parametrize("kind", KINDS)
def test_hundred_mutations_of_each_kind(kind):
    feed(kind, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutations_of_each_kind(kind):
    feed(kind, 1250)
