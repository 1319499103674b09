"""Files of `torch.save` that are hostile or broken: refused by a ConversionError, with nothing executed and little memory taken."""

from __future__ import annotations

import os
import pickle
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.processing.tensors import ConversionError
from omnisapiens_jax.processing.torch_files import read_torch_file, write_torch_file
from tests.oracle import run_oracle
from tests.pickles import FLOATS, Call, Name, Persistent, archive, pickled, stored, tensor


class Gadget:
    """Unpickled the ordinary way it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._made = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._made


# What each is refused for naming, and what it does.
GADGETS: dict[str, Callable[[Path], Gadget]] = {
    r"posix\.system": lambda file: Gadget(os.system, f"touch {file}"),
    r"posix\.mkdir": lambda file: Gadget(os.mkdir, file),
    r"(subprocess|commands)\.check_call": lambda file: Gadget(subprocess.check_call, ["touch", str(file)]),
    r"(builtins|__builtin__)\.eval": lambda file: Gadget(eval, f"open({str(file)!r}, 'w')"),
    r"(builtins|__builtin__)\.exec": lambda file: Gadget(exec, f"open({str(file)!r}, 'w')"),
    r"_?io\.open": lambda file: Gadget(open, str(file), "w"),
    r"(__builtin__\.getattr|pathlib\.Path\.touch)": lambda file: Gadget(Path.touch, file),
}
PLACES: dict[str, Callable[[bytes], Any]] = {
    "alone": lambda program: program,
    "as a shape": tensor,
    "as a storage": lambda program: [tensor(key=program)],
    "as a state": lambda program: {"weight": Call(Name("torch.distributed.device_mesh", "DeviceMesh"), (), program, pickle.NEWOBJ)},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("named", GADGETS)
def test_nothing_is_executed(tmp_path: Path, named: str, protocol: int, place: str) -> None:
    victim = tmp_path / "victim"
    program = pickle.dumps(GADGETS[named](victim), protocol)
    pickle.loads(program)
    assert victim.exists()  # it does what it is to do
    victim.rmdir() if victim.is_dir() else victim.unlink()
    with pytest.raises(ConversionError, match=rf"hostile\.pt is refused: it names '{named}', and only tensors .*Nothing was executed"):
        read_torch_file(archive(tmp_path / "hostile.pt", PLACES[place](program.removesuffix(pickle.STOP))))
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    [
        "torch load",
        "torch.serialization load",
        "torch.storage _load_from_bytes",
        "torch.hub load",
        "torch.jit load",
        "torch._utils _rebuild_sparse_tensor",
        "torch Size.__class__",
        "torch.Size __class__",
        "torch.distributed.tensor DTensor.from_local",
        "torch.distributed.distributed_c10d _world",
        "collections defaultdict",
        "collections OrderedDict.fromkeys",
        "numpy.core.multiarray fromfile",
        "numpy.lib.npyio load",
        "numpy load",
        "builtins __import__",
        "builtins getattr",
        "functools partial",
        "operator attrgetter",
        "importlib import_module",
        "omnisapiens_jax.processing.torch_files write_torch_file",
        "pickle Unpickler",
        " ",
    ],
)
def test_everything_else_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    module, attribute = name.split(" ")
    stacked = pickled(module) + pickled(attribute) + pickle.STACK_GLOBAL
    for function in (Name(module, attribute), stacked):
        with pytest.raises(ConversionError, match=rf"it names '{module}\.{attribute}'"):
            read_torch_file(archive(tmp_path / "hostile.pt", Call(function, ("x",))))


SIZE = Name("torch", "Size")
PROGRAMS: dict[str, Any] = {
    "calls a string": Call("os.system", ("true",)),
    "calls what a call made": Call(Call(SIZE, ((1,),)), ()),
    "calls without a tuple": Call(SIZE, "no tuple"),
    "makes an object of a string": Call("torch.Size", (), None, pickle.NEWOBJ),
    "sets the state of a string": pickled("text") + pickled({"__class__": SIZE}) + pickle.BUILD,
    "sets the state of a list": pickled([1]) + pickled({"append": 1}) + pickle.BUILD,
    "sets the state of a global": pickled(SIZE) + pickled({"__call__": 1}) + pickle.BUILD,
    "puts an item into a call": pickled(Call(SIZE, ())) + pickled("key") + pickled("value") + pickle.SETITEM,
    "INST": pickle.MARK + pickle.INST + b"posix\nsystem\n",
    "OBJ": pickle.MARK + pickled(SIZE) + pickle.OBJ,
    "NEWOBJ_EX": pickled(SIZE) + pickled(()) + pickled({}) + pickle.NEWOBJ_EX,
    "EXT1": pickle.EXT1 + b"\1",
    "PERSID": pickle.PERSID + b"storage\n",
    "STRING": pickle.STRING + b"'x'\n",
    "DUP": pickled("text") + pickle.DUP,
    "BYTEARRAY8": pickle.BYTEARRAY8 + (1 << 40).to_bytes(8, "little"),
    "a tuple as a key": {("a", "tuple"): 1},
    "a real number as a key": {1.5: 1},
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_no_instruction_does_more_than_put_plain_things_together(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConversionError, match=r"hostile\.pt is refused: it (calls|changes|has).*Nothing was executed"):
        read_torch_file(archive(tmp_path / "hostile.pt", PROGRAMS[what]))


V2, V3, PARAMETER = (Name("torch._utils", f"_rebuild_{what}") for what in ("tensor_v2", "tensor_v3", "parameter"))
SUBCLASS = Name("torch._tensor", "_rebuild_from_type_v2")
TENSORS: dict[str, Any] = {
    "larger than its storage": tensor((3, 5), (5, 1)),
    "beyond its storage": tensor(offset=1),
    "strides beyond its storage": tensor((2, 4), (9, 1)),
    "far larger than its storage": tensor((1 << 40,), (1,)),
    "a terabyte of one value": tensor((1 << 38,), (0,)),
    "more values than the storage has": tensor((13,), (0,)),
    "an axis beyond all numbers": tensor((1 << 62,), (1,)),
    "axes beyond all numbers": tensor((1 << 47, 1 << 47), (0, 0)),
    "axes beyond all numbers, and nothing": tensor((1 << 47, 1 << 47, 0), (1, 1, 1)),
    "a negative stride": tensor((3, 4), (-4, 1), 8),
    "a negative axis": tensor((3, -4), (4, 1)),
    "a negative offset": tensor(offset=-1),
    "a real offset": tensor(offset=0.0),
    "no offset": tensor(offset=None),
    "a real axis": tensor((3.0, 4)),
    "a truth for an axis": tensor((True, 4)),
    "a list for a shape": tensor([3, 4]),
    "no shape": tensor(12),
    "a stride too few": tensor((3, 4), (1,)),
    "too many axes": tensor((1,) * 33, (1,) * 33),
    "a storage of no type": tensor(kind=None),
    "a dtype for a type of storage": tensor(kind=Name("torch", "float32")),
    "a string for a type of storage": tensor(kind="FloatStorage"),
    "a key that is no string": tensor(key=0),
    "no such storage": tensor(key="1"),
    "another member": tensor(key="../data.pkl"),
    "no arguments": Call(V2, ()),
    "no storage": Call(V2, (Call(SIZE, ()), 0, (1,), (1,))),
    "no such storage by dtype": Call(V3, (Persistent("storage"), 0, (1,), (1,), False, None, Name("torch", "float32"))),
    "a parameter of no tensor": Call(PARAMETER, (1, True, None)),
    "a subclass of no tensor": Call(SUBCLASS, (SIZE, Name("torch", "Tensor"), (), None)),
    "negated": Call(V2, (*tensor().arguments, {"neg": True})),
    "a shard without parts": Call(SUBCLASS, (None, Name("torch.distributed.tensor", "DTensor"), (), (None, {}))),
    "a storage alone": Persistent(("storage", FLOATS, "0", "cpu", 12)),
    "a dtype alone": Name("torch", "float32"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_a_tensor_that_cannot_be_is_refused(tmp_path: Path, what: str) -> None:
    assert read_torch_file(archive(tmp_path / "fine.pt", {"layer": tensor()}))["layer"].read().shape == (3, 4)
    with pytest.raises(ConversionError, match=r"hostile\.pt: layer|hostile\.pt has no member"):
        read_torch_file(archive(tmp_path / "hostile.pt", {"layer": TENSORS[what]}))


def taken(action: Callable[[], Any]) -> int:
    """The most bytes that an action held at once."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


DEEP = pickle.EMPTY_TUPLE + pickle.TUPLE1 * 300_000
DOUBLED = pickled("x") + b"".join(pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(60))
ITSELF = pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.APPEND
BOMBS: dict[str, tuple[Any, str]] = {
    "a frame without end": (pickle.FRAME + (1 << 62).to_bytes(8, "little"), "is broken"),
    "a text without end": (pickle.BINUNICODE + b"\xff\xff\xff\xff" + b"text", "is broken"),
    "lists within lists": (pickle.EMPTY_LIST * 100_000 + pickle.APPEND * 99_999, "names of more than 500 characters"),
    "tuples within tuples": (DEEP, "names of more than 500 characters"),
    "tuples within tuples as a key, whose hash crashes Python": (
        pickle.EMPTY_DICT + DEEP + pickled(1) + pickle.SETITEM,
        "keys are neither",
    ),
    "calls of calls": (pickled(SIZE) * 20_000 + pickle.EMPTY_TUPLE + (pickle.REDUCE + pickle.TUPLE1) * 20_000, "neither a tensor nor"),
    "parameters of parameters": (pickled(PARAMETER) * 20_000 + pickled(tensor()) + (pickle.TUPLE1 + pickle.REDUCE) * 20_000, "is broken"),
    "twice what was twice": (DOUBLED, "repeated in it over and over"),
    "twice what was twice, as a shape": ([tensor(DOUBLED)], "0 has an offset, shape or strides that no tensor has"),
    "twice what was twice, as a layout": (Call(Name("torch.serialization", "_get_layout"), (DOUBLED,)), "neither a tensor nor"),
    "a list in itself": (pickle.EMPTY_LIST + ITSELF, "over and over"),
    "a name repeated in names": ({"n" * 200_000: [tensor()] * 100}, "names of more than 500 characters"),
    "too long": (pickle.EMPTY_LIST * (9 << 20), "9,437,187 bytes, more than any file of tensors needs"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_small_file_takes_little_memory(tmp_path: Path, what: str) -> None:
    program, said = BOMBS[what]
    file = archive(tmp_path / "hostile.pt", program)

    def read() -> None:
        with pytest.raises(ConversionError, match=said):
            read_torch_file(file)

    assert taken(read) < 150 * file.stat().st_size + (1 << 20)  # a list within a list is two bytes of the pickle, and 150 in memory


def test_a_memo_at_a_far_index_takes_little_memory(tmp_path: Path) -> None:
    """The unpickler in C makes a table as long as the index."""
    file = archive(tmp_path / "file.pt", pickled(1) + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f")
    assert taken(lambda: read_torch_file(file)) < 1 << 20


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    """A file of ours."""
    write_torch_file(tmp_path / "whole.bin", {"weight": np.ones((3, 4), np.float32), "bias": np.ones(3, np.float16)})
    return (tmp_path / "whole.bin").read_bytes()


def test_a_truncated_file_is_refused(tmp_path: Path, content: bytes) -> None:
    for length in (*range(0, len(content), 5), len(content) - 1):
        (tmp_path / "cut.bin").write_bytes(content[:length])
        with pytest.raises(ConversionError, match=r"cut\.bin is broken, or no file of torch 1\.6 or later"):
            read_torch_file(tmp_path / "cut.bin")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"nowhere\.bin cannot be read"):
        read_torch_file(tmp_path / "nowhere.bin")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    def refused(said: str, *members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(tmp_path / "other.pt", "w", compression) as file:
            for name, member in members:
                file.writestr(name, member)
        with pytest.raises(ConversionError, match=rf"other\.pt{said}"):
            read_torch_file(tmp_path / "other.pt")

    program, floats = b"\x80\2" + pickled({"layer": tensor()}) + b".", bytes(48)
    refused(" is a zip archive but no file of torch.save: it has 0 members data.pkl", ("a/weights.txt", b""))
    refused(" .* it has 2 members data.pkl", ("a/data.pkl", program), ("b/data.pkl", program))
    refused(" has no member 'a/data/0'; is it truncated?", ("a/data.pkl", program), ("b/data/0", floats))
    refused(": layer .* does not fit into its storage of 47 bytes", ("a/data.pkl", program), ("a/data/0", floats[:-1]))
    refused(": a/data.pkl is compressed", ("a/data.pkl", program), ("a/data/0", floats), compression=zipfile.ZIP_DEFLATED)
    refused(" was saved on a big-endian machine", ("a/data.pkl", program), ("a/data/0", floats), ("a/byteorder", b"big"))
    with pytest.warns(UserWarning, match="Duplicate name"):
        refused(" has members of the same name", ("a/data.pkl", program), ("a/data.pkl", program), ("a/data/0", floats))


@pytest.mark.parametrize(("field", "value", "said"), [(8, 1, "encrypted"), (42, 7, "does not begin where the archive says")])
def test_an_archive_whose_directory_lies_is_refused(tmp_path: Path, content: bytes, field: int, value: int, said: str) -> None:
    """Flags, or the place of a member."""
    directory = bytearray(content)
    directory[directory.index(b"PK\1\2") + field] = value
    (tmp_path / "lying.bin").write_bytes(directory)
    with pytest.raises(ConversionError, match=said):
        read_torch_file(tmp_path / "lying.bin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that torch has saved."""
    folder = tmp_path_factory.mktemp("saved")
    run_oracle("torch_saved", folder=str(folder))
    return folder


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 14), st.sampled_from(["set", "drop", "add"]), st.integers(0, 255)), min_size=1, max_size=6)


def changed(content: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    """Bytes with some set to other values, dropped or added."""
    other = bytearray(content)
    for place, what, value in changes:
        place %= len(content)
        other[place : place + (what != "add")] = b"" if what == "drop" else bytes([value])
    return bytes(other)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["content.pt", "shard.pt"])
@pytest.mark.parametrize("part", ["pickle", "archive"])
@settings(max_examples=125)
@given(changes=CHANGES)
def test_whatever_is_changed_nothing_but_a_conversion_error_comes_out(
    folder: Path, name: str, part: str, changes: list[tuple[int, str, int]]
) -> None:
    file = folder / "changed.pt"
    if part == "archive":
        file.write_bytes(changed((folder / name).read_bytes(), changes))
    else:
        with zipfile.ZipFile(folder / name) as whole, zipfile.ZipFile(file, "w") as target:
            for member in whole.namelist():
                target.writestr(member, changed(whole.read(member), changes) if member.endswith("/data.pkl") else whole.read(member))

    def read() -> None:
        try:
            for tensor in stored(read_torch_file(file)):
                tensor.read()
        except ConversionError:
            pass

    assert taken(read) < 1 << 20  # a hundred times the size of the file
