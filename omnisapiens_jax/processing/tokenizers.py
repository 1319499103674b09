"""Text to ids and back: one protocol, two vocabularies. Both parse the literal special tokens such as `<|im_start|>`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer as BpeTokenizer

from omnisapiens_jax.models.config import TokenIds

# The literal of every structural token, by the name of its field in TokenIds.
SPECIAL_TOKENS = {
    "pad": "<|endoftext|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "audio": "<|AUDIO|>",
    "audio_bos": "<|audio_bos|>",
    "audio_eos": "<|audio_eos|>",
    "vision_bos": "<|vision_bos|>",
    "vision_eos": "<|vision_eos|>",
    "image": "<|IMAGE|>",
    "video": "<|VIDEO|>",
}


class Tokenizer(Protocol):
    """What the rest of the code asks of a vocabulary."""

    ids: TokenIds
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written in it become their single id, nothing is added."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; `skip_special` drops the special tokens. Ids that form no valid UTF-8 become U+FFFD."""
        ...


class QwenTokenizer:
    """The published byte-level BPE, read from a `tokenizer.json` (or the directory that holds one)."""

    def __init__(self, path: str | Path):
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no tokenizer.json; pass the directory of a Qwen2.5-Omni checkpoint or the file itself")
        try:
            self._tokenizer = BpeTokenizer.from_file(str(file))
        except Exception as reason:  # the library raises nothing more special
            raise ValueError(f"{file}: not a readable tokenizer.json, perhaps cut off; copy it again ({reason})") from reason
        self.ids = _find_special_tokens(self._tokenizer.token_to_id, str(file))
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`. Text is normalised to NFC, as the published vocabulary demands."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See `Tokenizer.decode`. Ids past the vocabulary (unused rows of the embedding) decode to nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)


class MiniTokenizer:
    """The bundled small vocabulary: a sentencepiece model trained by `tools/train_tokenizer.py`. What it never saw is spelt in bytes."""

    def __init__(self, path: str | Path):
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no sentencepiece model; train one with tools/train_tokenizer.py")
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        unknown = self._model.unk_id()

        def find(piece: str) -> int | None:
            found = self._model.piece_to_id(piece)
            return None if found == unknown else found

        self.ids = _find_special_tokens(find, str(file))
        self.vocab_size = self._model.vocab_size()
        self._special = frozenset(find(piece) for piece in SPECIAL_TOKENS.values()) | {unknown}
        # sentencepiece writes a space as this character, so a real one must go through its bytes to survive.
        self._escape = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`. The text is taken as it is: no normalisation, every space and newline kept."""
        ids: list[int] = []
        for number, part in enumerate(text.split(_SPACE_MARK)):
            ids += (self._escape if number else []) + self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """See `Tokenizer.decode`."""
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size and not (skip_special and int(i) in self._special)]
        return self._model.decode(kept)


_SPACE_MARK = "\u2581"


def open_tokenizer(folder: Path) -> Tokenizer:
    """The vocabulary that lies in the directory of a checkpoint.

    Raises:
      FileNotFoundError: there is none.
    """
    if (folder / "tokenizer.json").is_file():
        return QwenTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return MiniTokenizer(folder / "tokenizer.model")
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model; copy that of the model it was made from there")


def _find_special_tokens(find: Callable[[str], int | None], file: str) -> TokenIds:
    found = {field: find(piece) for field, piece in SPECIAL_TOKENS.items()}
    known = {field: number for field, number in found.items() if number is not None}
    if missing := [SPECIAL_TOKENS[field] for field in found if field not in known]:
        raise ValueError(f"{file}: not an omni vocabulary, it has no {', '.join(missing)}")
    return TokenIds(**known)
