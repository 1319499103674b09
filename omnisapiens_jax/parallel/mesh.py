"""The device mesh, and the one table that says which logical axis lies on which mesh axis."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Names on the left are the only ones that models write down. `fsdp` divides both the batch and the parameters.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("act_embed", None),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_vocab", "tensor"),
    ("layers", None),
    ("norm", None),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("vocab", "tensor"),
)


def start(processes: str) -> None:
    """Joins this process to the others of its run; nothing may have touched a device before.

    Args:
      processes: empty = this process runs alone; `auto` = as the cluster says (TPU pods, Slurm, MPI, Kubernetes); `HOST:PORT,N,I` = the
        I-th of N, which meet at the address of the 0-th.

    Raises:
      ValueError: it is none of these.
    """
    if not processes:
        return
    if processes == "auto":
        jax.distributed.initialize()
        return
    address, *numbers = processes.split(",")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"processes {processes!r} must be empty, 'auto' or 'HOST:PORT,N,I', such as '10.0.0.1:1234,2,0'")
    jax.distributed.initialize(address, num_processes=int(numbers[0]), process_id=int(numbers[1]))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: list[Any] | None = None) -> Mesh:
    """A mesh of all devices (or of `devices`) with automatic sharding propagation; `data=-1` takes what the other axes leave.

    Raises:
      ValueError: an axis is below 1, or they do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise ValueError(f"mesh data={data} x fsdp={fsdp} x tensor={tensor}: every axis must be at least 1 (data may be -1: what is left)")
    if data == -1:
        data = max(len(devices) // (fsdp * tensor), 1)
    if data * fsdp * tensor != len(devices):
        raise ValueError(f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs {data * fsdp * tensor} devices; there are {len(devices)}")
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Inside, the models' logical names mean this mesh."""
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        yield mesh


def shardings(state: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every leaf of an nnx state, from its logical names."""
    with nnx.logical_axis_rules(RULES):
        specs = nnx.get_partition_spec(state)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def divided(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows along the batch axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Lays this process's rows of a batch on the mesh, along its batch axes; rows of all processes make the global batch."""
    sharding = divided(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def meet(name: str) -> None:
    """Returns when all processes have called it; `name` is the same in each of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of a global array that is divided along its first axis, the opposite of `put_batch`."""
    if array.is_fully_addressable:
        return np.asarray(array)
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def all_rows(tree: Any) -> Any:
    """The rows of all processes, for each of them: of global arrays, and of host arrays that hold a process's own rows `[rows, ...]`."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


def same_everywhere(content: bytes) -> bool:
    """Whether all processes have the same content. All of them must ask."""
    digest = np.frombuffer(hashlib.sha256(content).digest(), np.int32)
    return bool((all_rows(digest[None]) == digest).all())
