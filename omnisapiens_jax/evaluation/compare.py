"""Runs beside each other on the rows that all of them answered: scores with intervals, tests, calibration, groups."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.evaluation.answers import FINAL, Answer, evaluations
from omnisapiens_jax.evaluation.calibration import Reliability, reliability
from omnisapiens_jax.evaluation.metrics import (
    NO_LABEL,
    Difference,
    classification_scores,
    gold_index,
    headline,
    interval,
    mcnemar,
    predicted_index,
    resampled,
    set_scores,
    weighted_counts,
)
from omnisapiens_jax.evaluation.predictions import read_predictions

SIGNATURE = "modality_signature"
UNKNOWN = "(not given)"  # group of a row whose value nobody wrote down


@dataclasses.dataclass(frozen=True)
class Run:
    """What one model answered, under the name it has in a comparison."""

    name: str
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Against:
    """A run beside the first one: the difference of the score, how many answers got better and worse, McNemar's exact p-value of these."""

    difference: Difference
    better: int
    worse: int
    p: float


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        name: of the dataset or task.
        metric: the benchmark's for it.
        count: samples.
        scores: of each run.
        against: of each run but the first.
    """

    name: str
    metric: str
    count: int
    scores: tuple[Estimate, ...]
    against: tuple[Against, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Samples that have something in common: their share of right answers, and the calibration error where confidences are known."""

    value: str
    count: int
    accuracy: tuple[Estimate, ...]
    ece: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All that is known of R runs on N common samples.

    Attributes:
        scheme: what datasets and labels there are.
        names: of the runs.
        answers: `[R][N]`, in the order of the ids.
        right: `[R, N]` which are right, or how right a judge finds them.
        left_out: of each run, how many rows not all runs answered.
        dropped: free-form rows that a judge could not say anything about, in any run.
        no_label: of each run, how many predictions are no label of their domain.
        judge: of the free-form answers, "" where they had to match exactly.
        tasks: the benchmark's tasks, as far as there are rows, and their mean.
        datasets: likewise.
        metrics: of each run, every metric under the original's names: `{dataset}/{metric}`, `{dataset}/{label}/class_f1`,
            `aggregate/{metric}` over all classification rows.
        calibration: of each run, None where it has no confidences.
        groups: by column.
    """

    scheme: LabelScheme
    names: tuple[str, ...]
    answers: tuple[tuple[Answer, ...], ...]
    right: np.ndarray
    left_out: tuple[int, ...]
    dropped: int
    no_label: tuple[int, ...]
    judge: str
    tasks: tuple[Line, ...]
    datasets: tuple[Line, ...]
    metrics: tuple[Mapping[str, Estimate], ...]
    calibration: tuple[Reliability | None, ...]
    groups: Mapping[str, tuple[Group, ...]]


def compare(
    runs: Sequence[Run],
    *,
    scheme: LabelScheme = HBA,
    any_domain: bool = False,
    columns: Mapping[str, Sequence[str]] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares runs, the later ones with the first.

    Args:
        runs: at least one, of different names.
        scheme: what datasets and labels there are.
        any_domain: read labels as the published evaluation of generated answers did (`metrics.gold_index`).
        columns: what groups the rows of the split, by row.
        resamples: of the bootstrap. All runs are measured on the same resamples; each dataset is resampled by itself.
        seed: of the bootstrap.

    Raises:
        ValueError: names or ids come twice, no row is common to all runs, they disagree on a row's dataset or gold answer, their free-form
            answers were not judged alike, or a column is too short.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"a comparison needs one run at least, and different names, not {names}: name them, as in before=FILE")
    answers, left_out = _common(runs)
    judge, dropped, answers = _judged(names, answers, scheme)
    rows = answers[0]
    held: dict[str, list[int]] = {}
    for i, answer in enumerate(rows):
        held.setdefault(answer.dataset, []).append(i)
    datasets = [dataset.name for dataset in scheme.datasets if dataset.name in held]

    right = np.array([[answer.correct if answer.verdict is None else answer.verdict for answer in own] for own in answers], float)
    golds, predicted = np.full(len(rows), NO_LABEL), np.full(right.shape, NO_LABEL)
    cls = np.array([scheme.dataset(answer.dataset).domain is not None for answer in rows])
    for i in np.flatnonzero(cls):
        golds[i] = gold_index(scheme, rows[i].dataset, rows[i].gold, any_domain=any_domain)
        predicted[:, i] = [predicted_index(scheme, a[i].dataset, a[i].prediction, any_domain=any_domain) for a in answers]
    right[:, cls] = predicted[:, cls] == golds[cls]

    scores: dict[str, list[dict[str, np.ndarray]]] = {}  # dataset -> of each run, metric -> [1 + R]
    for name in datasets:
        own, own_seed = held[name], (seed, [dataset.name for dataset in scheme.datasets].index(name))
        if scheme.dataset(name).domain is None:
            exact = np.array([[answer[i].correct for i in own] for answer in answers], float)
            cells, weights = _cells(np.concatenate([exact, right[:, own]]), resamples, own_seed)
            matched, verdicts = np.split((weights @ cells.T / len(own)).T, 2)
            scores[name] = [{"accuracy": a} | ({"judge_accuracy": v} if judge else {}) for a, v in zip(matched, verdicts, strict=True)]
        else:
            cells, weights = _cells(np.concatenate([golds[None, own], predicted[:, own]]), resamples, own_seed)
            scores[name] = [classification_scores(scheme, name, cells[0], said, weights) for said in cells[1:]]

    metrics: list[dict[str, Estimate]] = [{} for _ in runs]
    for name, each in scores.items():
        for own, found in zip(metrics, each, strict=True):
            own |= {f"{name}/{metric}": _estimate(draws) for metric, draws in found.items()}
    if cls.any():
        cells, weights = _cells(np.concatenate([golds[None, cls], predicted[:, cls]]), resamples, (seed, len(scheme.datasets)))
        for own, said in zip(metrics, cells[1:], strict=True):
            counts = weighted_counts(cells[0], said, np.unique(cells[0]).tolist(), weights)
            own |= {f"aggregate/{metric}": _estimate(draws) for metric, draws in set_scores(counts).items()}

    measured = {name: headline(scheme, name, judged=bool(judge)) for name in datasets}
    draws = {name: [own[measured[name]] for own in scores[name]] for name in datasets}
    lines = tuple(_line(name, measured[name], draws[name], right[:, held[name]]) for name in datasets)
    members: dict[str, list[str]] = {}
    for name in datasets:
        members.setdefault(scheme.dataset(name).benchmark, []).append(name)
    means = {task: [np.mean([draws[name][r] for name in own], axis=0) for r in range(len(runs))] for task, own in members.items()}
    tasks = [_line(task, measured[own[0]], means[task], right[:, [i for name in own for i in held[name]]]) for task, own in members.items()]
    overall = [np.mean([own[r] for own in means.values()], axis=0) for r in range(len(runs))]
    tasks.append(_line("mean", "mean of the tasks", overall, right))

    return Comparison(
        scheme,
        tuple(names),
        answers,
        right,
        left_out,
        dropped,
        tuple(int((row[cls] == NO_LABEL).sum()) for row in predicted),
        judge,
        tuple(tasks),
        lines,
        tuple(metrics),
        tuple(_calibration(own, right[r]) for r, own in enumerate(answers)),
        _groups(answers, right, columns or {}, resamples, seed),
    )


def open_run(argument: str, scheme: LabelScheme = HBA) -> Run:
    """The run that a command line names: `[NAME=]PATH`, a run's folder or a file of answers.

    A folder is read for the evaluation that the run is judged by: after RL, else of the supervised run or the checkpoint.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder has several evaluations of other names, or the file is none (`predictions.read_predictions`).
    """
    name, named, rest = argument.partition("=")
    if not named or Path(argument).exists():
        name, rest = "", argument
    path = Path(rest)
    if path.is_dir():
        found = {key: file for key, file in evaluations(path).items() if "-without-" not in key}
        if not found:
            raise FileNotFoundError(f"{path} holds no evaluation-NAME.json: is the run finished?")
        chosen = next((key for key in FINAL if key in found), None) or (next(iter(found)) if len(found) == 1 else None)
        if chosen is None:
            raise ValueError(f"{path} holds several evaluations ({', '.join(found)}): name the file")
        return Run(name or path.resolve().name, tuple(read_predictions(found[chosen], scheme)))
    return Run(name or path.stem.removeprefix("evaluation-"), tuple(read_predictions(path, scheme)))


def read_columns(path: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Columns of a JSONL or parquet file, a text for each row: what groups the rows of a split.

    Row i of the file speaks of row i of the split, so it may be the split's own file, or one with metadata that lies beside it.

    Raises:
        ValueError: there is no such column, or a line is no JSON object.
    """
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        rows, known = table.select([name for name in names if name in table.column_names]).to_pylist(), set(table.column_names)
    else:
        rows, known = [], set()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as reason:
                raise ValueError(f"{path}, line {number}: not a JSON object ({reason})") from None
            known |= rows[-1].keys()
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(sorted(known))}")
    return {name: [UNKNOWN if row.get(name) is None else str(row[name]) for row in rows] for name in names}


def _common(runs: Sequence[Run]) -> tuple[tuple[tuple[Answer, ...], ...], tuple[int, ...]]:
    """The answers to the rows that all runs answered, by id, and how many others each run has."""
    tables = []
    for run in runs:
        tables.append({answer.id: answer for answer in run.answers})
        if len(tables[-1]) < len(run.answers):
            raise ValueError(f"{run.name}: {len(run.answers) - len(tables[-1])} rows come twice")
    ids = sorted(set.intersection(*map(set, tables)))
    if not ids:
        raise ValueError(f"no row was answered by all of {', '.join(run.name for run in runs)}: they cannot be compared")
    first = tables[0]
    for run, table in zip(runs, tables, strict=True):
        for i in ids:
            ours, theirs = ((a.dataset, a.gold.strip().lower()) for a in (first[i], table[i]))
            if ours != theirs:
                raise ValueError(
                    f"row {i} is {ours[0]} with answer {ours[1]!r} in {runs[0].name}, but {theirs[0]} with {theirs[1]!r} in {run.name}: "
                    "these are answers to different splits, or in different orders"
                )
    return tuple(tuple(table[i] for i in ids) for table in tables), tuple(len(table) - len(ids) for table in tables)


def _judged(
    names: Sequence[str], answers: tuple[tuple[Answer, ...], ...], scheme: LabelScheme
) -> tuple[str, int, tuple[tuple[Answer, ...], ...]]:
    """Who judged the free-form rows, how many could not be judged in some run, and all other rows."""
    places = [i for i, answer in enumerate(answers[0]) if scheme.dataset(answer.dataset).domain is None]
    judges = {name: {own[i].judge for i in places} for name, own in zip(names, answers, strict=True)}
    if len(set[str]().union(*judges.values())) > 1:
        told = ", ".join(f"{name} by {' and '.join(sorted(judge or 'nobody' for judge in own))}" for name, own in judges.items())
        raise ValueError(f"free-form answers were not judged alike ({told}): let one judge see all of them")
    judge = next(iter(next(iter(judges.values()))), "") if places else ""
    if not judge:
        return "", 0, answers
    lost = {i for i in places if any(own[i].verdict is None for own in answers)}
    if len(lost) == len(answers[0]):
        raise ValueError(f"{judge} could say nothing about any of the {len(lost)} rows, and there are no others")
    return judge, len(lost), tuple(tuple(answer for i, answer in enumerate(own) if i not in lost) for own in answers)


def _cells(columns: np.ndarray, resamples: int, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Columns `[K, N]` -> the kinds of rows `[K, U]` and how often each comes, as it is and in resamples `[1 + R, U]`."""
    cells, counts = np.unique(columns, axis=1, return_counts=True)
    return cells, resampled(counts, resamples=resamples, seed=seed)


def _estimate(draws: np.ndarray) -> Estimate:
    return Estimate(float(draws[0]), *interval(draws[1:]))


def _line(name: str, metric: str, draws: Sequence[np.ndarray], right: np.ndarray) -> Line:
    against = []
    for r in range(1, len(draws)):
        change = draws[r] - draws[0]
        difference = Difference(float(change[0]), *interval(change[1:]))
        better, worse = int((right[r] > right[0]).sum()), int((right[r] < right[0]).sum())
        against.append(Against(difference, better, worse, mcnemar(right[0], right[r])))
    return Line(name, metric, right.shape[1], tuple(map(_estimate, draws)), tuple(against))


def _calibration(answers: Sequence[Answer], right: np.ndarray) -> Reliability | None:
    known = [(answer.confidence, score) for answer, score in zip(answers, right, strict=True) if answer.confidence is not None]
    return reliability(*map(np.array, zip(*known, strict=True))) if known else None


def _groups(
    answers: tuple[tuple[Answer, ...], ...], right: np.ndarray, columns: Mapping[str, Sequence[str]], resamples: int, seed: int
) -> dict[str, tuple[Group, ...]]:
    rows = answers[0]
    values = {SIGNATURE: [answer.signature or UNKNOWN for answer in rows]} if any(answer.signature for answer in rows) else {}
    for name, column in columns.items():
        if rows[-1].id >= len(column):
            raise ValueError(f"the column {name} has {len(column)} rows, but row {rows[-1].id} was answered: it is not of this split")
        values[name] = [column[answer.id] for answer in rows]
    groups = {}
    for name, column in values.items():
        places: dict[str, list[int]] = {}
        for i, value in enumerate(column):
            places.setdefault(value, []).append(i)
        largest = sorted(places.items(), key=lambda item: -len(item[1]))
        groups[name] = tuple(_group(value, np.array(own), answers, right, resamples, seed) for value, own in largest)
    return groups


def _group(value: str, own: np.ndarray, answers: tuple[tuple[Answer, ...], ...], right: np.ndarray, resamples: int, seed: int) -> Group:
    cells, weights = _cells(right[:, own], resamples, (seed,))
    shares = weights @ cells.T / len(own)
    found = [_calibration([answer[i] for i in own], right[r, own]) for r, answer in enumerate(answers)]
    return Group(value, len(own), tuple(map(_estimate, shares.T)), tuple(each.ece if each else None for each in found))


def as_json(found: Comparison) -> dict[str, Any]:
    """As plain data, with all metrics of all runs; what is not defined is None."""

    def line(row: Line) -> dict[str, Any]:
        named = dict(zip(found.names, map(dataclasses.asdict, row.scores), strict=True))
        against = dict(zip(found.names[1:], map(dataclasses.asdict, row.against), strict=True))
        return {"name": row.name, "metric": row.metric, "count": row.count, "scores": named, f"against {found.names[0]}": against}

    runs = {}
    for r, name in enumerate(found.names):
        bins = found.calibration[r]
        runs[name] = {
            "rows left out": found.left_out[r],
            "predictions that are no label": found.no_label[r],
            "metrics": {metric: dataclasses.asdict(estimate) for metric, estimate in found.metrics[r].items()},
            "calibration": bins and {"ece": bins.ece, **{key: value.tolist() for key, value in vars(bins).items()}},
        }
    groups = {
        column: {g.value: {"count": g.count, "accuracy": [*map(dataclasses.asdict, g.accuracy)], "ece": g.ece} for g in own}
        for column, own in found.groups.items()
    }
    plain = {
        "samples": len(found.answers[0]),
        "free-form answers judged by": found.judge or None,
        "rows without a verdict": found.dropped,
        "tasks": [*map(line, found.tasks)],
        "datasets": [*map(line, found.datasets)],
        "groups": groups,
        "runs": runs,
    }
    return _defined(plain)


def _defined(value: Any) -> Any:
    """Nan as None, which JSON has."""
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_defined(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
