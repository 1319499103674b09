"""The atlas of a run: its splits opened, measured and planned, as `config.atlas` and `config.processing` say."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections
import numpy as np

from omnisapiens_jax import resources
from omnisapiens_jax.atlas import real_text
from omnisapiens_jax.atlas.ablation import WithoutTranscripts
from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets, choose_row
from omnisapiens_jax.atlas.faults import Quarantine, quarantined_rows
from omnisapiens_jax.atlas.labels import REAL_TEXT, SCHEMES, LabelScheme
from omnisapiens_jax.atlas.lengths import length_index, shortened
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import Index, PlanConfig, Planner
from omnisapiens_jax.atlas.recipe import Recipe, Target
from omnisapiens_jax.atlas.schema import Sample, task_kind
from omnisapiens_jax.atlas.sources import Source, open_source
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.parallel.mesh import same_everywhere
from omnisapiens_jax.processing.chat import FORMAT_PROMPTS
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import open_tokenizer
from omnisapiens_jax.training.journal import Bar, console
from omnisapiens_jax.training.state import open_weights

QUARANTINE = "quarantine.jsonl"  # in a run's folder
Rows = Callable[[Index], np.ndarray]  # [N] bool: which samples of a split take part


class NoRows(ValueError):
    """Nothing of a split is left for a stage."""


def rows_of_kind(kind: str, rows: Rows | None = None) -> Rows:
    """Those of `rows` (of all) whose task is `cls`, one of a list of labels, or `qa`, free text."""

    def chosen(index: Index) -> np.ndarray:
        own = np.array([task_kind(name) == kind for name in index.task_names], bool)[index.tasks]
        return own if rows is None else own & rows(index)

    return chosen


def rows_of_datasets(datasets: Sequence[str], rows: Rows | None = None) -> Rows:
    """Those of `rows` (of all) that are of some datasets."""

    def chosen(index: Index) -> np.ndarray:
        own = np.isin(np.asarray(index.dataset_names)[index.datasets], datasets)
        return own if rows is None else own & rows(index)

    return chosen


def rows_among(ids: np.ndarray, rows: Rows | None = None) -> Rows:
    """Those of `rows` (of all) that are the samples `ids`."""

    def chosen(index: Index) -> np.ndarray:
        own = np.isin(index.ids, ids)
        return own if rows is None else own & rows(index)

    return chosen


class Kept(Protocol):
    """What was computed of the samples of a split and takes the place of their words and media."""

    def batch(self, ids: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
        """Of the samples `ids [B]`, -1 for a masked row, in rows of a bucket of so many `tokens`."""
        ...


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of one split and the pipeline that batches them."""

    name: str
    source: Source
    pipeline: Pipeline
    zero: bool  # silence and black stand in for media that cannot be used
    identity: str  # a digest of the rows and of how examples are made of them, but not of their media
    rated: LabelScheme | None = None  # where given, batches have the `shares` of its classes among the raters of each sample
    kept: Kept | None = None  # where given, batches are made of it, and nothing is decoded

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once."""
        return self.pipeline.planner.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """As `Pipeline.batches`, with `shares` `[B, C]` (packed: `[B, S, C]`) where they are wanted, zeros where a slot is masked."""
        for step, batch in self.pipeline.batches(start, stop) if self.kept is None else self._of_kept(self.kept, start, stop):
            if self.rated is not None:
                shares = np.zeros((*batch["index"].shape, len(self.rated.classes)), np.float32)
                for place, i in np.ndenumerate(batch["index"]):
                    if i >= 0:
                        shares[place] = self.rated.shares(self.source[i])
                batch = {**batch, "shares": shares}
            yield step, batch

    def _of_kept(self, kept: Kept, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for step in range(start, stop):
            planned = self.pipeline.planner[step]
            ids = planned.ids[self.pipeline.host]
            yield step, {**kept.batch(ids, planned.bucket.tokens), "index": ids}

    def samples(self, batch: dict[str, Any]) -> list[Sample | None]:
        """The samples of a batch's slots, None where a slot is masked."""
        return [self.source[i] if i >= 0 else None for i in batch["index"].tolist()]

    def tell_faults(self) -> None:
        """Prints which rows were at fault, when they were measured or when this process met them."""
        if self.pipeline.faults:
            console.print(self.pipeline.faults.report(zero=self.zero))


class Atlas:
    """Opens splits on demand. All of them share one tokenizer and one way of reading media."""

    def __init__(self, config: ml_collections.ConfigDict, model: ThinkerConfig, workdir: Path | None = None):
        """`config` is the whole run's; where `config.atlas.path` is empty, the miniature atlas or the real texts, whichever
        `config.atlas.scheme` is for, are generated or fetched first.

        Bad rows are listed in `workdir`, in the file `QUARANTINE`.

        Raises:
          FileNotFoundError: a split or the tokenizer is not there.
          ValueError: the tokenizer is not the model's.
        """
        self._config, self._model = config, model
        weights = config.model.weights
        self.tokenizer = open_tokenizer(open_weights(weights).companions if weights else resources.resource("data/mini"))
        if self.tokenizer.ids != model.tokens:
            raise ValueError(
                f"the vocabulary {'of ' + weights if weights else 'bundled for mini'} is not that of the model "
                f"({config.model.preset}): name a checkpoint with its tokenizer beside it, --config.model.weights=DIR"
            )
        self.scheme = SCHEMES[config.atlas.scheme]
        self.root = Path(config.atlas.path) if config.atlas.path else self._own()
        for name in (config.atlas.train, config.atlas.validation, config.atlas.test):
            self.source(name)  # what is missing is told now, not when its turn comes
        self._cache = resources.cache() / "lengths"
        self._quarantine = workdir / QUARANTINE if workdir else None
        self._options = ProcessingConfig(
            **{**config.processing.to_dict(), "format_prompt": FORMAT_PROMPTS[config.processing.format_prompt]},
            feed_media=config.compat.media_inputs == "fed",
            system=config.compat.system_prompt,
        )

    def split(
        self,
        name: str,
        *,
        batch_size: int,
        target: Target | None,
        shuffle: bool,
        rows: Rows | None = None,
        transcripts: bool = True,
        packs: bool = False,
        rated: bool = False,
    ) -> Split:
        """One split.

        Args:
          name: its file in the atlas folder, or its name without the ending.
          batch_size: slots of a batch, all hosts together.
          target: what to append and teach; None ends at the assistant header.
          shuffle: a new order every epoch, as `config.atlas.training` says, or the file's own.
          rows: which samples take part (all).
          transcripts: False takes the words of every transcript out.
          packs: rows without a target are packed too where the config says so, as heads can read them; a sampler takes one prompt a row,
            here in batches of one signature.
          rated: batches know what the raters of each sample said.

        Raises:
          NoRows: no sample takes part.
        """
        atlas, compat = self._config.atlas, self._config.compat
        whole = self.source(name)
        source = whole if transcripts else WithoutTranscripts(whole)
        recipe = Recipe(
            self.tokenizer,
            self._model,
            self._options,
            max_tokens=atlas.max_tokens,
            target=target,
            scheme=self.scheme,
            truncation=compat.truncation,
            prompts=compat.qa_prompts,
            labels=compat.labels,
        )
        bounds = {"workers": atlas.workers, "deadline": atlas.deadline, "memory": atlas.worker_bytes}
        how = PipelineConfig(atlas.on_error, cache_bytes=atlas.cache_bytes, **bounds)
        leave_out = quarantined_rows(Path(atlas.quarantine), whole) if atlas.quarantine else ()
        if atlas.quarantine:  # also none: it may be the list of another atlas
            console.print(f"{name}: {len(leave_out)} rows are left out, as {atlas.quarantine} says")
        with Bar(f"measuring {name}", total=len(source), at_once=False) as bar:
            index, faults = length_index(
                source,
                recipe,
                on_error=atlas.on_error,
                cache=self._cache,
                leave_out=leave_out,
                quarantine=Quarantine(self._quarantine, whole.fingerprint()) if self._quarantine else None,
                progress=lambda done, _: bar.reach(done),
                **bounds,
            )
        if faults:
            console.print(faults.report(zero=atlas.on_error == "zero"))
        if cut := shortened(index):
            console.print(f"{name}: the transcripts of {cut} of {len(index)} samples were shortened to fit {atlas.max_tokens} tokens")
        if rows is not None:
            index = index.subset(rows(index))
        if not same_everywhere(index.content()):  # else they would plan different steps, and wait for each other for ever
            raise ValueError(
                f"{self.root / name}: the processes do not find the same rows usable and of the same size. Their reports of bad rows, or "
                f"{self._quarantine or 'a list of them'}, tell which: mend these, or leave them out with --config.atlas.quarantine=FILE"
            )
        if not len(index):
            raise NoRows(f"{self.root / name}: of {len(source)} rows {len(faults)} cannot be used, and none is left for this stage")
        mode = "homogeneous" if atlas.batches == "packed" and target is None and not packs else atlas.batches
        plan = PlanConfig(batch_size, hosts=jax.process_count(), seed=self._config.seed, mode=mode, shuffle=shuffle)
        if shuffle:
            plan = dataclasses.replace(plan, **atlas.training)
        cost = SlotCost.of(self._model).raised(index.sizes)
        if mode == "packed":
            buckets = (choose_row(index, cost, tokens=atlas.max_tokens),)
        else:
            buckets = choose_buckets(index, plan, cost, count=atlas.buckets)
        pipeline = Pipeline(source, recipe, Planner(index, buckets, plan), how, host=jax.process_index(), faults=faults)
        made = f"{source.fingerprint()} {recipe.fingerprint()} {recipe.prompts} {recipe.labels} {atlas.on_error == 'zero'}"
        return Split(
            name, source, pipeline, atlas.on_error == "zero", hashlib.sha256(made.encode()).hexdigest(), self.scheme if rated else None
        )

    def source(self, name: str) -> Source:
        """The rows of one split."""
        return open_source(self.root / name)

    def _own(self) -> Path:
        if self.scheme is REAL_TEXT:
            return real_text.atlas()
        from omnisapiens_jax.atlas.miniature import generate  # needs the extra `atlas`, which a run on another atlas does not

        atlas = self._config.atlas
        with Bar("making the miniature atlas", total=atlas.samples, at_once=False) as bar:
            return generate.atlas(
                atlas.samples, atlas.seed, descriptors=atlas.descriptors, cache=resources.cache(), progress=lambda done, _: bar.reach(done)
            )
