"""`report.html`: what a run did, on one page that needs nothing else. Media and charts are inside the file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from omnisapiens_jax.atlas.labels import HBA, LabelScheme
from omnisapiens_jax.atlas.schema import Sample
from omnisapiens_jax.atlas.sources import Source
from omnisapiens_jax.evaluation.answers import FINAL, Answer, accuracy, evaluations, load_answers
from omnisapiens_jax.evaluation.evaluate import MODALITIES
from omnisapiens_jax.evaluation.metrics import Difference, dataset_metrics, paired_bootstrap
from omnisapiens_jax.evaluation.pieces import confusions, environment, shown, varied
from omnisapiens_jax.pages.charts import Line, line_chart, smoothed
from omnisapiens_jax.rl.replay import Rollout, load_rollout
from omnisapiens_jax.rl.rewards import RewardConfig, extract_prediction

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # stage -> lines of its metrics.jsonl

_CHARTS = (
    # (metric, title, what it says, fixed axis)
    ("reward", "Reward", "mean over all responses; at most 1.7", None),
    ("accuracy", "Accuracy of rollouts", "share of sampled responses that are right", (0.0, 1.0)),
    ("format", "Format", "share that think first and then box an answer", (0.0, 1.0)),
    ("response_length", "Response length", "tokens, the end token included", None),
    ("entropy", "Entropy", "of the policy, nats a token, from what it sampled", None),
    ("groups_without_signal", "Groups without signal", "share of prompts whose responses all earned the same", (0.0, 1.0)),
)


def write_report(workdir: Path, curves: Curves, *, test: Source, train: Source, scheme: LabelScheme = HBA) -> Path:
    """Writes `workdir/report.html` and returns its path. Parts whose files a run does not have are left out.

    Args:
      workdir: with `config.json`, `evaluation-*.json` and, after RL, `rl/rollouts/*.npz`.
      curves: metrics by stage (`warm_start`, `generative`, `sft`, `qa`, `rl`), as far as they were run.
      test: the rows that were evaluated.
      train: the rows that rollouts were sampled for.
      scheme: what datasets and answers may be.
    """
    found = {name: load_answers(path) for name, path in evaluations(workdir).items()}
    final = next((found[name] for name in FINAL if name in found), [])
    blanked = [(m, paired(*_common(final, found[name]))) for m in MODALITIES if (name := f"after-without-{m}") in found]
    first = None
    if "before" in found and "after" in found:
        first, final = _common(found["before"], final)
    sets = [*([("before RL", first)] if first else []), *([("after RL" if first else "held-out", final)] if final else [])]
    page = environment().get_template("report.html.jinja")
    text = page.render(
        title=workdir.absolute().name,
        config=_flat(json.loads((workdir / "config.json").read_text())),
        count=len(final),
        accuracy=accuracy(final) if final else None,
        before=accuracy(first) if first else None,
        difference=paired(first, final) if first else None,
        datasets=_datasets(scheme, first, final),
        blanked=blanked,
        stages=[(name, len(rows), sum(row["time/seconds"] for row in rows)) for name, rows in curves.items() if rows],
        losses=[(name, _loss_chart(rows), _best(rows)) for name, rows in curves.items() if rows and name != "rl"],
        charts=_rl_charts(curves.get("rl", ())),
        confusions=confusions(scheme, sets),
        rollouts=_rollouts(sorted((workdir / "rl" / "rollouts").glob("*.npz")), train),
        galleries=_galleries(first, final, test),
    )
    path = workdir / "report.html"
    draft = path.with_suffix(".part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def paired(before: Sequence[Answer], after: Sequence[Answer]) -> Difference:
    """Accuracy of `after` minus `before`, with its 95 % interval. Raises ValueError if they did not answer the same samples."""
    if [answer.id for answer in before] != [answer.id for answer in after]:
        raise ValueError(f"the two evaluations answered different samples ({len(before)} and {len(after)}): they cannot be compared")
    return paired_bootstrap(np.array([a.correct for a in before]), np.array([a.correct for a in after]))


def _common(before: list[Answer], after: list[Answer]) -> tuple[list[Answer], list[Answer]]:
    """The answers to samples that both evaluations answered: a row may be too long for one, or its file unreadable later on.

    Raises ValueError if there is none.
    """
    both = {answer.id for answer in before} & {answer.id for answer in after}
    if not both:
        raise ValueError(f"the two evaluations ({len(before)} and {len(after)} samples) have no sample in common: they cannot be compared")
    return [answer for answer in before if answer.id in both], [answer for answer in after if answer.id in both]


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in config.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", json.dumps(value))]
    return rows


def _datasets(scheme: LabelScheme, first: list[Answer] | None, final: list[Answer]) -> list[dict[str, Any]]:
    """A row for each dataset, and one for all of them."""

    def measured(answers: list[Answer]) -> dict[str, dict[str, float]]:
        columns = zip(*[(a.dataset, a.gold, a.prediction) for a in answers], strict=True)
        return dataset_metrics(scheme, *map(list, columns))

    if not final:
        return []
    after, before = measured(final), measured(first) if first else {}
    rows = []
    for name in after:
        own = [i for i, answer in enumerate(final) if answer.dataset == name]
        golds = {final[i].gold.strip().lower() for i in own}
        rows.append(
            {
                "name": name,
                "domain": scheme.dataset(name).domain,
                "count": len(own),
                "chance": 1 / len(golds),
                "after": after[name],
                "before": before.get(name),
                "difference": paired([first[i] for i in own], [final[i] for i in own]) if first else None,
            }
        )
    return rows


def _loss_chart(rows: Sequence[Mapping[str, float]]) -> Markup:
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    lines = [Line("training loss", steps, losses, "raw"), Line("smoothed", steps, smoothed(losses, max(len(rows) / 20, 1)), "smooth")]
    measured = [row for row in rows if "validation_loss" in row]
    if measured:
        lines.append(Line("validation loss", [row["step"] for row in measured], [row["validation_loss"] for row in measured], "points"))
    return line_chart("Loss", lines, log=True)


def _best(rows: Sequence[Mapping[str, float]]) -> tuple[str, float, int] | None:
    """What the kept state was selected by, its value and its step: the lowest validation loss, or the highest of another metric."""
    named = {name for row in rows for name in row if name.startswith("validation_")}
    key = next(iter(sorted(named - {"validation_loss"})), "validation_loss")
    sign, which = (1, "lowest") if key == "validation_loss" else (-1, "highest")
    measured = [(sign * row[key], int(row["step"]) + 1) for row in rows if key in row and np.isfinite(row[key])]
    value, steps = min(measured, default=(0.0, 0))
    return (f"{which} {key.replace('_', ' ')}", sign * value, steps) if measured else None


def _rl_charts(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str, Markup]]:
    charts = []
    steps = [row["step"] for row in rows]
    for name, title, told, bounds in _CHARTS if rows else ():
        values = [row[name] for row in rows]
        lines = [Line("each step", steps, values, "raw"), Line("smoothed", steps, smoothed(values, max(len(rows) / 15, 1)), "smooth")]
        charts.append((title, told, line_chart(title, lines, bounds=bounds)))
    return charts


def _rollouts(paths: list[Path], train: Source) -> list[dict[str, Any]]:
    """Samples of the last and of the first record, of those that taught something: whose responses earned different rewards."""
    records = []
    for path in dict.fromkeys([paths[-1], paths[0]] if paths else []):
        rollout = load_rollout(path)
        live = [g for g in range(len(rollout.golds)) if rollout.row_mask[g].any()]
        telling = [g for g in live if rollout.advantages[g].any()] or live
        samples = {g: train[int(rollout.sample_ids[g])] for g in live}
        chosen = varied(telling, [samples[g].dataset for g in telling])
        records.append({"step": rollout.step, "groups": [_group(rollout, g, samples[g]) for g in chosen]})
    return records


def _group(rollout: Rollout, g: int, sample: Sample) -> dict[str, Any]:
    gold, times = sample.answer.strip().lower(), Counter(rollout.texts[g])
    earned = dict(zip(rollout.texts[g], zip(rollout.rewards[g].tolist(), rollout.advantages[g].tolist(), strict=True), strict=True))
    responses = [
        {"text": text, "times": times[text], "right": extract_prediction(text, RewardConfig()) == gold, "reward": reward, "advantage": gain}
        for text, (reward, gain) in sorted(earned.items(), key=lambda item: -item[1][0])
    ]
    return {"sample": shown(sample), "responses": responses}


def _galleries(first: list[Answer] | None, final: list[Answer], test: Source) -> list[dict[str, Any]]:
    """Held-out samples grouped by what became of them."""
    if first:
        pairs = list(zip(first, final, strict=True))
        kinds = [
            ("Wrong before, right after", [(a, b) for a, b in pairs if b.correct and not a.correct]),
            ("Right before, wrong after", [(a, b) for a, b in pairs if a.correct and not b.correct]),
        ]
    else:
        kinds = [(title, [(None, b) for b in final if b.correct == right]) for title, right in (("Right", True), ("Wrong", False))]
    galleries = []
    for title, cases in kinds:
        chosen = varied(cases, [after.dataset for _, after in cases])
        cards = [{"sample": shown(test[after.id]), "before": before, "after": after} for before, after in chosen]
        galleries.append({"title": title, "count": len(cases), "cases": cards})
    return galleries
