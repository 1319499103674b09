"""Greedy answers over a whole split, and what they are worth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from omnisapiens_jax.atlas.schema import Sample
from omnisapiens_jax.generation.sampling import Generator, rollout_keys
from omnisapiens_jax.parallel.mesh import put_batch
from omnisapiens_jax.processing.tokenizers import Tokenizer
from omnisapiens_jax.rl.rewards import RewardConfig, extract_prediction

Batches = Iterator[tuple[dict[str, Any], list[Sample | None]]]

SILENCE = -1.5  # log-mel of digital silence


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


def answer_all(generator: Generator, view: nnx.State, batches: Batches, tokenizer: Tokenizer, mesh: Mesh) -> list[Answer]:
    """Greedy answers to every sample, in the order of their ids.

    `generator` samples one rollout at temperature 0; `batches` give prompts and their samples (None where a slot is masked).
    """
    answers = []
    for batch, samples in batches:
        on_device = put_batch(batch, mesh)
        keys = rollout_keys(0, 0, on_device["index"].astype(jnp.int32), 1)
        responses = jax.device_get(generator(view, on_device, keys))
        for i, sample in enumerate(samples):
            if sample is not None:
                text = decode_response(tokenizer, responses.tokens[i, 0], responses.mask[i, 0])
                answers.append(Answer(sample.id, sample.dataset, sample.answer, extract_prediction(text, RewardConfig()), text))
    return sorted(answers, key=lambda answer: answer.id)


def decode_response(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Text of one response, `tokens [R]` up to the end that `mask [R]` shows, special tokens left out."""
    return tokenizer.decode(tokens[mask].tolist())


def blank(modality: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Takes one modality out of a batch and leaves its places: `audio` becomes silence, `video` even grey (after normalisation: 0)."""
    if modality == "audio":
        return lambda batch: {**batch, "audio_chunks": np.full_like(batch["audio_chunks"], SILENCE)}
    if modality == "video":
        return lambda batch: {**batch, "patches": np.zeros_like(batch["patches"])}
    raise ValueError(f"cannot blank {modality!r}: audio or video")


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
