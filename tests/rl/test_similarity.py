"""The similarity of the reward: published numbers with the published weights; batching, memory and compiling with a tiny model."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from tokenizers import Tokenizer, models, pre_tokenizers

from omnisapiens_jax.convert.minilm import load_minilm
from omnisapiens_jax.models.embedder import SentenceEmbedder
from omnisapiens_jax.rl import similarity as module
from omnisapiens_jax.rl.similarity import LENGTHS, Similarity
from tests.minilm import TINY, tiny_file

WORDS = [f"w{i}" for i in range(TINY.vocab_size)]


@pytest.fixture(scope="module")
def minilm() -> Similarity:
    return Similarity.load()


@pytest.fixture
def embedder(tmp_path: Path) -> SentenceEmbedder:
    return load_minilm(tiny_file(tmp_path / "model.safetensors"), TINY)


@pytest.fixture
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.enable_padding(length=128)  # as the published file has it; it must not reach the model
    return tokenizer


def test_published_cosines(minilm: Similarity) -> None:
    cosines = minilm(["The cat sits outside"] * 2 + ["ANGER", ""], ["A feline rests outdoors", "A man is playing guitar", "anger", "anger"])
    np.testing.assert_allclose(cosines[:3], [0.6134, 0.0363, 1.0], atol=5e-5)
    assert -1 <= cosines[3] < 0.5
    assert cosines.dtype == np.float32


def test_near_words_are_nearer(minilm: Similarity) -> None:
    near, far = minilm(["joy", "joy"], ["happiness", "major depression"])
    assert near > far + 0.2


def text(length: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def test_any_mixture_of_lengths_gives_each_text_its_own_embedding(embedder: SentenceEmbedder, tokenizer: Tokenizer) -> None:
    lengths = [0, 1, 8, 9, 64, 65, 256, 300, 1, 8] + [3] * 70
    texts = [text(length, seed) for seed, length in enumerate(lengths)]
    got = Similarity(embedder, tokenizer).embed(texts)
    tokens, mask = np.zeros((len(texts), 256), np.int32), np.zeros((len(texts), 256), bool)
    for i, words in enumerate(content.split()[:256] for content in texts):
        tokens[i, : len(words)] = [WORDS.index(word) for word in words]
        mask[i, : len(words)] = True
    np.testing.assert_allclose(got, jax.jit(embedder)(tokens, mask), atol=2e-6)
    assert not got[0].any()
    assert Similarity(embedder, tokenizer)([], []).shape == (0,)


def test_compiles_a_program_a_length_and_none_after_warming_up(tokenizer: Tokenizer) -> None:
    traced = []

    class Counting(SentenceEmbedder):
        def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            traced.append(tokens.shape)
            return super().__call__(tokens, mask)

    similarity = Similarity(Counting(TINY, rngs=nnx.Rngs(0)), tokenizer)
    similarity.warm_up()
    assert sorted(length for _, length in traced) == sorted(LENGTHS)
    for count in (1, 5, 64, 65, 200):
        similarity([text(1 + i % 90, 1000 + count + i) for i in range(count)], [text(2, i) for i in range(count)])
    assert len(traced) == len(LENGTHS)


def test_a_text_is_embedded_once_until_it_is_forgotten(
    embedder: SentenceEmbedder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity = Similarity(embedder, tokenizer)
    run: list[int] = []
    inner = similarity._run
    monkeypatch.setattr(similarity, "_run", lambda rows, length: (run.append(len(rows)), inner(rows, length))[1])
    first = similarity(["w1", "w2", "w1", "w1"], ["w2", "w2", "w3", "w1"])
    assert run == [3]
    np.testing.assert_array_equal(similarity(["w1", "w2", "w1", "w1"], ["w2", "w2", "w3", "w1"]), first)
    assert run == [3]
    np.testing.assert_allclose(first[[1, 3]], 1, atol=1e-6)

    monkeypatch.setattr(module, "_REMEMBERED", 2)
    similarity.embed(["w1"])
    similarity.embed(["w4"])  # leaves w1 and w4, the last two used
    similarity.embed(["w1", "w4"])
    assert run == [3, 1]
    similarity.embed(["w2"])
    assert run == [3, 1, 1]
    assert similarity.embed([f"w{i}" for i in range(9)]).shape == (9, TINY.hidden_size)  # more at once than is remembered


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_works_under_the_trainings_mesh(embedder: SentenceEmbedder, tokenizer: Tokenizer, kind: AxisType) -> None:
    alone = Similarity(embedder, tokenizer)(["w1 w2"], ["w3"])
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(Similarity(embedder, tokenizer)(["w1 w2"], ["w3"]), alone)


def test_counts_must_agree(embedder: SentenceEmbedder, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="2 predictions but 1 golds"):
        Similarity(embedder, tokenizer)(["a", "b"], ["a"])
