"""Steps of the published BAM training in torch: an Adam for the heads and one for each adapter, whose residual is on the pooled state."""

from pathlib import Path

import numpy as np
import torch
from _serve import serve
from classifier_parts import Adapter, scores
from torch import nn


def run(
    folder: str,
    labels: list[int],
    pooled: np.ndarray,
    modalities: list[str],
    domains: np.ndarray,
    targets: np.ndarray,
    lr: float,
    adapter_lr: float,
    steps: int,
    twice: bool,
    **given: np.ndarray,
) -> dict[str, np.ndarray]:
    """Args: heads.bin and adapters.bin lie in the folder; pooled [B, D]; given: MODALITY_descriptors [B, F], MODALITY_present [B]; twice:
    the adapters are in the first optimizer as well. Returns: the losses, and all parameters afterwards by their released names."""
    states = torch.from_numpy(pooled)
    heads = nn.ModuleList(nn.Linear(states.shape[1], count) for count in labels)
    heads.load_state_dict({name.removeprefix("heads."): value for name, value in torch.load(Path(folder) / "heads.bin").items()})
    kept = torch.load(Path(folder) / "adapters.bin")
    adapters = nn.ModuleDict()
    for modality in modalities:
        own = {name.removeprefix(f"{modality}_adapter."): value for name, value in kept.items() if name.startswith(modality)}
        hidden, features = own["mlp.0.weight"].shape
        adapters[modality] = Adapter(features, hidden, states.shape[1], True, False, False, False)
        adapters[modality].load_state_dict(own)
    base = list(heads.parameters()) + (list(adapters.parameters()) if twice else [])
    optimizers = [torch.optim.Adam(base, lr=lr)] + [torch.optim.Adam(adapter.parameters(), lr=adapter_lr) for adapter in adapters.values()]
    losses = []
    for _ in range(steps):
        total = states
        for modality, adapter in adapters.items():
            total = (
                total
                + adapter(torch.from_numpy(given[f"{modality}_descriptors"])) * torch.from_numpy(given[f"{modality}_present"])[:, None]
            )
        loss = nn.functional.cross_entropy(scores(heads, total, torch.from_numpy(domains)), torch.from_numpy(targets))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    found = {f"heads.{name}": value for name, value in heads.state_dict().items()}
    found |= {f"{modality}_adapter.{name}": value for modality, adapter in adapters.items() for name, value in adapter.state_dict().items()}
    return {"losses": np.array(losses), **{name: value.numpy() for name, value in found.items()}}


if __name__ == "__main__":
    serve(run)
