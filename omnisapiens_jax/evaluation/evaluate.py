"""Greedy answers over a whole split, and what they are worth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.generation.sampling import Generator, rollout_keys
from omnisapiens_jax.parallel.mesh import all_rows, put_batch
from omnisapiens_jax.processing.audio import SILENCE
from omnisapiens_jax.processing.example import Batch
from omnisapiens_jax.processing.tokenizers import Tokenizer
from omnisapiens_jax.processing.vision import grey_patches
from omnisapiens_jax.rl.rewards import RewardConfig, extract_prediction

MODALITIES = ("text", "audio", "video")  # those that can be blanked


@dataclasses.dataclass(frozen=True)
class Answer:
    """One evaluated sample."""

    id: int
    dataset: str
    gold: str
    prediction: str
    text: str

    @property
    def correct(self) -> bool:
        """Whether the prediction is the gold answer, white space and case aside."""
        return self.prediction == self.gold.strip().lower()


def answer_all(
    generator: Generator, view: nnx.State, batches: Iterable[Batch], source: Source, tokenizer: Tokenizer, mesh: Mesh
) -> list[Answer]:
    """Greedy answers to every sample, in the order of their ids; every process returns all of them.

    `generator` samples one rollout at temperature 0; `batches` give this process's prompts, whose `index` points into `source`.
    """
    answers = []
    for batch in batches:
        on_device = put_batch(batch, mesh)
        responses = generator(view, on_device, rollout_keys(0, 0, on_device["index"], 1))
        for index, tokens, mask in zip(*all_rows((on_device["index"], responses.tokens, responses.mask)), strict=True):
            if index >= 0:
                sample, text = source[int(index)], decode_response(tokenizer, tokens[0], mask[0])
                answers.append(Answer(sample.id, sample.dataset, sample.answer, extract_prediction(text, RewardConfig()), text))
    return sorted(answers, key=lambda answer: answer.id)


def decode_response(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Text of one response, `tokens [R]` up to the end that `mask [R]` shows, special tokens left out."""
    return tokenizer.decode(tokens[mask].tolist())


def blank(batch: dict[str, np.ndarray], modality: str) -> dict[str, np.ndarray]:
    """A batch without one modality, its places left: `audio` becomes silence, `video` even grey.

    Words are tokens like all others, so `text` is taken out of the samples, with `WithoutTranscripts`, before there are batches.
    """
    if modality == "audio":
        return {**batch, "audio_chunks": np.full_like(batch["audio_chunks"], SILENCE)}
    if modality == "video":
        return {**batch, "patches": grey_patches(batch["patches"])}
    raise ValueError(f"cannot blank {modality!r} in a batch: audio or video")


def accuracy(answers: list[Answer]) -> float:
    """Share of correct answers."""
    return float(np.mean([answer.correct for answer in answers]))


def save_answers(path: Path, answers: list[Answer]) -> None:
    """Writes answers as JSON, whole or not at all."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps([dataclasses.asdict(answer) for answer in answers], indent=1, ensure_ascii=False))
    draft.replace(path)


def load_answers(path: Path) -> list[Answer]:
    """Reads what `save_answers` wrote."""
    return [Answer(**row) for row in json.loads(path.read_text())]
