"""The GRPO loss and its gradient in float64 torch autograd, written from the formula, token by token as verl 0.5 states it."""

import numpy as np
import torch
from _serve import serve


def run(
    log_probs: np.ndarray,
    old_log_probs: np.ndarray,
    advantages: np.ndarray,
    mask: np.ndarray,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> dict[str, np.ndarray]:
    new = torch.tensor(log_probs, dtype=torch.float64, requires_grad=True)
    old, weight = torch.tensor(old_log_probs, dtype=torch.float64), torch.tensor(mask, dtype=torch.float64)
    advantage = torch.tensor(advantages, dtype=torch.float64)[..., None].expand_as(new)
    ratio = (new - old).clamp(-20.0, 20.0).exp()
    worse = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    losses = torch.where(advantage < 0, torch.minimum(worse, -advantage * dual_clip), worse)
    lengths = weight.sum(-1)
    by_sequence = (losses * weight).sum(-1) / lengths.clamp(min=1)
    totals = {"token_mean": (losses * weight).sum() / weight.sum(), "seq_mean_token_mean": by_sequence.sum() / (lengths > 0).sum()}
    answer = {}
    for name, total in totals.items():
        (gradient,) = torch.autograd.grad(total, new, retain_graph=True)
        answer |= {f"{name}_loss": total.detach().numpy(), f"{name}_gradient": gradient.numpy()}
    return answer


if __name__ == "__main__":
    serve(run)
