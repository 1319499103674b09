"""Our side of `throughput.py`: `python throughput_ours.py FOLDER TOKENIZER BATCH WORKERS` feeds from FOLDER/rows.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from throughput_child import serve

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import PlanConfig, Planner
from omnisapiens_jax.atlas.recipe import Recipe
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.options import REFERENCE
from omnisapiens_jax.processing.tokenizers import QwenTokenizer


def pipeline(folder: Path, tokenizer: Path, batch: int, workers: int) -> Pipeline:
    """The pipeline as a run on 7B has it."""
    config, source = ThinkerConfig.preset("7b"), open_source(folder / "rows.jsonl")
    recipe = Recipe(QwenTokenizer(tokenizer), config, REFERENCE, max_tokens=4096)
    index, _ = length_index(source, recipe, on_error="raise", workers=workers)
    plan = PlanConfig(batch)
    planner = Planner(index, choose_buckets(index, plan, SlotCost.of(config).raised(index.sizes)), plan)
    return Pipeline(source, recipe, planner, PipelineConfig(workers=workers))


def main(folder: Path, tokenizer: Path, batch: int, workers: int) -> None:
    """Keeps the prompt of row 0 as FOLDER/ours.npz, for the comparison, then serves."""
    made = pipeline(folder, tokenizer, batch, workers)
    first = next(batch for _, batch in made.batches(0, made.planner.steps_per_epoch) if 0 in batch["index"])
    row = first["index"].tolist().index(0)
    kept = {name: first[name][row] for name in ("tokens", "segment_ids", "audio_chunks", "patches", "patch_mask")}
    np.savez(folder / "ours.npz", allow_pickle=False, **kept)

    def batches(samples: int) -> Iterator[int]:
        left = samples
        for _, batch in made.batches(0, samples):
            count = int(batch["row_mask"].sum())
            yield count
            if (left := left - count) <= 0:
                return

    serve(batches)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
