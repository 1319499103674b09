"""Runs beside each other: scores, intervals, tests, groups, the page and the command line, from saved files alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnisapiens_jax.evaluation.__main__ import main
from omnisapiens_jax.evaluation.answers import Answer, load_answers, save_answers
from omnisapiens_jax.evaluation.compare import UNKNOWN, Run, compare, open_run, read_columns
from omnisapiens_jax.evaluation.comparison import markdown, write_comparison
from omnisapiens_jax.resources import resource
from tests.evaluation.test_metrics import EMOTION, PTSD, SARCASM, SENTI, set_metrics
from tests.evaluation.test_report import HOSTILE, Page

GOLDEN = {"mosei_senti": SENTI, "meld_emotion": EMOTION, "ptsd_in_the_wild": PTSD, "mmsd": SARCASM}
FEW = 200  # resamples, where nothing depends on them


def heads_file(path: Path) -> Path:
    """The rows of the golden values, as the original's classifiers write them."""
    columns = {"predictions": [], "ground_truths": [], "datasets": []}
    for dataset, (predictions, golds) in GOLDEN.items():
        columns["predictions"] += predictions.tolist()
        columns["ground_truths"] += golds.tolist()
        columns["datasets"] += [dataset] * len(golds)
    path.write_text(json.dumps(columns))
    return path


def made_up(right: float, *, seed: int, verdicts: bool = False, count: int = 240) -> tuple[Answer, ...]:
    """Answers of which about that share is right: two emotion datasets, sarcasm, free form."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(count):
        dataset = ("cremad", "meld_emotion", "mmsd", "siq2")[i % 4]
        golds = {"mmsd": ("sarcasm", "not sarcasm"), "siq2": ("he is shy", "because | it rains")}.get(dataset, ("sad", "happy", "anger"))
        gold, hit = golds[(i // 4) % len(golds)], bool(rng.random() < right)
        said = gold if hit else "nonsense" if i % 5 == 0 else golds[(i // 4 + 1) % len(golds)]
        row = Answer(i, dataset, gold, said, f"{said}{HOSTILE}", "text_audio" if dataset == "cremad" else "text_video_audio")
        row = dataclasses.replace(row, likelihood=float(rng.uniform(0.5, 1)))
        if dataset == "siq2" and verdicts:
            row = dataclasses.replace(row, prediction="so", question="Why?", verdict=float(hit), judge="a judge", explanation="because")
        rows.append(row)
    return tuple(rows)


def test_the_golden_values_stand_under_the_originals_names(tmp_path: Path) -> None:
    found = compare([open_run(str(heads_file(tmp_path / "heads.json")))], resamples=FEW)
    (metrics,) = found.metrics
    wanted = {
        "mosei_senti/weighted_f1": 0.4,
        "mosei_senti/micro_precision": 0.444444,
        "mosei_senti/F1w5": 0.526667,
        "mosei_senti/ACC2": 0.666667,
        "mosei_senti/F1w2": 0.751323,
        "meld_emotion/emotion_weighted_accuracy_mean": 0.69,
        "meld_emotion/anger/emotion_weighted_accuracy": 0.75,
        "meld_emotion/happy/emotion_weighted_accuracy": 0.4,
        "meld_emotion/macro_f1": 0.466667,
        "meld_emotion/sad/class_f1": 1.0,
        "ptsd_in_the_wild/weighted_f1": 0.5,
        "mmsd/weighted_precision": 0.833333,
    }
    # The golden run counted the one prediction of another domain against that domain's class; here it is nobody's.
    predictions, golds = (np.concatenate([pair[i] for pair in GOLDEN.values()]) for i in (0, 1))
    assert predictions[9] == 11
    predictions[9] = -1
    wanted |= {f"aggregate/{name}": value for name, value in set_metrics(golds, predictions).items()}
    assert {name: metrics[name].value for name in wanted} == pytest.approx(wanted, abs=5e-7)
    assert all(not own.low > own.value and not own.high < own.value for own in metrics.values() if own.value in (0.0, 1.0))
    tasks = {row.name: row.scores[0].value for row in found.tasks}
    assert tasks == pytest.approx({"EMO": 0.69, "SEN": 0.751323, "PTSD": 0.5, "SAR": 2 / 3, "mean": (0.69 + 0.751323 + 0.5 + 2 / 3) / 4})
    assert found.no_label == (1,)  # 11 for a sentiment


def test_a_better_run_is_told_from_an_equal_one() -> None:
    runs = [Run(name, made_up(share, seed=seed)) for name, share, seed in (("base", 0.4, 0), ("same", 0.4, 2), ("better", 0.8, 4))]
    found = compare(runs, resamples=500)
    tasks = {row.name: row for row in found.tasks}
    assert list(tasks) == ["EMO", "SAR", "SOC", "mean"] and tasks["EMO"].count == 120 and tasks["SOC"].metric == "accuracy"
    same, better = tasks["mean"].against
    assert not same.difference.significant and same.p > 0.05
    assert better.difference.low > 0.2 and better.p < 1e-6 and better.better > better.worse
    emotion = [row for row in found.datasets if row.name in ("cremad", "meld_emotion")]
    for r in range(3):
        assert tasks["EMO"].scores[r].value == pytest.approx(np.mean([row.scores[r].value for row in emotion]))
    for row in (*found.tasks, *found.datasets):
        assert all(own.low < own.value < own.high for own in row.scores)
        assert row.against[1].difference.mean == pytest.approx(row.scores[2].value - row.scores[0].value)
        # Paired: the interval of a run's difference to itself is a point.
    twin = compare([runs[0], Run("twin", runs[0].answers)], resamples=FEW)
    assert all((row.against[0].difference.low, row.against[0].difference.high, row.against[0].p) == (0, 0, 1) for row in twin.tasks)


def test_verdicts_count_where_all_runs_have_them_by_the_same_judge() -> None:
    first, second = made_up(0.5, seed=0, verdicts=True), made_up(0.7, seed=1, verdicts=True)
    free = [i for i, answer in enumerate(first) if answer.dataset == "siq2"]
    lost = tuple(dataclasses.replace(a, verdict=None) if i in free[:3] else a for i, a in enumerate(second))
    found = compare([Run("a", first), Run("b", lost)], resamples=FEW)
    soc = next(row for row in found.tasks if row.name == "SOC")
    assert (soc.metric, soc.count, found.dropped, found.judge) == ("judge_accuracy", len(free) - 3, 3, "a judge")
    assert soc.scores[0].value == np.mean([first[i].verdict or 0.0 for i in free[3:]])
    assert found.metrics[0]["siq2/accuracy"].value == 0.0  # no answer matches exactly
    text = markdown(found)
    assert "Free-form answers were judged by a judge; 3 rows that the judge could not decide are left out." in text
    other = tuple(dataclasses.replace(answer, judge="another" if answer.judge else "") for answer in second)
    for strange, told in ((other, "b by another"), (made_up(0.7, seed=1), "b by nobody")):
        with pytest.raises(ValueError, match=rf"not judged alike \(a by a judge, {told}\)"):
            compare([Run("a", first), Run("b", strange)])


def test_rows_that_not_all_runs_answered_are_left_out_and_counted() -> None:
    rows = made_up(0.5, seed=0)
    found = compare([Run("a", rows), Run("b", rows[10:]), Run("c", rows[:-4])], resamples=FEW)
    assert len(found.answers[0]) == len(rows) - 14 and found.left_out == (14, 4, 10)
    assert "c: 10 rows that not all runs answered are left out" in markdown(found)
    with pytest.raises(ValueError, match="no row was answered by all of a, b"):
        compare([Run("a", rows[:5]), Run("b", rows[5:])])
    with pytest.raises(ValueError, match="a: 1 rows come twice"):
        compare([Run("a", (*rows, rows[0]))])
    with pytest.raises(ValueError, match="row 0 is cremad with answer 'sad' in a, but cremad with 'fear' in b: .*different orders"):
        compare([Run("a", rows), Run("b", (dataclasses.replace(rows[0], gold="fear"), *rows[1:]))])
    with pytest.raises(ValueError, match="different names"):
        compare([Run("a", rows), Run("a", rows)])


def test_groups_come_from_the_rows_and_from_a_file_beside_them(tmp_path: Path) -> None:
    rows = made_up(0.6, seed=0)
    lines = [{"speaker": "left" if i % 2 else "right", "age": None if i % 3 else i % 6} for i in range(len(rows))]
    (tmp_path / "meta.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "meta.parquet")
    columns = read_columns(tmp_path / "meta.jsonl", ["speaker", "age"])
    assert columns == read_columns(tmp_path / "meta.parquet", ["speaker", "age"]) and columns["age"][:4] == ["0", UNKNOWN, UNKNOWN, "3"]
    found = compare([Run("a", rows)], columns=columns, resamples=FEW)
    assert {name: [(g.value, g.count) for g in own] for name, own in found.groups.items()} == {
        "modality_signature": [("text_video_audio", 180), ("text_audio", 60)],
        "speaker": [("right", 120), ("left", 120)],
        "age": [(UNKNOWN, 160), ("0", 40), ("3", 40)],
    }
    left = found.groups["speaker"][1]
    assert left.accuracy[0].value == np.mean([row.correct for row in rows[1::2]])
    assert left.ece[0] is not None and 0 < left.ece[0] < 1
    with pytest.raises(ValueError, match="has no column height; it has age, speaker"):
        read_columns(tmp_path / "meta.jsonl", ["height"])
    with pytest.raises(ValueError, match="the column speaker has 10 rows, but row 239 was answered"):
        compare([Run("a", rows)], columns={"speaker": columns["speaker"][:10]})
    (tmp_path / "meta.jsonl").write_text("{}\n[1]\n")
    with pytest.raises(ValueError, match="meta.jsonl, line 2: not a JSON object"):
        read_columns(tmp_path / "meta.jsonl", ["speaker"])


def test_calibration_reads_probabilities_of_heads_and_of_responses() -> None:
    rows = made_up(1.0, seed=0)
    heads = tuple(dataclasses.replace(row, probabilities=(0.1, 0.9)) for row in rows)
    silent = tuple(dataclasses.replace(row, likelihood=None) for row in rows)
    found = compare([Run("generated", rows), Run("heads", heads), Run("silent", silent)], resamples=FEW)
    generated, head, none = found.calibration
    assert generated is not None and head is not None and none is None
    assert generated.ece == pytest.approx(1 - np.mean([row.likelihood or 0.0 for row in rows])) and head.ece == pytest.approx(0.1)


def test_the_page_names_the_numbers_and_needs_nothing_else(tmp_path: Path) -> None:
    runs = [Run(f"base{HOSTILE}", made_up(0.4, seed=0, verdicts=True)), Run("better", made_up(0.8, seed=2, verdicts=True))]
    found = compare(runs, resamples=FEW)
    page = Page(write_comparison(tmp_path, found))
    text = page.text
    assert "240 samples that all of them answered" in text and "judged by a judge" in text
    assert "not verified" in text and "Qwen2.5-Omni-7B unverified" in text and "0.583" in text  # the paper's EMO
    assert "meld_emotion/happy/emotion_weighted_accuracy" in text
    assert "modality_signature" in text and "As often right as sure?" in text
    assert len(page.all("svg")) == 2 and all("confidence" in chart["aria-label"] for chart in page.all("svg"))
    assert text.count("Wrong in base") == 1 and "6 shown" in text and "a judge: because" in text
    assert not page.all("script") and HOSTILE in text and not page.all("img")
    plain = json.loads((tmp_path / "comparison.json").read_text())
    emo = plain["tasks"][0]
    assert emo["name"] == "EMO" and emo["scores"]["better"]["value"] == found.tasks[0].scores[1].value
    assert plain["runs"]["better"]["metrics"]["cremad/accuracy"]["low"] < plain["runs"]["better"]["metrics"]["cremad/accuracy"]["value"]
    table = (tmp_path / "comparison.md").read_text()
    assert f"| EMO | emotion_weighted_accuracy_mean | 120 | {found.tasks[0].scores[0].value:.3f} [" in table
    widths = {line.replace(r"\|", "").count("|") for line in table.splitlines() if line.startswith(("| task ", "| EMO ", "| --- "))}
    assert len(widths) <= 6 and "nan" not in table and "None" not in table


def test_the_command_line_compares_saved_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run's folder, a file of ours, and one of the original."""
    mini = resource("data/mini")
    rows = [json.loads(line) for line in (mini / "test.jsonl").read_text().splitlines()]
    ours = [
        Answer(i, row["dataset"], row["answer"], row["answer"].lower(), row["answer"], row["modality_signature"])
        for i, row in enumerate(rows)
    ]
    run = tmp_path / "run"
    run.mkdir()
    save_answers(run / "evaluation-before.json", [dataclasses.replace(row, prediction="x") for row in ours])
    save_answers(run / "evaluation-after.json", ours)
    original = tmp_path / "step_3.json"
    assert main(["export", str(run), str(original), "--as", "texts"]) == 0
    out = tmp_path / "out"
    files = [f"start={run / 'evaluation-before.json'}", str(run), f"theirs={original}"]
    grouped = ["--groups", str(mini / "test.jsonl"), "--by", "task"]
    assert main(["compare", *files, "--out", str(out), "--atlas", str(mini / "test"), "--resamples", "100", *grouped]) == 0
    plain = json.loads((out / "comparison.json").read_text())
    assert list(plain["runs"]) == ["start", "run", "theirs"] and plain["samples"] == len(rows)
    for task in plain["tasks"][:-1]:  # even who is always wrong is right about what a row is not: the emotions' metric counts that
        assert task["scores"]["start"]["value"] == (0.5 if task["name"] == "EMO" else 0.0), task
        assert task["scores"]["run"]["value"] == task["scores"]["theirs"]["value"] == 1.0
        assert task["against start"]["run"]["better"] == task["count"]
    assert set(plain["groups"]) == {"modality_signature", "task"}
    assert "data:video/mp4;base64," in (out / "comparison.html").read_text()
    assert "comparison.html" in capsys.readouterr().out


def test_runs_on_real_texts_are_compared_by_their_own_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No number of the papers stands beside them, whose tasks have the same names."""
    rows = [Answer(i, "vader_tweets", gold, "positive", "", "text") for i, gold in enumerate(("positive", "neutral", "negative") * 4)]
    save_answers(tmp_path / "evaluation-sft.json", [*rows, Answer(99, "isarcasm", "sarcasm", "sarcasm", "")])
    assert main(["compare", f"text={tmp_path}", "--out", str(tmp_path), "--resamples", "20", "--scheme", "real_text"]) == 0
    plain, text = json.loads((tmp_path / "comparison.json").read_text()), Page(tmp_path / "comparison.html").text
    assert [(task["name"], task["metric"]) for task in plain["tasks"]] == [
        ("SEN", "weighted_f1"),
        ("SAR", "weighted_f1"),
        ("mean", "mean of the tasks"),
    ]
    assert "unverified" not in text + (tmp_path / "comparison.md").read_text() and "not verified" not in text
    assert main(["export", str(tmp_path), str(tmp_path / "texts.json"), "--as", "classes", "--scheme", "real_text"]) == 0
    assert json.loads((tmp_path / "texts.json").read_text())["ground_truths"][:3] == [2, 1, 0]
    assert main(["compare", str(tmp_path)]) == 1 and "unknown dataset 'vader_tweets'" in capsys.readouterr().err


def test_the_command_line_judges_and_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mini, path = resource("data/mini"), tmp_path / "qa.json"
    rows = [json.loads(line) for line in (mini / "test.jsonl").read_text().splitlines()]
    free = [row for row in rows if row["task"].endswith("_qa")]
    path.write_text(json.dumps([{"dataset": row["dataset"], "pred": row["answer"], "gold": row["answer"].lower()} for row in free]))
    out = tmp_path / "judged.json"
    assert main(["judge", str(path), "--with", "f1", "--out", str(out), "--atlas", str(mini / "test")]) == 0
    judged = load_answers(out)
    assert all(row.verdict == 1.0 and row.judge == "token F1" for row in judged)
    assert "What does the speaker feel, and is it hidden?" in {row.question.splitlines()[-1] for row in judged}
    assert not any("<" in row.question or "Transcript" in row.question for row in judged)
    assert f"token F1: 1.000, {len(free)} free-form answers, 0 dropped" in capsys.readouterr().out

    (tmp_path / "empty").mkdir()
    save_answers(tmp_path / "empty" / "evaluation-a.json", judged)
    save_answers(tmp_path / "empty" / "evaluation-b.json", judged)
    for arguments, told in (
        (["compare", str(tmp_path / "nowhere.json")], "nowhere.json"),
        (["compare", str(tmp_path)], "holds no evaluation-NAME.json"),
        (["compare", str(tmp_path / "empty")], "holds several evaluations (a, b): name the file"),
        (["compare", str(path), "--by", "task"], "--groups FILE and --by COLUMN belong together"),
        (["judge", str(path), "--with", "openai", "--out", str(out)], "needs a key: set OPENAI_API_KEY"),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err
