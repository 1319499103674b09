"""The length index says what `build` will give, and is found again on disk exactly while it is still true."""

import dataclasses

import numpy as np
import pytest

from omnisapiens_jax.atlas.faults import BadSamples
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.recipe import Recipe, target_text
from omnisapiens_jax.atlas.sources import open_source
from tests.atlas.toys import CONFIG, OPTIONS, edit_row, recipe, write_atlas


@pytest.fixture
def atlas(tmp_path):
    return write_atlas(tmp_path, count=12)


@pytest.fixture
def measured(monkeypatch):
    """Rows that were measured, in the order they were."""
    rows: list[int] = []
    real = Recipe.measure
    monkeypatch.setattr(Recipe, "measure", lambda self, sample, *rest: rows.append(sample.id) or real(self, sample, *rest))
    return rows


@pytest.mark.parametrize("target", [None, target_text])
def test_the_index_holds_the_size_of_every_example(atlas, target):
    source, how = open_source(atlas), recipe(target=target)
    index, faults = length_index(source, how, on_error="raise")
    assert index.ids.tolist() == list(range(12)) and index.names == ("text", "text_audio", "text_video_audio") and not faults
    assert index.signatures.tolist() == [0, 1, 2] * 4
    for i, size in enumerate(index.sizes.tolist()):
        assert list(dataclasses.astuple(how.build(source[i]).size())) == size


def test_the_cache_answers_until_rows_or_recipe_change(atlas, tmp_path, measured):
    cache = tmp_path / "cache"

    def rows_measured(how=recipe()):  # noqa: B008 - frozen
        measured.clear()
        index, _ = length_index(open_source(atlas), how, on_error="raise", cache=cache)
        assert len(index) == 12
        return len(measured)

    assert [rows_measured(), rows_measured()] == [12, 0]
    for how in (
        recipe(target=target_text),
        recipe(options=dataclasses.replace(OPTIONS, video_frames=2)),
        recipe(max_tokens=500),
        recipe(config=dataclasses.replace(CONFIG, audio=dataclasses.replace(CONFIG.audio, n_window=50))),
    ):
        assert [rows_measured(how), rows_measured(how)] == [12, 0]
    edit_row(atlas, 3, problem="shorter")
    assert [rows_measured(), rows_measured()] == [12, 0]
    assert not list(cache.glob("*.part"))


def test_a_cached_index_is_the_measured_one(atlas, tmp_path):
    fresh, _ = length_index(open_source(atlas), recipe(), on_error="raise", cache=tmp_path / "c", threads=1)
    again, _ = length_index(open_source(atlas), recipe(), on_error="raise", cache=tmp_path / "c")
    for name in ("ids", "signatures", "sizes", "excess"):
        a, b = getattr(fresh, name), getattr(again, name)
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert fresh.names == again.names


def test_a_file_that_was_replaced_or_lost_is_noticed(atlas, tmp_path, measured):
    cache = tmp_path / "c"
    length_index(open_source(atlas), recipe(), on_error="raise", cache=cache)
    measured.clear()
    wav = atlas.parent / "audio/4.wav"
    wav.write_bytes((atlas.parent / "audio/7.wav").read_bytes() + bytes(2))
    index, _ = length_index(open_source(atlas), recipe(), on_error="raise", cache=cache)
    assert measured == [4] and index.sizes[4].tolist() == list(dataclasses.astuple(recipe().build(open_source(atlas)[4]).size()))
    wav.unlink()
    with pytest.raises(BadSamples, match="1 samples cannot be used"):
        length_index(open_source(atlas), recipe(), on_error="raise", cache=cache)


def test_a_mended_file_is_noticed(atlas, tmp_path, measured):
    wav = atlas.parent / "audio/4.wav"
    whole = wav.read_bytes()
    wav.write_bytes(b"RIFF")
    index, faults = length_index(open_source(atlas), recipe(), on_error="skip", cache=tmp_path / "c")
    assert len(index) == 11 and len(faults) == 1
    wav.write_bytes(whole)
    measured.clear()
    index, faults = length_index(open_source(atlas), recipe(), on_error="raise", cache=tmp_path / "c")
    assert len(index) == 12 and not faults and measured == [4]
    measured.clear()
    length_index(open_source(atlas), recipe(), on_error="raise", cache=tmp_path / "c")
    assert measured == []


def test_progress_ends_at_the_number_of_rows(atlas):
    calls = []
    length_index(open_source(atlas), recipe(), on_error="raise", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 12) for i in range(1, 13)]


def test_a_vocabulary_of_another_model_is_refused_at_once():
    with pytest.raises(ValueError, match="special ids"):
        recipe(config=dataclasses.replace(CONFIG, tokens=dataclasses.replace(CONFIG.tokens, pad=99)))
