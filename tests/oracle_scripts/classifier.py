"""A classifier in torch: transformers' thinker under peft's LoRA, the masked mean of `hidden_states[-2]`, a linear map for each domain.

Arguments are named `config/lora/factor`, `config/weight` and `config/bias` (of all heads, one after the other) and `config/case/argument`,
`domain` and `label` among them. Answers are `config/case/value`: pooled states, logits, the loss, gradients and the parameters after one
step of Adam, by the names on disk.
"""

import numpy as np
import torch
from _serve import serve
from thinker import adapted, tensors


def classify(
    folder: str, counts: list, rate: float, factors: dict, weight: np.ndarray, bias: np.ndarray, given: dict
) -> dict[str, np.ndarray]:
    # Copies: a step is made in place.
    model, parameters = adapted(folder, "eager", {name: value.copy() for name, value in factors.items()})
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    assert trained.keys() == factors.keys()
    heads, begin = torch.nn.ModuleList(), 0
    for number, count in enumerate(counts):
        heads.append(torch.nn.Linear(weight.shape[1], count))
        heads[number].weight.data = torch.from_numpy(weight[begin : begin + count].copy())
        heads[number].bias.data = torch.from_numpy(bias[begin : begin + count].copy())
        begin += count
    trained |= {f"heads.{name}": value for name, value in heads.named_parameters()}
    domains, labels = (given.pop(name) for name in ("domain", "label"))
    mask = given["attention_mask"][..., None].float()
    states = model(**given, output_hidden_states=True).hidden_states[-2]
    pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
    logits = torch.full((len(pooled), sum(counts)), torch.finfo(pooled.dtype).min / 2)
    for row, domain in enumerate(domains.tolist()):
        if domain >= 0:
            begin = sum(counts[:domain])
            logits[row, begin : begin + counts[domain]] = heads[domain](pooled[row])
    classified = labels >= 0
    loss = torch.nn.functional.cross_entropy(logits[classified], labels[classified])
    loss.backward()
    answer = {"pooled": pooled, "logits": logits, "loss": loss}
    # What the loss does not depend on has no gradient at all, and Adam leaves it alone.
    answer |= {f"grad/{name}": torch.zeros_like(value) if value.grad is None else value.grad for name, value in trained.items()}
    torch.optim.Adam(trained.values(), lr=rate).step()
    return {name: value.detach().numpy() for name, value in (answer | {f"step/{name}": value for name, value in trained.items()}).items()}


def run(folders: dict, cases: list, counts: list, rate: float, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    answer = {}

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    for config, folder in folders.items():
        for case in cases:
            given = tensors(under(f"{config}/{case}/"))
            parts = (under(f"{config}/lora/"), arrays[f"{config}/weight"], arrays[f"{config}/bias"])
            answer |= {f"{config}/{case}/{name}": value for name, value in classify(folder, counts, rate, *parts, given).items()}
    return answer


if __name__ == "__main__":
    serve(run)
