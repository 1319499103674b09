"""What `torch.load(weights_only=True)` finds in a file that holds a dict of tensors: dtype, shape and bytes of each."""

import numpy as np
import torch
from _serve import serve


def run(file: str) -> dict[str, np.ndarray]:
    answer = {}
    mapped = torch.load(file, weights_only=True, mmap=True)
    for name, tensor in torch.load(file, weights_only=True).items():
        assert torch.equal(tensor, mapped[name])
        dtype, shape = str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape))
        answer[f"{name}/{dtype}/{shape}"] = tensor.reshape(-1).view(torch.uint8).numpy()
    return answer


if __name__ == "__main__":
    serve(run)
