"""A whole row: prompt and ids against transformers' processor, layout of the example, and batches of fixed shape."""

from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from omnisapiens_jax.models.config import PRESETS
from omnisapiens_jax.processing.example import AUDIO, IGNORED, TEXT, VISION, Bucket, build_example, collate, measure
from omnisapiens_jax.processing.media import MediaError, decode_audio, decode_video
from omnisapiens_jax.processing.options import REFERENCE, ProcessingConfig
from omnisapiens_jax.processing.tokenizers import QwenTokenizer
from omnisapiens_jax.processing.vision import patchify
from tests.oracle import run_oracle
from tests.published_chat_template import PUBLISHED
from tests.qwen_vocabulary import qwen_tokenizer


def png(height: int, width: int, seed: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make(mini_tokenizer, mini, small):
    def build(problem: str, options: ProcessingConfig = small, **fields):
        return build_example(problem=problem, tokenizer=mini_tokenizer, config=mini, options=options, **fields)

    return build


@pytest.fixture
def rich(make, wav, mp4):
    return make(
        "Look <video> and <image> again.", audios=[wav(0.7), wav(1.31, seed=1)], videos=[mp4(5)], images=[png(90, 60)], response="sad"
    )


@pytest.mark.oracle
def test_ids_equal_transformers_processor(wav, mp4, small):
    """Our rows against the real processor: same ids, from the same messages, for every kind of media and fps."""
    config, tokenizer = PRESETS["7b"], QwenTokenizer(qwen_tokenizer())
    clips = {"short": wav(0.61), "long": wav(4.7, rate=44100, channels=2)}
    pictures = {"wide": png(60, 200), "tall": png(333, 100)}
    video, tune = mp4(12, width=160, height=120), mp4(40, sound=3.9)
    grid = {v: list(patchify(decode_video(v, frames=4), config.vision, min_pixels=3136, max_pixels=84 * 140)[1]) for v in (video, tune)}
    plain, sounding = dataclasses.replace(small, fps=3.0), dataclasses.replace(small, use_audio_in_video=True, fps=0.9)
    cases = [
        ("What is it?", [], [], [], small),
        ("<image> or <audio>?\n\nOptions: 愤怒, sad <audio>", ["short", "long"], [], ["wide"], small),
        ("Hm", ["long"], [video], ["tall", "wide"], plain),
        ("<video>then<video>, feel?", [], [video, video], [], dataclasses.replace(plain, format_prompt=" \\boxed{}")),
        ("<video> talks", [], [tune], [], sounding),
        ("<audio> and <video>?", ["short"], [tune], [], dataclasses.replace(sounding, fps=0.3)),
    ]
    rows, mine, arrays = [], [], {}
    for problem, audios, videos, images, options in cases:
        example = build_example(
            problem=problem,
            tokenizer=tokenizer,
            config=config,
            options=options,
            audios=[clips[a] for a in audios],
            videos=videos,
            images=[pictures[i] for i in images],
        )
        mine.append(example)
        # The messages are written out here by hand-made rules, not by our own message builder.
        text = problem + options.format_prompt
        for tag, count in (("<image>", len(images)), ("<video>", len(videos)), ("<audio>", len(audios))):
            text = tag * (count - text.count(tag)) + text
        content, rest = [], text
        while rest:
            at, tag = min((rest.find(t), t) if t in rest else (len(rest), "") for t in ("<image>", "<video>", "<audio>"))
            content += [{"type": "text", "text": rest[:at]}] * bool(at) + [{"type": tag[1:-1]}] * bool(tag)
            rest = rest[at + len(tag) :]
        system = (
            "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and visual inputs, "
        )
        system += "as well as generating text and speech."
        names = list(audios)
        for number, clip in enumerate(videos):
            if options.use_audio_in_video:
                arrays[f"tune{number}"] = decode_audio(clip, seconds=10)
                names.append(f"tune{number}")
        rows.append(
            {
                "messages": [{"role": "system", "content": [{"type": "text", "text": system}]}, {"role": "user", "content": content}],
                "audios": names,
                "images": images,
                "video_grids": [grid[v] for v in videos],
                "fps": options.fps,
                "sound": [None] * len(audios) + list(range(len(videos))) if options.use_audio_in_video else None,
            }
        )
    arrays |= {name: decode_audio(clip, seconds=10) for name, clip in clips.items()}
    arrays |= {name: np.asarray(Image.open(io.BytesIO(file))) for name, file in pictures.items()}
    bounds = {"min_pixels": small.image_min_pixels, "max_pixels": small.image_max_pixels}
    theirs = run_oracle("omni_processor", tokenizer=str(qwen_tokenizer().parent), template=PUBLISHED, rows=rows, **bounds, **arrays)
    for number, example in enumerate(mine):
        assert example.tokens.tolist() == theirs[f"tokens{number}"].tolist(), json.loads(str(theirs[f"text{number}"]))


def test_reference_token_counts(mp4, wav, mini_tokenizer):
    """10 s of sound are 250 tokens; a 720p clip, scaled to 147,456 pixels and four frames, is 360."""
    config = dataclasses.replace(PRESETS["7b"], tokens=mini_tokenizer.ids)
    clip = mp4(6, width=1280, height=720)
    size = {"problem": "<audio><video>", "tokenizer": mini_tokenizer, "config": config, "audios": [wav(11.0)], "videos": [clip]}
    options = dataclasses.replace(REFERENCE)
    example = build_example(**size, options=options)
    assert np.sum(example.media == AUDIO) == 250 == np.sum(example.tokens == config.tokens.audio)
    assert np.sum(example.media == VISION) == 360 == np.sum(example.tokens == config.tokens.video)
    assert measure(**size, options=options) == example.size()


def test_every_media_token_finds_its_own_embedding(rich, mini):
    """Follows each token through collate's index into a list of embeddings that carry their own names."""
    bucket = Bucket(*(value + pad for value, pad in zip(dataclasses.astuple(rich.size()), (7, 2, 3, 1, 2, 0, 0), strict=True)))
    batch = collate([None, rich], bucket, mini)
    assert {name: value.shape[1:] for name, value in batch.items() if name in ("tokens", "positions", "patch_coords")} == {
        "tokens": (bucket.tokens,),
        "positions": (3, bucket.tokens),
        "patch_coords": (bucket.frames, bucket.windows, bucket.window_patches, 2),
    }
    cells = bucket.window_patches // 4
    named = [("audio", i) for i in range(bucket.audio_tokens)] + [
        # a vision embedding is named by its frame and by the patch coordinates of its first patch
        (frame, *batch["patch_coords"][1, frame, window, 4 * cell].tolist())
        for frame in range(bucket.frames)
        for window in range(bucket.windows)
        for cell in range(cells)
    ]
    index = batch["media_index"][1]
    assert (index[len(rich.tokens) :] == -1).all() and (batch["media_index"][0] == -1).all()
    found = [named[i] for i in index if i >= 0]
    audio_tokens = len(rich.audio_pairs)
    assert found[:audio_tokens] == [("audio", i) for i in range(audio_tokens)]  # the clips, put in front, come first
    seen = found[audio_tokens:]
    frames = sorted({frame for frame, _, _ in seen})
    assert frames == [0, 1, 2]  # four video frames in two steps, then the still
    for frame in frames:
        own = [place for f, *place in seen if f == frame]
        assert own == sorted(own), "reading order"
        assert all(row % 2 == 0 and column % 2 == 0 for row, column in own)
    assert (rich.media[: rich.prompt_length] != TEXT).sum() == len(found)


def test_positions_and_labels_of_a_response(rich, make, mini, mini_tokenizer):
    length = rich.prompt_length
    answer = [*mini_tokenizer.encode("sad"), mini.tokens.im_end]
    assert rich.tokens[length:].tolist() == answer == rich.labels[length:].tolist()
    assert (rich.labels[:length] == IGNORED).all()
    # the sampler's law: position of response token t = prompt length + rope delta + t, on every axis
    np.testing.assert_array_equal(rich.positions[:, length:], np.tile(length + rich.rope_delta + np.arange(len(answer)), (3, 1)))
    prompt = make("Hi.")
    assert prompt.prompt_length == len(prompt.tokens) and (prompt.labels == IGNORED).all() and prompt.rope_delta == 0
    assert mini_tokenizer.decode(prompt.tokens, skip_special=False).endswith("Hi.<|im_end|>\n<|im_start|>assistant\n")


def test_a_response_that_spells_media_tokens_is_only_text(make, wav):
    example = make("Hear", audios=[wav(0.5)], response="<|vision_bos|><|IMAGE|><|AUDIO|>")
    assert (example.media[example.prompt_length :] == TEXT).all()
    assert np.sum(example.media == AUDIO) == len(example.audio_pairs) == 12


def test_measure_equals_the_built_size(mini_tokenizer, mini, small, wav, mp4):
    fields = {
        "problem": "<video><audio> and <image>",
        "audios": [wav(0.7, rate=22050), wav(2.0, format="OGG")],
        "videos": [mp4(7, sound=1.0), mp4(2)],
        "images": [png(50, 300), png(111, 99)],
        "response": "happy because",
    }
    for options in (small, dataclasses.replace(small, modalities=("video", "image"))):
        size = measure(tokenizer=mini_tokenizer, config=mini, options=options, **fields)
        assert size == build_example(tokenizer=mini_tokenizer, config=mini, options=options, **fields).size()
        assert (size.audio_tokens > 0) == ("audio" in options.modalities)


@pytest.mark.parametrize(
    "changes", [{}, {"use_audio_in_video": True}, {"real_timing": True}, {"modalities": ("video",)}, {"feed_media": False}]
)
def test_other_words_with_the_same_media_are_laid_out_without_opening_these(make, small, wav, mp4, monkeypatch, changes):
    options = dataclasses.replace(small, **changes)
    media = {"audios": [wav(0.7), wav(1.31, seed=1)], "videos": [mp4(10, sound=1.0), mp4(5, sound=0.6)], "images": [png(90, 60)]}
    words, others = "<video><audio> She said no. <image><video> How?", "<video><audio> Well, she said: oh no, never! <image><video> Why?"
    like, wanted = make(words, options, **media, response="sad"), make(others, options, **media, response="afraid, and sad")
    for name in ("decode_audio", "decode_video", "decode_image", "has_audio", "video_shape", "image_shape", "frame_spacing"):
        monkeypatch.setattr(f"omnisapiens_jax.processing.media.{name}", lambda *_, **__: pytest.fail("opened"))
    found = make(others, options, **media, response="afraid, and sad", like=like)
    for field in dataclasses.fields(found):
        np.testing.assert_equal(getattr(found, field.name), getattr(wanted, field.name), err_msg=field.name)


def test_sound_in_video_is_used_only_when_every_video_has_it(make, mini, small, mp4):
    options = dataclasses.replace(small, use_audio_in_video=True)
    sounding = make("<video>", options, videos=[mp4(10, sound=1.0)])
    opening = np.flatnonzero(sounding.tokens == mini.tokens.vision_bos)[0]
    assert (
        sounding.tokens[opening + 1] == mini.tokens.audio_bos
        and (sounding.positions[:, opening] == sounding.positions[:, opening + 1]).all()
    )
    silent = make("<video>", options, videos=[mp4(10)])
    np.testing.assert_array_equal(silent.positions, make("<video>", videos=[mp4(10)]).positions)
    with pytest.raises(MediaError, match="video 1.* no audio stream"):
        make("<video>", options, videos=[mp4(10, sound=1.0), mp4(3)])


def test_real_timing_tells_the_seconds_between_the_frames(make, small, mp4):
    """20 frames at 10 a second: frames 0, 6, 13 and 19 are 19 / 30 s apart on average, so a grid step of two lasts 31 ticks, not 25."""
    told, real = make("<video>", videos=[mp4(20)]), make("<video>", dataclasses.replace(small, real_timing=True), videos=[mp4(20)])
    steps = [np.unique(example.positions[0, example.media == VISION]).tolist() for example in (told, real)]
    assert [last - first for first, last in steps] == [25, 31] and real.size() == told.size()
    still = make("<video>", dataclasses.replace(small, real_timing=True), videos=[mp4(1)])
    np.testing.assert_array_equal(still.positions, make("<video>", videos=[mp4(1)]).positions)


def test_a_batch_pads_on_the_right_and_masks_empty_slots(rich, make, mini):
    text = make("Hi.", response="ok")
    bucket = Bucket.covering([rich.size(), text.size()])
    batch = collate([rich, None, text], bucket, mini)
    assert batch["row_mask"].tolist() == [True, False, True]
    assert batch["segment_ids"].sum(axis=1).tolist() == [len(rich.tokens), 0, len(text.tokens)]
    assert (batch["tokens"][2, len(text.tokens) :] == mini.tokens.pad).all() and (batch["labels"][2, len(text.tokens) :] == IGNORED).all()
    assert batch["audio_frames"][1:].sum() == 0 and not batch["patch_mask"][1:].any()
    np.testing.assert_array_equal(batch["positions"][0, :, : len(rich.tokens)], rich.positions)
    assert batch["rope_delta"].tolist() == [rich.rope_delta, 0, 0]
    tiny = collate([text], text.size(), mini)
    assert tiny["patches"].shape == (1, 0, 0, 0, 1176) and tiny["audio_chunks"].shape == (1, 0, 50, 128)


def test_what_does_not_fit_is_named(rich, make, mini, wav):
    with pytest.raises(
        ValueError, match=rf"row 1 does not fit its bucket: tokens {len(rich.tokens)} > 40, audio_chunks 5 > 0, .*larger bucket"
    ):
        collate([None, rich], Bucket(40), mini)
    assert not Bucket(40).holds(rich.size()) and Bucket.covering([rich.size(), Bucket(9999)]).holds(rich.size())


def test_samples_that_cannot_be_built_say_which_and_why(make, mini_tokenizer, small, wav):
    with pytest.raises(ValueError, match=r"meld 7: more placeholders than media: the problem holds 2 <audio>, the row 1 audio"):
        make("<audio><audio>", audios=[wav()], name="meld 7")
    with pytest.raises(ValueError, match=r"meld 7: the text itself holds 1 literal placeholder"):
        make("say <|AUDIO|>", name="meld 7")
    with pytest.raises(MediaError, match=r"meld 7, audio 1 \(\d+ bytes\): corrupt audio"):
        make("hear", audios=[wav(), b"RIFF" + bytes(50)], name="meld 7")
    with pytest.raises(MediaError, match=r"meld 7, image 0: 800x2 pixels"):
        make("see", images=[png(2, 800)], name="meld 7")
    with pytest.raises(ValueError, match="special ids"):
        build_example(problem="x", tokenizer=mini_tokenizer, config=PRESETS["7b"], options=small)


@pytest.mark.parametrize(
    "fields", [{"modalities": ("smell",)}, {"video_min_pixels": 10**9}, {"fps": 0}, {"use_audio_in_video": True, "modalities": ("video",)}]
)
def test_options_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError):
        ProcessingConfig(**fields)
