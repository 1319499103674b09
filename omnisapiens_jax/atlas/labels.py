"""The label scheme of Human Behavior Atlas as data: domains (one classification head each), datasets, and look-ups between them."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from omnisapiens_jax.atlas.schema import Sample

_METRICS = {"emotion": "emotion_weighted_accuracy_mean", "sentiment_intensity": "F1w2", None: "judge_accuracy"}


@dataclasses.dataclass(frozen=True)
class Domain:
    """A set of labels that share one classification head."""

    name: str
    labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A source of the benchmark. `domain` is None and `labels` is empty for free-form question answering.

    `benchmark` is the paper's task the dataset is averaged into; `signature` its modalities; `labels` are those that occur in its gold
    answers; `samples` is the paper's count of all splits together, None where it gives none.
    """

    name: str
    benchmark: str
    signature: str
    domain: str | None
    labels: tuple[str, ...] = ()
    samples: int | None = None

    @property
    def kind(self) -> str:
        """`cls` or `qa`, the suffix that the dataset's `task` strings carry."""
        return "qa" if self.domain is None else "cls"

    @property
    def metric(self) -> str:
        """What the paper scores the dataset by, as `evaluation.metrics` names it; `judge_accuracy` is a language model's verdict."""
        return _METRICS.get(self.domain, "weighted_f1")


@dataclasses.dataclass(frozen=True)
class LabelScheme:
    """Domains in head order and datasets. A global class index counts the labels of all domains in that order."""

    domains: tuple[Domain, ...]
    datasets: tuple[Dataset, ...]

    def __post_init__(self) -> None:
        labels = {domain.name: domain.labels for domain in self.domains}
        for dataset in self.datasets:
            if dataset.domain is not None and dataset.domain not in labels:
                raise ValueError(f"dataset {dataset.name!r} names the unknown domain {dataset.domain!r}")
            strange = [label for label in dataset.labels if label not in labels.get(dataset.domain or "", ())]
            if strange:
                raise ValueError(f"dataset {dataset.name!r} has labels outside its domain {dataset.domain!r}: {strange}")

    @cached_property
    def classes(self) -> tuple[tuple[str, str], ...]:
        """(domain, label) of every global class index."""
        return tuple((domain.name, label) for domain in self.domains for label in domain.labels)

    @cached_property
    def mapping(self) -> dict[str, int]:
        """`"{dataset}_{answer}"` -> global class index, the `label_mapping` of the published label file."""
        return {f"{d.name}_{label}": self._index[d.domain, label] for d in self.datasets if d.domain for label in d.labels}

    @cached_property
    def _index(self) -> dict[tuple[str, str], int]:
        return {key: i for i, key in enumerate(self.classes)}

    @cached_property
    def _datasets(self) -> dict[str, Dataset]:
        return {dataset.name: dataset for dataset in self.datasets}

    def released(self) -> dict[str, Any]:
        """The content of the published label file (`unified_label_map.json`, beside released heads `label_scheme.json`).

        The heads are in the order of `meta.global_classes`. When it was made, and what its makers noted about four labels, is left out.
        """
        own = sorted((dataset for dataset in self.datasets if dataset.domain is not None), key=lambda dataset: dataset.name)
        detail = {
            f"{dataset.name}_{label}": {
                "domain": dataset.domain,
                "unified_label": label,
                "global_index": self.mapping[f"{dataset.name}_{label}"],
                "notes": "",
            }
            for dataset in own
            for label in sorted(dataset.labels)
        }
        heads = {domain.name: self.head_classes(i) for i, domain in enumerate(self.domains)}
        return {
            "label_mapping": {key: entry["global_index"] for key, entry in detail.items()},
            "num_classes": len(self.classes),
            "datasets": [dataset.name for dataset in own],
            "dataset_labels": {dataset.name: sorted(dataset.labels) for dataset in own},
            "meta": {
                "excluded_qa_datasets": sorted(dataset.name for dataset in self.datasets if dataset.domain is None),
                "domains": {domain.name: [*domain.labels] for domain in self.domains},
                "dataset_domain": {dataset.name: dataset.domain for dataset in own},
                "global_classes": {name: [{"index": i, "label": self.classes[i][1]} for i in places] for name, places in heads.items()},
                "unified_detail": detail,
            },
        }

    def dataset(self, name: str) -> Dataset:
        """The dataset of that name. Raises `KeyError` that lists the known ones."""
        if name not in self._datasets:
            raise KeyError(f"unknown dataset {name!r}; the label scheme has: {', '.join(self._datasets)}")
        return self._datasets[name]

    def head(self, dataset: str) -> int:
        """Index of the classification head of a dataset. Raises `KeyError` for unknown and for free-form datasets."""
        domain = self._domain(dataset)
        return next(i for i, d in enumerate(self.domains) if d.name == domain)

    def head_classes(self, head: int) -> range:
        """The global class indices that a head decides between."""
        start = sum(len(domain.labels) for domain in self.domains[:head])
        return range(start, start + len(self.domains[head].labels))

    def index(self, dataset: str, answer: str) -> int:
        """Global class index of a gold answer, looked up in the dataset's own labels whatever the case of its letters.

        "neutral" is a sentiment in one dataset and an emotion in another, so an answer has no index without its dataset.

        Raises:
            KeyError: naming the dataset and listing its labels.
        """
        self._domain(dataset)
        key = f"{dataset}_{answer.strip().lower()}"
        if key not in self.mapping:
            raise KeyError(f"unknown label {answer!r} of dataset {dataset!r}; its labels are: {', '.join(self.dataset(dataset).labels)}")
        return self.mapping[key]

    def place(self, dataset: str, answer: str) -> tuple[int, int]:
        """Head and global class index of a gold answer, (-1, -1) of a free-form one. Raises `KeyError` as `head` and `index` do."""
        return (-1, -1) if self.dataset(dataset).domain is None else (self.head(dataset), self.index(dataset, answer))

    def prediction(self, dataset: str, text: str) -> int:
        """Global class index of a predicted text within the dataset's *domain*, or -1 when it is no label of that domain."""
        return self._index.get((self._domain(dataset), text.strip().lower()), -1)

    def index_any_domain(self, text: str) -> int:
        """Index of a text without its dataset, where the last domain wins ("neutral" is always the emotion), -1 when unknown.

        This is what the published RL evaluation did; use it only to compare with those numbers.
        """
        return max((i for i, (_, label) in enumerate(self.classes) if label == text.strip().lower()), default=-1)

    def check(self, sample: Sample) -> None:
        """Raises a `SampleError` of kind `label` when the row's dataset, task type or answer does not fit the scheme."""
        try:
            dataset = self.dataset(sample.dataset)
        except KeyError as error:
            raise sample.error(error.args[0], kind="label", field="dataset") from None
        if dataset.kind != sample.kind:
            raise sample.error(f"{sample.task!r} says {sample.kind}, but the dataset is {dataset.kind}", kind="label", field="task")
        if dataset.domain is not None:
            try:
                self.index(sample.dataset, sample.answer)
            except KeyError as error:
                raise sample.error(error.args[0], kind="label", field="answer") from None
            if strange := [label for label, _ in sample.raters if label not in dataset.labels]:
                raise sample.error(f"has shares of {strange}, which the dataset has not", kind="label", field="raters")

    def shares(self, sample: Sample) -> np.ndarray:
        """Which share of its raters gave each class `[C]` float32; all on the answer where only that is known, zeros without a domain."""
        shares = np.zeros(len(self.classes), np.float32)
        if self.dataset(sample.dataset).domain is not None:
            for label, share in sample.raters or ((sample.answer, 1.0),):
                shares[self.index(sample.dataset, label)] = share
        return shares

    def _domain(self, dataset: str) -> str:
        domain = self.dataset(dataset).domain
        if domain is None:
            raise KeyError(f"dataset {dataset!r} is free-form question answering: it has no labels")
        return domain


_SENTIMENTS = ("highly negative", "negative", "weakly negative", "neutral", "weakly positive", "positive", "highly positive")
_EMOTIONS = ("anger", "disgust", "fear", "happy", "neutral", "calm", "sad", "surprise")
_MELD_EMOTIONS = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")
_TAV, _TA, _T = "text_video_audio", "text_audio", "text"

HBA = LabelScheme(
    domains=(
        Domain("sentiment_intensity", _SENTIMENTS),
        Domain("emotion", _EMOTIONS),
        Domain("mental_health_ptsd", ("no ptsd", "ptsd")),
        Domain("mental_health_depression", ("no depression", "depression")),
        Domain("mental_health_anxiety", ("no anxiety", "anxiety")),
        Domain("sarcasm", ("not sarcasm", "sarcasm")),
        Domain("humour", ("not humour", "humour")),
    ),
    datasets=(
        Dataset("cremad", "EMO", _TA, "emotion", ("anger", "disgust", "fear", "happy", "neutral", "sad"), 7442),
        Dataset("meld_emotion", "EMO", _TAV, "emotion", _MELD_EMOTIONS, 13_706),
        Dataset("mosei_emotion", "EMO", _TAV, "emotion", ("anger", "disgust", "fear", "happy", "sad", "surprise"), 8598),
        Dataset("tess", "EMO", _TA, "emotion", _MELD_EMOTIONS, 2800),
        Dataset("urfunny", "HUM", _TAV, "humour", ("not humour", "humour"), 2125),
        Dataset("intentqa", "INT", _TAV, None, samples=16_297),
        Dataset("ptsd_in_the_wild", "PTSD", _TAV, "mental_health_ptsd", ("no ptsd", "ptsd"), 634),
        Dataset("mmpsy_anxiety", "ANX", _T, "mental_health_anxiety", ("no anxiety", "anxiety"), 1275),
        Dataset("mmpsy_depression", "DEP", _T, "mental_health_depression", ("no depression", "depression"), 1275),
        Dataset("daicwoz", "DEP", _TA, "mental_health_depression", ("no depression", "depression"), 189),
        Dataset("meld_senti", "SEN", _TAV, "sentiment_intensity", ("negative", "neutral", "positive"), 13_705),
        Dataset(
            "chsimsv2",
            "SEN",
            _TAV,
            "sentiment_intensity",
            ("highly negative", "weakly negative", "neutral", "weakly positive", "highly positive"),
            4403,
        ),
        Dataset("mosei_senti", "SEN", _TAV, "sentiment_intensity", _SENTIMENTS, 22_856),
        Dataset("mmsd", "SAR", _TAV, "sarcasm", ("not sarcasm", "sarcasm"), 690),
        Dataset("siq2", "SOC", _TAV, None, samples=6437),
        Dataset("mimeqa", "NVC", _TAV, None, samples=806),
    ),
)

# Real texts (data/real_text), whose labels are not those of the benchmark: a scheme of their own, so that heads and tables of one never
# count the rows of the other.
REAL_TEXT = LabelScheme(
    domains=(Domain("sentiment", ("negative", "neutral", "positive")), Domain("sarcasm", ("not sarcasm", "sarcasm"))),
    datasets=(
        Dataset("vader_tweets", "SEN", _T, "sentiment", ("negative", "neutral", "positive")),
        Dataset("isarcasm", "SAR", _T, "sarcasm", ("not sarcasm", "sarcasm")),
    ),
)

SCHEMES = {"hba": HBA, "real_text": REAL_TEXT}
