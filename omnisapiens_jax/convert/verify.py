"""Is a checkpoint what it should be: against its receipt, against the tensors it came from, and run beside transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from omnisapiens_jax.convert import checkpoint
from omnisapiens_jax.convert.huggingface import open_huggingface
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.source import Progress, Source, read_params
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.models.thinker import Thinker
from omnisapiens_jax.processing.audio import audio_token_count
from omnisapiens_jax.processing.example import Example, collate, lay_out
from omnisapiens_jax.processing.positions import rope_positions
from omnisapiens_jax.processing.tensors import ConversionError, Tensor, as_bytes, blocks, nbytes, some

_READ_BYTES = 32 << 20
STAGES = ("audio", "vision", "penultimate", "last", "logits")
BOUND = 1e-4  # of the largest value of a stage: float32 rounding grows with depth; a wrong weight is off by the size of the value


@dataclasses.dataclass(frozen=True)
class Finding:
    """A line of the answer."""

    what: str
    result: str
    bound: str
    good: bool


def verify(path: Path, reference: Path | None = None, *, python: str = sys.executable, progress: Progress | None = None) -> list[Finding]:
    """Reads every tensor of a checkpoint of ours again, and compares it with a Hugging Face directory if one is named.

    Args:
      path: a checkpoint of ours.
      reference: a thinker or full Omni directory. The thinker's weights (not LoRA factors, heads or adapters) are compared with it, cast to
        the checkpoint's dtypes; where `python` has transformers, both are also run on the same random text, sound and video, in float32,
        one after the other: four bytes of memory a parameter.
      python: an interpreter, this one or that of another environment.
      progress: called after each tensor.

    Raises:
      ConversionError: one of them cannot be read at all.
    """
    recorded = {record["name"]: record["sha256"] for record in checkpoint.load_manifest(path)["tensors"]}
    source = open_source(path)
    source.check()
    tensors = {**source.tensors, **(source.lora.factors if source.lora else {}), **source.parts}
    hashes = _hashes(tensors, {name: tensor.dtype for name, tensor in tensors.items()}, progress)
    found = [_same("tensors as the receipt says", hashes, recorded)]
    if reference is None:
        return found
    theirs = open_huggingface(reference)
    theirs.check()
    shapes = {name: tensor.shape for name, tensor in theirs.tensors.items()}
    found.append(_same("shapes of the reference", {name: tensor.shape for name, tensor in source.tensors.items()}, shapes))
    if not found[-1].good:
        return found
    dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
    cast = sorted({f"{theirs.tensors[name].dtype} to {dtype}" for name, dtype in dtypes.items() if theirs.tensors[name].dtype != dtype})
    what = f"values of the reference{f', cast from {some(cast)}' if cast else ''}"
    found.append(_same(what, {name: hashes[name] for name in dtypes}, _hashes(theirs.tensors, dtypes, progress)))
    if importlib.util.find_spec("transformers") is None and python == sys.executable:
        found.append(Finding("run beside transformers", "not done: it is not installed here; name its interpreter with --python", "", True))
        return found
    return found + _run_both(source, reference, python)


def _hashes(tensors: Mapping[str, Tensor], dtypes: Mapping[str, np.dtype], progress: Progress | None) -> dict[str, str]:
    total, done, found = nbytes(tensors.values()), 0, {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256()
        for start, stop in blocks(tensor.shape, tensor.dtype.itemsize, _READ_BYTES):
            digest.update(as_bytes(tensor.read(start, stop).astype(dtypes[name], copy=False)))
        found[name] = digest.hexdigest()
        done += nbytes([tensor])
        if progress:
            progress(name, done, total)
    return found


def _same(what: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> Finding:
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    result = f"{len(wanted) - len(wrong)} of {len(wanted)}" + (f"; other: {some(wrong, 5)}" if wrong else "")
    return Finding(what, result, "all", not wrong)


def _run_both(source: Source, reference: Path, python: str) -> list[Finding]:
    example, inputs = _random_inputs(source.config)
    ours = _answers(source, example)
    theirs = _ask_transformers(inputs, reference, python)
    found = []
    for stage in STAGES:
        difference = float(np.abs(ours[stage] - theirs[stage]).max())
        scale = float(np.abs(theirs[stage]).max())
        found.append(Finding(f"{stage}: largest difference", f"{difference:.2e}", f"{BOUND * scale:.2e}", difference <= BOUND * scale))
    return found


def _answers(source: Source, example: Example) -> dict[str, np.ndarray]:
    """What our thinker makes of one row, by stage: `[tokens, width]`. Its parameters are gone when this returns."""
    config = source.config
    thinker = nnx.eval_shape(lambda: Thinker(config, rngs=nnx.Rngs(0)))
    checkpoint.put_params(thinker, read_params(source, dtype=np.dtype(np.float32)))
    batch = {name: jnp.asarray(value) for name, value in collate([example], example.size(), config).items()}
    hidden = thinker(batch)
    vision = thinker.vision(batch["patches"], batch["patch_mask"], batch["patch_coords"])
    places = batch["media_index"][0, batch["tokens"][0] == config.tokens.video] - batch["audio_pairs"].shape[1]
    found = {
        "audio": thinker.audio(batch["audio_chunks"], batch["audio_frames"], batch["audio_pairs"])[0],
        "vision": vision[0, places],
        "penultimate": hidden.penultimate[0],
        "last": hidden.last[0],
        "logits": thinker.logits(hidden.last)[0],
    }
    return {stage: np.asarray(value) for stage, value in found.items()}


def _random_inputs(config: ThinkerConfig) -> tuple[Example, dict[str, np.ndarray]]:
    """A row of text, sound and video for us, and the same for transformers."""
    random, ids = np.random.default_rng(0), config.tokens
    mel = random.standard_normal((3 * config.audio.chunk_frames // 2, config.audio.num_mel_bins)).astype(np.float32)
    cells = 2 * config.vision.window_size // (config.vision.patch_size * config.vision.spatial_merge_size) + 1  # not whole windows
    grid = (2, config.vision.spatial_merge_size * cells, config.vision.spatial_merge_size * 2)
    patches = random.standard_normal((int(np.prod(grid)), config.vision.patch_dim)).astype(np.float32)
    words = random.integers(0, config.text.vocab_size, 24)
    words = words[~np.isin(words, dataclasses.astuple(ids))].tolist()
    heard, seen = audio_token_count(len(mel)), len(patches) // config.vision.cell_patches
    row = [*words[:8], ids.audio_bos, *[ids.audio] * heard, ids.audio_eos, ids.vision_bos, *[ids.video] * seen, ids.vision_eos, *words[8:]]
    tokens = np.asarray(row, np.int32)
    positions, _ = rope_positions(
        tokens, config, audio_tokens=[heard], image_grids=[], video_grids=[grid], seconds_per_grid=[1.0], use_audio_in_video=False
    )
    example = lay_out(tokens, tokens, positions, len(tokens), [mel], [(patches, grid)], config)
    return example, {
        "input_ids": tokens[None].astype(np.int64),
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "input_features": mel.T[None],
        "feature_attention_mask": np.ones((1, len(mel)), np.int64),
        "pixel_values_videos": patches,
        "video_grid_thw": np.array([grid]),
        "video_second_per_grid": np.ones(1, np.float32),
    }


def _ask_transformers(inputs: Mapping[str, np.ndarray], reference: Path, python: str) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        np.savez(Path(folder) / "inputs.npz", **inputs)  # pyright: ignore[reportArgumentType]
        done = subprocess.run([python, "-c", _TORCH_SIDE, str(reference), folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConversionError(f"transformers under {python} could not run {reference}:\n{done.stderr.strip()[-2000:]}")
        with np.load(Path(folder) / "outputs.npz") as outputs:
            return dict(outputs)


# Runs in the other interpreter, which knows nothing of this package.
_TORCH_SIDE = """
import sys
import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

reference, folder = sys.argv[1:]
model = Thinker.from_pretrained(reference, dtype=torch.float32).eval()
given = {name: torch.from_numpy(value) for name, value in np.load(folder + "/inputs.npz").items()}
with torch.no_grad():
    out = model(**given, output_hidden_states=True)
    answer = {
        "audio": model.get_audio_features(given["input_features"], given["feature_attention_mask"]).last_hidden_state,
        "vision": torch.cat(model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"]).pooler_output),
        "penultimate": out.hidden_states[-2][0],
        "last": out.hidden_states[-1][0],
        "logits": out.logits[0],
    }
np.savez(folder + "/outputs.npz", **{name: value.numpy() for name, value in answer.items()})
"""
