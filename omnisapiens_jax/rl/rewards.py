"""The GRPO reward of Human Behavior Atlas: accuracy, format and similarity of a response, on the host.

    score = 1.0 * accuracy + 0.2 * format + 0.5 * similarity                                   (at most 1.7)

A penalty for length may be added, that of the benchmark's other reward (HARPO). `RewardConfig()` is the reward as it was meant;
`PUBLISHED` is what the published code computes, quirk for quirk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np

Similarity = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""Predictions [N] and golds [N] in, cosine similarities [N] in [-1, 1] out."""

_AROUND_MARKS = re.compile(r"\s*([<>/])\s*")
_BOXED = re.compile(r"\\boxed\{([^}]*)\}")
_BRACKETS = re.compile(r"\[(.*?)\]")
_ANSWER = re.compile(r"<answer>(.*?)</answer>")
_FORMAT = re.compile(r"<think>.*</think>.*\\boxed\{.*\}.*", re.DOTALL)
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Weights of the three parts, and two places where the published code surprises.

    Attributes:
        accuracy: weight of the exact match.
        format: weight of the think-then-boxed form.
        similarity: weight of the embedding cosine; 0 leaves the embedder out.
        overlong: weight of the penalty for length (HARPO: 0.75). Nothing else asks a response to end after its answer.
        longest: tokens at which that penalty is whole.
        buffer: tokens over which it grows, the last before `longest`; at least 1.
        strip: ignore white space around the prediction and the gold. The published code does not: ` Anger ` is wrong there.
        brackets_in_thinking: let the `[...]` fallback read the reasoning too. The published code does, and takes the first
            citation `[1]` of the reasoning for the answer; otherwise only what follows the think block is read.
    """

    accuracy: float = 1.0
    format: float = 0.2
    similarity: float = 0.5
    overlong: float = 0.0
    longest: int = 812
    buffer: int = 128
    strip: bool = True
    brackets_in_thinking: bool = False

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise ValueError(f"the overlong penalty needs a buffer of at least 1 token, not {self.buffer}")


PUBLISHED = RewardConfig(strip=False, brackets_in_thinking=True)


@dataclasses.dataclass(frozen=True)
class Rewards:
    """What N responses earned. The arrays are [N] float32; `predictions` holds what was read out of each response."""

    score: np.ndarray
    accuracy: np.ndarray
    format: np.ndarray
    similarity: np.ndarray
    overlong: np.ndarray
    predictions: tuple[str, ...]


def normalise(response: str) -> str:
    """Deletes white space around every `<`, `>` and `/`: `< think >` counts as a tag, and `a / b` becomes `a/b`."""
    return _AROUND_MARKS.sub(r"\1", response)


def extract_prediction(response: str, config: RewardConfig) -> str:
    r"""The answer a response gives, in lower case.

    The first that matches: `\boxed{...}` up to the first closing brace (it may be empty or span lines), `[...]` on one line,
    `<answer>...</answer>` on one line, else the whole response. The benchmark scores responses by another reading, where an empty box and
    brackets count for nothing: `evaluation.answers.extract_answer`.
    """
    text = normalise(response)
    bracket_text = text if config.brackets_in_thinking else _after_thinking(text)
    match = _BOXED.search(text) or _BRACKETS.search(bracket_text) or _ANSWER.search(text)
    prediction = (match.group(1) if match else text).lower()
    return prediction.strip() if config.strip else prediction


def follows_format(response: str) -> bool:
    r"""Whether the entire response is `<think>...</think>...\boxed{...}...`, beginning with the think tag."""
    return _FORMAT.fullmatch(normalise(response)) is not None


def overlong_penalty(lengths: np.ndarray, config: RewardConfig) -> np.ndarray:
    """0 for a response that keeps clear of the buffer, falling to -1 at its end: `lengths [N]` in tokens to `[N]` float32."""
    return -np.clip((lengths - (config.longest - config.buffer)) / config.buffer, 0.0, 1.0).astype(np.float32)


def score_responses(
    responses: Sequence[str], golds: Sequence[str], similarity: Similarity | None, config: RewardConfig, lengths: np.ndarray | None = None
) -> Rewards:
    """Scores N responses against their gold answers.

    Args:
        responses: decoded texts, without special tokens.
        golds: the answer of each response's sample.
        similarity: cosine of predictions and golds; negative cosines earn nothing. None only when its weight is 0.
        config: weights and switches.
        lengths: tokens of each response `[N]`, its end among them. None only when the weight of `overlong` is 0.

    Raises:
        ValueError: responses and golds differ in number, a similarity or the lengths are missing, or the similarity answers with the
            wrong shape.
    """
    if len(responses) != len(golds):
        raise ValueError(f"{len(responses)} responses but {len(golds)} gold answers: give one gold answer for each response")
    predictions = tuple(extract_prediction(response, config) for response in responses)
    answers = tuple(gold.strip().lower() if config.strip else gold.lower() for gold in golds)
    accuracy = np.array([p == a for p, a in zip(predictions, answers, strict=True)], np.float32)
    form = np.array([follows_format(response) for response in responses], np.float32)
    closeness = np.zeros(len(responses), np.float32)
    if config.similarity and responses:
        if similarity is None:
            raise ValueError(f"the similarity weight is {config.similarity} but no similarity was given: pass one, or set the weight to 0")
        cosine = np.asarray(similarity(predictions, answers), np.float32)
        if cosine.shape != closeness.shape:
            raise ValueError(f"the similarity answered with shape {cosine.shape} for {len(responses)} pairs, expected {closeness.shape}")
        closeness = np.clip(cosine, 0.0, 1.0)
    long = np.zeros(len(responses), np.float32)
    if config.overlong:
        if lengths is None:
            raise ValueError(f"the overlong weight is {config.overlong} but no lengths were given: pass them, or set the weight to 0")
        long = overlong_penalty(lengths, config)
    score = config.accuracy * accuracy + config.format * form + config.similarity * closeness + config.overlong * long
    return Rewards(score.astype(np.float32), accuracy, form, closeness, long, predictions)


def _after_thinking(text: str) -> str:
    # Reasoning that never closes has no answer behind it.
    if _THINK_CLOSE in text:
        return text.rpartition(_THINK_CLOSE)[2]
    return "" if _THINK_OPEN in text else text
