"""What a user sees for each thing that may be wrong with an atlas, while it is measured and while it is trained on."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from omnisapiens_jax.atlas.bucketing import SlotCost, choose_buckets
from omnisapiens_jax.atlas.faults import BadSamples, FaultLog, Quarantine, quarantined_rows, read_quarantine
from omnisapiens_jax.atlas.lengths import length_index, shortened
from omnisapiens_jax.atlas.pipeline import Pipeline, PipelineConfig
from omnisapiens_jax.atlas.plan import MASKED, PlanConfig, Planner
from omnisapiens_jax.atlas.recipe import target_text
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.processing.audio import log_mel
from omnisapiens_jax.processing.vision import patchify
from tests.atlas.toys import CONFIG, OPTIONS, edit_row, recipe, write_atlas

BAD = 2  # a row with sound and video


@pytest.fixture
def atlas(tmp_path):
    return write_atlas(tmp_path, count=9)


def truncate(file, keep=0.6):
    file.write_bytes(file.read_bytes()[: int(len(file.read_bytes()) * keep)])


FAULTS = {
    "corrupt WAV": (lambda p: (p.parent / "audio/2.wav").write_bytes(b"RIFF" + b"\xff" * 400), "media", "audios", "corrupt audio file"),
    "truncated MP4": (lambda p: truncate(p.parent / "video/2.mp4"), "media", "videos", "2.mp4"),
    "missing file": (lambda p: (p.parent / "audio/2.wav").unlink(), "media", "audios", "No such file"),
    "empty file": (lambda p: (p.parent / "video/2.mp4").write_bytes(b""), "media", "videos", "is empty"),
    "no modality_signature": (lambda p: edit_row(p, BAD, modality_signature=None), "schema", "modality_signature", "is missing"),
    "unknown label": (lambda p: edit_row(p, BAD, answer="joy"), "label", "answer", "its labels are: anger, disgust"),
    "unknown dataset": (lambda p: edit_row(p, BAD, dataset="iemocap"), "label", "dataset", "the label scheme has: cremad"),
    "fewer media than placeholders": (
        lambda p: edit_row(p, BAD, problem="<audio> and <audio> <video>: which?"),
        "placeholders",
        "problem",
        "2 <audio>",
    ),
    "no media where the signature says so": (lambda p: edit_row(p, BAD, videos=[]), "no_media", "videos", "is 'text_video_audio'"),
    "no media where the problem says so": (
        lambda p: edit_row(p, BAD, modality_signature="text_audio", videos=None, problem="<video>\nWhich of anger, sad?"),
        "no_media",
        "videos",
        "has <video>",
    ),
    "too long": (lambda p: edit_row(p, BAD, problem="question " * 300), "too_long", "problem", "no transcript"),
    "not JSON": (
        lambda p: p.write_text(p.read_text().replace('{"problem": "Transcript: ' + words(19), "{x", 1)),
        "schema",
        "(the line)",
        "not JSON",
    ),
}


def words(count):
    return " ".join(f"word{j}" for j in range(count))


@pytest.mark.parametrize("name", FAULTS)
def test_measuring_names_the_row_and_what_is_wrong(atlas, name):
    spoil, kind, field, phrase = FAULTS[name]
    spoil(atlas)
    with pytest.raises(BadSamples) as caught:
        length_index(open_source(atlas), recipe(), on_error="raise")
    message = str(caught.value)
    assert "1 samples cannot be used" in message and f"1 {kind}" in message and phrase in message and "on_error='skip'" in message
    assert str(atlas) in message and f"row {BAD}" in message and repr(field) in message
    index, faults = length_index(open_source(atlas), recipe(), on_error="skip")
    assert BAD not in index.ids and len(index) == 8
    assert [(f.kind, f.field, f.row) for f in faults] == [(kind, field, BAD)]
    assert sum(faults.counts().values()) == 1


def test_a_video_may_bring_the_sound_that_the_signature_promises(atlas):
    edit_row(atlas, BAD, audios=[], problem="<video>\nWhich of anger, sad?")
    sample = open_source(atlas)[BAD]
    assert "audio" in sample.modality_signature and sample.videos and not sample.audios


@pytest.mark.parametrize("name", [name for name, (_, kind, _, _) in FAULTS.items() if kind in ("media", "schema", "no_media")])
def test_a_row_that_breaks_while_training_stops_the_run_or_masks_its_slot(atlas, name):
    spoil, kind, field, phrase = FAULTS[name]

    def pipeline(policy):
        return Pipeline(source, how, planner, PipelineConfig(on_error=policy))

    how, config = recipe(), PlanConfig(batch_size=2)
    index, _ = length_index(open_source(atlas), how, on_error="raise")
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG)), config)
    spoil(atlas)
    source = open_source(atlas)
    with pytest.raises(SampleError, match=f"row {BAD}.*{field}") as caught:
        list(pipeline("raise").batches(0, planner.steps_per_epoch))
    assert caught.value.kind == kind and phrase in str(caught.value)

    skipping = pipeline("skip")
    epochs = 2 * planner.steps_per_epoch
    fed = [i for _, batch in skipping.batches(0, epochs) for i in batch["index"].tolist() if i != MASKED]
    assert sorted(fed) == sorted(2 * [i for i in range(9) if i != BAD])
    assert len(skipping.faults) == 1 and f"1 {kind}" in skipping.faults.report() and phrase in skipping.faults.report()


def test_a_file_that_grew_after_it_was_measured_is_noticed(atlas):
    how, config = recipe(), PlanConfig(batch_size=2)
    source = open_source(atlas)
    index, _ = length_index(source, how, on_error="raise")
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG), token_multiple=1, count=8), config)
    (atlas.parent / "audio/1.wav").write_bytes((atlas.parent / "audio/8.wav").read_bytes())
    with pytest.raises(SampleError, match="row 1.*changed since it was measured; delete the length cache"):
        list(Pipeline(source, how, planner, PipelineConfig()).batches(0, planner.steps_per_epoch))


def test_a_long_transcript_is_shortened_counted_and_nothing_else_is_cut(atlas):
    text = f"<video><audio>\nTranscript: {words(400)}\nWhich of anger, sad?"
    edit_row(atlas, BAD, problem=text)
    how = recipe(target=target_text)
    index, faults = length_index(open_source(atlas), how, on_error="raise")
    assert shortened(index) == 1 and not faults
    row = index.ids.tolist().index(BAD)
    example = how.build(open_source(atlas)[BAD], int(index.excess[row]))
    assert 150 < example.size().tokens <= how.max_tokens and tuple(vars(example.size()).values()) == tuple(index.sizes[row])
    encode = how.tokenizer.encode
    prompt = example.tokens[: example.prompt_length].tolist()
    tail = encode("Which of anger, sad?<|im_end|><|im_start|>assistant")
    assert prompt[-len(tail) :] == tail  # question and assistant header are whole
    tokens = CONFIG.tokens
    heard, seen = ((example.tokens == t).sum() for t in (tokens.audio, tokens.video))
    assert heard == len(example.audio_pairs) > 0 and seen == example.patch_mask.sum() // 4 > 0


def test_the_pipeline_feeds_the_shortened_transcript(atlas):
    edit_row(atlas, BAD, problem=f"Transcript: {words(400)}\nWhich of anger, sad?")
    source, how, config = open_source(atlas), recipe(), PlanConfig(batch_size=2)
    index, _ = length_index(source, how, on_error="raise")
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG)), config)
    fed = [i for _, batch in Pipeline(source, how, planner, PipelineConfig()).batches(0, planner.steps_per_epoch) for i in batch["index"]]
    assert BAD in fed and max(bucket.tokens for bucket in planner.buckets) <= how.max_tokens


def test_the_report_counts_all_and_shows_the_first(atlas):
    for row in range(9):
        edit_row(atlas, row, modality_signature=" ")
    _, faults = length_index(open_source(atlas), recipe(), on_error="skip")
    assert "9 samples cannot be used" in faults.report() and "cremad: 3 schema" in faults.report()


def fed_by(atlas, how, on_error, index, **options):
    config = PlanConfig(batch_size=1, shuffle=False)
    planner = Planner(index, choose_buckets(index, config, SlotCost.of(CONFIG)), config)
    pipeline = Pipeline(open_source(atlas), how, planner, PipelineConfig(on_error, **options))
    batches = [batch for _, batch in pipeline.batches(0, planner.steps_per_epoch)]
    return {int(batch["index"][0]): batch for batch in batches if batch["index"][0] != MASKED}, pipeline.faults


def garble(file):
    """Breaks the pictures of a clip and leaves its index whole: it can be measured, not decoded."""
    data = bytearray(file.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov")
    data[start:end] = b"\xff" * (end - start)
    file.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 1])
def test_zero_feeds_silence_and_black_for_what_cannot_be_decoded(atlas, workers):
    (atlas.parent / "audio/2.wav").write_bytes(b"RIFF" + b"\xff" * 400)
    (atlas.parent / "video/2.mp4").write_bytes(b"not a clip")
    garble(atlas.parent / "video/5.mp4")
    edit_row(atlas, 1, answer="joy")  # what nothing can stand in for
    index, faults = length_index(open_source(atlas), recipe(), on_error="zero", workers=workers)
    assert index.ids.tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    assert dict(faults.counts()) == {("meld_emotion", "media"): 1, ("cremad", "label"): 1}
    report = faults.report(zero=True)
    assert "1 samples cannot be used" in report and "1 samples have media that cannot be decoded: silence or black stands in" in report

    fed, faults = fed_by(atlas, recipe(), "zero", index, workers=workers)
    assert sorted(fed) == index.ids.tolist()
    assert sorted((fault.row, fault.kind, fault.field) for fault in faults) == [(2, "media", "audios"), (5, "media", "videos")]
    silence = log_mel(np.zeros(8000, np.float32))  # half a second
    np.testing.assert_array_equal(fed[2]["audio_chunks"][0].reshape(-1, 128)[:50], silence)
    assert fed[2]["audio_frames"][0].sum() == 50
    bounds = {"min_pixels": OPTIONS.video_min_pixels, "max_pixels": OPTIONS.video_max_pixels}
    black, _ = patchify(np.zeros((4, 224, 224, 3), np.uint8), CONFIG.vision, **bounds)
    seen = fed[2]["patches"][0][fed[2]["patch_mask"][0]]
    np.testing.assert_array_equal(seen, black)
    whole, _ = fed_by(write_atlas(atlas.parent / "whole", count=9), recipe(), "raise", index)
    assert (fed[5]["patch_mask"] == whole[5]["patch_mask"]).all()  # black, in the size that the clip has
    assert np.unique(fed[5]["patches"][0][fed[5]["patch_mask"][0]], axis=0).shape[0] == 1
    np.testing.assert_array_equal(fed[8]["patches"], whole[8]["patches"])


def test_a_replaced_medium_that_is_mended_is_fed(atlas, tmp_path):
    whole = (atlas.parent / "audio/2.wav").read_bytes()
    (atlas.parent / "audio/2.wav").write_bytes(b"RIFF" + b"\xff" * 400)
    length_index(open_source(atlas), recipe(), on_error="zero", cache=tmp_path / "cache")
    (atlas.parent / "audio/2.wav").write_bytes(whole)
    index, faults = length_index(open_source(atlas), recipe(), on_error="zero", cache=tmp_path / "cache")
    fresh, _ = length_index(open_source(atlas), recipe(), on_error="raise")
    assert not faults
    np.testing.assert_array_equal(index.sizes, fresh.sizes)


def test_bad_rows_are_listed_in_a_file_that_a_later_run_leaves_out(atlas, tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    truncate(atlas.parent / "video/2.mp4")
    edit_row(atlas, 4, answer="joy")
    for _ in range(2):  # started again
        length_index(open_source(atlas), recipe(), on_error="skip", quarantine=Quarantine(path, open_source(atlas).fingerprint()))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["row"], line["dataset"], line["field"], line["kind"]) for line in lines] == [
        (2, "meld_emotion", "videos", "media"),
        (4, "cremad", "answer", "label"),
    ]
    assert all(line["file"] == str(atlas) and line["reason"] for line in lines)
    rows = quarantined_rows(path, open_source(atlas))
    assert rows == {2, 4}
    index, faults = length_index(open_source(atlas), recipe(), on_error="raise", leave_out=rows, cache=tmp_path / "cache")
    assert index.ids.tolist() == [0, 1, 3, 5, 6, 7, 8] and not faults
    with pytest.raises(BadSamples):  # the cache does not take the rows that were left out for good ones
        length_index(open_source(atlas), recipe(), on_error="raise", cache=tmp_path / "cache")
    other = write_atlas(tmp_path / "other", count=10)
    assert not quarantined_rows(path, open_source(other))  # the same numbers of another file


def test_a_list_of_rows_that_have_changed_leaves_out_none_and_says_so(atlas, tmp_path):
    path, source = tmp_path / "quarantine.jsonl", open_source(atlas)
    fault = source[4].error("broken", kind="media", field="audios")
    FaultLog([fault], quarantine=Quarantine(path, source.fingerprint()))
    moved = write_atlas(tmp_path / "moved", count=9)
    assert quarantined_rows(path, open_source(moved)) == {4}  # the same rows elsewhere
    atlas.write_text("".join(atlas.read_text().splitlines(keepends=True)[1:]))  # what was row 4 is row 3 now
    with pytest.raises(ValueError, match=r"line 1: .*train.jsonl has changed since .* row 4 .* remove the lines of that file") as told:
        quarantined_rows(path, open_source(atlas))
    assert str(path) in str(told.value)
    FaultLog([fault], quarantine=Quarantine(path, open_source(atlas).fingerprint()))
    assert len(read_quarantine(path)) == 2  # the row of that number that is bad now is another one


def test_a_list_that_was_cut_off_is_gone_on_with(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    faults = [SampleError("broken", kind="media", file="a.jsonl", row=i, dataset="cremad", field="audios") for i in range(3)]
    FaultLog(faults[:2], quarantine=Quarantine(path, "a"))
    path.write_bytes(path.read_bytes()[:-5])
    assert [fault.row for fault in read_quarantine(path)] == [0]
    FaultLog(faults[1:], quarantine=Quarantine(path, "a"))
    assert [fault.row for fault in read_quarantine(path)] == [0, 1, 2]
    path.write_text('{"row": 1}\n')
    with pytest.raises(ValueError, match="line 1: not a line of a quarantine list, which has fingerprint, file, row"):
        read_quarantine(path)


def test_a_list_is_not_read_again_for_every_row(tmp_path, monkeypatch):
    """Thousands of them come one by one."""
    parsed, real = [], json.loads
    monkeypatch.setattr("omnisapiens_jax.atlas.faults.json.loads", lambda line: parsed.append(line) or real(line))
    path = tmp_path / "quarantine.jsonl"
    faults = [SampleError("broken", kind="media", file="a.jsonl", row=i, dataset="cremad", field="audios") for i in range(40)]
    one, other = FaultLog(quarantine=Quarantine(path, "a")), FaultLog(quarantine=Quarantine(path, "a"))
    for i in range(0, 40, 2):
        one.add(faults[i])
        other.add(faults[i], faults[i + 1])
    assert len(parsed) <= 2 * 40  # by each of the two
    assert sorted(fault.row for fault in read_quarantine(path)) == [*range(40)]
    path.unlink()  # as if another run cleared it away
    one.add(faults[1])
    assert [fault.row for fault in read_quarantine(path)] == [1]


def test_a_full_disk_is_told_not_a_shorter_list(tmp_path):
    faults = [SampleError("broken", kind="media", file="a.jsonl", row=i, dataset="cremad", field="audios") for i in range(3)]
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, most[1]))  # the first fault and a part of the second
    try:
        with pytest.raises(OSError, match="too large"):
            FaultLog(faults, quarantine=Quarantine(tmp_path / "quarantine.jsonl", "a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    FaultLog(faults, quarantine=Quarantine(tmp_path / "quarantine.jsonl", "a"))
    assert [fault.row for fault in read_quarantine(tmp_path / "quarantine.jsonl")] == [0, 1, 2]


WRITER = """
import sys
from pathlib import Path
from omnisapiens_jax.atlas.faults import FaultLog, Quarantine
from omnisapiens_jax.atlas.schema import SampleError
log = FaultLog(quarantine=Quarantine(Path(sys.argv[1]), "a"))
for row in range(int(sys.argv[2]), int(sys.argv[2]) + 60):
    log.add(SampleError("\u00fc" * 50, kind="media", file="a.jsonl", row=row, dataset="cremad", field="audios"))
"""


def test_processes_write_one_list_together(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, start]) for start in ("0", "30")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(fault.row for fault in read_quarantine(path)) == [*range(90)]
