"""Files are read out of tars as if these were unpacked."""

import io
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.atlas.tars import TarFiles

NAMES = ["a.wav", "videos/b.mp4", "./c d.wav", "deep/" * 30 + "e.pt", "ü/你好.wav"]


def write_tar(path, files, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@settings(max_examples=12)
@given(
    first=st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=1500)), max_size=8),
    second=st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=1500)), max_size=4),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_reading_is_unpacking(tmp_path_factory, first, second, format):
    folder, unpacked = tmp_path_factory.mktemp("tars"), tmp_path_factory.mktemp("unpacked")
    for name, files in (("1.tar", first), ("2.tar", second)):
        write_tar(folder / name, files, format)
        with tarfile.open(folder / name) as tar:
            tar.extractall(unpacked, filter="fully_trusted")
    tars = TarFiles(folder, cache=folder / "cache")
    for name in {*NAMES, "gone.wav", "deep"}:
        path = unpacked / os.path.normpath(name)
        assert tars.read(name) == (path.read_bytes() if path.is_file() else None)


def test_a_tar_in_a_subfolder_counts_as_unpacked_there_and_links_are_followed(tmp_path):
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("one", "two"):
            entry = tarfile.TarInfo(name)
            if name == "one":
                entry.size = 3
            else:
                entry.type, entry.linkname = tarfile.LNKTYPE, "one"
            tar.addfile(entry, io.BytesIO(b"abc"))
    write_tar(tmp_path / "videos" / "part.tar", [("b.mp4", b"mp4")])
    tars = TarFiles(tmp_path)
    assert (tars.read("one"), tars.read("two"), tars.read("videos/b.mp4"), tars.read("b.mp4")) == (b"abc", b"abc", b"mp4", None)


def test_a_tar_that_changed_is_walked_through_again(tmp_path):
    write_tar(tmp_path / "a.tar", [("x", b"old")])
    assert TarFiles(tmp_path).read("x") == b"old"
    write_tar(tmp_path / "a.tar", [("w", b""), ("x", b"new")])
    assert TarFiles(tmp_path).read("x") == b"new"


@pytest.mark.parametrize("left", [0, 100])
def test_an_index_that_cannot_be_read_is_made_again(tmp_path, left):
    write_tar(tmp_path / "a.tar", [("x", b"1")])
    for _ in range(2):
        assert TarFiles(tmp_path, cache=tmp_path / "cache").read("x") == b"1"
        (kept,) = (tmp_path / "cache").iterdir()
        kept.write_bytes(kept.read_bytes()[:left])


@pytest.mark.parametrize("kind", ["cut", "gz", "noise", "empty"])
def test_a_tar_that_cannot_be_read_at_random_is_named(tmp_path, kind):
    write_tar(tmp_path / "good.tar", [("x", b"1" * 5000), ("y", b"2" * 5000)])
    content = (tmp_path / "good.tar").read_bytes()
    match kind:
        case "cut":
            (tmp_path / "bad.tar").write_bytes(content[:8000])
        case "gz":
            with tarfile.open(tmp_path / "bad.tar", "w:gz") as tar:
                tar.add(tmp_path / "good.tar", "x")
        case "noise":
            (tmp_path / "bad.tar").write_bytes(np.random.default_rng(0).bytes(4000))
        case "empty":
            (tmp_path / "bad.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="bad.tar is no whole uncompressed tar"):
        TarFiles(tmp_path)


def test_a_tar_that_shrinks_under_way_is_an_error_not_a_short_file(tmp_path):
    write_tar(tmp_path / "a.tar", [("x", b"1" * 5000)])
    tars = TarFiles(tmp_path)
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(OSError, match="cut off: x"):
        tars.read("x")
