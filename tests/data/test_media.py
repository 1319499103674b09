"""The miniature atlas' files: what is committed, what the generator makes, and how its voices and faces differ."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from omnisapiens_jax.atlas.labels import HBA
from omnisapiens_jax.atlas.miniature import face, speech, words
from omnisapiens_jax.atlas.miniature.generate import atlas, encode_mp4, generate, write_parquet
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.resources import resource

SPLITS = ("train", "validation", "test")
MINI = resource("data/mini")
MINI_SAMPLES, MINI_SEED = 144, 0


def _pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_every_committed_row_is_valid_and_its_media_open() -> None:
    used = {MINI / f"{split}.jsonl" for split in SPLITS} | {MINI / "tokenizer.model"}
    total = 0
    for split in SPLITS:
        source = open_source(MINI / f"{split}.jsonl")
        total += len(source)
        for index in range(len(source)):
            sample = source[index]
            HBA.check(sample)
            assert sample.class_label == sample.answer and sample.rationale
            assert (len(sample.audios), len(sample.videos)) == tuple(kind in sample.modality_signature for kind in ("audio", "video"))
            assert (len(sample.ext_audio_feats), len(sample.ext_video_feats)) == (len(sample.audios), len(sample.videos))
            assert not sample.images
            used |= {*sample.audios, *sample.videos, *sample.ext_video_feats, *sample.ext_audio_feats}
            for clip in sample.audios:
                info = soundfile.info(str(clip))
                assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "WAV")
                assert 0.4 < info.duration < 2.8
            for clip in map(Path, map(str, sample.videos)):
                pictures = _pictures(clip)
                assert pictures.shape[1:] == (112, 112, 3) and 8 <= len(pictures) <= 28
                with av.open(str(clip)) as container:
                    assert container.streams.video[0].average_rate == 10
                    assert len(container.streams.audio) == 1
                landmarks = np.load(str(sample.ext_video_feats[0]))
                count = len(landmarks["frame_indices"])
                assert int(landmarks["total_frames"]) == len(pictures)
                shapes = {name: landmarks[name].shape for name in ("pose", "face", "left_hand", "right_hand")}
                assert shapes == {
                    "pose": (count, 33, 3),
                    "face": (count, 478, 3),
                    "left_hand": (count, 21, 3),
                    "right_hand": (count, 21, 3),
                }
                assert landmarks["face"].min() > -0.1 and landmarks["face"].max() < 1.1
    assert total == MINI_SAMPLES
    assert {path for path in MINI.rglob("*") if path.is_file()} == used  # nothing stray is committed


def test_generator_makes_the_committed_rows_again(tmp_path: Path) -> None:
    made = generate(tmp_path / "again", MINI_SAMPLES, MINI_SEED, descriptors=True, workers=2)
    for split in SPLITS:
        assert (made / f"{split}.jsonl").read_bytes() == (MINI / f"{split}.jsonl").read_bytes()
    clips = sorted(path.relative_to(made) for path in made.rglob("*.*") if path.suffix in (".wav", ".mp4", ".npz"))
    assert len(clips) > 200
    for clip in clips:
        # equal on one machine; another processor may round a sample differently
        if clip.suffix == ".wav":
            np.testing.assert_allclose(soundfile.read(made / clip)[0], soundfile.read(MINI / clip)[0], atol=2e-3)
        elif clip.suffix == ".mp4":
            assert np.abs(_pictures(made / clip).astype(int) - _pictures(MINI / clip)).mean() < 1
        else:
            ours, theirs = np.load(made / clip), np.load(MINI / clip)
            assert {*ours} == {*theirs}
            for name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], atol=2e-3)


def test_media_do_not_depend_on_what_was_made_before() -> None:
    voice = next(v for v in words.SPEAKERS["train"] if v.name == "en+f2")  # espeak breathes at random in this one
    look = face.draw_look(np.random.default_rng(1))

    def make() -> tuple[np.ndarray, np.ndarray, bytes]:
        wave = speech.speak("Well, the letter is flat.", voice, "happy", np.random.default_rng(2), laugh="after")
        frames, _ = face.animate(look, "happy", speech.envelope(wave, 12), np.random.default_rng(3))
        return wave, frames, encode_mp4(frames, wave)

    first = make()
    speech.speak("Something else entirely", words.SPEAKERS["train"][3], "fear", np.random.default_rng(4))
    second = make()
    assert all(np.array_equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert first[2] == second[2]


def test_a_killed_run_leaves_nothing_behind_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atlas(108, 7, cache=tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []
    seen: list[tuple[int, int]] = []
    folder = atlas(108, 7, cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (108, 108) and folder.parent == tmp_path
    assert atlas(108, 7, cache=tmp_path, progress=stop) == folder  # from the cache
    with pytest.raises(FileExistsError, match="remove it"):
        generate(folder, 108, 7)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert not any(row["ext_video_feats"] or row["ext_audio_feats"] for row in rows)
    described = tmp_path / f"{folder.name}-descriptors"  # another atlas, which has a place of its own
    described.mkdir()
    assert atlas(108, 7, descriptors=True, cache=tmp_path) == described


def test_parquet_holds_the_same_rows_with_bytes(tmp_path: Path) -> None:
    write_parquet(MINI, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{split}-00000-of-00001.parquet" for split in SPLITS}
    file = tmp_path / "test-00000-of-00001.parquet"
    schema = pq.read_schema(file)
    assert "texts" not in schema.names
    assert schema.field("audios").type == schema.field("images").type == pa.list_(pa.binary())
    packed, loose = open_source(file), open_source(MINI / "test.jsonl")
    assert len(packed) == len(loose)
    for index in range(len(loose)):
        ours, theirs = packed[index], loose[index]
        assert (ours.problem, ours.answer, ours.dataset, ours.rationale) == (
            theirs.problem,
            theirs.answer,
            theirs.dataset,
            theirs.rationale,
        )
        for field in ("audios", "videos", "ext_video_feats"):
            assert getattr(ours, field) == tuple(path.read_bytes() for path in getattr(theirs, field))


def test_real_clips_are_valid_rows() -> None:
    source = open_source(resource("data/real/clips.jsonl"))
    for index in range(len(source)):
        sample = source[index]
        HBA.check(sample)
        assert all(Path(str(path)).is_file() for path in (*sample.audios, *sample.videos))
        assert all(soundfile.info(str(path)).samplerate == 16000 for path in sample.audios)


def _pitch(wave: np.ndarray) -> float:
    """Median fundamental in Hz of the loud frames: the highest autocorrelation past the main lobe."""
    found = []
    for start in range(0, len(wave) - 1200, 400):
        frame = wave[start : start + 1200] - wave[start : start + 1200].mean()
        if np.mean(frame**2) < 0.3 * np.mean(wave**2):
            continue
        correlation = np.correlate(frame, frame, "full")[1199:] / (1200 - np.arange(1200))
        lobe = int(np.argmax(correlation < 0.3 * correlation[0]))
        lag = lobe + int(np.argmax(correlation[lobe:360])) if 0 < lobe < 300 else 0
        if lag and correlation[lag] > 0.4 * correlation[0]:
            found.append(16000 / lag)
    return float(np.median(found))


@pytest.mark.parametrize("split", SPLITS)
def test_feelings_sound_different_in_every_split(split: str) -> None:
    voices = words.SPEAKERS[split][::3]

    def measure(style: str) -> np.ndarray:
        """Pitch in octaves, level in dB, length in seconds: [voices, 3]."""
        waves = [speech.speak("Well, the letter is on the table.", voice, style, np.random.default_rng(7)) for voice in voices]
        return np.array([(np.log2(_pitch(w)), 10 * np.log10(np.mean(w**2)), len(w) / 16000) for w in waves])

    neutral = measure("neutral")
    pitch, level, length = (
        {style: value for style, value in zip(speech.PROSODY, column, strict=True)}
        for column in np.array([np.median(measure(style) - neutral, axis=0) for style in speech.PROSODY]).T
    )
    assert pitch["fear"] > 0.3 and pitch["happy"] > 0.3
    assert pitch["sad"] < -0.4 and pitch["flat"] < -0.25
    assert level["anger"] > 6 and level["sad"] < -5 and level["fear"] < -2
    assert length["fear"] < -0.2 and length["sad"] > 0.2 and length["disgust"] > 0.1


def test_faces_show_what_their_landmarks_say() -> None:
    def shown(style: str, **kwargs: bool) -> tuple[np.ndarray, np.ndarray]:
        looks = [face.draw_look(np.random.default_rng(i)) for i in range(6)]
        clips = [face.animate(look, style, np.full(12, 0.3), np.random.default_rng(i), **kwargs) for i, look in enumerate(looks)]
        return np.stack([frames for frames, _ in clips]), np.stack([face.landmarks(drawn) for _, drawn in clips])

    # 36 points of the head, 2 x 10 of brows, 2 x 16 of eyes, 10 of the nose, then 20 of each lip
    def smile(points: np.ndarray) -> np.ndarray:
        lip = points[..., 98:118, 1]
        return lip[..., 9:11].mean(-1) - (lip[..., 0] + lip[..., -1]) / 2  # middle lower than corners: positive

    assert (smile(shown("happy")[1][:, -1]) > 0.01).all()
    assert (smile(shown("sad")[1][:, -1]) < -0.01).all()
    late, early = smile(shown("happy", late=True)[1]), smile(shown("happy", late=False)[1])
    assert (late[:, -1] > late[:, 0] + 0.02).all() and (early[:, 0] > early[:, -1] + 0.02).all()
    frames = shown("fear")[0]
    assert frames.dtype == np.uint8 and frames.shape == (6, 12, 112, 112, 3)
    # the pixels at the mouth's middle are dark when it gapes, and are not when it is shut
    open_mouth, shut = shown("fear"), shown("neutral")
    for frames, points, dark in ((*open_mouth, True), (*shut, False)):
        middle = points[:, -1, 98:138, :2].mean(1) * 112
        values = np.array([clip[-1, round(y) + 3, round(x)].mean() for clip, (x, y) in zip(frames, middle, strict=True)])
        assert (values < 90).all() == dark
