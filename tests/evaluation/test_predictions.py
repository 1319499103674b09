"""The original's prediction files, read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omnisapiens_jax.evaluation.answers import Answer, save_answers
from omnisapiens_jax.evaluation.predictions import read_predictions, write_predictions

ANSWERS = [
    Answer(0, "mosei_senti", "neutral", "neutral", r"<think>so</think>\boxed{neutral}"),
    Answer(1, "cremad", "sad", "gloomy", "gloomy"),
    Answer(2, "siq2", "He is shy", "shy", r"\boxed{Shy}", question="How is he?", verdict=1.0, judge="j", explanation="same"),
]


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_heads_numbers(tmp_path: Path) -> None:
    path = tmp_path / "cls_val_generations_3.json"
    assert write_predictions(path, ANSWERS, "classes") == 1  # the free-form row has no class
    content = json.loads(path.read_text())
    assert content == {"predictions": [3, -1], "ground_truths": [3, 13], "datasets": ["mosei_senti", "cremad"]}
    found = read_predictions(path)
    assert [(row.gold, row.correct) for row in found] == [("neutral", True), ("sad", False)]


def test_a_number_of_another_domain_is_no_label_even_if_its_word_is_one(tmp_path: Path) -> None:
    """11 is the emotion neutral, 3 the sentiment."""
    content = {"predictions": [11, 3, 3], "ground_truths": [3, 3, 11], "datasets": ["mosei_senti", "mosei_senti", "cremad"]}
    assert [row.correct for row in read_predictions(written(tmp_path / "p.json", content))] == [False, True, False]


def test_policies_texts(tmp_path: Path) -> None:
    path = tmp_path / "step_40.json"
    assert write_predictions(path, ANSWERS, "texts") == 0
    assert json.loads(path.read_text())["predictions"] == [answer.text for answer in ANSWERS]
    assert [(row.dataset, row.gold, row.prediction) for row in read_predictions(path)] == [
        ("mosei_senti", "neutral", "neutral"),
        ("cremad", "sad", "gloomy"),
        ("siq2", "He is shy", "shy"),
    ]


def test_free_form_answers_with_and_without_a_verdict(tmp_path: Path) -> None:
    path = tmp_path / "test_qa_preds_step_1.json"
    assert write_predictions(path, ANSWERS, "qa") == 2
    row = {"dataset": "siq2", "pred": "shy", "gold": "He is shy"}
    assert json.loads(path.read_text()) == [row | {"question": "How is he?", "graded_result": True, "graded_result_explanation": "same"}]
    (found,) = read_predictions(path)
    assert (found.prediction, found.verdict, found.question, found.explanation) == ("shy", 1.0, "How is he?", "same")
    (plain,) = read_predictions(written(path, [row]))
    assert plain.verdict is None and plain.judge == ""


def test_our_own(tmp_path: Path) -> None:
    save_answers(tmp_path / "evaluation-after.json", ANSWERS)
    assert read_predictions(tmp_path / "evaluation-after.json") == ANSWERS


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"predictions": [1], "ground_truths": [1]}, "has no 'datasets'"),
        ({"predictions": [1], "ground_truths": [1, 2], "datasets": ["cremad"]}, "1 predictions, 2 ground_truths, 1 datasets"),
        ({"predictions": [], "ground_truths": [], "datasets": []}, "it holds no rows"),
        ([], "it holds no rows"),
        ([{"dataset": "siq2", "pred": "x"}], "has no 'gold'"),
        ([{"id": 1}], "missing 4 required"),
        (7, "it holds no rows"),
        ({"predictions": [1.5], "ground_truths": [7], "datasets": ["cremad"]}, "1.5 is neither a class index nor a text"),
    ],
)
def test_what_is_no_file_of_answers(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is not a file of answers .*{told}.*expected one that an evaluation wrote"):
        read_predictions(written(tmp_path / "p.json", content))


def test_what_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("predictions: 1")
    with pytest.raises(ValueError, match="p.json is not a file of answers"):
        read_predictions(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError):
        read_predictions(tmp_path / "q.json")


def test_unknown_datasets_and_gold_labels_are_counted(tmp_path: Path) -> None:
    datasets = ["iemocap", "cremad", "iemocap", "cremad", "cremad", "mosei_senti"]
    content = {"predictions": ["sad"] * 6, "ground_truths": ["sad", "calm", "sad", "sad", "calm", "positive"], "datasets": datasets}
    with pytest.raises(ValueError) as found:
        read_predictions(written(tmp_path / "p.json", content))
    told = str(found.value)
    assert "p.json: 4 of 6 rows do not fit the label scheme" in told
    assert "2 rows, the first is row 0: unknown dataset 'iemocap'" in told and "2 rows, the first is row 1: unknown label 'calm'" in told
