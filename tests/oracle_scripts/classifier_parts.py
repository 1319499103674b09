"""Domain heads and behavioural adapters in torch, of today's and of earlier forms: their files, and what they answer."""

from pathlib import Path

import numpy as np
import torch
from _serve import serve
from torch import nn


class Adapter(nn.Module):
    """`features` of a descriptor to `width`. The first ones were given three confidences besides, all zero."""

    def __init__(self, features: int, hidden: int, width: int, normed: bool, confidences: bool, conf_norm: bool, scalar: bool):
        super().__init__()
        self.ln_feats = nn.LayerNorm(features) if normed else None
        self.confidences = confidences
        self.ln_conf = nn.LayerNorm(3) if conf_norm else None
        self.mlp = nn.Sequential(nn.Linear(features + 3 * confidences, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.alpha = nn.Parameter(torch.tensor(1.0) if scalar else torch.ones(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.ln_feats is not None:
            features = self.ln_feats(features)
        if self.confidences:
            confidences = torch.zeros(len(features), 3)
            if self.ln_conf is not None:
                confidences = self.ln_conf(confidences)
            features = torch.cat([features, confidences], dim=-1)
        return self.mlp(features) * self.alpha


def scores(heads: nn.ModuleList, pooled: torch.Tensor, domains: torch.Tensor) -> torch.Tensor:
    counts = [head.out_features for head in heads]
    logits = torch.full((len(pooled), sum(counts)), torch.finfo(pooled.dtype).min / 2)
    for row, domain in enumerate(domains.tolist()):
        begin = sum(counts[:domain])
        logits[row, begin : begin + counts[domain]] = heads[domain](pooled[row])
    return logits


def run(
    folder: str,
    labels: list[int],
    adapters: dict[str, dict],
    states: np.ndarray,
    mask: np.ndarray,
    domains: np.ndarray,
    targets: np.ndarray,
) -> dict[str, np.ndarray]:
    """Args: labels of each head; each adapter's form, and the modality it is for; states [B, T, D]; targets within all labels [B]."""
    torch.manual_seed(0)
    batch, _, width = states.shape
    hidden, real, rows = torch.from_numpy(states), torch.from_numpy(mask)[..., None].float(), torch.from_numpy(domains)
    answer = {}
    with torch.no_grad():
        heads = nn.ModuleList(nn.Linear(width, count) for count in labels)
        torch.save({f"heads.{name}": value for name, value in heads.state_dict().items()}, Path(folder) / "heads.bin")
        pooled = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
        logits = scores(heads, pooled, rows)
        answer |= {"pooled": pooled, "logits": logits, "loss": nn.functional.cross_entropy(logits, torch.from_numpy(targets))}
        total = pooled
        for name, form in adapters.items():
            modality = form.pop("modality")
            adapter = Adapter(width=width, **form)
            for key, value in adapter.named_parameters():
                if not key.startswith("mlp."):  # away from the ones and zeros they begin as
                    value.copy_(4 * torch.ones_like(value) if key == "alpha" else torch.randn_like(value))
            torch.save({f"{modality}_adapter.{key}": value for key, value in adapter.state_dict().items()}, Path(folder) / f"{name}.bin")
            # As audio's: of length 1, so that the variance is near the norm's eps.
            descriptors = nn.functional.normalize(torch.randn(batch, form["features"]), dim=-1)
            delta = adapter(descriptors)
            answer |= {
                f"{name}/descriptors": descriptors,
                f"{name}/delta": delta,
                f"{name}/nothing": adapter(torch.zeros_like(descriptors)),
            }
            total = total + delta
        answer["logits_of_all"] = scores(heads, total, rows)
    return {name: value.numpy() for name, value in answer.items()}


if __name__ == "__main__":
    serve(run)
