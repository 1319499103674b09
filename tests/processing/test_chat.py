"""Prompts: the published template, the reference's tag rules and hashes, and the transcript that may be shortened."""

from __future__ import annotations

import hashlib

import jinja2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.processing import chat
from omnisapiens_jax.processing.chat import Message, Part, WordDropout, build_messages, media_order, render, shorten_transcript
from tests.published_chat_template import PUBLISHED

ALL = ("audio", "video", "image")
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
PARTS = st.one_of(st.builds(Part, st.just("text"), TEXT), st.sampled_from([Part(kind) for kind in ALL]))
MESSAGES = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), st.lists(PARTS, max_size=5).map(tuple)), max_size=4
)


@given(messages=MESSAGES, generation=st.booleans())
def test_rendering_equals_the_published_template(messages: list[Message], generation: bool):
    as_dicts = [
        {"role": m.role, "content": [{"type": p.kind, **({"text": p.text} if p.kind == "text" else {})} for p in m.parts]} for m in messages
    ]
    assert len(PUBLISHED) == 1281
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(PUBLISHED)
    assert render(messages, generation_prompt=generation) == template.render(messages=as_dicts, add_generation_prompt=generation)


def test_missing_tags_go_to_the_front_audio_first():
    (system, user) = build_messages("What is it?", {"audio": 2, "video": 1, "image": 1}, modalities=ALL)
    assert system.parts[0].text == chat.OMNI_SYSTEM
    assert [p.kind for p in user.parts] == ["audio", "audio", "video", "image", "text"]
    assert media_order((system, user)) == ("audio", "audio", "video", "image")


def test_tags_that_are_there_keep_their_place():
    (_, user) = build_messages("Hear <audio>, then\n<video> see.", {"audio": 2, "video": 1}, modalities=ALL)
    assert [p.text or p.kind for p in user.parts] == ["audio", "Hear ", "audio", ", then\n", "video", " see."]


def test_disabled_modalities_stay_text_and_the_official_sentence_needs_audio():
    messages = build_messages("<image><video>?", {"video": 1, "image": 1}, modalities=("video",))
    assert [m.role for m in messages] == ["user"]
    assert messages[0].parts == (Part("text", "<image>"), Part("video"), Part("text", "?"))
    assert render(messages).startswith(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image><|vision_bos|>"
    )
    assert build_messages("Hi", {}, modalities=("audio",))[0].role == "system", "with or without a clip in the row"


def test_more_tags_than_media_are_an_error():
    with pytest.raises(ValueError, match=r"more placeholders than media: the problem holds 2 <audio>, the row 1 audio"):
        build_messages("<audio><audio>", {"audio": 1}, modalities=ALL)


def test_format_prompt_is_the_references_and_follows_without_a_space():
    template = "{{ content }}" + chat.FORMAT_PROMPTS["think"]
    assert hashlib.sha256(template.encode()).hexdigest() == "2ed83310b1d9fe45ab918f20a73c0b330cea082837539f039838322b1fc05e9c"
    (message,) = build_messages("Sad?", {}, modalities=("video",), format_prompt=chat.FORMAT_PROMPTS["think"])
    assert message.parts[0].text.startswith("Sad?You FIRST think")


PROBLEM = "<audio>Transcript: one two three four five six\nQuestion: how does one feel?\nOptions: sad, happy"


def words(text: str) -> list[int]:
    return [1] * len(text.replace("\n", " \n ").split(" "))


@pytest.mark.parametrize("excess", range(0, 5))
def test_only_the_transcript_is_shortened_and_no_more_than_needed(excess: int):
    shorter = shorten_transcript(PROBLEM, excess, words)
    assert shorter is not None
    head, tail = "<audio>Transcript: ", "\nQuestion: how does one feel?\nOptions: sad, happy"
    assert shorter.startswith(head) and shorter.endswith(tail)
    assert len(words(shorter)) == len(words(PROBLEM)) - excess
    kept = shorter.removeprefix(head).removesuffix(tail).removesuffix(" …")
    assert "one two three four five six".startswith(kept)


def test_a_problem_that_cannot_be_shortened_enough_is_given_up():
    assert shorten_transcript(PROBLEM, 6, words) is None
    assert shorten_transcript("Question: how?", 1, words) is None
    assert shorten_transcript("Question: how?", 0, words) == "Question: how?"


@pytest.mark.parametrize(
    "problem",
    [
        "<audio>Transcript: one two three four. What emotion is this? Choose one: sad, happy",
        "Transcript: one two three. How? <audio> Choose one: sad, happy\nAnswer shortly.",
        "Transcript: one two three four\n ",
    ],
)
def test_a_line_that_may_hold_the_question_is_never_cut(problem: str):
    assert shorten_transcript(problem, 1, words) is None


WORDS = st.lists(st.text(alphabet="abé,.!😀", min_size=1, max_size=5), min_size=1, max_size=30)
SPACES = st.sampled_from([" ", "  ", "\t", "\u00a0"])


@given(WORDS, SPACES, st.floats(0, 1), st.integers(1, 2**32 - 1))
def test_dropout_leaves_some_words_of_the_transcript_in_their_order_and_all_else(said: list[str], space: str, odds: float, seed: int):
    head, tail = "<audio>Transcript: ", "\nQuestion: how does one feel?\nOptions: sad, happy"
    problem = head + space.join(said) + tail
    left = WordDropout(odds, seed)(problem)
    assert left.startswith(head) and left.endswith(tail)
    kept, rest = left.removeprefix(head).removesuffix(tail).split(space), iter(said)
    assert all(kept) and all(word in rest for word in kept)
    assert left == WordDropout(odds, seed)(problem)
    assert odds > 0 or left == problem
    assert odds < 1 or len(kept) == 1


def test_dropout_drops_at_its_rate_and_other_words_for_another_seed():
    said = " ".join(f"w{i}" for i in range(200))
    kept = [len(WordDropout(0.3, seed)(f"Transcript: {said}\nHow?").split()) - 2 for seed in range(1, 101)]
    assert abs(np.mean(kept) / 200 - 0.7) < 0.01
    assert WordDropout(0.3, 1)(f"Transcript: {said}\nHow?") != WordDropout(0.3, 2)(f"Transcript: {said}\nHow?")


@pytest.mark.parametrize(
    "problem",
    ["Question: how?", "Transcript: \nQuestion: how?", "Transcript: one two three. How? <audio> Choose one: sad, happy\nAnswer shortly."],
)
def test_dropout_never_touches_what_may_be_the_question(problem: str):
    assert WordDropout(1.0, 3)(problem) == problem
