"""A linear map under PEFT's LoRA in training: what it gives, the gradients of the sum of its squares, and what PEFT has dropped.

Arguments are the input `x`, the parameters `kernel` and `bias` and the factors `a` and `b`, in torch's axes.
"""

import numpy as np
import torch
from _serve import serve
from peft import LoraConfig, get_peft_model


def run(rate: float, alpha: float, **arrays: np.ndarray) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(value) for name, value in arrays.items()}
    base = torch.nn.Sequential(torch.nn.Linear(*reversed(arrays["kernel"].shape)))
    settings = LoraConfig(r=len(arrays["a"]), lora_alpha=alpha, lora_dropout=rate, target_modules=["0"])
    model = get_peft_model(base, settings).train()
    named = dict(model.named_parameters())
    places = {"kernel": "base_layer.weight", "bias": "base_layer.bias", "a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    own = {name: next(value for key, value in named.items() if key.endswith(place)) for name, place in places.items()}
    for name, value in own.items():
        value.data = given[name]
    seen = []
    layer = next(module for name, module in model.named_modules() if name.endswith("lora_dropout.default"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.manual_seed(3)
    x = given["x"].requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {"grad/x": x.grad, "grad/a": own["a"].grad, "grad/b": own["b"].grad}
    (read,) = seen
    return {name: value.detach().numpy() for name, value in {"y": y, "kept": read != 0, **gradients}.items()}


if __name__ == "__main__":
    serve(run)
