"""What transformers answers for the cases: live from its own environment, or stored in `tests/golden/`."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import zlib
from pathlib import Path

import numpy as np

from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.models.layers import LORA_TARGETS, LoraConfig
from tests.models import cases
from tests.oracle import run_oracle

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TENSORS = ("logits", "last", "penultimate", "audio", "image", "video")
GRADIENT_CASE = "mixed_right"  # text, image, audio and video in one batch, so no parameter is left without a gradient
LORA = LoraConfig(rank=3, alpha=6.0, targets=LORA_TARGETS)  # every projection of every tower; the oracle's scale is 2 too


@dataclasses.dataclass(frozen=True)
class Reference:
    """One case: transformers' values with eager attention (real tokens only, media in reading order) and how far sdpa is from them."""

    values: dict[str, np.ndarray]  # of TENSORS, those the case has
    noise: dict[str, float]
    positions: np.ndarray  # [n, 3]
    deltas: np.ndarray  # [rows]
    greedy: np.ndarray | None  # [rows, 16], where transformers can continue (nothing padded on the right)
    margin: float  # least lead of a greedy token

    def tolerance(self, name: str) -> float:
        """Four times the distance of transformers' two attentions, within the absolute bars.

        Never less than four float32 roundings of the largest value: on another machine the two attentions may share a kernel and agree.
        """
        bar = 1e-4 if name in ("audio", "image", "video") else 5e-4
        rounding = float(np.finfo(np.float32).eps * np.abs(self.values[name]).max())
        return min(4 * max(self.noise[name], rounding), bar)


@functools.cache
def live() -> dict[tuple[str, str], Reference]:
    """Every case of every config, from one process of the oracle."""
    answer = _answer(tuple(cases.CASES), ())
    return {(config, case): _reference(answer, config, case) for config in cases.CONFIGS for case in cases.CASES}


@functools.cache
def live_gradients() -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradients of GRADIENT_CASE under `LORA`, of every config, by name on disk (`<module>/lora_A` for factors)."""
    answer = _answer((), (GRADIENT_CASE,))
    found = {}
    for config in cases.CONFIGS:
        prefix = f"{config}/{GRADIENT_CASE}/eager/with_lora/"
        grads = {name.removeprefix(f"{prefix}grad/"): value for name, value in answer.items() if name.startswith(f"{prefix}grad/")}
        assert answer[f"{prefix}without_gradient"].tolist() == ["audio_tower.audio_bos_eos_token.weight"]
        found[config] = float(answer[f"{prefix}loss"]), grads
    return found


@functools.cache
def golden(config_name: str) -> dict[str, Reference]:
    """The stored cases of a config, written by `tests/golden/make_thinker.py`."""
    with np.load(GOLDEN / f"thinker_{config_name}.npz") as stored:
        flat = dict(stored)
    return {case: unpack({name.split("/", 1)[1]: value for name, value in flat.items() if name.startswith(f"{case}/")}) for case in STORED}


STORED = tuple(case for case in cases.CASES if not case.endswith("_left"))  # the left-padded ones have the same values


def pack(reference: Reference) -> dict[str, np.ndarray]:
    """A reference as named arrays."""
    packed = {f"values/{name}": value for name, value in reference.values.items()}
    packed |= {f"noise/{name}": np.array(value) for name, value in reference.noise.items()}
    packed |= {"positions": reference.positions, "deltas": reference.deltas, "margin": np.array(reference.margin)}
    return packed | ({} if reference.greedy is None else {"greedy": reference.greedy})


def unpack(packed: dict[str, np.ndarray]) -> Reference:
    """Inverse of `pack`."""
    return Reference(
        values={name.removeprefix("values/"): value for name, value in packed.items() if name.startswith("values/")},
        noise={name.removeprefix("noise/"): float(value) for name, value in packed.items() if name.startswith("noise/")},
        positions=packed["positions"],
        deltas=packed["deltas"],
        greedy=packed.get("greedy"),
        margin=float(packed["margin"]),
    )


def lora_factors(config_name: str) -> dict[str, np.ndarray]:
    """A `[rank, in]` and B `[out, rank]` of every adapted projection, by name on disk; B is not zero, so both have gradients."""
    found = {}
    for row in mappings(cases.CONFIGS[config_name]):
        if row.layers is None or row.layout != "linear" or row.ours[-2] not in LORA.targets[row.ours[0]]:
            continue
        for name in row.their_names:
            out_width, in_width = row.their_shape
            for factor, shape in (("lora_A", (LORA.rank, in_width)), ("lora_B", (out_width, LORA.rank))):
                key = f"{name.removesuffix('.weight')}/{factor}"
                random = np.random.RandomState(zlib.crc32(key.encode()))
                found[key] = (random.standard_normal(shape) / np.sqrt(shape[1]) * 0.5).astype(np.float32)
    return found


def _answer(forward_cases: tuple[str, ...], gradient_cases: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = {}
    for config in cases.CONFIGS:
        for case in {*forward_cases, *gradient_cases}:
            arrays |= {f"{config}/{case}/{name}": value for name, value in cases.for_transformers(config, case).items()}
        if gradient_cases:
            arrays |= {f"{config}/lora/{name}": value for name, value in lora_factors(config).items()}
    with tempfile.TemporaryDirectory() as root:
        folders = {config: str(Path(root) / config) for config in cases.CONFIGS}
        for config, folder in folders.items():
            Path(folder).mkdir()
            cases.write_checkpoint(cases.CONFIGS[config], Path(folder))
        return run_oracle("thinker", folders=folders, cases=list(forward_cases), gradient_cases=list(gradient_cases), **arrays)


def _reference(answer: dict[str, np.ndarray], config: str, case: str) -> Reference:
    eager, sdpa = (
        {name.removeprefix(prefix): value for name, value in answer.items() if name.startswith(prefix)}
        for prefix in (f"{config}/{case}/eager/", f"{config}/{case}/sdpa/")
    )
    real = cases.for_transformers(config, case)["attention_mask"] == 1  # what stands at padding is junk, and differs between attentions
    for found in (eager, sdpa):
        found |= {name: found[name][real] for name in ("logits", "last", "penultimate")}
    names = [name for name in TENSORS if name in eager]
    for exact in ("positions", "deltas", "greedy"):
        np.testing.assert_array_equal(eager.get(exact, 0), sdpa.get(exact, 0))
    return Reference(
        values={name: eager[name] for name in names},
        noise={name: float(np.abs(eager[name] - sdpa[name]).max()) for name in names},
        positions=eager["positions"].transpose(1, 2, 0)[real],
        deltas=eager["deltas"][:, 0],
        greedy=eager.get("greedy"),
        margin=float(eager["margin"].min()) if "margin" in eager else float("inf"),
    )
