"""Tensors that a run divided over its devices are whole again, whatever version of torch saved the parts of its ranks."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnisapiens_jax.convert.shards import JoinedTensor, join_shards
from omnisapiens_jax.processing.tensors import ConversionError, StoredTensor
from omnisapiens_jax.processing.torch_files import ShardedTensor, read_torch_file
from tests.oracle import run_oracle
from tests.pickles import Call, Name, archive, tensor

KINDS = ("fsdp1", "hsdp1", "fsdp2", "hsdp2", "tensors", "crossed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder of sharded state dicts of four ranks, and the whole of every tensor."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_oracle("sharded_states", folder=str(folder))


def ranks(folder: Path, kind: str) -> list[dict[str, StoredTensor | ShardedTensor]]:
    return [read_torch_file(folder / kind / f"model_world_size_4_rank_{rank}.pt") for rank in range(4)]


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_shards_of_a_run_make_its_tensors(shards: tuple[Path, dict[str, np.ndarray]], kind: str) -> None:
    """FSDP 1 and 2, over all ranks and over groups of them; tensors whose last parts are smaller or empty; any order of ranks."""
    folder, wanted = shards
    files = ranks(folder, kind)
    assert {f"{kind}/{name}" for name in files[0]} == {name for name in wanted if name.startswith(f"{kind}/")}
    for name in files[0]:
        whole = join_shards(name, [file[name] for file in files])
        values = wanted[f"{kind}/{name}"]
        assert (whole.shape, whole.name) == (values.shape, name)
        np.testing.assert_array_equal(whole.read().astype(np.float32), values, err_msg=name)
        for start, stop in ((1, 2), (2, 5), (0, 0), (len(values), None)):
            np.testing.assert_array_equal(whole.read(start, stop).astype(np.float32), values[start:stop], err_msg=name)
        again = join_shards(name, [file[name] for file in reversed(files)])
        assert again.read().tobytes() == whole.read().tobytes()


@pytest.mark.oracle
def test_the_last_ranks_may_have_less_or_nothing(shards: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Else the test above would not show it."""
    held = [file["2.weight"] for file in ranks(shards[0], "fsdp1")]
    assert [rank.local.shape[0] for rank in held if isinstance(rank, ShardedTensor)] == [1, 1, 1, 0]


@pytest.mark.oracle
def test_ranks_that_do_not_fit_together_are_refused(shards: tuple[Path, dict[str, np.ndarray]]) -> None:
    parts: list[Any] = [file["0.weight"] for file in ranks(shards[0], "fsdp1")]
    others = [file["0.weight"] for file in ranks(shards[0], "hsdp1")]
    narrower = dataclasses.replace(parts[1], local=dataclasses.replace(parts[1].local, shape=(2, 4)))
    for wrong in (parts[1:], [*parts[:3], parts[0]], [*parts[:3], others[3]], [*parts[:3], parts[3].local]):
        with pytest.raises(ConversionError, match=r"pt: 0\.weight is not divided over the \d ranks whose files are there"):
            join_shards("0.weight", wrong)
    with pytest.raises(ConversionError, match=r"rank_0\.pt: the ranks disagree about 0\.weight"):
        join_shards("0.weight", [parts[0].local, *parts[1:]])
    with pytest.raises(ConversionError, match=r"rank_0\.pt: the parts of 0\.weight do not fit together along axis 0"):
        join_shards("0.weight", [parts[0], narrower, *parts[2:]])
    with pytest.raises(ConversionError, match=r"rank_0\.pt: the parts of 0\.weight make \(6, 5\), not \(7, 5\)"):
        join_shards("0.weight", parts[:3])
    with pytest.raises(ConversionError, match=r"rank_0\.pt: both is divided over devices in a way that is not known here"):
        ranks(shards[0], "twice")


@pytest.mark.parametrize(
    ("tensors", "specs", "placements"),
    [
        ("_tensor.api", "_tensor.placement_types", "_tensor.placement_types"),  # 2.2
        ("_tensor.api", "_tensor._dtensor_spec", "_tensor.placement_types"),  # 2.4
        ("tensor", "tensor._dtensor_spec", "tensor.placement_types"),  # 2.5 and later
    ],
)
def test_shards_of_earlier_versions_of_torch_are_read(tmp_path: Path, tensors: str, specs: str, placements: str) -> None:
    """Whose modules have other names, and whose mesh is a tensor of ranks."""

    def new(module: str, name: str, arguments: tuple[Any, ...] = (), state: Any = None) -> Call:
        return Call(Name(f"torch.distributed.{module}", name), arguments, state, pickle.NEWOBJ)

    def part(rank: int) -> ShardedTensor:
        float32, size = Name("torch", "float32"), Call(Name("torch", "Size"), ((5, 2),))
        ranks = tensor((2,), (1,), kind=Name("torch", "IntStorage"), key="1")
        mesh = {"device_type": "cuda", "mesh": ranks, "mesh_dim_names": ("fsdp",), "_coordinate_on_dim": [rank]}
        spec = {
            "mesh": new("device_mesh", "DeviceMesh", (), mesh),
            "placements": (new(placements, "Shard", (), {"dim": 0}),),
            "tensor_meta": new(specs, "TensorMeta", (size, (2, 1), float32)),
        }
        local = tensor((3 - rank, 2), (2, 1))
        slots = (None, {"_local_tensor": local, "_spec": new(specs, "DTensorSpec", (), spec)})
        kind = Name(f"torch.distributed.{tensors}", "DTensor")
        layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
        made = (kind, float32, (5, 2), (2, 1), None, layout, Call(Name("torch", "device"), ("cuda", rank)), False)
        function = Name("torch._utils", "_rebuild_wrapper_subclass")
        state = {"weight": Call(Name("torch._tensor", "_rebuild_from_type_v2"), (function, kind, made, slots))}
        values = np.arange(6 * rank, 6 * rank + 6, dtype=np.float32)
        return read_torch_file(archive(tmp_path / f"{rank}.pt", state, {"0": values.tobytes(), "1": bytes(8)}))["weight"]

    whole = join_shards("weight", [part(0), part(1)])
    np.testing.assert_array_equal(whole.read(), np.arange(10, dtype=np.float32).reshape(5, 2))


def test_a_joined_tensor_names_every_part() -> None:
    """Else work could go on after one of the later files changed."""
    parts = [StoredTensor("weight", Path(f"rank_{rank}.pt"), np.dtype(np.float32), (2, 3), 0) for rank in range(4)]
    rows = [JoinedTensor("weight", (parts[rank], parts[rank + 1]), 1, (2, 6)) for rank in (0, 2)]
    assert JoinedTensor("weight", tuple(rows), 0, (4, 6)).made_of == tuple(parts)
