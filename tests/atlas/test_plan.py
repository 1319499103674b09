"""Laws that every plan keeps, whatever the samples, hosts, batch size and seed."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, padding_share
from omnisapiens_jax.atlas.plan import MASKED, Index, PlanConfig, Planner
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import Bucket

COST = SlotCost.of(ThinkerConfig.preset("7b"))
NAMES = ("text", "text_audio", "text_video_audio")


def make_index(count: int, seed: int = 0) -> Index:
    """Samples like the benchmark's: text, audio of 0.5-10 s, video of three shapes; ids are not consecutive."""
    rng = np.random.default_rng(seed)
    signatures = rng.integers(3, size=count).astype(np.int32)
    sizes = np.zeros((count, 6), np.int32)
    audio, video = signatures >= 1, signatures == 2
    frames = rng.integers(50, 1001, size=count)
    sizes[:, 1], sizes[:, 2] = np.where(audio, -(-frames // 200), 0), np.where(audio, frames // 4, 0)
    sizes[:, 3], sizes[:, 5] = 2 * video, 64 * video
    sizes[:, 4] = np.array([12, 15, 24])[rng.integers(3, size=count)] * video
    sizes[:, 0] = rng.lognormal(5, 0.5, size=count) + 20 + sizes[:, 2] + 16 * sizes[:, 3] * sizes[:, 4]
    ids = np.sort(rng.choice(10 * count, count, replace=False)).astype(np.int64)
    return Index(ids, signatures, NAMES, sizes, np.zeros(count, np.int32))


def make_planner(index: Index, **config) -> Planner:
    plan = PlanConfig(**config)
    return Planner(index, choose_buckets(index, plan, COST, count=4), plan)


configs = st.fixed_dictionaries(
    {
        "hosts": st.sampled_from([1, 2, 3]),
        "batch_size": st.sampled_from([6, 12, 18]),
        "seed": st.integers(0, 2**31),
        "mode": st.sampled_from(["homogeneous", "mixed"]),
        "shuffle": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(configs, st.integers(1, 150), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_and_fits_its_bucket(config, count, epoch):
    index = make_index(count, seed=count)
    plan = make_planner(index, **config).epoch(epoch)
    assert plan.ids.shape == (len(plan), config["hosts"], config["batch_size"] // config["hosts"])
    assert sorted(plan.ids[plan.ids != MASKED].tolist()) == index.ids.tolist()
    rows = {int(i): row for row, i in enumerate(index.ids)}
    for k in range(len(plan)):
        step = plan[k]
        for i in step.ids[step.ids != MASKED].tolist():
            assert step.bucket.holds(Bucket(*index.sizes[rows[i]].tolist()))


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(1, 150))
def test_a_homogeneous_batch_has_one_signature(config, count):
    index = make_index(count, seed=count)
    plan = make_planner(index, **{**config, "mode": "homogeneous"}).epoch(0)
    of = dict(zip(index.ids.tolist(), index.signatures.tolist(), strict=True))
    for ids in plan.ids:
        assert len({of[i] for i in ids.ravel().tolist() if i != MASKED}) == 1


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(20, 150), st.data())
def test_a_plan_is_a_function_of_its_inputs(config, count, data):
    index = make_index(count, seed=count)
    first, second = make_planner(index, **config), pickle.loads(pickle.dumps(make_planner(index, **config)))
    step = data.draw(st.integers(0, 3 * first.steps_per_epoch))
    for k in (step, 0, step + 1):  # in any order, and over the end of an epoch
        assert first[k].bucket == second[k].bucket and np.array_equal(first[k].ids, second[k].ids)
    epoch, position = first.locate(step)
    assert epoch * first.steps_per_epoch + position == step and 0 <= position < first.steps_per_epoch
    assert np.array_equal(first[step].ids, first.epoch(epoch)[position].ids)


@settings(max_examples=30, deadline=None)
@given(configs, st.integers(20, 150))
def test_the_number_of_hosts_changes_only_who_does_what(config, count):
    index = make_index(count, seed=count)
    one, three = (make_planner(index, **{**config, "hosts": hosts}).epoch(1) for hosts in (1, 3))
    assert np.array_equal(one.bucket, three.bucket)
    assert np.array_equal(one.ids.reshape(len(one), -1), three.ids.reshape(len(three), -1))


def test_seed_and_epoch_shuffle_anew_and_evaluation_does_not():
    index = make_index(200)
    train = make_planner(index, batch_size=8, seed=1)
    assert not np.array_equal(train.epoch(0).ids, train.epoch(1).ids)
    assert not np.array_equal(train.epoch(0).ids, make_planner(index, batch_size=8, seed=2).epoch(0).ids)
    final = make_planner(index, batch_size=8, shuffle=False)
    assert np.array_equal(final.epoch(0).ids, final.epoch(5).ids)
    mixed = make_planner(index, batch_size=8, shuffle=False, mode="mixed").epoch(0).ids
    assert np.array_equal(mixed.ravel(), index.ids)


def test_dropping_loses_less_than_a_batch_of_each_group():
    index = make_index(400)
    plan = make_planner(index, batch_size=8, incomplete="drop").epoch(0)
    assert (plan.ids != MASKED).all() and 400 - plan.ids.size < 8 * 4 * 3


def test_signatures_take_turns_until_they_run_out():
    count = 60
    signatures = np.array([0] * 8 + [1] * 16 + [2] * 36, np.int32)
    index = Index(np.arange(count), signatures, NAMES, np.ones((count, 6), np.int32), np.zeros(count, np.int32))
    for shuffle in (True, False):
        config = PlanConfig(batch_size=4, shuffle=shuffle)
        plan = Planner(index, (Bucket(1, 1, 1, 1, 1, 1),), config).epoch(0)
        order = signatures[plan.ids[:, 0, 0]].tolist()
        assert [sorted(order[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2
        assert [sorted(order[i : i + 2]) for i in (6, 8)] == [[1, 2]] * 2 and order[10:] == [2] * 5
        if not shuffle:
            assert order[:6] == [0, 1, 2] * 2


@pytest.mark.parametrize("mode", ["homogeneous", "mixed"])
def test_few_buckets_waste_little(mode):
    index = make_index(3000)
    plan = PlanConfig(batch_size=4, mode=mode)
    buckets = choose_buckets(index, plan, COST)
    whole = Bucket.covering(Bucket(*size) for size in index.sizes.tolist())
    assert 0 < len(buckets) <= 8 and (mode == "homogeneous" or buckets[-1].holds(whole))
    prices = COST(np.array([list(vars(b).values()) for b in buckets]))
    assert (np.diff(prices) >= 0).all()
    waste, alone = (padding_share(Planner(index, shapes, plan).epoch(0), index, COST) for shapes in (buckets, (whole,)))
    assert alone > 0.5 and waste < (0.2 if mode == "homogeneous" else 0.8 * alone)


def test_samples_alike_need_one_bucket():
    count = 50
    index = Index(
        np.arange(count), np.zeros(count, np.int32), ("text",), np.tile([100, 0, 0, 0, 0, 0], (count, 1)), np.zeros(count, np.int32)
    )
    assert choose_buckets(index, PlanConfig(batch_size=4), COST) == (Bucket(112),)


def test_a_plan_that_cannot_be_is_refused_with_the_reason():
    index = make_index(20)
    with pytest.raises(ValueError, match=r"20 of 20 samples fit no bucket; the first is row .* largest bucket is Bucket\(tokens=8"):
        Planner(index, (Bucket(8),), PlanConfig(batch_size=4))
    with pytest.raises(ValueError, match="20 samples make no batch of 64"):
        make_planner(index, batch_size=64, incomplete="drop")
    with pytest.raises(ValueError, match="multiple of the 3 hosts"):
        PlanConfig(batch_size=4, hosts=3)
    with pytest.raises(ValueError, match="no samples"):
        choose_buckets(index.subset(np.zeros(20, bool)), PlanConfig(batch_size=4), COST)
    audio, video = index.sizes[:1] * 0 + [[10, 5, 5, 0, 0, 0]], index.sizes[:1] * 0 + [[10, 0, 0, 1, 1, 4]]
    pair = Index(np.arange(2), np.arange(2, dtype=np.int32), ("a", "b"), np.concatenate([audio, video]), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="joint maximum"):
        Planner(pair, (Bucket(10, 5, 5), Bucket(10, 0, 0, 1, 1, 4)), PlanConfig(batch_size=2, mode="mixed"))


def test_a_subset_plans_only_its_samples():
    index = make_index(90)
    third = index.subset(index.ids % 3 == 0)
    plan = make_planner(third, batch_size=4).epoch(0)
    assert set(plan.ids[plan.ids != MASKED].tolist()) == set(index.ids[index.ids % 3 == 0].tolist())
