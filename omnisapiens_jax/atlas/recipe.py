"""From a `Sample` to the model's `Example`: its target text, its token budget, and errors that name the row."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.schema import Sample, SampleError
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.chat import shorten_transcript
from omnisapiens_jax.processing.example import Bucket, Example, build_example, measure
from omnisapiens_jax.processing.media import MediaError
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import Tokenizer

_T = TypeVar("_T")
_NAME = "this row"  # how errors of the media code begin; file and number of the row come before it

BARE_TARGET = r"\boxed{%s}"


def target_text(sample: Sample, bare: str = BARE_TARGET) -> str:
    r"""What supervised training teaches: `<think>{rationale}</think>\boxed{answer}`, or `bare` filled in where there is no rationale."""
    if sample.rationale:
        return f"<think>{sample.rationale}</think>" + BARE_TARGET % sample.answer
    return bare % sample.answer


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How samples become examples.

    Attributes:
        tokenizer: the vocabulary.
        config: the model's geometry.
        options: media and prompt options.
        max_tokens: the most tokens of prompt and target together. What is longer has its transcript shortened; if that does not
            suffice it is an error of kind `too_long`. Media, question and assistant header are never cut.
        with_target: append `target_text` (supervised) or end with the assistant header (RL, evaluation).
        bare_target: `%s` template of the target of rows without a rationale.
        scheme: what datasets and answers may be.
    """

    tokenizer: Tokenizer
    config: ThinkerConfig
    options: ProcessingConfig
    max_tokens: int
    with_target: bool = False
    bare_target: str = BARE_TARGET
    scheme: LabelScheme = HBA

    def __post_init__(self) -> None:
        if self.tokenizer.ids != self.config.tokens:
            raise ValueError(f"the tokenizer's special ids {self.tokenizer.ids} are not the model's {self.config.tokens}")

    def fingerprint(self) -> str:
        """A digest of all that decides the size of an example."""
        parts = (self.config.audio, self.config.vision, self.config.tokens, self.options, self.scheme)
        rest = (self.max_tokens, self.with_target, self.bare_target, *(dataclasses.astuple(part) for part in parts))
        return hashlib.sha256(pickle.dumps(self.tokenizer) + repr(rest).encode()).hexdigest()

    def measure(self, sample: Sample, replaced: list[SampleError] | None = None) -> tuple[Bucket, int]:
        """Size of the example, and the tokens its transcript had to lose for it (0 for nearly all).

        Args:
            sample: the row.
            replaced: where given, silence and black stand in for media that cannot be used (see `build_example`), and the fault goes
                into this list.

        Raises:
            SampleError: the row cannot be used.
        """
        self.scheme.check(sample)
        size, excess = self._guarded(sample, measure, sample.problem, replaced), 0
        while (missing := size.tokens - self.max_tokens) > 0:  # a second pass only if the cut changes how its surroundings are tokenised
            excess += missing
            size = self._guarded(sample, measure, self._shortened(sample, excess), None if replaced is None else [])
        return size, excess

    def build(self, sample: Sample, excess: int = 0, replaced: list[SampleError] | None = None) -> Example:
        """The example of a sample, its transcript shortened by the `excess` tokens that `measure` found; `replaced` as there.

        It knows its head and its class, as the scheme has them.

        Raises:
            SampleError: the row cannot be used.
        """
        self.scheme.check(sample)
        example = self._guarded(sample, build_example, self._shortened(sample, excess), replaced)
        domain, label = self.scheme.place(sample.dataset, sample.answer)
        return dataclasses.replace(example, domain=domain, label=label)

    def _shortened(self, sample: Sample, excess: int) -> str:
        problem = shorten_transcript(sample.problem, excess, self.tokenizer.encode)
        if problem is None:
            raise sample.error(
                f"is {excess} tokens longer than the {self.max_tokens} of the largest bucket, and no transcript could lose as many",
                kind="too_long",
                field="problem",
            )
        return problem

    def _inputs(self, sample: Sample, problem: str) -> dict[str, Any]:
        return {
            "problem": problem,
            "tokenizer": self.tokenizer,
            "config": self.config,
            "options": self.options,
            "audios": sample.audios,
            "videos": sample.videos,
            "images": sample.images,
            "response": target_text(sample, self.bare_target) if self.with_target else None,
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
