"""Trains the small vocabulary of the `mini` preset: python tools/train_tokenizer.py TEXTS OUT.model

TEXTS is a .jsonl file, whose `problem`, `answer` and `rationale` strings are read, or a plain text file. The same input
gives the same file.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from omnisapiens_jax.models.config import TokenIds
from omnisapiens_jax.processing import chat
from omnisapiens_jax.processing.tokenizers import SPECIAL_TOKENS, MiniTokenizer

VOCAB_SIZE = 1024


def train(texts: Iterable[str], out: Path, vocab_size: int = VOCAB_SIZE, *, fold_case: bool = False) -> None:
    """Writes a sentencepiece model whose ids 0.. are SPECIAL_TOKENS in order; everything it never saw is spelt in bytes.

    With `fold_case` it reads text as NFKC without regard to case, which a model of a few thousand texts cannot learn to ignore.
    """
    # Sentences that every prompt repeats are one piece each, and so are the marks of an answer: a prompt then costs about 70 text
    # tokens instead of 180, which is what training on a laptop lives on.
    sentences = [s for prompt in chat.FORMAT_PROMPTS.values() for s in re.split(r"(?<=\.) ", prompt) if s]
    whole = [chat.OMNI_SYSTEM, chat.PLAIN_SYSTEM, *sentences, "<think>", "</think>", "\\boxed{"]
    if fold_case:
        whole = [text.casefold() for text in whole]
    roles = ["system", "user", "assistant"] * 100  # as frequent in prompts as the commonest words of the texts
    with out.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for text in [*texts, *roles, "}"] for line in text.split("\n") if line.strip()]),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=[*SPECIAL_TOKENS.values(), *(text.replace(" ", "\u2581") for text in whole)],
            unk_id=len(SPECIAL_TOKENS) + len(whole),
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="nfkc_cf" if fold_case else "identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=1 << 16,
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = MiniTokenizer(out)
    if tokenizer.ids != TokenIds(*range(len(SPECIAL_TOKENS))):
        raise RuntimeError(f"{out}: the special tokens did not get the first ids: {tokenizer.ids}")


def read_texts(path: Path) -> list[str]:
    """The texts of a .jsonl or plain file."""
    if path.suffix != ".jsonl":
        return path.read_text().split("\n")
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [row[key] for row in rows for key in ("problem", "answer", "rationale") if row.get(key)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--fold-case", action="store_true", help="read text without regard to case")
    args = parser.parse_args()
    texts = read_texts(args.texts)
    train(texts, args.out, args.vocab_size, fold_case=args.fold_case)
    tokenizer = MiniTokenizer(args.out)
    spent = sum(len(tokenizer.encode(text)) for text in texts)
    density = sum(map(len, texts)) / max(spent, 1)
    print(f"{args.out}: {tokenizer.vocab_size} pieces, {density:.2f} characters a token over {len(texts)} texts")


if __name__ == "__main__":
    main()
