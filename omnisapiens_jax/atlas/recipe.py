"""From a `Sample` to the model's `Example`: its target text, its token budget, and errors that name the row."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.schema import Sample, SampleError
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.chat import WordDropout, shorten_transcript
from omnisapiens_jax.processing.example import IGNORED, Bucket, Example, build_example, lay_out_words, measure
from omnisapiens_jax.processing.media import MediaError
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import Tokenizer

_T = TypeVar("_T")
Target = Callable[[Sample], str]  # what supervised training teaches for a sample; a plain function, as worker processes get it by name
_NAME = "this row"  # how errors of the media code begin; file and number of the row come before it

TRUNCATION = ("transcript", "right")
PROMPTS = ("whole", "padding")
LABELS = ("response", "shifted")


def target_text(sample: Sample) -> str:
    r"""`<think>{rationale}</think>\boxed{answer}`, or the boxed answer alone where there is no rationale."""
    thought = f"<think>{sample.rationale}</think>" if sample.rationale else ""
    return rf"{thought}\boxed{{{sample.answer}}}"


def lower_answer(sample: Sample) -> str:
    """The bare answer in lower case, as free-form answers are taught."""
    return sample.answer.lower()


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How samples become examples.

    Attributes:
        tokenizer: the vocabulary.
        config: the model's geometry.
        options: media and prompt options.
        max_tokens: the most tokens of prompt and target together. What is longer has its transcript shortened; if that does not
            suffice it is an error of kind `too_long`. Media, question and assistant header are never cut.
        target: what is appended to the prompt and taught; None ends with the assistant header (heads, RL, evaluation).
        scheme: what datasets and answers may be.
        truncation: `right` cuts the end off a prompt that is too long instead, question and assistant header first, as the published
            loaders do. It may cut placeholders of media, so that these cannot be fed.
        prompts: `padding` teaches the target behind what the published trainers take for the prompt: the first tokens of the row padded
            on the left to `max_tokens`, as many as the prompt has, which are padding alone in any but the longest rows.
        labels: `shifted` teaches the last token of the prompt and the target without its end token, as the published generative SFT,
            which shifts its labels twice.
    """

    tokenizer: Tokenizer
    config: ThinkerConfig
    options: ProcessingConfig
    max_tokens: int
    target: Target | None = None
    scheme: LabelScheme = HBA
    truncation: str = "transcript"
    prompts: str = "whole"
    labels: str = "response"

    def __post_init__(self) -> None:
        for name, known in (("truncation", TRUNCATION), ("prompts", PROMPTS), ("labels", LABELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")
        if self.options.feed_media and (self.truncation == "right" or self.prompts == "padding"):
            raise ValueError("truncation right and padding for prompts lose places of media: they need feed_media=False")
        if self.tokenizer.ids != self.config.tokens:
            raise ValueError(f"the tokenizer's special ids {self.tokenizer.ids} are not the model's {self.config.tokens}")

    def fingerprint(self) -> str:
        """A digest of all that decides the size of an example."""
        parts = (self.config.audio, self.config.vision, self.config.tokens, self.options, self.scheme)
        target = self.target and f"{self.target.__module__}.{self.target.__qualname__}"
        rest = (self.max_tokens, target, self.truncation, *(dataclasses.astuple(part) for part in parts))
        return hashlib.sha256(pickle.dumps(self.tokenizer) + repr(rest).encode()).hexdigest()

    def measure(self, sample: Sample, replaced: list[SampleError] | None = None) -> tuple[Bucket, int]:
        """Size of the example, and the tokens its transcript (or its end: `truncation`) had to lose for it, 0 for nearly all.

        Args:
            sample: the row.
            replaced: where given, silence and black stand in for media that cannot be used (see `build_example`), and the fault goes
                into this list.

        Raises:
            SampleError: the row cannot be used.
        """
        self.scheme.check(sample)
        size, excess = self._guarded(sample, measure, sample.problem, replaced), 0
        if self.truncation == "right":
            excess = max(size.tokens - self.max_tokens, 0)
            if excess and self.target and (taught := len(self.tokenizer.encode(self.target(sample))) + 1) >= self.max_tokens:
                raise sample.error(f"its target of {taught} tokens leaves no room in {self.max_tokens}", kind="too_long", field="answer")
            return dataclasses.replace(size, tokens=size.tokens - excess), excess
        while (missing := size.tokens - self.max_tokens) > 0:  # a second pass only if the cut changes how its surroundings are tokenised
            excess += missing
            size = self._guarded(sample, measure, self._shortened(sample, excess), None if replaced is None else [])
        return size, excess

    def build(
        self,
        sample: Sample,
        excess: int = 0,
        replaced: list[SampleError] | None = None,
        words: WordDropout | None = None,
        like: Example | None = None,
    ) -> Example:
        """The example of a sample, its transcript shortened by the `excess` tokens that `measure` found; `replaced` as there.

        With `words` it loses some of its transcript, and is not longer for it. `like` is one with other words, whose media are taken over.

        It knows its head and its class, as the scheme has them.

        Raises:
            SampleError: the row cannot be used.
        """
        self.scheme.check(sample)
        right = self.truncation == "right"
        problem = self._shortened(sample, 0 if right else excess)
        if words is not None:
            problem = self._without(words, problem)
        example = self._guarded(sample, functools.partial(build_example, like=like), problem, replaced)
        if cut_off := max(len(example.tokens) - self.max_tokens, 0) if right else 0:
            kept = np.delete(np.arange(len(example.tokens)), slice(example.prompt_length - cut_off, example.prompt_length))
            cut = lay_out_words(example.tokens[kept], example.labels[kept], example.prompt_length - cut_off, self.config)
            example = dataclasses.replace(cut, read=example.read)
        if self.target is not None:
            example = self._as_taught(example)
        domain, label = self.scheme.place(sample.dataset, sample.answer)
        return dataclasses.replace(example, domain=domain, label=label)

    def _as_taught(self, example: Example) -> Example:
        """The example as `prompts` and `labels` say."""
        tokens, labels, length = example.tokens.copy(), example.labels.copy(), example.prompt_length
        if self.prompts == "padding":
            padded = np.concatenate([np.full(self.max_tokens - length, self.config.tokens.pad, np.int32), tokens[:length]])
            tokens[:length] = padded[:length]
        if self.labels == "shifted":
            labels[length - 1], labels[-1] = tokens[length - 1], IGNORED
        return dataclasses.replace(example, tokens=tokens, labels=labels)

    def _shortened(self, sample: Sample, excess: int) -> str:
        problem = shorten_transcript(sample.problem, excess, self.tokenizer.encode)
        if problem is None:
            raise sample.error(
                f"is {excess} tokens longer than the {self.max_tokens} of the largest bucket, and no transcript could lose as many",
                kind="too_long",
                field="problem",
            )
        return problem

    def _without(self, words: WordDropout, problem: str) -> str:
        """`problem` without those words; as it is where that takes more tokens, as it may where words meet without a space."""
        fewer = words(problem)
        return fewer if len(self.tokenizer.encode(fewer)) <= len(self.tokenizer.encode(problem)) else problem

    def _inputs(self, sample: Sample, problem: str) -> dict[str, Any]:
        return {
            "problem": problem,
            "tokenizer": self.tokenizer,
            "config": self.config,
            "options": self.options,
            "audios": sample.audios,
            "videos": sample.videos,
            "images": sample.images,
            "response": None if self.target is None else self.target(sample),
            "name": _NAME,
        }

    def _guarded(self, sample: Sample, work: Callable[..., _T], problem: str, replaced: list[SampleError] | None) -> _T:
        reasons: list[MediaError] | None = None if replaced is None else []
        try:
            done = work(**self._inputs(sample, problem), replaced=reasons)
        except MediaError as reason:
            raise _media_error(sample, reason) from reason
        except ValueError as reason:
            raise sample.error(str(reason), kind="placeholders", field="problem") from reason
        if replaced is not None:
            replaced += [_media_error(sample, reason) for reason in reasons or ()]
        return done


def _media_error(sample: Sample, reason: MediaError) -> SampleError:
    kind = str(reason).removeprefix(f"{_NAME}, ").split(" ", 1)[0]
    return sample.error(str(reason), kind="media", field=f"{kind}s")
