"""Files that travel with the package: `configs/` and `data/`, in a checkout or in the installed wheel."""

from __future__ import annotations

import os
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


def _roots() -> list[Path]:
    checkout = _PACKAGE.parent
    # Site-packages has no pyproject.toml, so a folder there that happens to be called `data` is not taken for ours.
    return [checkout, _PACKAGE / "_resources"] if (checkout / "pyproject.toml").exists() else [_PACKAGE / "_resources"]
