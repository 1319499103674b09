"""A comparison as files: `comparison.html` (one page that needs nothing else), `comparison.md` and `comparison.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.evaluation import paper
from omnisapiens_jax.evaluation.calibration import Reliability
from omnisapiens_jax.evaluation.compare import Against, Comparison, Estimate, as_json
from omnisapiens_jax.evaluation.compare import Line as Row
from omnisapiens_jax.evaluation.pieces import MINUS, confusions, environment, shown, varied
from omnisapiens_jax.pages.charts import Line, line_chart

NONE = "\N{EN DASH}"


def write_comparison(folder: Path, found: Comparison, *, source: Source | None = None) -> Path:
    """Writes the three files into a folder and returns the path of the page. With the rows themselves, examples show their media."""
    folder.mkdir(parents=True, exist_ok=True)
    page = environment().get_template("comparison.html.jinja")
    text = page.render(
        names=found.names,
        count=len(found.answers[0]),
        notes=_notes(found),
        tasks=_table(found, found.tasks, paper.TASKS),
        datasets=_table(found, found.datasets, paper.DATASETS),
        metrics=_metrics(found),
        confusions=confusions(found.scheme, list(zip(found.names, found.answers, strict=True))),
        reliability=[(name, bins.ece, int(bins.counts.sum()), _curve(bins)) for name, bins in _calibrated(found)],
        groups=found.groups,
        galleries=_galleries(found, source),
        caveat=_caveat(found),
    )
    contents = {"html": text, "md": markdown(found), "json": json.dumps(as_json(found), indent=1, ensure_ascii=False) + "\n"}
    for ending, content in contents.items():
        draft = folder / f"comparison.{ending}.part"
        draft.write_text(content, encoding="utf-8")
        draft.replace(folder / f"comparison.{ending}")
    return folder / "comparison.html"


def markdown(found: Comparison) -> str:
    """The tables as Markdown: tasks and datasets with their intervals, the tests against the first run, and the papers' numbers."""
    parts = [f"{len(found.answers[0])} samples. In brackets 95 % bootstrap intervals of {' and '.join(found.names)}."]
    parts += _notes(found)
    for title, rows, known in (("task", found.tasks, paper.TASKS), ("dataset", found.datasets, paper.DATASETS)):
        lines = _table(found, rows, known)
        models = list(lines[0]["paper"]) if lines else []
        head = [title, "metric", "n", *found.names, *(f"{name}, unverified" for name in models)]
        body = [
            [row["name"], row["metric"], row["count"], *map(_cell, row["scores"]), *map(_score, row["paper"].values())] for row in lines
        ]
        parts.append(_lines(head, body))
    for r, name in enumerate(found.names[1:]):
        head = ["task or dataset", f"{name} {MINUS} {found.names[0]}", "better", "worse", "McNemar p"]
        body = [[row.name, *_against(row.against[r])] for row in (*found.tasks, *found.datasets)]
        parts.append(_lines(head, body))
    for column, groups in found.groups.items():
        head = [column, "n", *(f"accuracy {name}" for name in found.names), *(f"ECE {name}" for name in found.names)]
        parts.append(_lines(head, [[g.value, g.count, *map(_cell, g.accuracy), *map(_score, g.ece)] for g in groups]))
    if calibrated := _calibrated(found):
        parts.append(_lines(["run", "n", "ECE, 15 bins"], [[name, int(bins.counts.sum()), _score(bins.ece)] for name, bins in calibrated]))
    return "\n\n".join([*parts, *filter(None, [_caveat(found)])]) + "\n"


def _caveat(found: Comparison) -> str:
    return paper.CAVEAT if found.scheme is HBA else ""


def _notes(found: Comparison) -> list[str]:
    """What a reader has to know before the numbers."""
    notes = []
    for name, left_out, no_label in zip(found.names, found.left_out, found.no_label, strict=True):
        facts = [f"{left_out} rows that not all runs answered are left out"] if left_out else []
        facts += [f"{no_label} predictions are no label of their domain and count as wrong"] if no_label else []
        notes += [f"{name}: {'; '.join(facts)}."] if facts else []
    if any(row.metric == "judge_accuracy" for row in found.datasets):
        lost = f"; {found.dropped} rows that the judge could not decide are left out" if found.dropped else ""
        notes.append(f"Free-form answers were judged by {found.judge}{lost}.")
    elif any(row.metric == "accuracy" for row in found.datasets):
        notes.append("No judge has seen the free-form answers: they count only where they match exactly.")
    return notes


def _table(found: Comparison, rows: Sequence[Row], known: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Lines with the papers' numbers beside them, which are of the benchmark's rows alone: of every model that has one of any line."""
    models = [model for model, scores in known.items() if found.scheme is HBA and any(row.name in scores for row in rows)]
    return [{**vars(row), "paper": {model: known[model].get(row.name) for model in models}} for row in rows]


def _metrics(found: Comparison) -> list[tuple[str, list[Estimate | None]]]:
    names = dict.fromkeys(name for own in found.metrics for name in own)
    return [(name, [own.get(name) for own in found.metrics]) for name in names]


def _calibrated(found: Comparison) -> list[tuple[str, Reliability]]:
    return [(name, bins) for name, bins in zip(found.names, found.calibration, strict=True) if bins]


def _curve(bins: Reliability) -> Markup:
    held = bins.counts > 0
    lines = [Line("perfect", (0.0, 1.0), (0.0, 1.0), "raw")]
    lines.append(Line("accuracy", bins.confidence[held].tolist(), bins.accuracy[held].tolist(), "points"))
    return line_chart("Accuracy", lines, bounds=(0.0, 1.0), over="confidence")


def _galleries(found: Comparison, source: Source | None) -> list[dict[str, Any]]:
    """Samples that a run answers otherwise than the first; of a single run, those it gets right and wrong."""
    right, first = found.right >= 0.5, found.names[0]
    if len(found.names) == 1:
        kinds = [("Right", [0], right[0]), ("Wrong", [0], ~right[0])]
    else:
        kinds = []
        for r, name in enumerate(found.names[1:], start=1):
            kinds.append((f"Wrong in {first}, right in {name}", [0, r], ~right[0] & right[r]))
            kinds.append((f"Right in {first}, wrong in {name}", [0, r], right[0] & ~right[r]))
    galleries = []
    for title, runs, which in kinds:
        places = np.flatnonzero(which).tolist()
        cases = []
        for i in varied(places, [found.answers[0][i].dataset for i in places]):
            row = found.answers[0][i]
            given = [(found.names[r], found.answers[r][i], bool(right[r, i])) for r in runs]
            cases.append({"row": row, "sample": None if source is None else shown(source[row.id]), "given": given})
        galleries.append({"title": title, "count": len(places), "cases": cases})
    return galleries


def _score(value: float | None) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:.3f}"


def _cell(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return NONE
    return f"{estimate.value:.3f} [{_score(estimate.low)}, {_score(estimate.high)}]"


def _against(row: Against) -> list[str | int]:
    d = row.difference
    change = NONE if math.isnan(d.mean) else f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"
    return [change, row.better, row.worse, f"{row.p:.2g}"]


def _lines(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
