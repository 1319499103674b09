"""TMRoPE positions against transformers' get_rope_index, and the laws a reader can check by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.positions import interleave, rope_positions, video_times
from tests.oracle import run_oracle

CONFIG = ThinkerConfig.preset("7b")
IDS = CONFIG.tokens
WORD = 1000


def random_row(rng: np.random.Generator, *, sound: bool) -> dict:
    """Text, clips, stills and videos in random order; with `sound` every video carries its own audio."""
    row: dict = {"tokens": [], "mel_frames": [], "image_grids": [], "video_grids": [], "seconds_per_grid": [], "sound": sound}

    def text(at_least: int = 0) -> None:
        row["tokens"] += [WORD] * int(rng.integers(at_least, 6))

    def audio_length() -> int:
        row["mel_frames"].append(int(rng.integers(3, 900 if sound else 60)))
        return ((row["mel_frames"][-1] - 1) // 2 + 1 - 2) // 2 + 1

    def grid(steps: int) -> list[int]:
        return [steps, 2 * int(rng.integers(1, 5)), 2 * int(rng.integers(1, 6))]

    text(1)
    kinds = ["audio", "image", "video"]
    for kind in rng.choice(kinds, rng.integers(0, 5)):
        if kind == "audio":
            row["tokens"] += [IDS.audio_bos, *[IDS.audio] * audio_length(), IDS.audio_eos]
        elif kind == "image":
            row["image_grids"].append(grid(1))
            row["tokens"] += [IDS.vision_bos, *[IDS.image] * (np.prod(row["image_grids"][-1]) // 4), IDS.vision_eos]
        else:
            row["video_grids"].append(g := grid(int(rng.integers(1, 8))))
            # From many steps in a chunk to steps that jump over several; fractions whose products are not whole.
            row["seconds_per_grid"].append(float(rng.choice([0.08, 0.4, 1.0, 1 / 3, 0.7, 2.0, 1.37, 5.3, 9.1])))
            cells = int(np.prod(g)) // 4
            if sound:
                length = audio_length()
                times = np.repeat(np.arange(g[0]) * row["seconds_per_grid"][-1] * 25, cells // g[0])
                pieces = interleave(times, np.arange(length), CONFIG)
                inner = [t for which, b, e in pieces for t in [(IDS.video, IDS.audio)[which]] * (e - b)]
                row["tokens"] += [IDS.vision_bos, IDS.audio_bos, *inner, IDS.audio_eos, IDS.vision_eos]
            else:
                row["tokens"] += [IDS.vision_bos, *[IDS.video] * cells, IDS.vision_eos]
        text()
    row["tokens"] = [int(t) for t in row["tokens"]]
    return row


def ours(row: dict) -> tuple[np.ndarray, int]:
    return rope_positions(
        np.array(row["tokens"]),
        CONFIG,
        audio_tokens=[((f - 1) // 2 + 1 - 2) // 2 + 1 for f in row["mel_frames"]],
        image_grids=[tuple(g) for g in row["image_grids"]],
        video_grids=[tuple(g) for g in row["video_grids"]],
        seconds_per_grid=row["seconds_per_grid"],
        use_audio_in_video=row["sound"],
    )


@pytest.mark.oracle
def test_equal_to_transformers_on_random_layouts():
    rng = np.random.default_rng(7)
    rows = [random_row(rng, sound=bool(i % 2)) for i in range(300)]
    theirs = run_oracle("rope_index", rows=rows, ids=dataclasses.asdict(IDS), seconds_per_chunk=2.0)
    for number, row in enumerate(rows):
        positions, delta = ours(row)
        np.testing.assert_array_equal(positions, theirs[f"positions{number}"], err_msg=str(row))
        assert delta == theirs[f"delta{number}"], row
    with_sound = [row for row in rows if row["sound"] and row["video_grids"]]
    assert len(with_sound) > 50
    assert any(row["seconds_per_grid"][0] > 4 for row in with_sound), "no step jumped over a whole chunk"


def test_equal_to_the_stored_positions():
    with np.load(Path(__file__).parents[1] / "golden" / "positions.npz") as golden:
        for number, row in enumerate(json.loads(str(golden["rows"]))):
            positions, delta = ours(row)
            np.testing.assert_array_equal(positions, golden[f"positions{number}"], err_msg=str(row))
            assert delta == golden[f"delta{number}"]


@pytest.mark.oracle
def test_silent_videos_among_sounding_rows_get_text_positions_as_in_transformers():
    silent = {"tokens": [WORD, IDS.vision_bos, *[IDS.video] * 8, IDS.vision_eos, WORD], "mel_frames": [], "image_grids": []}
    silent |= {"video_grids": [[2, 4, 4]], "seconds_per_grid": [1.0], "sound": True}
    theirs = run_oracle("rope_index", rows=[silent], ids=dataclasses.asdict(IDS), seconds_per_chunk=2.0)
    np.testing.assert_array_equal(ours(silent)[0], theirs["positions0"])
    np.testing.assert_array_equal(ours(silent)[0], np.tile(np.arange(12), (3, 1)))


def test_a_still_spreads_over_rows_and_columns_at_one_time():
    tokens = np.array([WORD, IDS.vision_bos, *[IDS.image] * 6, IDS.vision_eos, WORD])
    positions, delta = rope_positions(tokens, CONFIG, image_grids=[(1, 4, 6)])
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert delta == 7 - 10


def test_sound_in_video_shares_its_opening_and_closing_positions():
    # 2 steps of one cell, 1 s apart, and 2 audio tokens: everything is in the first chunk, the video before the audio.
    tokens = np.array([IDS.vision_bos, IDS.audio_bos, IDS.video, IDS.video, IDS.audio, IDS.audio, IDS.audio_eos, IDS.vision_eos, WORD])
    positions, _ = rope_positions(
        tokens, CONFIG, audio_tokens=[2], video_grids=[(2, 2, 2)], seconds_per_grid=[1.0], use_audio_in_video=True
    )
    # The text goes on after the audio, the last piece placed, although the video reached 26.
    assert positions[0].tolist() == [0, 0, 1, 26, 1, 2, 3, 3, 4]


def test_times_are_cut_not_rounded_and_in_float32():
    assert video_times(4, 0.7, CONFIG).tolist() == [0, 17, 35, 52]
    # In float64 3 * 1.16 * 25 is 86.999..., in float32 it is 87: the published law is float32.
    assert int(3 * 1.16 * 25) == 86
    assert video_times(4, 1.16, CONFIG)[3] == 87


def test_a_step_over_several_chunks_cuts_off_single_tokens():
    # Steps at 0 and 250 with two cells each: the limit rises by one chunk a cut, so the second cell of the late step stands alone.
    assert interleave(np.array([0, 0, 250, 250]), np.arange(3), CONFIG) == [(0, 0, 2), (1, 0, 3), (0, 2, 3), (0, 3, 4)]


@pytest.mark.parametrize(
    ("tokens", "media", "message"),
    [
        ([IDS.audio_bos, IDS.audio, IDS.audio_eos], {}, "more audio placeholders than media"),
        ([WORD], {"image_grids": [(1, 2, 2)]}, "1 image item.* no placeholder"),
        ([IDS.audio_bos, IDS.audio, IDS.audio_eos], {"audio_tokens": [2]}, "needs 2 placeholders, found 1"),
        ([IDS.vision_bos, IDS.video, IDS.vision_eos], {"video_grids": [(1, 2, 2)]}, "as many seconds_per_grid"),
    ],
)
def test_placeholders_that_do_not_match_the_media_are_errors(tokens, media, message):
    with pytest.raises(ValueError, match=message):
        rope_positions(np.array(tokens), CONFIG, **media)


def test_a_row_with_only_some_silent_videos_is_an_error_with_sound():
    tokens = [IDS.vision_bos, IDS.audio_bos, IDS.video, IDS.audio, IDS.audio_eos, IDS.vision_eos, IDS.vision_bos, IDS.video, IDS.vision_eos]
    with pytest.raises(ValueError, match="1 of 2 videos have no audio"):
        rope_positions(
            np.array(tokens), CONFIG, audio_tokens=[1], video_grids=[(1, 2, 2)] * 2, seconds_per_grid=[1.0] * 2, use_audio_in_video=True
        )
