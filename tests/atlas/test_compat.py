"""Each switch of `config.compat` that concerns rows does what the published loaders do, and nothing by default."""

import dataclasses

import numpy as np
import pytest

from omnisapiens_jax.atlas.recipe import lower_answer, target_text
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.processing.chat import OMNI_SYSTEM, PLAIN_SYSTEM, WordDropout
from omnisapiens_jax.processing.example import IGNORED, Bucket
from omnisapiens_jax.processing.options import ProcessingConfig
from tests.atlas.toys import CONFIG, OPTIONS, ToyTokenizer, recipe, write_atlas

UNFED = dataclasses.replace(OPTIONS, feed_media=False)
PAD, END = CONFIG.tokens.pad, CONFIG.tokens.im_end
ENCODE = ToyTokenizer().encode


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Text alone, with sound, with sound and pictures."""
    source = open_source(write_atlas(tmp_path_factory.mktemp("atlas"), count=3))
    return [source[i] for i in range(3)]


@pytest.mark.parametrize("target", [None, lower_answer])
def test_media_that_are_not_fed_leave_their_placeholders(samples, target):
    for sample in samples:
        fed, unfed = (recipe(options=options, target=target).build(sample) for options in (OPTIONS, UNFED))
        for name in ("tokens", "labels", "prompt_length", "domain", "label"):
            np.testing.assert_array_equal(getattr(unfed, name), getattr(fed, name))
        assert unfed.size() == Bucket(len(fed.tokens)) == recipe(options=UNFED, target=target).measure(sample)[0]
        np.testing.assert_array_equal(unfed.positions, np.tile(np.arange(len(fed.tokens)), (3, 1)))
        assert unfed.rope_delta == 0 and not unfed.media.any()
    assert fed.media.any() and len(fed.audio_chunks) and len(fed.patches)


def test_the_system_sentence_may_stand_before_sound_alone(samples):
    official, plain = (ENCODE(sentence) for sentence in (OMNI_SYSTEM, PLAIN_SYSTEM))

    def sentence(sample, system):
        return recipe(options=dataclasses.replace(OPTIONS, system=system)).build(sample).tokens[2:].tolist()

    for sample in samples:
        assert sentence(sample, "always")[: len(official)] == official
        wanted = official if sample.audios else plain
        assert sentence(sample, "with_audio")[: len(wanted)] == wanted
    with pytest.raises(ValueError, match="unknown system 'never'; known: always, with_audio"):
        ProcessingConfig(system="never")


@pytest.mark.parametrize("target", [None, target_text])
def test_a_prompt_may_lose_its_end_instead_of_its_transcript(samples, target):
    sample = samples[2]
    whole = recipe(options=UNFED, target=target).build(sample)
    short = len(whole.tokens) - 5
    how = recipe(options=UNFED, target=target, max_tokens=short, truncation="right")
    size, excess = how.measure(sample)
    cut, length = how.build(sample, excess), whole.prompt_length
    assert (size.tokens, excess) == (short, 5) and cut.size() == size and cut.prompt_length == length - 5
    np.testing.assert_array_equal(cut.tokens, [*whole.tokens[: length - 5], *whole.tokens[length:]])
    np.testing.assert_array_equal(cut.labels, [*whole.labels[: length - 5], *whole.labels[length:]])
    assert recipe(options=UNFED, target=target, truncation="right").measure(sample) == (whole.size(), 0)
    # By default the words of the transcript go, and the assistant header stays.
    kept = recipe(options=UNFED, target=target, max_tokens=short)
    example = kept.build(sample, kept.measure(sample)[1])
    np.testing.assert_array_equal(example.tokens[: example.prompt_length][-3:], whole.tokens[:length][-3:])


def test_a_prompt_that_loses_words_in_training_keeps_more_of_its_end(samples):
    how = recipe(options=UNFED, truncation="right")
    words = WordDropout(0.5, 3)
    whole = how.build(dataclasses.replace(samples[2], problem=words(samples[2].problem)))
    for room in (3, 0, -3):
        cut = dataclasses.replace(how, max_tokens=len(whole.tokens) + room)
        example = cut.build(samples[2], cut.measure(samples[2])[1], words=words)
        np.testing.assert_array_equal(example.tokens, whole.tokens[: cut.max_tokens])


def test_a_target_that_leaves_no_room_is_told(samples):
    with pytest.raises(SampleError, match="its target of 2 tokens leaves no room in 2") as fault:
        recipe(options=UNFED, target=lower_answer, max_tokens=2, truncation="right").measure(samples[0])
    assert fault.value.kind == "too_long"


def test_answers_may_be_taught_behind_padding(samples):
    """The first tokens of the row padded on the left, as many as the prompt has."""
    whole = recipe(options=UNFED, target=lower_answer).build(samples[1])
    length = whole.prompt_length
    for room in (2 * length, length + 10, length):
        found = recipe(options=UNFED, target=lower_answer, prompts="padding", max_tokens=room).build(samples[1])
        padded = [PAD] * (room - length) + whole.tokens[:length].tolist()
        np.testing.assert_array_equal(found.tokens, [*padded[:length], *whole.tokens[length:]])
        np.testing.assert_array_equal(found.labels, whole.labels)
    prompt = recipe(options=UNFED, prompts="padding").build(samples[1])  # what is answered is whole
    np.testing.assert_array_equal(prompt.tokens, whole.tokens[:length])


def test_labels_may_be_shifted_twice(samples):
    """The prompt's last token is taught, and the end of the response is not."""
    right, wrong = (recipe(target=target_text, labels=labels).build(samples[1]) for labels in ("response", "shifted"))
    length = right.prompt_length
    assert right.labels[length:].tolist() == right.tokens[length:].tolist() and right.labels[-1] == END
    assert (right.labels[:length] == IGNORED).all() and (wrong.labels[: length - 1] == IGNORED).all()
    assert wrong.labels[length - 1 :].tolist() == [*right.tokens[length - 1 : -1].tolist(), IGNORED]
    np.testing.assert_array_equal(wrong.tokens, right.tokens)


@pytest.mark.parametrize("change", [{"truncation": "right"}, {"prompts": "padding"}])
def test_what_loses_places_of_media_is_refused_where_they_are_fed(change):
    with pytest.raises(ValueError, match="lose places of media"):
        recipe(**change)


@pytest.mark.parametrize("name", ["truncation", "prompts", "labels"])
def test_an_unknown_switch_is_told(name):
    with pytest.raises(ValueError, match=f"unknown {name} 'up'; known: "):
        recipe(options=UNFED, **{name: "up"})
