"""Templates of pages, with the house style at hand as `{% include "style.css" %}`."""

from __future__ import annotations

from pathlib import Path

import jinja2


def templates(folder: Path) -> jinja2.Environment:
    """An environment that finds the templates of a folder and escapes whatever is put into them."""
    loader = jinja2.FileSystemLoader([folder, Path(__file__).parent])
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
