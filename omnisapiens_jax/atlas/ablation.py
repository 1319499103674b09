"""Sources that lack something: what a model does without it tells what it used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from omnisapiens_jax.atlas.schema import MEDIA_FIELDS, Sample
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.processing.chat import transcript_span


@dataclasses.dataclass(frozen=True)
class WithoutTranscripts:
    """A source whose problems have lost the words of their transcript; question and options stay."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        span = transcript_span(sample.problem)
        if span is None:
            return sample
        return dataclasses.replace(sample, problem=sample.problem[: span[0]].rstrip() + sample.problem[span[1] :])

    def fingerprint(self) -> str:
        """Changes with the rows, and differs from that of the rows themselves."""
        return f"{self.source.fingerprint()} without transcripts"

    def stamp(self, index: int, fields: Sequence[str] = MEDIA_FIELDS) -> str:
        """That of the row itself."""
        return self.source.stamp(index, fields)

    def file(self, index: int) -> str:
        """That of the row itself."""
        return self.source.file(index)
