"""Random access to the files in tar archives: an index of where each one's bytes lie, so that nothing has to be unpacked."""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from omnisapiens_jax import resources


class TarFiles:
    """The regular files of the uncompressed tars in a folder and its subfolders (one level), by their path from that folder.

    A tar counts as unpacked where it lies; where two hold the same path, the tar whose name sorts last wins. Walking through the headers
    of 100 GB takes a while, so the index is kept in `cache` and found again as long as the tars' names, sizes and times stay.
    """

    def __init__(self, folder: Path, *, cache: Path | None = None) -> None:
        """`cache` is where indices are kept, `resources.cache() / "tars"` by default.

        Raises:
          ValueError: a tar is broken, cut off or compressed; it is named.
        """
        self.folder = folder
        self._tars = sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")])
        if not self._tars:
            self._names, self._places, self.stamp = np.zeros(0, "S1"), np.zeros((0, 3), np.int64), ""
            return
        facts = [(str(tar.relative_to(folder)), tar.stat().st_size, tar.stat().st_mtime_ns) for tar in self._tars]
        self.stamp = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]  # changes when a tar does
        kept = (cache or resources.cache() / "tars") / f"{self.stamp}.npz"
        if (found := _kept(kept)) is None:
            found = _index(folder, self._tars)
            _keep(kept, *found)
        self._names, self._places = found

    def __len__(self) -> int:
        return len(self._names)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None where no tar has it.

        Raises:
          OSError: the tar cannot be read, or is shorter than it was.
        """
        if (encoded := _normal(name)) is None or not len(self._names):
            return None
        row = int(np.searchsorted(self._names, encoded))
        if row == len(self._names) or self._names[row] != encoded:
            return None
        tar, offset, size = self._places[row].tolist()
        with self._tars[tar].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{self._tars[tar]} is cut off: {name} should have {size} bytes at {offset}")
        return content


def _normal(name: str) -> bytes | None:
    """A path as the index holds it; None for one that numpy's strings, which end at a zero byte, cannot hold."""
    return None if "\0" in name else posixpath.normpath(name).encode("utf-8", "surrogateescape")


def _index(folder: Path, tars: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The sorted paths `[N]` bytes, and `[N, 3]` int64 (tar, offset, size)."""
    found: dict[bytes, tuple[int, int, int]] = {}
    for number, path in enumerate(tars):
        below = path.parent.relative_to(folder).as_posix()
        try:
            with tarfile.open(path, "r:") as tar:
                end = path.stat().st_size
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                    if (name := _normal(posixpath.join(below, member.name))) is None:
                        continue
                    if member.isreg() and not member.issparse():
                        if member.offset_data + member.size > end:
                            raise tarfile.ReadError(f"cut off within {member.name}")
                        found[name] = (number, member.offset_data, member.size)
                    elif member.islnk() and (target := _normal(posixpath.join(below, member.linkname))) in found:
                        found[name] = found[target]  # a file that was packed under two names
        except (tarfile.TarError, OSError) as reason:
            raise ValueError(f"{path} is no whole uncompressed tar ({reason}); fetch it again, or unpack it beside the JSONL") from reason
    names = np.array(sorted(found), dtype="S") if found else np.zeros(0, "S1")
    places = np.array([found[name] for name in names.tolist()], np.int64).reshape(-1, 3)
    return names, places


def _kept(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """An index that was kept; None where there is none, or none that can be read, as a crash of the machine may leave it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["names"], arrays["places"]
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _keep(path: Path, names: np.ndarray, places: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as draft:
        np.savez(draft, names=names, places=places)
    os.replace(draft.name, path)
