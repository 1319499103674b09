"""The reward against the table of the published code, its two repairs, and laws any response obeys."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.rl.rewards import PUBLISHED, RewardConfig, extract_prediction, follows_format, score_responses

DEFAULT = RewardConfig()
CLOSED = "<think>a</think>"

# response, (prediction, accuracy, format) of the published code, (prediction, accuracy) with the defaults; the gold is "anger".
TABLE = [
    (r"<think>x</think>\boxed{anger}", ("anger", 1, 1), ("anger", 1)),
    (r"<think> a </think> \boxed{ Anger }", (" anger ", 0, 1), ("anger", 1)),
    (r"\boxed{anger}", ("anger", 1, 0), ("anger", 1)),
    (r"<think>see [1]</think> anger", ("1", 0, 0), ("<think>see [1]</think>anger", 0)),
    (r"<think>see [1]</think> \boxed{anger}", ("anger", 1, 1), ("anger", 1)),
    (r"<answer> happy </answer>", ("happy", 0, 0), ("happy", 0)),
    (r"anger", ("anger", 1, 0), ("anger", 1)),
    (r"<think>a</think>\boxed{\text{anger}}", (r"\text{anger", 0, 1), (r"\text{anger", 0)),
    (r"x<think>a</think>\boxed{anger}", ("anger", 1, 0), ("anger", 1)),
    (r"<think>a</think>\boxed{}", ("", 0, 1), ("", 0)),
]


@pytest.mark.parametrize(("response", "published", "repaired"), TABLE)
def test_the_published_table(response: str, published: tuple, repaired: tuple) -> None:
    old = score_responses([response], ["anger"], None, dataclasses.replace(PUBLISHED, similarity=0.0))
    assert (old.predictions[0], old.accuracy[0], old.format[0]) == published
    assert old.score[0] == pytest.approx(published[1] + 0.2 * published[2])
    new = score_responses([response], ["anger"], None, RewardConfig(similarity=0.0))
    assert (new.predictions[0], new.accuracy[0]) == repaired
    assert new.format[0] == published[2]


def test_brackets_are_read_behind_the_reasoning_only() -> None:
    text = "<think>as [1] says, [2]</think> so [Anger] [no]"
    assert extract_prediction(text, PUBLISHED) == "1"
    assert extract_prediction(text, DEFAULT) == "anger"
    assert extract_prediction("[Anger] it is", DEFAULT) == "anger"
    assert extract_prediction("<think>cut off at [1]", DEFAULT) == "<think>cut off at [1]"


def test_order_of_extraction_and_line_ends() -> None:
    both = "[b] <answer>c</answer> \\boxed{a} \\boxed{d}"
    assert extract_prediction(both, DEFAULT) == "a"
    assert extract_prediction("<answer>c</answer> [b]", DEFAULT) == "b"
    assert extract_prediction("\\boxed{two\nlines}", DEFAULT) == "two\nlines"
    assert extract_prediction("[two\nlines] <answer>c</answer>", DEFAULT) == "c"
    assert extract_prediction("either / or", DEFAULT) == "either/or"


def test_format_asks_for_the_whole_response() -> None:
    assert follows_format("<think>\na\n</think>\nso\n\\boxed{x}\n.")
    assert follows_format("< think >a< / think >\\boxed{x}")
    for bad in (" <thinking>a</thinking>\\boxed{x}", "<think>a\\boxed{x}</think>", "<think>a</think>\\boxed{x", "<think>a</think>x", ""):
        assert not follows_format(bad), bad


def test_the_gold_is_stripped_too_and_similarity_is_clipped_and_weighted() -> None:
    seen = []

    def cosine(predictions, golds):
        seen.append((tuple(predictions), tuple(golds)))
        return np.array([0.5, -0.3, 1.0000001])

    rewards = score_responses([CLOSED + r"\boxed{Joy}", "fear", "a"], [" joy ", "Anger", "A"], cosine, DEFAULT)
    assert seen == [(("joy", "fear", "a"), ("joy", "anger", "a"))]
    np.testing.assert_array_equal(rewards.similarity, np.array([0.5, 0.0, 1.0], np.float32))
    np.testing.assert_allclose(rewards.score, [1 + 0.2 + 0.25, 0.0, 1.5], rtol=1e-6)
    assert score_responses([r"\boxed{joy}"], [" joy"], lambda p, g: np.zeros(1), PUBLISHED).accuracy[0] == 0


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="2 responses but 1 gold"):
        score_responses(["a", "b"], ["a"], None, DEFAULT)
    with pytest.raises(ValueError, match="similarity weight is 0.5 but no similarity"):
        score_responses(["a"], ["a"], None, DEFAULT)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 1 pairs"):
        score_responses(["a"], ["a"], lambda p, g: np.zeros(2), DEFAULT)
    with pytest.raises(ValueError, match="overlong weight is 0.75 but no lengths"):
        score_responses(["a"], ["a"], None, RewardConfig(similarity=0.0, overlong=0.75))
    assert score_responses([], [], None, DEFAULT).score.shape == (0,)


def test_a_response_that_does_not_end_loses_what_the_reference_says() -> None:
    lengths = np.array([600, 684, 685, 748, 812, 813])
    config = RewardConfig(similarity=0.0, overlong=0.75)
    expected = np.array([0, 0, -0.0078125, -0.5, -1, -1])  # HARPO's penalty at its own limits
    rewards = score_responses(["anger"] * 6, ["anger"] * 6, None, config, lengths)
    np.testing.assert_array_equal(rewards.overlong, expected)
    np.testing.assert_allclose(rewards.score, 1 + 0.75 * expected, rtol=1e-6)


words = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\\{}[]<>/"), max_size=12)


@given(st.text(max_size=80), words)
def test_any_response_is_scored_within_bounds(response: str, gold: str) -> None:
    for config in (DEFAULT, PUBLISHED):
        rewards = score_responses([response], [gold], lambda p, g: np.array([-1.0]), config)
        assert rewards.score[0] in (np.float32(0), np.float32(1), np.float32(0.2), np.float32(1.2))
        assert rewards.predictions[0] == rewards.predictions[0].lower()


@given(words, words, st.sampled_from(["", " ", "\n\t "]))
def test_a_boxed_answer_is_found_whatever_the_reasoning_and_white_space(answer: str, reasoning: str, space: str) -> None:
    response = f"<think>{space}{reasoning} [9]{space}</think>{space}\\boxed{{{space}{answer.upper()}{space}}}{space}"
    rewards = score_responses([response], [answer.upper()], None, RewardConfig(similarity=0.0))
    assert rewards.accuracy[0] == 1 and rewards.format[0] == 1
