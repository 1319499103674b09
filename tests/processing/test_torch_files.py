"""Files of `torch.save`: read as torch reads them, and written so that torch reads them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from omnisapiens_jax.processing.tensors import ConversionError
from omnisapiens_jax.processing.torch_files import read_torch_file, write_torch_file
from tests.oracle import run_oracle
from tests.pickles import stored


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of files that torch has saved, and the dtype and bytes of every tensor in `content.pt`."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_oracle("torch_saved", folder=str(folder))


@pytest.mark.oracle
@pytest.mark.parametrize("file", ["content.pt", "protocol_4.pt"])
def test_every_tensor_is_read_as_torch_reads_it(saved: tuple[Path, dict[str, np.ndarray]], file: str) -> None:
    """Every dtype, views of a shared storage in any order, scalars, empty tensors, parameters; named by their places."""
    folder, wanted = saved
    found = {f"{held.dtype}/{held.name}": held for held in stored(read_torch_file(folder / file))}
    assert found.keys() == wanted.keys() and len(wanted) > 30
    for name, held in found.items():
        values = held.read()
        assert values.flags.c_contiguous and values.shape == held.shape
        assert values.tobytes() == wanted[name].tobytes(), name


@pytest.mark.oracle
def test_rows_of_a_view_are_read_alone(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    for held in stored(read_torch_file(saved[0] / "content.pt")["views"]):
        whole = held.read()
        for start, stop in ((0, 1), (1, 3), (2, None), (len(whole), None)):
            np.testing.assert_array_equal(held.read(start, stop), whole[start:stop], err_msg=held.name)


@pytest.mark.oracle
def test_plain_values_come_back_and_tuples_as_lists(saved: tuple[Path, dict[str, np.ndarray]]) -> None:
    values = read_torch_file(saved[0] / "content.pt")["values"]
    plain = {"none": None, "yes": True, "whole": -3, "large": 1 << 70, "real": 0.1, "text": "Größe"}
    assert values == plain | {7: [1, [2, 3]], "size": [2, 3]}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("legacy.pt", r"no file of torch 1\.6 or later .*load such a file with torch where you trust it and save it again"),
        ("expanded.pt", r"repeated float32 \(100,\) does not fit into its storage of 4 bytes"),
        ("sparse.pt", r"it names 'torch\._utils\._rebuild_sparse_tensor'"),
        ("module.pt", r"it names 'torch\.nn\.modules\.linear\.Linear'"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(saved: tuple[Path, dict[str, np.ndarray]], file: str, said: str) -> None:
    with pytest.raises(ConversionError, match=said):
        read_torch_file(saved[0] / file)


@pytest.mark.oracle
def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        "heads.0.weight": random.standard_normal((7, 5)).astype(np.float32),
        "turned": random.standard_normal((5, 7)).T,
        "half": random.standard_normal(3).astype(np.float16),
        "bfloat16": random.standard_normal((2, 2)).astype(ml_dtypes.bfloat16),
        "alpha": np.array(4.0, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "whole": np.arange(-2, 300),
        "Größe": np.array([True, False]),
    }
    write_torch_file(tmp_path / "ours.bin", tensors)
    wanted = {f"{name}/{values.dtype}/{'x'.join(map(str, values.shape))}": values.tobytes() for name, values in tensors.items()}
    theirs = run_oracle("torch_loaded", file=str(tmp_path / "ours.bin"))
    assert {name: values.tobytes() for name, values in theirs.items()} == wanted
    ours = read_torch_file(tmp_path / "ours.bin")
    assert {name: tensor.read().tobytes() for name, tensor in ours.items()} == {name: values.tobytes() for name, values in tensors.items()}


def test_what_torch_cannot_hold_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="z is complex64, which files of torch.save cannot hold"):
        write_torch_file(tmp_path / "ours.bin", {"z": np.zeros(2, np.complex64)})
