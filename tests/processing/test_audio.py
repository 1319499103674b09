"""Log-mel against WhisperFeatureExtractor, and the layout of chunks and pairs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnisapiens_jax.models.config import PRESETS
from omnisapiens_jax.processing.audio import MAX_SAMPLES, audio_token_count, layout_audio, log_mel, mel_frames
from omnisapiens_jax.processing.media import decode_audio
from tests.oracle import run_oracle

REAL = Path(__file__).parents[2] / "data" / "real"


@pytest.mark.oracle
def test_log_mel_equals_whispers(wav):
    rng = np.random.default_rng(0)
    click = np.zeros(4000, np.float32)
    click[-1] = 1.0  # the loudest frame lies past the last valid one
    clips = {
        "audio_tone": decode_audio(wav(2.345, rate=44100, channels=2), seconds=10),
        "audio_whole_frames": rng.standard_normal(160 * 50).astype(np.float32) * 0.1,
        "audio_one_over": rng.standard_normal(160 * 50 + 1).astype(np.float32),
        "audio_quiet": rng.standard_normal(9999).astype(np.float32) * 1e-4,
        "audio_silence": np.zeros(16000, np.float32),
        "audio_click": click,
        "audio_tiny": rng.standard_normal(330).astype(np.float32),
    }
    clips |= {f"audio_{name}": decode_audio(REAL / f"{name}.wav", seconds=10) for name in ("obama_speech", "austen_0880", "ten_of_clubs")}
    theirs = run_oracle("extractors", **clips)
    worst = 0.0
    for name, clip in clips.items():
        ours, expected = log_mel(clip), theirs[name.replace("audio", "mel")]
        assert ours.shape == expected.shape == (mel_frames(len(clip)), 128), name
        worst = max(worst, float(np.abs(ours - expected).max()))
    print(f"log-mel: worst difference {worst:.1e}")
    assert worst <= 5e-5


def test_silence_is_the_floor_and_long_clips_are_cut():
    np.testing.assert_array_equal(log_mel(np.zeros(16000)), -1.5)
    assert mel_frames(MAX_SAMPLES + 12345) == 30000


@pytest.mark.parametrize(("seconds", "tokens"), [(10.0, 250), (0.5, 12), (0.02, 0), (0.03, 1)])
def test_token_counts(seconds: float, tokens: int):
    assert audio_token_count(mel_frames(round(seconds * 16000))) == tokens


@given(lengths=st.lists(st.integers(3, 150), max_size=4), n_window=st.sampled_from([4, 15, 25]))
def test_pairs_are_the_neighbours_of_each_clips_own_states(lengths: list[int], n_window: int):
    config = dataclasses.replace(PRESETS["mini"].audio, n_window=n_window, num_mel_bins=2)
    mels = [np.full((length, 2), i + 1, np.float32) for i, length in enumerate(lengths)]
    layout = layout_audio(mels, config)
    # Said slowly: name every state by (clip, place), walk the chunks, then pair up each clip's own list.
    where, chunk = {}, 0
    for clip, length in enumerate(lengths):
        place = 0
        for start in range(0, length, 2 * n_window):
            frames = min(2 * n_window, length - start)
            assert layout.frames[chunk] == frames
            assert (layout.chunks[chunk, :frames] == clip + 1).all() and (layout.chunks[chunk, frames:] == 0).all()
            for position in range((frames - 1) // 2 + 1):
                where[clip, place] = chunk * config.chunk_tokens + position
                place += 1
            chunk += 1
    expected = [
        [where[clip, 2 * i], where[clip, 2 * i + 1]] for clip, length in enumerate(lengths) for i in range(audio_token_count(length))
    ]
    assert layout.pairs.tolist() == expected
    assert layout.clip_tokens == tuple(audio_token_count(length) for length in lengths)
    assert len(layout.chunks) == chunk


def test_a_pair_straddles_chunks_of_an_odd_number_of_states():
    config = dataclasses.replace(PRESETS["mini"].audio, n_window=3)  # 6 frames, 3 states a chunk
    assert layout_audio([np.zeros((12, 128), np.float32)], config).pairs.tolist() == [[0, 1], [2, 3], [4, 5]]
