"""The processor: a prompt and its files to a batch of one row, in the words of the model's own vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.example import build_example, collate
from omnisapiens_jax.processing.media import MediaError
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.processor import Processor
from omnisapiens_jax.processing.tokenizers import MiniTokenizer, open_tokenizer
from omnisapiens_jax.resources import resource


@pytest.fixture(scope="module")
def processor(mini: ThinkerConfig) -> Processor:
    options = ProcessingConfig(audio_seconds=2.0, video_min_pixels=3136, video_max_pixels=84 * 140)
    return Processor(open_tokenizer(resource("data/mini")), mini, options)


def test_a_prompt_with_its_files_is_the_batch_that_the_pipeline_makes(
    processor: Processor, wav: Callable[..., bytes], mp4: Callable[..., bytes], tmp_path: Path
) -> None:
    """From paths and from bytes alike."""
    sound, film = tmp_path / "sound.wav", tmp_path / "film.mp4"
    sound.write_bytes(wav(0.5))
    film.write_bytes(mp4(6))
    problem = "Is <audio> what <video> shows?"
    batch = processor(problem, audios=[sound], videos=[film])
    example = build_example(
        problem=problem,
        tokenizer=processor.tokenizer,
        config=processor.config,
        options=processor.options,
        audios=[sound],
        videos=[film],
    )
    wanted = collate([example], example.size(), processor.config)
    again = processor(problem, audios=[sound.read_bytes()], videos=[film.read_bytes()])
    assert batch.keys() == wanted.keys() == again.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(batch[name], array, strict=True)
        np.testing.assert_array_equal(again[name], array, strict=True)
    assert batch["audio_frames"].sum() == 50 and batch["patch_mask"].any() and batch["row_mask"].tolist() == [True]


def test_a_prompt_without_media_has_no_slots_for_them(processor: Processor) -> None:
    batch = processor("How are you?")
    assert not batch["audio_pairs"].size and not batch["patches"].size
    assert processor.decode(batch["tokens"][0].tolist()).endswith("user\nHow are you?\nassistant\n")


def test_what_cannot_be_read_is_named(processor: Processor, wav: Callable[..., bytes]) -> None:
    with pytest.raises(MediaError, match="the prompt, audio 1"):
        processor("<audio><audio>", audios=[wav(0.5), b"no sound"])
    with pytest.raises(ValueError, match=r"the prompt: more placeholders than media: the problem holds 2 <audio>, the row 1 audio"):
        processor("<audio><audio>", audios=[wav(0.5)])


def test_another_models_vocabulary_is_refused(mini_tokenizer: MiniTokenizer, mini: ThinkerConfig) -> None:
    other = dataclasses.replace(mini, tokens=dataclasses.replace(mini.tokens, audio=99))
    with pytest.raises(
        ValueError, match=r"special tokens are TokenIds\(.*audio=3, .* the model's TokenIds\(.*audio=99, .*: put the tokenizer of"
    ):
        Processor(mini_tokenizer, other)


def test_a_folder_without_a_vocabulary_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"has neither tokenizer\.json nor tokenizer\.model; copy that of the model it was made from"
    ):
        open_tokenizer(tmp_path)
