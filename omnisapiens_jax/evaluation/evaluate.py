"""Answers to a whole split, sharded over the mesh, that go on where a killed run was."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnisapiens_jax.atlas.plan import Planner
from omnisapiens_jax.atlas.schema import Sample
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.evaluation.answers import Answer, AnswerLog, extract_answer
from omnisapiens_jax.generation.sampling import Generator, rollout_keys
from omnisapiens_jax.parallel.mesh import all_rows, put_batch
from omnisapiens_jax.processing.audio import SILENCE
from omnisapiens_jax.processing.chat import TAGS, transcript_span
from omnisapiens_jax.processing.tokenizers import Tokenizer
from omnisapiens_jax.processing.vision import grey_patches

MODALITIES = ("text", "audio", "video")  # those that can be blanked


Ask = Callable[[nnx.State, dict[str, jax.Array]], list[Answer]]
"""Parameters and a batch on the mesh in, the answers to its samples (of all processes) out."""


class Prompts(Protocol):
    """What is asked, such as `atlas.pipeline.Pipeline`."""

    @property
    def planner(self) -> Planner:
        """What is in which batch."""
        ...

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """This process's rows of the batches `start` to `stop - 1`."""
        ...


def answer_all(
    ask: Ask,
    params: nnx.State,
    pipeline: Prompts,
    source: Source,
    mesh: Mesh,
    path: Path,
    *,
    how: str,
    without: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """The answers to every sample, in the order of their ids; every process returns all of them, and they are in `path`.

    Batch by batch they go to a log beside `path` (`AnswerLog`), so that a run that was killed at any moment asks only for what it lacks.

    Args:
      ask: answers a batch, such as `greedy` makes it.
      params: that it does so with.
      pipeline: this process's prompts, whose `index` points into `source`.
      source: the rows.
      mesh: what batches are laid on.
      path: of the finished answers.
      how: the settings of `ask`; a log of others is refused.
      without: `audio` or `video`, to blank it (`text` is taken out of the samples before there are batches).
      progress: told how many batches are done.

    Raises:
      ValueError: the log in this place is of other rows, batches, settings or weights.
    """
    plan = _plan(pipeline, source, how, without, _digest(params, mesh))
    with AnswerLog(path, plan, writes=jax.process_index() == 0) as log:
        progress(len(log.batches))
        for _, batch in pipeline.batches(len(log.batches), pipeline.planner.steps_per_epoch):
            log.append(ask(params, put_batch(batch if without in ("", "text") else blank(batch, without), mesh)))
            progress(len(log.batches))
        return log.finish()


def greedy(generator: Generator, source: Source, tokenizer: Tokenizer) -> Ask:
    """Answers with the likeliest response to each prompt.

    Args:
      generator: samples one rollout at temperature 0; the parameters are its `view`.
      source: the rows that the `index` of a batch points into.
      tokenizer: decodes the responses.
    """

    def ask(view: nnx.State, batch: dict[str, jax.Array]) -> list[Answer]:
        responses = generator(view, batch, rollout_keys(0, 0, batch["index"], 1))
        answers = []
        for index, tokens, mask, logs in zip(
            *all_rows((batch["index"], responses.tokens, responses.mask, responses.log_probs)), strict=True
        ):
            if index >= 0:
                text = decode_response(tokenizer, tokens[0], mask[0])
                answers.append(_answer(source[int(index)], text, math.exp(float(logs[0][mask[0]].sum()))))
        return answers

    return ask


def decode_response(tokenizer: Tokenizer, tokens: np.ndarray, mask: np.ndarray) -> str:
    """Text of one response, `tokens [R]` up to the end that `mask [R]` shows, special tokens left out."""
    return tokenizer.decode(tokens[mask].tolist())


def question_of(problem: str) -> str:
    """What a free-form problem asks: without the tags of its media and without its transcript."""
    span = transcript_span(problem)
    text = problem if span is None else problem[: span[0]].rstrip().removesuffix("Transcript:") + problem[span[1] :]
    for tag in TAGS.values():
        text = text.replace(tag, "")
    return "\n".join(line for line in map(str.strip, text.splitlines()) if line)


def blank(batch: dict[str, np.ndarray], modality: str) -> dict[str, np.ndarray]:
    """A batch without one modality, its places left: `audio` becomes silence, `video` even grey.

    Words are tokens like all others, so `text` is taken out of the samples, with `WithoutTranscripts`, before there are batches.
    """
    if modality == "audio":
        return {**batch, "audio_chunks": np.full_like(batch["audio_chunks"], SILENCE)}
    if modality == "video":
        return {**batch, "patches": grey_patches(batch["patches"])}
    raise ValueError(f"cannot blank {modality!r} in a batch: audio or video")


def _answer(sample: Sample, text: str, likelihood: float) -> Answer:
    asked = question_of(sample.problem) if sample.kind == "qa" else ""
    return Answer(
        sample.id,
        sample.dataset,
        sample.answer,
        extract_answer(text),
        text,
        signature=sample.modality_signature,
        question=asked,
        likelihood=likelihood,
    )


def _plan(pipeline: Prompts, source: Source, how: str, without: str, weights: str) -> str:
    """A digest of all that says what the batches hold and how they are answered."""
    planner = pipeline.planner
    epoch = planner.epoch(0)
    parts = (source.fingerprint(), how, without, weights, [planner.buckets[b] for b in epoch.bucket])
    return hashlib.sha256("\n".join(map(repr, parts)).encode() + epoch.ids.astype("<i8").tobytes()).hexdigest()


def _digest(view: nnx.State, mesh: Mesh) -> str:
    """What tells these weights from others: a digest of each leaf's sum as integers, which is the same on every mesh."""
    return hashlib.sha256(np.asarray(_summed(mesh)(view)).tobytes()).hexdigest()


@functools.cache
def _summed(mesh: Mesh) -> Callable[[nnx.State], jax.Array]:
    def sums(view: nnx.State) -> jax.Array:
        bits = [jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") for leaf in jax.tree.leaves(view)]
        return jnp.stack([jnp.sum(leaf, dtype=jnp.uint32) for leaf in bits])

    return jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))
