"""Safetensors files: the same bytes as the format's own package writes, and nothing believed that the package does not believe."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from omnisapiens_jax.processing.tensors import (
    DTYPES,
    ConversionError,
    HeldTensor,
    SafetensorsWriter,
    check_finite,
    read_finite,
    read_safetensors,
)

LOADABLE = [name for name, dtype in DTYPES.items() if not name.startswith("F8_")]  # by the package, as numpy arrays


def arrays() -> dict[str, np.ndarray]:
    """One of every dtype, and every kind of shape and name."""
    random = np.random.default_rng(0)
    found = {f"of.{name}": random.integers(0, 2, (3, 5)).astype(dtype) for name, dtype in DTYPES.items()}
    shaped = {"scalar": (), "empty": (0, 4), "flat": (7,), "deep": (2, 1, 3, 1, 2), 'quote " \\ \n \x7f ünïcode 😀': (2,)}
    return found | {name: random.standard_normal(shape).astype(np.float32) for name, shape in shaped.items()}


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    with SafetensorsWriter(path, {name: (value.dtype, value.shape) for name, value in tensors.items()}, metadata) as writer:
        for name in writer.order:
            writer.write(tensors[name])


def raw(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    text = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_package_and_we_write_the_same_bytes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(arrays(), tmp_path / "theirs", metadata)
    write(tmp_path / "ours", arrays(), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_the_package_writes_is_read_whole_or_by_rows(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "file", {"format": "pt"})
    found = read_safetensors(tmp_path / "file")
    assert found.keys() == arrays().keys()
    for name, wanted in arrays().items():
        tensor = found[name]
        assert (tensor.name, tensor.file, tensor.dtype, tensor.shape) == (name, tmp_path / "file", wanted.dtype, wanted.shape)
        assert tensor.read().tobytes() == wanted.tobytes()
        if wanted.ndim:
            for start, stop in ((0, 1), (1, 2), (1, None), (2, 99), (2, 1)):
                rows = tensor.read(start, stop)
                assert rows.shape == wanted[start:stop].shape and rows.tobytes() == wanted[start:stop].tobytes()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    save_file(arrays(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut"
    for length in [*range(0, len(content) - 64, 31), *range(len(content) - 64, len(content))]:
        cut.write_bytes(content[:length])
        with pytest.raises(ConversionError, match=re.escape(str(cut))):
            read_safetensors(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(ConversionError, match=r"is truncated or has a tail: its tensors end at byte [\d,]+, the file at"):
        read_safetensors(cut)


def test_a_file_that_shrinks_after_it_was_opened_is_told(tmp_path: Path) -> None:
    save_file({"weight": np.ones(100, np.float32)}, tmp_path / "file")
    tensor = read_safetensors(tmp_path / "file")["weight"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-1])
    with pytest.raises(ConversionError, match=r"file ends in the middle of weight; is it truncated\?"):
        tensor.read()
    (tmp_path / "file").unlink()
    with pytest.raises(FileNotFoundError, match=r"file: weight cannot be read \(No such file"):  # not the checkpoint's fault
        tensor.read(3, 4)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def entry(**other: Any) -> str:
    return json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | other)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', r"the header is broken \(given twice: a\)"),
        (f'{{"__metadata__":{{"x":"1","x":"2"}},"a":{ENTRY}}}', r"given twice: x"),
        (f'{{"a":{entry(dtype="F33")}}}', r"a has dtype 'F33'; known: BOOL, U8,"),
        (f'{{"a":{entry(dtype="F4")}}}', r"a has dtype 'F4'"),
        (f'{{"a":{entry(dtype=["F32"])}}}', r"a has dtype \['F32'\]"),
        (f'{{"a":{entry(shape=[2])}}}', r"a is F32 \[2\] but has 4 bytes"),
        (f'{{"a":{entry(shape=[-1])}}}', r"a cannot have shape \[-1\]"),
        (f'{{"a":{entry(shape=[True])}}}', r"a cannot have shape \[True\]"),
        (f'{{"a":{entry(shape=[1.0])}}}', r"a cannot have shape \[1\.0\]"),
        (f'{{"a":{entry(shape=[2**62, 2**62])}}}', r"a cannot have shape \[\d+, \d+\]: no machine addresses so much"),
        (f'{{"a":{entry(shape=[2**62, 2, 0], data_offsets=[0, 0])}}}', r"no machine addresses so much"),
        (f'{{"a":{entry(shape=[10**400])}}}', r"a cannot have shape \[1000"),
        (f'{{"a":{entry(shape=[1] * 65)}}}', r"a cannot have shape \[1, 1.* and 45 more\]"),
        (f'{{"a":{entry(data_offsets=[4, 0])}}}', r"a cannot lie at \[4, 0\]"),
        (f'{{"a":{entry(data_offsets=[0, 4, 8])}}}', r"a cannot lie at \[0, 4, 8\]"),
        (f'{{"a":{entry(data_offsets=[0, None])}}}', r"a cannot lie at \[0, None\]"),
        (f'{{"a":{entry(data_offsets=[4, 8])}}}', r"a begins at byte 4 of the data, but the tensors before it end at 0"),
        (f'{{"a":{ENTRY},"b":{ENTRY}}}', r"b begins at byte 0 of the data, but the tensors before it end at 4"),
        (f'{{"a":{ENTRY},"b":{entry(data_offsets=[4, 8])}}}', r"is truncated or has a tail"),
        ('{"a":{"dtype":"F32","shape":[1]}}', r"the header does not describe a by dtype, shape and data_offsets"),
        ('{"a":3}', r"the header does not describe a by"),
        ("[1]", r"the header is not a JSON object"),
        ("", r"the header is broken"),
        (b'{"\xff":3}', r"the header is broken \('utf-8' codec"),
        ('{"a":' * 100_000, r"the header is broken \(maximum recursion depth"),
        (f'{{"a":{ENTRY[:-1]},"more":{"[" * 200}{"]" * 200}}}}}', r"the header is broken \(.*recursion limit exceeded"),
        (f'{{"a":{ENTRY[:-1]},"more":NaN}}}}', r"the header is broken"),
        (f'{{"\\ud800":{ENTRY}}}', r"the header is broken"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', r"the header is broken"),
        (f'{{"__metadata__":{{"x":1}},"a":{ENTRY}}}', r"the header is broken"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: str | bytes, said: str) -> None:
    path = raw(tmp_path / "model.safetensors", header, b"\0" * 4)
    with pytest.raises(ConversionError, match=rf"model\.safetensors.*{said}"):
        read_safetensors(path)


def test_a_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    for length in (5, 2**31, 2**63, 2**64 - 1):
        (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + b"{}  ")
        with pytest.raises(ConversionError, match=rf"truncated or not a safetensors file \(12 bytes, a header of {length:,}\)"):
            read_safetensors(tmp_path / "file")
    with pytest.raises(ConversionError, match=r"nowhere cannot be read \(No such file"):
        read_safetensors(tmp_path / "nowhere")
    with pytest.raises(ConversionError, match=r"cannot be read \(Is a directory"):
        read_safetensors(tmp_path)


def test_what_the_format_allows_beyond_the_usual_is_read(tmp_path: Path) -> None:
    free = f' {{"__metadata__":null, "a":{ENTRY[:-1]},"more":{{"x":[1.5]}}}},\n"z":{entry(shape=[0, 2**60], data_offsets=[4, 4])}}} '
    assert_as_the_package_says(raw(tmp_path / "file", free, b"\0\0\x80\x3f"))
    assert read_safetensors(tmp_path / "file")["a"].read().tolist() == [1.0]


def assert_as_the_package_says(path: Path) -> None:
    """Refused in our words if the package refuses; otherwise the same tensors."""
    try:
        with safe_open(path, framework="np") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        wanted = load_file(path)
    except (SafetensorError, ValueError):  # ValueError: numpy has no such shape
        with pytest.raises(ConversionError, match=re.escape(str(path))):
            read_safetensors(path)
        return
    found = read_safetensors(path)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype and tensor.read().tobytes() == wanted[name].tobytes()


SIZES = [0, 1, 2, 3, 4, 5, 8, 16, 2**16, 2**31, 2**48, 2**61, 2**63, 2**64, -1, -4]
ODD = [*SIZES, None, True, False, 1.0, 1e300, "1", "\0", [], [1], {}]
NAMES = ["a", "b", "c", "__metadata__", "", "\ud800", "ü", "dtype", "more"]
NOISE = ["", " ", "-", "0", ".", "e9", '"', "\\", "{", "]", ",", "NaN", "\ufeff", "\t"]


def bent_header(random: Random) -> tuple[str, bytes]:
    """A header that fits its data, bent in up to two places, and sometimes no JSON any more."""
    entries: list[tuple[str, Any]] = []
    end = 0
    for name in ["a", "b", "c", "d.weight"][: random.randint(0, 4)]:
        dtype, shape = random.choice(LOADABLE), [random.randint(0, 4) for _ in range(random.randint(0, 3))]
        size = math.prod(shape) * DTYPES[dtype].itemsize
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}))
        end += size
    for _ in range(random.choice([0, 1, 1, 2])) if entries else ():
        place = random.randrange(len(entries))
        entries[place] = bent(random, *entries[place])
    metadata = {random.choice(NAMES): random.choice(["pt", *ODD]) for _ in range(random.randint(0, 2))}
    text = json.dumps(dict(entries) | ({"__metadata__": metadata} if random.random() < 0.3 else {}), ensure_ascii=random.random() < 0.5)
    for _ in range(random.choice([0, 0, 0, 1, 2])):
        place = random.randint(0, len(text))
        text = text[:place] + random.choice(NOISE) + text[place + random.randint(0, 3) :]
    return text, bytes(range(256))[: max(0, end + random.choice([0, 0, 0, 0, -1, 1]))]


def bent(random: Random, name: str, described: Any) -> tuple[str, Any]:
    numbers = random.choices(ODD, k=random.randint(0, 3))
    field = random.choice(["", "name", "dtype", "shape", "axes", "data_offsets", "more"])
    match field if isinstance(described, dict) else "":
        case "":
            return name, random.choice(ODD)
        case "name":
            return random.choice(NAMES), described
        case "dtype":
            return name, described | {"dtype": random.choice([*LOADABLE, "f32", "F128", *ODD])}
        case "axes":
            return name, described | {"shape": [random.choice(SIZES), random.randint(0, 4)]}
        case "more":
            return name, described | {random.choice(NAMES): random.choice(ODD)}
        case _:
            return name, described | {field: random.choice([numbers, random.choice(ODD)])}


@settings(max_examples=2_500)
@given(random=st.randoms(use_true_random=True))
def test_no_header_is_believed_that_the_package_does_not_believe(tmp_path_factory: pytest.TempPathFactory, random: Random) -> None:
    header, data = bent_header(random)
    note(header)
    path = raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header.encode("utf-8", "surrogatepass"), data)
    if given_twice(header):
        with pytest.raises(ConversionError, match=re.escape(str(path))):
            read_safetensors(path)
    else:
        assert_as_the_package_says(path)


def given_twice(header: str) -> bool:
    """The package takes the last of two, we take neither."""
    found = False

    def watch(pairs: list[tuple[str, Any]]) -> None:
        nonlocal found
        found |= len({name for name, _ in pairs}) < len(pairs)

    try:
        json.loads(header, object_pairs_hook=watch)
    except ValueError:
        return False
    return found


def test_a_dtype_the_format_has_not_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="a is complex128, which safetensors files cannot hold"):
        SafetensorsWriter(tmp_path / "file", {"a": (np.dtype(np.complex128), (1,))})
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda dtype: np.dtype(dtype).name)
def test_infinite_and_nan_are_found_and_all_else_passes(dtype: type) -> None:
    limits = ml_dtypes.finfo(dtype)
    edges = np.array([0.0, -0.0, limits.max, limits.min, limits.smallest_subnormal, limits.tiny], dtype)
    many = np.resize(edges, (1000, 700))  # more than one piece of those that are looked at in turn
    check_finite(many, HeldTensor("weight", many))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        many[-1, -1] = bad
        with pytest.raises(ConversionError, match="memory: 1 of 700,000 values read of weight are infinite or NaN; a model with them"):
            check_finite(many, HeldTensor("weight", many))


def test_a_cast_that_overflows_is_told_from_a_broken_checkpoint() -> None:
    tensor = HeldTensor("weight", np.array([1.0, 70_000.0], np.float32))
    assert read_finite(tensor, 0, 2, DTYPES["BF16"]).dtype == ml_dtypes.bfloat16
    with pytest.raises(ConversionError, match="1 of 2 values read of weight are infinite or NaN as float16: they are too large for it"):
        read_finite(tensor, 0, 2, DTYPES["F16"])


def test_a_header_of_many_names_is_refused_at_once(tmp_path: Path) -> None:
    """Work that grew with the square of the names would take minutes."""
    names = [f"layer.{number}" for number in range(30_000)]
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(f'"{name}":{entry}' for name in [*names, "layer.7"]) + "}").encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    begun = time.process_time()
    with pytest.raises(ConversionError, match=r"given twice: layer\.7\)"):
        read_safetensors(tmp_path / "file")
    assert time.process_time() - begun < 3
