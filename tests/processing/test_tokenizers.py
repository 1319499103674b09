"""Both vocabularies: no text is lost, the special tokens are where the model expects them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.models.config import PRESETS, TokenIds
from omnisapiens_jax.processing import chat
from omnisapiens_jax.processing.tokenizers import SPECIAL_TOKENS, MiniTokenizer, QwenTokenizer
from tests.oracle import run_oracle
from tests.qwen_vocabulary import qwen_tokenizer
from tools.train_tokenizer import main, train

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
HARD = [
    "",
    " ",
    "\n",
    "  two  spaces  ",
    "a\nb\n\n c\t",
    "\u2581 \u2581",
    "é😀",
    "\x00\x01",
    "愤怒 of 3.14%",
    "<think>x</think>\\boxed{sad}",
    "\r\n",
]


@pytest.fixture(scope="module")
def qwen() -> QwenTokenizer:
    return QwenTokenizer(qwen_tokenizer())


def test_mini_has_the_ids_of_its_preset(mini_tokenizer: MiniTokenizer):
    assert mini_tokenizer.ids == PRESETS["mini"].tokens
    assert mini_tokenizer.vocab_size == PRESETS["mini"].text.vocab_size
    for number, piece in enumerate(SPECIAL_TOKENS.values()):
        assert mini_tokenizer.encode(f"a{piece}b")[1] == number
        assert mini_tokenizer.decode([number]) == ""
        assert mini_tokenizer.decode([number], skip_special=False) == piece


@pytest.mark.parametrize("text", HARD)
def test_mini_keeps_every_character(mini_tokenizer: MiniTokenizer, text: str):
    assert mini_tokenizer.decode(mini_tokenizer.encode(text), skip_special=False) == text


@given(text=TEXT)
def test_mini_round_trip(mini_tokenizer: MiniTokenizer, text: str):
    ids = mini_tokenizer.encode(text)
    assert mini_tokenizer.decode(ids, skip_special=False) == text
    assert all(0 <= i < mini_tokenizer.vocab_size for i in ids)


@given(ids=st.lists(st.integers(0, 1100), max_size=30))
def test_mini_decodes_whatever_a_policy_samples(mini_tokenizer: MiniTokenizer, ids: list[int]):
    assert isinstance(mini_tokenizer.decode(ids), str)


def test_the_training_script_gives_the_same_file_twice(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(3)
    rows = [{"problem": " ".join("".join(rng.choice(list("abcdefghij"), 4)) for _ in range(9)), "answer": "sad"} for _ in range(400)]
    texts = tmp_path / "rows.jsonl"
    texts.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", str(texts), str(tmp_path / "a.model")])
    main()
    assert "1024 pieces" in capsys.readouterr().out
    train([text for row in rows for text in row.values()], tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_vocabulary_may_fold_case_and_then_keeps_the_sentences_of_prompts_whole(tmp_path):
    rng = np.random.default_rng(3)
    words = [" ".join("".join(rng.choice(list("abcdefghij"), 4)) for _ in range(9)) for _ in range(400)]
    train(words, tmp_path / "folded.model", 512, fold_case=True)
    folded = MiniTokenizer(tmp_path / "folded.model")
    assert folded.encode(f"{words[0].upper()}\n<|AUDIO|>") == folded.encode(f"{words[0]}\n<|AUDIO|>")
    assert folded.encode("<|AUDIO|>") == [folded.ids.audio] and len(folded.encode(chat.OMNI_SYSTEM)) == 1


def test_a_missing_vocabulary_says_where_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools/train_tokenizer\.py"):
        MiniTokenizer(tmp_path / "no.model")
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        QwenTokenizer(tmp_path)


def test_qwen_ids_and_size(qwen: QwenTokenizer):
    assert qwen.ids == TokenIds()
    assert qwen.vocab_size == 151665
    assert qwen.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert qwen.decode([151644, 872, 151663, 152000]) == "user<|repo_name|>"


@given(text=TEXT)
def test_qwen_round_trip_is_nfc(qwen: QwenTokenizer, text: str):
    import unicodedata

    assert qwen.decode(qwen.encode(text), skip_special=False) == unicodedata.normalize("NFC", text)


@pytest.mark.oracle
def test_qwen_equals_transformers(qwen: QwenTokenizer):
    rng = np.random.default_rng(0)
    pool = list("abc XYZ  019'st\n\t.,éß愤怒😀  -_<>|") + ["<|im_end|>", "<|AUDIO|>", "don't", " the"]
    texts = [*HARD, *("".join(rng.choice(pool, rng.integers(1, 40))) for _ in range(300))]
    theirs = run_oracle("qwen_tokens", tokenizer=str(qwen_tokenizer().parent), texts=texts)
    for number, text in enumerate(texts):
        assert qwen.encode(text) == theirs[f"ids{number}"].tolist(), repr(text)
