"""Modalities taken away for an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from omnisapiens_jax.atlas.ablation import WithoutTranscripts
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.evaluation.evaluate import SILENCE, blank
from omnisapiens_jax.processing.audio import log_mel
from omnisapiens_jax.resources import resource


def test_words_leave_the_transcript_and_nothing_else() -> None:
    source = open_source(resource("data/mini") / "test")
    silent = WithoutTranscripts(source)
    assert len(silent) == len(source) and silent.fingerprint() != source.fingerprint()
    for i in range(len(source)):
        old, new = source[i], silent[i]
        before, after = old.problem.split("\n"), new.problem.split("\n")
        assert len(before) == len(after)
        for was, now in zip(before, after, strict=True):
            assert now == ("Transcript:" if was.startswith("Transcript:") else was)
        assert (old.answer, old.audios, old.videos) == (new.answer, new.audios, new.videos)


def test_a_blanked_batch_keeps_its_shape_and_the_other_modality() -> None:
    batch = {"audio_chunks": np.ones((2, 3, 4, 5), np.float32), "patches": np.ones((2, 1, 1, 4, 6), np.float32), "tokens": np.ones((2, 7))}
    for modality, key, value in (("audio", "audio_chunks", SILENCE), ("video", "patches", 0)):
        changed = blank(batch, modality)
        assert changed[key].shape == batch[key].shape and (changed[key] == value).all()
        assert all(changed[name] is batch[name] for name in batch if name != key)
    pixels = blank({"patches": np.ones((2, 1, 1, 4, 6), np.uint8)}, "video")["patches"]
    assert pixels.dtype == np.uint8 and (pixels == [123, 123, 117, 117, 104, 104]).all()
    with pytest.raises(ValueError, match="cannot blank 'smell'"):
        blank(batch, "smell")


def test_silence_is_what_silent_audio_gives() -> None:
    np.testing.assert_allclose(log_mel(np.zeros(16_000, np.float32)), SILENCE, atol=1e-6)
