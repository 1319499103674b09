"""Laws that every plan keeps, whatever the samples, hosts, batch size and seed."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, choose_row, padding_share, planned
from omnisapiens_jax.atlas.mixture import draw, shares
from omnisapiens_jax.atlas.packing import pack
from omnisapiens_jax.atlas.plan import MASKED, NO_AUDIO, NO_VIDEO, Index, PlanConfig, Planner
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import Bucket

COST = SlotCost.of(ThinkerConfig.preset("7b"))
NAMES = ("text", "text_audio", "text_video_audio")
SOURCES = (("a", "b", "c", "d", "e"), ("x_cls", "y_cls", "z_qa"))  # names of datasets and tasks


def make_index(count: int, seed: int = 0) -> Index:
    """Samples like the benchmark's: text, audio of 0.5-10 s, video of three shapes; ids are not consecutive."""
    rng = np.random.default_rng(seed)
    signatures = rng.integers(3, size=count).astype(np.int32)
    sizes = np.zeros((count, 7), np.int32)
    sizes[:, 6] = 1
    audio, video = signatures >= 1, signatures == 2
    frames = rng.integers(50, 1001, size=count)
    sizes[:, 1], sizes[:, 2] = np.where(audio, -(-frames // 200), 0), np.where(audio, frames // 4, 0)
    sizes[:, 3], sizes[:, 5] = 2 * video, 64 * video
    sizes[:, 4] = np.array([12, 15, 24])[rng.integers(3, size=count)] * video
    sizes[:, 0] = rng.lognormal(5, 0.5, size=count) + 20 + sizes[:, 2] + 16 * sizes[:, 3] * sizes[:, 4]
    ids = np.sort(rng.choice(10 * count, count, replace=False)).astype(np.int64)
    datasets = rng.choice(5, count, p=[0.5, 0.3, 0.1, 0.06, 0.04]).astype(np.int32)
    return Index(ids, signatures, NAMES, sizes, np.zeros(count, np.int32), datasets, datasets // 2, *SOURCES)


def alike(signatures: np.ndarray, sizes: np.ndarray) -> Index:
    """Samples of one dataset."""
    zeros = np.zeros(len(sizes), np.int32)
    return Index(np.arange(len(sizes)), signatures.astype(np.int32), NAMES[: signatures.max() + 1], sizes, zeros, zeros, zeros, *SOURCES)


def make_planner(index: Index, **config) -> Planner:
    plan = PlanConfig(**config)
    return Planner(index, (small_row(index),) if plan.mode == "packed" else choose_buckets(index, plan, COST, count=4), plan)


def small_row(index: Index) -> Bucket:
    """A packed row of up to four samples: each of its budgets binds now and then."""
    tokens, chunks, sounds, frames, windows, patches, _ = index.sizes.max(0).tolist()
    return Bucket(2 * tokens, chunks + 3, sounds + 150, 2 * frames, windows, patches, 4)


configs = st.fixed_dictionaries(
    {
        "hosts": st.sampled_from([1, 2, 4]),
        "batch_size": st.sampled_from([4, 8, 12]),
        "seed": st.integers(0, 2**31),
        "mode": st.sampled_from(["homogeneous", "mixed", "packed"]),
        "shuffle": st.booleans(),
    }
)
# Epochs of a mixture hold some samples more than once.
mixtures = configs.map(lambda config: {**config, "shuffle": True, "temperature": 3.0, "audio_dropout": 0.3, "word_dropout": 0.5})


@settings(max_examples=40, deadline=None)
@given(configs, st.integers(1, 150), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch_and_fits_its_bucket(config, count, epoch):
    index = make_index(count, seed=count)
    plan = make_planner(index, **config).epoch(epoch)
    assert plan.ids.shape[:3] == (len(plan), config["hosts"], config["batch_size"] // config["hosts"])
    assert sorted(plan.ids[plan.ids != MASKED].tolist()) == index.ids.tolist()
    sizes = dict(zip(index.ids.tolist(), index.sizes, strict=True))
    for k in range(len(plan)):
        step = plan[k]
        for row in step.ids.reshape(config["batch_size"], -1).tolist():
            held = np.array([sizes[i] for i in row if i != MASKED]).reshape(-1, 7)
            added, largest = held.sum(0), held.max(0, initial=0)
            assert step.bucket.holds(Bucket(*np.where([1, 1, 1, 1, 0, 0, 1], added, largest).tolist()))


@settings(max_examples=20, deadline=None)
@given(configs, st.integers(1, 150))
def test_a_homogeneous_batch_has_one_signature(config, count):
    index = make_index(count, seed=count)
    plan = make_planner(index, **{**config, "mode": "homogeneous"}).epoch(0)
    of = dict(zip(index.ids.tolist(), index.signatures.tolist(), strict=True))
    for ids in plan.ids:
        assert len({of[i] for i in ids.ravel().tolist() if i != MASKED}) == 1


@settings(max_examples=25, deadline=None)
@given(configs | mixtures, st.integers(20, 150), st.data())
def test_a_plan_is_a_function_of_its_inputs_and_of_the_step(config, count, data):
    index = make_index(count, seed=count)
    first, second = make_planner(index, **config), pickle.loads(pickle.dumps(make_planner(index, **config)))
    step = data.draw(st.integers(0, 3 * first.steps_per_epoch))
    for k in (step, 0, step + 1):  # in any order, and over the end of an epoch
        assert first[k].bucket == second[k].bucket
        assert all(np.array_equal(getattr(first[k], name), getattr(second[k], name)) for name in ("ids", "withheld", "words"))
    epoch, position = first.locate(step)
    assert sum(len(first.epoch(e)) for e in range(epoch)) + position == step and 0 <= position < len(first.epoch(epoch))
    assert np.array_equal(first[step].ids, first.epoch(epoch)[position].ids)


@settings(max_examples=15, deadline=None)
@given(configs | mixtures, st.integers(20, 150))
def test_the_number_of_hosts_changes_only_who_does_what(config, count):
    index = make_index(count, seed=count)
    one, four = (make_planner(index, **{**config, "hosts": hosts}).epoch(1) for hosts in (1, 4))
    assert np.array_equal(one.bucket, four.bucket)
    for name in ("ids", "withheld", "words"):
        assert np.array_equal(getattr(one, name).reshape(len(one), -1), getattr(four, name).reshape(len(four), -1))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(1, 50), st.integers(0, 2**31), st.integers(1, 12))
def test_a_mixture_gives_each_group_its_share_and_each_sample_its_turn(counts, temperature, seed, epochs):
    groups = np.repeat(np.arange(len(counts)), counts)
    drawn = np.stack([draw(groups, temperature, seed, epoch) for epoch in range(epochs)])
    assert drawn.shape == (epochs, len(groups))  # an epoch is as long as there are samples
    weights = np.array(counts) ** (1 / temperature)
    for group, count in enumerate(counts):
        share = (groups[drawn] == group).sum(1)
        assert len(set(share.tolist())) == 1 and abs(share[0] - len(groups) * weights[group] / weights.sum()) < 1
        times = np.bincount(drawn[groups[drawn] == group], minlength=len(groups))[groups == group]
        assert times.max() - times.min() <= 1 and times.sum() == epochs * share[0] and len(times) == count


def test_a_mixture_goes_from_every_sample_once_to_equal_groups():
    counts = np.array([1000, 100, 7])
    assert shares(counts, 1.0).tolist() == [1000, 100, 7] and shares(counts, 1e9).tolist() == [369, 369, 369]
    index = make_index(400)
    plans = [make_planner(index, batch_size=8, mode=mode, temperature=2.0).epoch(0) for mode in ("homogeneous", "mixed", "packed")]
    for plan in plans:  # what is drawn does not depend on how it is batched
        assert np.array_equal(np.sort(plan.ids[plan.ids >= 0]), np.sort(plans[0].ids[plans[0].ids >= 0]))
        share = np.bincount(index.datasets[planned(plan, index)])
        assert np.array_equal(share, shares(np.bincount(index.datasets), 2.0)) and share[-1] > 1.5 * np.bincount(index.datasets)[-1]
    tasks = index.tasks[planned(make_planner(index, batch_size=8, temperature=2.0, balance="task").epoch(0), index)]
    assert np.array_equal(np.bincount(tasks), shares(np.bincount(index.tasks), 2.0))


def test_dropout_is_drawn_for_each_sample_and_epoch_whatever_surrounds_it():
    index = make_index(3000)
    odds = {"audio_dropout": 0.3, "video_dropout": 0.1}

    def withheld(index: Index, epoch: int, **config) -> dict[int, int]:
        plan = make_planner(index, **odds, **config).epoch(epoch)
        assert (plan.withheld[plan.ids == MASKED] == 0).all()
        return dict(zip(plan.ids[plan.ids >= 0].tolist(), plan.withheld[plan.ids >= 0].tolist(), strict=True))

    whole, third = withheld(index, 1, batch_size=8), withheld(index.subset(index.ids % 3 == 0), 1, batch_size=12, mode="packed", hosts=4)
    assert len(third) > 900 and all(whole[i] == bits for i, bits in third.items())
    bits = np.array(list(whole.values()))
    lost = [((bits & bit) > 0).mean() for bit in (NO_AUDIO, NO_VIDEO)] + [(bits == NO_AUDIO + NO_VIDEO).mean()]
    np.testing.assert_allclose(lost, [0.3, 0.1, 0.03], atol=0.03)
    assert withheld(index, 2, batch_size=8) != whole != withheld(index, 1, batch_size=8, seed=7)


def test_words_are_drawn_for_each_sample_and_epoch_whatever_surrounds_it():
    index = make_index(3000)

    def seeds(index: Index, epoch: int, **config) -> dict[int, int]:
        plan = make_planner(index, word_dropout=0.2, **config).epoch(epoch)
        assert ((plan.words == 0) == (plan.ids == MASKED)).all()
        return dict(zip(plan.ids[plan.ids >= 0].tolist(), plan.words[plan.ids >= 0].tolist(), strict=True))

    whole, third = seeds(index, 1, batch_size=8), seeds(index.subset(index.ids % 3 == 0), 1, batch_size=12, mode="packed", hosts=4)
    assert len(third) > 900 and all(whole[i] == seed for i, seed in third.items())
    assert len({*whole.values()}) > 2990
    for other in (seeds(index, 2, batch_size=8), seeds(index, 1, batch_size=8, seed=7)):
        assert all(other[i] != seed for i, seed in whole.items())
    assert not make_planner(index, batch_size=8, audio_dropout=0.5).epoch(1).words.any()


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
    index = alike(signatures, np.ones((count, 7), np.int32))
    for shuffle in (True, False):
        config = PlanConfig(batch_size=4, shuffle=shuffle)
        plan = Planner(index, (Bucket(1, 1, 1, 1, 1, 1),), config).epoch(0)
        order = signatures[plan.ids[:, 0, 0]].tolist()
        assert [sorted(order[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2
        assert [sorted(order[i : i + 2]) for i in (6, 8)] == [[1, 2]] * 2 and order[10:] == [2] * 5
        if not shuffle:
            assert order[:6] == [0, 1, 2] * 2
    plans = [Planner(index, (Bucket(1, 1, 1, 1, 1, 1),), PlanConfig(batch_size=4, seed=seed)).epoch(0) for seed in range(12)]
    assert {int(signatures[plan.ids[0, 0, 0]]) for plan in plans} == {0, 1, 2}  # none of them is always first


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
    index = alike(np.zeros(count, np.int32), np.tile([100, 0, 0, 0, 0, 0, 1], (count, 1)))
    assert choose_buckets(index, PlanConfig(batch_size=4), COST) == (Bucket(112),)


def test_a_plan_that_cannot_be_is_refused_with_the_reason():
    index = make_index(20)
    with pytest.raises(ValueError, match=r"20 of 20 samples fit no bucket; the first is row .* largest bucket is Bucket\(tokens=8"):
        Planner(index, (Bucket(8),), PlanConfig(batch_size=4))
    with pytest.raises(ValueError, match="20 samples make no batch of 64"):
        make_planner(index, batch_size=64, incomplete="drop")
    for wrong, told in (
        ({"hosts": 3}, "multiple of the 3 hosts"),
        ({"mode": "pakced"}, "unknown mode 'pakced'; known: homogeneous, mixed, packed"),
        ({"temperature": 0.5}, "temperature 0.5 must be at least 1"),
        ({"audio_dropout": 30}, "audio_dropout 30 is a probability"),
        ({"word_dropout": -0.1}, "word_dropout -0.1 is a probability"),
        ({"shuffle": False, "video_dropout": 0.1}, "are for training"),
        ({"shuffle": False, "word_dropout": 0.1}, "are for training"),
    ):
        with pytest.raises(ValueError, match=told):
            PlanConfig(**{"batch_size": 4, **wrong})
    with pytest.raises(ValueError, match="one shape of row, not 2"):
        Planner(index, (Bucket(8), Bucket(9)), PlanConfig(batch_size=4, mode="packed"))
    with pytest.raises(ValueError, match="no samples"):
        choose_buckets(index.subset(np.zeros(20, bool)), PlanConfig(batch_size=4), COST)
    with pytest.raises(ValueError, match="-1 buckets"):
        choose_buckets(index, PlanConfig(batch_size=4), COST, count=-1)
    pair = alike(np.arange(2), np.array([[10, 5, 5, 0, 0, 0, 1], [10, 0, 0, 1, 1, 4, 1]]))
    with pytest.raises(ValueError, match="joint maximum"):
        Planner(pair, (Bucket(10, 5, 5), Bucket(10, 0, 0, 1, 1, 4)), PlanConfig(batch_size=2, mode="mixed"))


def test_a_subset_plans_only_its_samples():
    index = make_index(90)
    third = index.subset(index.ids % 3 == 0)
    plan = make_planner(third, batch_size=4).epoch(0)
    assert set(plan.ids[plan.ids != MASKED].tolist()) == set(index.ids[index.ids % 3 == 0].tolist())


def test_a_packed_row_is_chosen_to_be_full():
    index, plan = make_index(600), PlanConfig(batch_size=2, mode="packed")
    row = choose_row(index, COST, tokens=4096)
    assert row.tokens == 4096 and row.holds(Bucket.covering(Bucket(*size) for size in index.sizes.tolist()))
    assert padding_share(Planner(index, (row,), plan).epoch(0), index, COST) < 0.12
    longest = int(index.sizes[:, 0].max())
    assert choose_row(index, COST, tokens=1).tokens == longest


def test_no_sample_waits_long_for_its_row():
    """However awkward a sample is, it is packed about when its turn comes: a stream of small ones does not pass it for ever."""
    index = make_index(3000)
    order = np.random.default_rng(0).permutation(3000)
    place = np.empty(3000)
    for k, row in enumerate(pack(index.sizes[order], np.array(list(vars(small_row(index)).values())), pool=64)):
        place[row] = k
    assert (place <= np.arange(3000)).all()
