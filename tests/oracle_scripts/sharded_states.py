"""Saves sharded state dicts as verl does, each rank of a small run its own file, and answers the whole tensors."""

import os
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # before the ranks are forked: each would import it anew
import torch.distributed as dist
from _serve import serve
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, ShardingStrategy, StateDictType, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WORLD = 4


def model() -> nn.Module:
    """Seven rows over four ranks are 2, 2, 2, 1; three are 1, 1, 1, 0; one is 1, 0, 0, 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False), nn.Linear(3, 1))


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    half = torch.randn(5, 6).to(torch.bfloat16)
    return {"columns": torch.randn(4, 7), "half": half, "whole": torch.arange(6), "both": torch.randn(5, 3)}


def rank(number: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=WORLD)
    flat = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    crossed = DeviceMesh("cpu", [[0, 2], [1, 3]])
    states = {}
    for kind, mesh, strategy in (("fsdp1", flat, ShardingStrategy.FULL_SHARD), ("hsdp1", hybrid, ShardingStrategy.HYBRID_SHARD)):
        wrapped = FullyShardedDataParallel(model(), device_mesh=mesh, sharding_strategy=strategy, device_id=torch.device("cpu"))
        with FullyShardedDataParallel.state_dict_type(
            wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
        ):
            states[kind] = wrapped.state_dict()
    for kind, mesh in (("fsdp2", flat), ("hsdp2", hybrid)):
        states[kind] = fully_shard(model(), mesh=mesh).state_dict()
    for kind, mesh in (("tensors", hybrid), ("crossed", crossed)):
        whole = tensors()
        states[kind] = {
            "columns": distribute_tensor(whole["columns"], mesh, [Replicate(), Shard(1)]),
            "half": distribute_tensor(whole["half"], mesh, [Shard(0), Replicate()]),
            "whole": whole["whole"],
            "both": distribute_tensor(whole["both"], mesh, [Shard(1), Shard(0)]),
        }
    states["twice"] = {"both": distribute_tensor(tensors()["both"], hybrid, [Shard(0), Shard(0)])}
    for kind, state in states.items():
        (folder / kind).mkdir(exist_ok=True)
        torch.save(state, folder / kind / f"model_world_size_{WORLD}_rank_{number}.pt")
    dist.barrier()
    os._exit(0)  # without the second that gloo takes to say goodbye


def run(folder: str) -> dict[str, np.ndarray]:
    torch.multiprocessing.start_processes(rank, (Path(folder),), WORLD, start_method="fork")
    answer = {}
    for kind in ("fsdp1", "hsdp1", "fsdp2", "hsdp2"):
        answer |= {f"{kind}/{name}": tensor.numpy() for name, tensor in model().state_dict().items()}
    for kind in ("tensors", "crossed"):
        answer |= {f"{kind}/{name}": tensor.float().numpy() for name, tensor in tensors().items()}
    return answer


if __name__ == "__main__":
    serve(run)
