"""Small checkpoints that several rooms' tests begin with."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from omnisapiens_jax.convert.names import lora_mappings
from omnisapiens_jax.convert.source import Lora, Source
from omnisapiens_jax.models.layers import LoraConfig
from omnisapiens_jax.processing.tensors import HeldTensor
from omnisapiens_jax.resources import resource
from tests import tiny
from tests.models import cases


def tiny_thinker(folder: Path) -> Path:
    """A thinker of Hugging Face with a tokenizer, of the tiny shape."""
    folder.mkdir(exist_ok=True)
    cases.write_checkpoint(tiny.TINY, folder)
    shutil.copy(resource("data/mini/tokenizer.model"), folder)
    return folder


def with_factors(source: Source, lora: LoraConfig) -> Source:
    """The same with random LoRA factors beside the weights."""
    random = np.random.default_rng(0)
    shapes = {name: row.their_shape for row in lora_mappings(source.config, lora) for name in row.their_names}
    factors = {name: HeldTensor(name, random.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    return dataclasses.replace(source, lora=Lora(lora, factors))
