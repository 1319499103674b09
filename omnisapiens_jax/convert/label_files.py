"""`label_scheme.json`, which says what the classes of released heads are called: written beside heads of ours, and read."""

from __future__ import annotations

import json
from pathlib import Path

from omnisapiens_jax.atlas.labels import Domain, LabelScheme
from omnisapiens_jax.convert.huggingface import LABELS, copy_companions
from omnisapiens_jax.convert.source import Source


def write_labels(folder: Path, scheme: LabelScheme) -> None:
    """Writes a scheme as the released models have theirs, beside the heads in `folder`."""
    (folder / LABELS).write_text(json.dumps(scheme.released(), indent=2, ensure_ascii=False), encoding="utf-8")


def write_companions(source: Source, folder: Path) -> list[str]:
    """Copies what stands beside the weights of a source, and writes the scheme of heads that a run of ours has trained; their names.

    That of the model that the run began with, if there is one, is of heads that are no more.
    """
    found = copy_companions(source.companions, folder)
    if source.scheme is None:
        return found
    write_labels(folder, source.scheme)
    return found if LABELS in found else [*found, LABELS]


def domains_of(source: Source) -> tuple[Domain, ...] | None:
    """The domains of a source's heads, in their order; None where nothing says them, or a file of another form does."""
    if source.scheme is not None:
        return source.scheme.domains
    file = source.companions / LABELS
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))["meta"]["global_classes"]
        return tuple(Domain(name, tuple(str(one["label"]) for one in own)) for name, own in classes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
