"""Batches from real files: the plan executed, resumed at any step, the same however the work is done."""

import dataclasses
import itertools
import shutil
from typing import Any

import numpy as np
import pytest

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, choose_row
from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import MASKED, PlanConfig, Planner
from omnisapiens_jax.atlas.recipe import Recipe, lower_answer, target_text
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.processing.chat import WordDropout
from omnisapiens_jax.processing.media import decode_video
from omnisapiens_jax.processing.tokenizers import QwenTokenizer
from tests.atlas.toys import CONFIG, edit_row, recipe, write_atlas
from tests.qwen_vocabulary import qwen_tokenizer


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    return write_atlas(tmp_path_factory.mktemp("atlas"))


def make(path, pipeline=PipelineConfig(), *, host=0, target=None, **plan: Any):  # noqa: B008 - frozen
    source, how = open_source(path), recipe(target=target)
    index, _ = length_index(source, how, on_error="raise")
    config = PlanConfig(**{"batch_size": 4, "seed": 5, **plan})
    cost = SlotCost.of(CONFIG)
    packed = config.mode == "packed"
    buckets = (choose_row(index, cost, tokens=300),) if packed else choose_buckets(index, config, cost, count=4)
    return Pipeline(source, how, Planner(index, buckets, config), pipeline, host=host)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("mode", ["homogeneous", "mixed"])
def test_an_epoch_feeds_every_sample_with_its_own_media(atlas, mode):
    pipeline = make(atlas, mode=mode)
    seen = []
    for step, batch in pipeline.batches(0, pipeline.planner.steps_per_epoch):
        assert batch["tokens"].shape == (4, pipeline.planner[step].bucket.tokens)
        np.testing.assert_array_equal(batch["row_mask"], batch["index"] != MASKED)
        for row, i in enumerate(batch["index"].tolist()):
            assert (batch["audio_frames"][row] > 0).any() == (i != MASKED and i % 3 > 0)
            assert batch["patch_mask"][row].any() == (i != MASKED and i % 3 == 2)
        seen += [i for i in batch["index"].tolist() if i != MASKED]
    assert sorted(seen) == list(range(30)) and not pipeline.faults


def test_an_epoch_of_packed_rows_feeds_every_sample_with_its_own_media(atlas):
    pipeline = make(atlas, mode="packed", batch_size=2)
    row, fed = pipeline.planner.buckets[0], []
    for _, batch in pipeline.batches(0, pipeline.planner.steps_per_epoch):
        assert batch["tokens"].shape == (2, row.tokens) and batch["index"].shape == (2, row.segments)
        np.testing.assert_array_equal(batch["row_mask"], batch["index"] != MASKED)
        for b, s in np.argwhere(batch["row_mask"]):
            i, own = batch["index"][b, s], batch["media_index"][b][batch["segment_ids"][b] == s + 1]
            assert ((own >= 0) & (own < row.audio_tokens)).any() == (i % 3 > 0) and (own >= row.audio_tokens).any() == (i % 3 == 2)
            fed.append(i)
        for media in batch["media_index"]:
            assert len(set(media[media >= 0].tolist())) == (media >= 0).sum()  # no place is read by two
        assert batch["segment_ids"].max() > 1
    assert sorted(fed) == list(range(30))


@pytest.mark.parametrize("mode", ["mixed", "packed"])
def test_dropout_takes_the_content_and_nothing_else(atlas, mode):
    whole, deaf, blind = (
        dict(make(atlas, **{"mode": mode, "batch_size": 8, **odds}).batches(0, 2))
        for odds in ({}, {"audio_dropout": 1.0}, {"video_dropout": 1.0})
    )
    for step, batch in whole.items():
        grey = np.repeat([123, 117, 104], 392)  # nearest to 255 times the published means
        for lost, field, left in ((deaf[step], "audio_chunks", -1.5), (blind[step], "patches", grey)):
            there = {"audio_chunks": batch["audio_frames"] > 0, "patches": batch["patch_mask"]}[field]
            assert there.any() and (lost[field][there] == left).all() and not (batch[field][there] == left).all()
            same({**batch, field: there}, {**lost, field: there})


@pytest.mark.parametrize("mode", ["mixed", "packed"])
def test_word_dropout_leaves_out_words_and_nothing_else(atlas, mode):
    plan: dict[str, Any] = {"mode": mode, "batch_size": 30 if mode == "mixed" else 2}
    whole, fewer = (make(atlas, PipelineConfig(cache_bytes=2**28), target=target_text, **plan, word_dropout=odds) for odds in (0.0, 0.5))
    source, encode, left = open_source(atlas), recipe().tokenizer.encode, []
    of_epoch = []
    for epoch in (0, 1):
        before, after = (dict(_segments(pipeline, epoch)) for pipeline in (whole, fewer))
        assert before.keys() == after.keys() == set(range(30))
        for i, tokens in after.items():
            said = encode(source[i].problem.split("\n")[0].removeprefix("Transcript: "))
            begin = next(k for k in range(len(tokens)) if before[i][k : k + len(said)] == said)
            kept = len(tokens) - len(before[i]) + len(said)
            assert 1 <= kept <= len(said)
            assert tokens[:begin] == before[i][:begin] and tokens[begin + kept :] == before[i][begin + len(said) :]
            rest = iter(said)
            assert all(word in rest for word in tokens[begin : begin + kept])
            left.append(kept / len(said))
        of_epoch.append(after)
    assert of_epoch[0] != of_epoch[1] and abs(np.mean(left) - 0.5) < 0.1


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_lose_words_are_decoded_once_and_else_as_without_a_cache(atlas, monkeypatch, workers):
    plan: dict[str, Any] = {"target": target_text, "word_dropout": 0.5, "audio_dropout": 0.3}
    plain, kept = (make(atlas, PipelineConfig(cache_bytes=size, workers=workers, threads=0), **plan) for size in (0, 2**28))
    decoded = []
    steps = 3 * plain.planner.steps_per_epoch
    wanted = dict(plain.batches(0, steps))
    counted = lambda *args, **how: decoded.append(args) or decode_video(*args, **how)  # noqa: E731
    monkeypatch.setattr("omnisapiens_jax.processing.media.decode_video", counted)
    for step, batch in kept.batches(0, steps):
        same(batch, wanted[step])
    source = open_source(atlas)
    assert len(decoded) == (0 if workers else sum(len(source[i].videos) for i in range(len(source))))


def test_word_dropout_never_lengthens_a_sample(atlas):
    """Behind "Transcript:" without a space this vocabulary spells "wonderful" in more tokens than "a" and " wonderful" take."""
    tokenizer = QwenTokenizer(qwen_tokenizer())
    how = recipe(tokenizer=tokenizer, config=dataclasses.replace(CONFIG, tokens=tokenizer.ids))
    sample = dataclasses.replace(open_source(atlas)[0], problem="Transcript:a wonderful\nHow?")
    seeds = [seed for seed in range(1, 20) if WordDropout(0.9, seed)(sample.problem) == "Transcript:wonderful\nHow?"]
    assert len(seeds) > 3
    for seed in seeds:
        np.testing.assert_array_equal(how.build(sample, words=WordDropout(0.9, seed)).tokens, how.build(sample).tokens)


def _segments(pipeline, epoch):
    """The tokens of every sample of an epoch."""
    first = sum(len(pipeline.planner.epoch(e)) for e in range(epoch))
    for _, batch in pipeline.batches(first, first + len(pipeline.planner.epoch(epoch))):
        index = batch["index"].reshape(len(batch["index"]), -1)
        for row, s in np.argwhere(index != MASKED):
            yield int(index[row, s]), batch["tokens"][row][batch["segment_ids"][row] == s + 1].tolist()


@pytest.mark.parametrize("plan", [{}, {"mode": "packed", "batch_size": 1, "temperature": 2.0, "audio_dropout": 0.5, "word_dropout": 0.5}])
def test_a_run_resumes_at_any_step_with_the_identical_remainder(atlas, plan):
    whole = dict(make(atlas, **plan).batches(0, 25))  # more than two epochs
    assert 2 * make(atlas, **plan).planner.steps_per_epoch < 25
    for start in (1, 20):
        rest = dict(make(atlas, **plan).batches(start, 25))
        assert list(rest) == list(range(start, 25))
        for step, batch in rest.items():
            same(batch, whole[step])


@pytest.mark.parametrize("how", [PipelineConfig(threads=0), PipelineConfig(threads=4, ahead=6), PipelineConfig(cache_bytes=2**28)])
def test_threads_and_cache_change_nothing(atlas, how):
    plan: dict[str, Any] = {"video_dropout": 0.5, "word_dropout": 0.5}
    for (_, a), (_, b) in itertools.zip_longest(make(atlas, **plan).batches(0, 20), make(atlas, how, **plan).batches(0, 20)):
        same(a, b)


@pytest.mark.slow
def test_a_fault_in_a_worker_process_is_the_same_error_and_stops_the_run(tmp_path):
    path = write_atlas(tmp_path, count=9)
    pipeline = make(path, PipelineConfig(workers=2))
    (tmp_path / "audio/4.wav").unlink()
    with pytest.raises(SampleError, match="row 4.*audios.*No such file"):
        list(pipeline.batches(0, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "plan"),
    [
        (1, {}),
        (2, {}),
        (1, {"word_dropout": 0.5}),
        (2, {"mode": "packed", "batch_size": 1, "audio_dropout": 0.5, "word_dropout": 0.5}),
    ],
)
def test_workers_change_nothing(atlas, workers, plan):
    several = make(atlas, PipelineConfig(workers=workers), **plan).batches(3, 9)
    for (k, a), (n, b) in itertools.zip_longest(make(atlas, **plan).batches(3, 9), several):
        assert k == n
        same(a, b)


@pytest.mark.parametrize("plan", [{}, {"word_dropout": 0.5}])
def test_hosts_get_the_same_shapes_and_together_the_whole_batch(atlas, plan):
    alone = make(atlas, **plan)
    pair = [make(atlas, hosts=2, host=host, **plan) for host in (0, 1)]
    for (_, whole), (_, first), (_, second) in zip(*(p.batches(0, 8) for p in (alone, *pair)), strict=True):
        same(whole, {name: np.concatenate([first[name], second[name]]) for name in whole})


def test_the_cache_keeps_within_its_bound(atlas):
    pipeline = make(atlas, PipelineConfig(cache_bytes=400_000, threads=0))
    list(pipeline.batches(0, 20))
    cache = pipeline._load._cache
    held = sum(v.nbytes for e in cache._examples.values() for v in vars(e).values() if isinstance(v, np.ndarray))
    assert 0 < held == cache._used <= 400_000


def test_a_cached_sample_is_decoded_once(atlas, monkeypatch):
    pipeline = make(atlas, PipelineConfig(cache_bytes=2**28, threads=0))
    built, real = [], Recipe.build
    monkeypatch.setattr(Recipe, "build", lambda self, sample, *rest: built.append(sample.id) or real(self, sample, *rest))
    list(pipeline.batches(0, 3 * pipeline.planner.steps_per_epoch))
    assert sorted(built) == list(range(30))


def test_targets_are_trained_and_prompts_are_not(atlas):
    plain, taught = make(atlas), make(atlas, target=target_text)
    source = open_source(atlas)
    encode = recipe().tokenizer.encode
    for _, batch in taught.batches(0, 8):
        for row, i in enumerate(batch["index"].tolist()):
            trained = batch["labels"][row][batch["labels"][row] >= 0].tolist()
            assert trained == ([] if i == MASKED else [*encode(target_text(source[i])), CONFIG.tokens.im_end])
    for _, batch in plain.batches(0, 8):
        assert (batch["labels"] == -100).all()
        np.testing.assert_array_equal(batch["prompt_length"], (batch["segment_ids"] > 0).sum(1))


@pytest.mark.parametrize("mode", ["mixed", "packed"])
def test_a_batch_knows_the_head_and_the_class_of_every_sample(atlas, mode, tmp_path):
    shutil.copytree(atlas.parent, tmp_path, dirs_exist_ok=True)
    path, seen = tmp_path / atlas.name, set()
    edit_row(path, 3, dataset="siq2", task="social_qa")
    source, pipeline = open_source(path), make(path, mode=mode, batch_size=2)
    for _, batch in pipeline.batches(0, pipeline.planner.steps_per_epoch):
        assert batch["domain"].dtype == batch["label"].dtype == np.int32
        for place, i in np.ndenumerate(batch["index"]):
            domain, label = batch["domain"][place], batch["label"][place]
            seen.add(i)
            if i in (MASKED, 3):  # nothing, and a free-form answer
                assert domain == label == -1
            else:
                assert domain == HBA.head(source[i].dataset) and HBA.classes[label] == (HBA.domains[domain].name, source[i].answer)
    assert seen - {MASKED} == set(range(30))


def test_the_target_text(atlas):
    sample = open_source(atlas)[1]
    assert target_text(sample) == r"<think>the words say so</think>\boxed{sad}"
    bare = dataclasses.replace(sample, rationale="")
    assert target_text(bare) == r"\boxed{sad}" and lower_answer(dataclasses.replace(bare, answer="Sad")) == "sad"


def test_a_way_of_working_that_cannot_be_is_refused():
    """A misspelt policy must not mean another."""
    wrong: Any
    for wrong, told in (({"on_error": "rais"}, "unknown on_error 'rais'; known: raise, skip, zero"), ({"workers": -1}, "-1 workers")):
        with pytest.raises(ValueError, match=told):
            PipelineConfig(**wrong)


def test_a_host_that_is_not_there_is_refused(atlas):
    with pytest.raises(ValueError, match="host 2 of 2"):
        make(atlas, hosts=2, host=2)
