"""Prompts to batches and ids to text: what a user holds beside a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import Batch, build_example, collate
from omnisapiens_jax.processing.media import Source
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Processor:
    """The vocabulary, the model's shapes and the way of reading media that belong together.

    Raises ValueError when the vocabulary is not the model's.
    """

    tokenizer: Tokenizer
    config: ThinkerConfig
    options: ProcessingConfig = ProcessingConfig()

    def __post_init__(self) -> None:
        if self.tokenizer.ids != self.config.tokens:
            raise ValueError(
                f"the vocabulary's special tokens are {self.tokenizer.ids}, the model's {self.config.tokens}: put the tokenizer of the "
                "model that this one was made from beside the weights"
            )

    def __call__(
        self, problem: str, *, audios: Sequence[str | Source] = (), videos: Sequence[str | Source] = (), images: Sequence[str | Source] = ()
    ) -> Batch:
        """A batch of one row: the prompt with its media, ready for `Thinker` and `Generator`.

        Args:
          problem: text with a tag `<audio>`, `<video>` or `<image>` where each file belongs; tags that are missing come first.
          audios: files or their bytes, in the order of the tags; likewise `videos` and `images`.

        Raises:
          MediaError: a file cannot be decoded.
          ValueError: there are more tags than files.
        """
        example = build_example(
            problem=problem,
            tokenizer=self.tokenizer,
            config=self.config,
            options=self.options,
            audios=_sources(audios),
            videos=_sources(videos),
            images=_sources(images),
            name="the prompt",
        )
        return collate([example], example.size(), self.config)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response."""
        return self.tokenizer.decode(ids)


def _sources(media: Sequence[str | Source]) -> list[Source]:
    return [Path(one) if isinstance(one, str) else one for one in media]
