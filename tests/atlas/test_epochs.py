"""A release is prepared, read and batched: nothing is lost, nothing comes twice, and a run goes on where it was."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import PlanConfig, Planner
from omnisapiens_jax.atlas.prepare import prepare
from omnisapiens_jax.atlas.sources import open_source, open_splits
from tests.atlas.release import write_release
from tests.atlas.toys import CONFIG, recipe

BATCH = 8


@pytest.fixture(
    scope="module",
    params=[(96, "tar", 0), pytest.param((2048, "parquet", 2), marks=pytest.mark.slow)],
    ids=["small", "2048"],
)
def prepared(request, tmp_path_factory):
    rows, form, workers = request.param
    folder = tmp_path_factory.mktemp("release")
    write_release(folder / "release", rows, form)
    return prepare(folder / "release", folder / "prepared", workers=workers)


@pytest.fixture(scope="module")
def measured(prepared):
    """Each split's source and index."""
    return {split: (source, length_index(source, recipe(), on_error="raise")[0]) for split, source in open_splits(prepared).items()}


def pipeline(measured, split, *, host=0, workers=0, **plan):
    source, index = measured[split]
    config = PlanConfig(**{"batch_size": BATCH, "seed": 5, **plan})
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG), count=4), config)
    return Pipeline(source, recipe(), planner, PipelineConfig(workers=workers, threads=0), host=host)


def digest(batch):
    return hashlib.sha256(b"".join(name.encode() + str(a.shape).encode() + a.tobytes() for name, a in sorted(batch.items()))).hexdigest()


@pytest.mark.parametrize(("hosts", "mode"), [(1, "mixed"), (4, "homogeneous")])
def test_every_sample_of_every_split_comes_once_an_epoch(measured, hosts, mode):
    for split, (source, _) in measured.items():
        seen, faults = [], 0
        for host in range(hosts):
            one = pipeline(measured, split, host=host, hosts=hosts, mode=mode)
            for _, batch in one.batches(0, one.planner.steps_per_epoch):
                assert len(batch["index"]) == BATCH // hosts
                seen += [i for i in batch["index"].tolist() if i >= 0]
            faults += len(one.faults)
        assert sorted(seen) == list(range(len(source))) and not faults


@pytest.fixture(scope="module")
def whole(measured):
    """An epoch of training batches and the beginning of the next, as digests."""
    one = pipeline(measured, "train")
    return {step: digest(batch) for step, batch in one.batches(0, one.planner.steps_per_epoch + 5)}


def test_a_run_stopped_anywhere_goes_on_with_the_identical_remainder(measured, whole):
    @settings(max_examples=3)
    @given(start=st.integers(0, len(whole) - 1))
    def goes_on(start):
        rest = {step: digest(batch) for step, batch in pipeline(measured, "train").batches(start, len(whole))}
        assert rest == {step: whole[step] for step in range(start, len(whole))}

    goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_go_on_with_the_identical_remainder(measured, whole, workers):
    @settings(max_examples=2)
    @given(start=st.integers(0, len(whole) - 1))
    def goes_on(start):
        rest = {step: digest(batch) for step, batch in pipeline(measured, "train", workers=workers).batches(start, len(whole))}
        assert rest == {step: whole[step] for step in range(start, len(whole))}

    goes_on()


def test_a_prepared_atlas_measures_as_the_release_does(prepared, measured):
    release = open_source(prepared.parents[3] / "release" / "train")
    index, _ = length_index(release, recipe(), on_error="raise")
    assert (index.sizes == measured["train"][1].sizes).all() and (index.signatures == measured["train"][1].signatures).all()
