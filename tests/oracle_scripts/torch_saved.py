"""Saves files with `torch.save` and answers what is in them, each tensor by its place in the file."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from _serve import serve
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def contents() -> dict[str, Any]:
    torch.manual_seed(0)
    numbers = torch.randn(6, 4)
    tagged = torch.arange(3.0)
    tagged.origin = "an attribute of its own"
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    ordered = module.state_dict()
    assert isinstance(ordered, collections.OrderedDict) and ordered._metadata
    dtypes = {
        name: numbers.mul(3).to(getattr(torch, name))
        for name in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 bool".split()
    }
    return {
        "dtypes": dtypes | {"uint8": torch.arange(5, dtype=torch.uint8)},
        "views": {
            "transposed": numbers.T,
            "every_second": numbers[:, ::2],
            "rows": numbers[2:5],
            "of_the_same_storage": numbers,
            "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
            "row_of_many": numbers[:1].expand(1, 4),
        },
        "shapes": {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 5), "empty_inside": torch.empty(3, 0, 2, dtype=torch.int32)},
        "parameters": {"plain": torch.nn.Parameter(torch.ones(2)), "buffer": torch.nn.Buffer(torch.zeros(2)), "tagged": tagged},
        "ordered": ordered,
        "nested": [{"deep": (torch.arange(4), [torch.ones(1)])}, numbers],
        "values": {
            "none": None,
            "yes": True,
            "whole": -3,
            "large": 1 << 70,
            "real": 0.1,
            "text": "Größe",
            7: [1, (2, 3)],
            "size": torch.Size([2, 3]),
        },
    }


def tensors(content: Any, place: str = "") -> dict[str, torch.Tensor]:
    if isinstance(content, torch.Tensor):
        return {place.removeprefix("."): content.detach()}
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list | tuple) else ()
    return {name: tensor for key, value in inside for name, tensor in tensors(value, f"{place}.{key}").items()}


def run(folder: str) -> dict[str, np.ndarray]:
    content = contents()
    torch.save(content, Path(folder) / "content.pt")
    torch.save(content, Path(folder) / "protocol_4.pt", pickle_protocol=4)
    torch.save(content["views"], Path(folder) / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"repeated": torch.ones(1).expand(100)}, Path(folder) / "expanded.pt")
    torch.save({"sparse": torch.eye(3).to_sparse()}, Path(folder) / "sparse.pt")
    torch.save(torch.nn.Linear(2, 2), Path(folder) / "module.pt")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.save({"weight": distribute_tensor(torch.ones(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])}, Path(folder) / "shard.pt")
    answer = {}
    for name, tensor in tensors(content).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        answer[f"{dtype}/{name}"] = (tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor[None].view(torch.uint8)).numpy()
    return answer


if __name__ == "__main__":
    serve(run)
