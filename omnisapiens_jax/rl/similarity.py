"""How close two texts are in meaning: the cosine of their MiniLM embeddings, fast enough to sit inside the RL loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from omnisapiens_jax.convert.minilm import fetch_minilm, load_minilm
from omnisapiens_jax.models.embedder import EmbedderConfig, SentenceEmbedder

_ROWS = {8: 8, 64: 1, 256: 1}
"""Texts of one device call, by their length: few, because most are remembered and a call seldom has many new ones."""

LENGTHS = tuple(_ROWS)
"""Tokens a text is padded to: a label, a sentence, and the most the model reads."""

_REMEMBERED = 16384


class Similarity:
    """Cosine of predictions and golds. It is called as `rewards.Similarity` asks.

    Texts are embedded once and remembered (the least recently used are forgotten after 16,384, some 25 MB). There are as many compiled
    programs as `LENGTHS`, whatever the number of texts. In a multi-process run each process scores its own rows on its own device.
    """

    def __init__(self, embedder: SentenceEmbedder, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the caller's keeps its settings
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(LENGTHS[-1])
        graph, state = nnx.split(embedder)
        # One device of this process, whatever mesh the training runs under.
        self._mesh = jax.make_mesh((1,), ("alone",), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:1])
        self._whole = NamedSharding(self._mesh, PartitionSpec())
        self._state = jax.device_put(state, self._whole)
        self._remembered: OrderedDict[str, np.ndarray] = OrderedDict()

        def forward(state: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            with jax.default_matmul_precision("highest"):  # a reward should not depend on the accelerator's taste in bf16
                return nnx.merge(graph, state)(tokens, mask)

        self._forward = jax.jit(forward)

    @classmethod
    def load(cls) -> Similarity:
        """all-MiniLM-L6-v2, downloaded at first (see `convert.minilm.fetch_minilm` for what is raised offline)."""
        folder = fetch_minilm()
        embedder = load_minilm(folder / "model.safetensors", EmbedderConfig())
        return cls(embedder, Tokenizer.from_file(str(folder / "tokenizer.json")))

    def __call__(self, predictions: Sequence[str], golds: Sequence[str]) -> np.ndarray:
        """Cosines [N] float32 in [-1, 1] of N predictions and their golds.

        Raises:
            ValueError: they differ in number.
        """
        if len(predictions) != len(golds):
            raise ValueError(f"{len(predictions)} predictions but {len(golds)} golds")
        both = self.embed([*predictions, *golds])
        return np.sum(both[: len(predictions)] * both[len(predictions) :], axis=-1)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings [N, D] float32 of length 1. Text beyond 256 tokens is not read."""
        found = {text: self._remembered[text] for text in texts if text in self._remembered}
        found |= self._embed_new([text for text in dict.fromkeys(texts) if text not in found])
        for text in found:
            self._remembered[text] = found[text]
            self._remembered.move_to_end(text)
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return np.stack([found[text] for text in texts]) if texts else np.zeros((0, self._state["word"]["embedding"].shape[-1]), np.float32)

    def warm_up(self) -> None:
        """Compiles every program now, so that no later step does."""
        for length in LENGTHS:
            self._run([[0]], length).block_until_ready()

    def _embed_new(self, texts: list[str]) -> dict[str, np.ndarray]:
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        calls: list[tuple[list[int], jax.Array]] = []
        for shorter, length in zip((-1, *LENGTHS), LENGTHS, strict=False):
            fitting = [i for i, ids in enumerate(encoded) if shorter < len(ids) <= length]
            rows = _ROWS[length]
            for start in range(0, len(fitting), rows):
                chosen = fitting[start : start + rows]
                calls.append((chosen, self._run([encoded[i] for i in chosen], length)))  # the device works while we pad the next
        return {texts[i]: row for chosen, result in calls for i, row in zip(chosen, np.asarray(result), strict=False)}

    def _run(self, rows: list[list[int]], length: int) -> jax.Array:
        tokens = np.zeros((_ROWS[length], length), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
        with jax.set_mesh(self._mesh):
            return self._forward(self._state, *jax.device_put((tokens, mask), self._whole))
