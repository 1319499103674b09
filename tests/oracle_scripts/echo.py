"""Gives back what it was given, and says which libraries answered: the bridge's own test."""

import numpy as np
import torch
import transformers
from _serve import serve


def run(array: np.ndarray, factor: float, fail: bool = False) -> dict[str, np.ndarray]:
    if fail:
        raise ValueError(f"asked to fail with factor {factor}")
    return {
        "array": array,
        "product": (torch.from_numpy(array) * factor).numpy(),
        "versions": np.array([torch.__version__, transformers.__version__]),
        "threads": np.array(torch.get_num_threads()),
    }


if __name__ == "__main__":
    serve(run)
