"""Arrays kept by sample: what was written whole is read, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.atlas.store import Arrays, Field, Store

FIELDS = {
    "pooled": Field((3,)),
    "times": Field((None,)),
    "frames": Field((None, 2), np.dtype(np.float16)),
    "label": Field((), np.dtype(np.int32)),
}


def arrays(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    frames = random.standard_normal((seed % 4, 2)).astype(np.float16)
    return {
        "pooled": random.random(3, np.float32),
        "times": random.random(5, np.float32),
        "frames": frames,
        "label": np.asarray(seed, np.int32),
    }


def write(folder: Path, samples: dict[int, int], stamp: str = "") -> None:
    """Records of samples, each with the arrays of a seed."""
    with Store(folder, FIELDS).adding() as add:
        for sample, seed in samples.items():
            add(sample, stamp, arrays(seed))


def holds(store: Store, sample: int, seed: int) -> bool:
    return all((store[sample][name] == value).all() and store[sample][name].shape == value.shape for name, value in arrays(seed).items())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, {7: 1, 3: 2, 5: 0})
    store = Store(tmp_path, FIELDS)
    assert len(store) == 3 and not store.damaged and all(holds(store, *pair) for pair in ((7, 1), (3, 2), (5, 0)))
    with pytest.raises(KeyError):
        store[4]
    with pytest.raises(ValueError, match="read-only"):
        store[7]["pooled"][0] = 1


def test_only_what_was_made_for_the_sample_counts_and_the_newest(tmp_path: Path) -> None:
    write(tmp_path, {1: 1, 2: 2}, "old")
    assert Store(tmp_path, FIELDS).missing({1: "old", 2: "new", 3: "old"}) == [2, 3]
    write(tmp_path, {2: 5}, "new")
    store = Store(tmp_path, FIELDS)
    assert store.missing({1: "old", 2: "new"}) == [] and holds(store, 2, 5) and holds(store, 1, 1)


@given(cut=st.integers(0, 400))
def test_a_file_that_was_cut_off_anywhere_gives_its_whole_records(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write(folder, {0: 0, 1: 1, 2: 2, 3: 3})
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:cut])
    store = Store(folder, FIELDS)
    assert all(holds(store, sample, sample) for sample in range(4) if sample in store._records)
    assert len(store) == (4 if cut >= len(whole) else len(store)) and [*store._records] == [*range(len(store))]
    write(folder, {sample: sample for sample in store.missing(dict.fromkeys(range(4), ""))})
    assert all(holds(Store(folder, FIELDS), sample, sample) for sample in range(4))


@given(place=st.integers(0, 1000), bit=st.integers(0, 7))
def test_a_flipped_bit_costs_records_but_never_gives_wrong_ones(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("flipped")
    write(folder, {0: 0, 1: 1, 2: 2, 3: 3})
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file.write_bytes(content)
    store = Store(folder, FIELDS)
    found = [sample for sample in range(4) if sample not in store.missing({sample: ""})]
    assert store.damaged >= 1 and len(found) < 4 and all(holds(store, sample, sample) for sample in found)


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    with Store(tmp_path, FIELDS).adding() as add, pytest.raises(ValueError, match=r"pooled is \(4,\), not \(3,\)"):
        add(0, "", {**arrays(0), "pooled": np.zeros(4)})
