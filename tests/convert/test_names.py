"""The name table at real size: every tensor of the published thinkers, by name and shape, and the exact parameter counts."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.convert.names import TABLE, mappings
from omnisapiens_jax.models.config import ThinkerConfig

KEYS = Path(__file__).resolve().parents[1] / "golden" / "thinker_keys.txt"  # listed from transformers' own models at published sizes
SIZES = {"3b": (1442, 4_703_464_448), "7b": (1346, 8_931_813_888)}


def published(preset: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the list has for a size."""
    (section,) = re.findall(rf"== Qwen2\.5-Omni-{preset.upper()} [^\n]*\n(.*?)(?=\n== |\Z)", KEYS.read_text(), re.DOTALL)
    found = {}
    for line in section.splitlines():
        if match := re.fullmatch(r"(\S+)  \[([\d, ]+)\](?:  x(\d+))?", line.strip()):
            name, shape, count = match[1], tuple(map(int, match[2].split(","))), match[3]
            for layer in range(int(count or 1)):
                found[name.replace(".N.", f".{layer}.")] = shape
    return found


@pytest.mark.parametrize("preset", SIZES)
def test_every_published_tensor_has_its_place(preset: str) -> None:
    tensors, parameters = SIZES[preset]
    config = ThinkerConfig.preset(preset)
    names = published(preset)
    assert len(names) == tensors and sum(map(math.prod, names.values())) == parameters  # the list itself
    assert {name: row.their_shape for row in mappings(config) for name in row.their_names} == names
    assert sum(math.prod(row.shape) for row in mappings(config)) == parameters


def test_no_two_rows_share_a_place() -> None:
    assert len({theirs for theirs, _, _ in TABLE}) == len({ours for _, ours, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", [row for row in mappings(ThinkerConfig.preset("mini")) if row.layout != "same"], ids=lambda row: row.theirs)
def test_axes_change_as_the_layer_reads_them(row) -> None:
    """A linear or convolution kernel acts on a flattened window alike on both sides."""
    theirs = np.random.default_rng(0).standard_normal(row.their_shape)
    ours = row.to_ours(theirs)
    assert ours.shape == (row.shape if row.layers is None else row.shape[1:])
    np.testing.assert_array_equal(row.to_theirs(ours), theirs)
    window = np.random.default_rng(1).standard_normal(row.their_shape[1:])  # what one output sees: [in], [in, 3] or [3, 2, 14, 14]
    flat = window.T if row.layout == "conv1d" else window  # ours has the tap outside the channel
    np.testing.assert_allclose(flat.reshape(-1) @ ours, np.tensordot(theirs, window, axes=window.ndim), atol=1e-9)
