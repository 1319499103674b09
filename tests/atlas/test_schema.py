"""What a user sees for good and bad rows."""

import pickle
from pathlib import Path

import pytest

from omnisapiens_jax.atlas.schema import SampleError, sample_from_row, task_kind

ROW = {
    "problem": "<audio>\nWhat emotion?",
    "answer": "anger",
    "images": [],
    "videos": [],
    "audios": ["audio/a.wav"],
    "dataset": "cremad",
    "modality_signature": "text_audio",
    "ext_video_feats": [],
    "ext_audio_feats": ["opensmile/audio/a.wav.pt"],
    "task": "emotion_cls",
    "class_label": "anger",
    "texts": [],
}


def read(row, root: Path | None = Path("/atlas")):
    return sample_from_row(row, file="train.jsonl", index=17, root=root)


def test_a_row_becomes_a_sample_with_paths_below_the_file():
    sample = read(ROW)
    assert sample.audios == (Path("/atlas/audio/a.wav"),)
    assert sample.ext_audio_feats == (Path("/atlas/opensmile/audio/a.wav.pt"),)
    assert (sample.id, sample.kind, sample.rationale, sample.images) == (17, "cls", "", ())


def test_bytes_are_kept_as_they_are():
    assert read({**ROW, "audios": [b"RIFF"], "ext_audio_feats": None}, root=None).audios == (b"RIFF",)


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"modality_signature": None}, "modality_signature", "missing"),
        ({"modality_signature": "  "}, "modality_signature", "blank"),
        ({"problem": ""}, "problem", "blank"),
        ({"answer": None}, "answer", "missing"),
        ({"answer": 3}, "answer", "int"),
        ({"task": "emotion"}, "task", "_cls or _qa"),
        ({"audios": "audio/a.wav"}, "audios", "list"),
        ({"audios": ["a.wav", ""]}, "audios", "item 1"),
        ({"dataset": None}, "dataset", "missing"),
        ({"problem": "cut in an emoji \ud83d"}, "problem", "half of a character"),
        ({"audios": ["cut/\ud83d.wav"]}, "audios", "no file name in UTF-8: 'cut/\\ud83d.wav'"),
        ({"ext_audio_feats": ["a\0b.pt"]}, "ext_audio_feats", "no file name in UTF-8"),
    ],
)
def test_a_bad_field_is_named_with_its_file_row_and_dataset(change, field, words):
    with pytest.raises(SampleError) as caught:
        read({**ROW, **change})
    message = str(caught.value)
    assert caught.value.kind == "schema" and caught.value.field == field
    assert "train.jsonl" in message and "row 17" in message and field in message and words in message
    assert "dataset" in change or "'cremad'" in message


def test_errors_survive_the_way_back_from_a_worker_process():
    error = SampleError("is blank", kind="schema", file="f", row=3, dataset="d", field="x")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.row == 3 and again.kind == "schema"


def test_the_last_underscore_token_is_the_task_type():
    assert task_kind("chsimsv2_sentiment_intensity_cls") == "cls"
    assert task_kind("siq2_qa") == "qa"
    with pytest.raises(ValueError, match="must end in"):
        task_kind("emotion_cls_v2")
