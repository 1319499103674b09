"""Checkpoints by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from omnisapiens_jax.convert.huggingface import VOICES
from omnisapiens_jax.processing.tensors import ConversionError

_ID = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")
# Weights, settings and vocabulary of every kind; optimizers, which may lie beside them, are of no use here.
_WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "tokenizer.model",
    VOICES,
    "heads.bin",
    "adapters.bin",
    "adapter_model.bin",
    "*pytorch_model_fsdp*.bin",
    "*model_world_size_*.pt",
    "params/*",
    "lora/*",
)


def resolve(name: str | Path) -> Path:
    """The directory of a checkpoint: `name` itself if it is there, else the files of the hub's `OWNER/NAME` or `OWNER/NAME@REVISION`.

    What was fetched once is kept in the hub's cache; private models need a token in `HF_TOKEN`.

    Raises:
      ConversionError: it is neither, or cannot be fetched.
    """
    if Path(name).exists() or not _ID.fullmatch(str(name)):
        return Path(name)
    repository, _, revision = str(name).partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(_WANTED)))
    except LocalEntryNotFoundError as reason:
        command = f"hf download {repository}{f' --revision {revision}' if revision else ''} --local-dir DIR"
        raise ConversionError(
            f"{name} is no directory here, and the Hugging Face hub is out of reach and has left no whole copy in its cache. "
            f"Where there is a connection, `{command}` makes a directory to name instead"
        ) from reason
    except Exception as reason:  # of many libraries below: HTTP, sockets, the disk
        why = " ".join(str(reason).split())
        raise ConversionError(f"{name} is no directory here, nor to be had from the Hugging Face hub: {why}") from reason
