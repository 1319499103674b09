"""One sample as the model takes it: `build_example` makes the unpadded row, `collate` puts rows into a batch of fixed shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing import chat, media
from omnisapiens_jax.processing.audio import SAMPLE_RATE, SILENCE, audio_token_count, layout_audio, log_mel, mel_frames
from omnisapiens_jax.processing.media import MediaError, Source
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.positions import Grid, interleave, rope_positions
from omnisapiens_jax.processing.tokenizers import Tokenizer
from omnisapiens_jax.processing.vision import black_patches, grey_patches, grid_of, layout_vision, patchify, window_slots

IGNORED = -100  # label of a token that is not trained
STAND_IN_SAMPLES = SAMPLE_RATE // 2  # of silence, for a clip that cannot be decoded
STAND_IN_SIDE = 224  # pixels of a black picture, for one that cannot
TEXT, AUDIO, VISION = 0, 1, 2  # kinds in Example.media

PER_SAMPLE = ("prompt_length", "rope_delta", "row_mask", "domain", "label")  # what a batch says of samples, not of tokens or media

Batch = dict[str, np.ndarray]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A fixed shape of one row. Media axes of size 0 mean that the batch carries no such media and the tower is skipped.

    Samples that share a row add up their tokens, audio, frames and segments; `windows` and `window_patches` are those of its largest frame.
    """

    tokens: int
    audio_chunks: int = 0
    audio_tokens: int = 0
    frames: int = 0
    windows: int = 0
    window_patches: int = 0
    segments: int = 1  # samples that share the row

    def holds(self, other: Bucket) -> bool:
        """Whether a row of size `other` fits."""
        return not self._too_small_for(other)

    def _too_small_for(self, other: Bucket) -> list[str]:
        fields = [field.name for field in dataclasses.fields(self)]
        return [f"{name} {getattr(other, name)} > {getattr(self, name)}" for name in fields if getattr(other, name) > getattr(self, name)]

    @classmethod
    def together(cls, sizes: Iterable[Bucket]) -> Bucket:
        """The smallest bucket that holds all of `sizes` in one row."""
        columns = np.array([dataclasses.astuple(size) for size in sizes], np.int64).reshape(-1, len(dataclasses.fields(cls)))
        return cls(*np.where(ADDED, columns.sum(0), columns.max(0, initial=0)).tolist())

    @classmethod
    def covering(cls, sizes: Iterable[Bucket]) -> Bucket:
        """The smallest bucket that holds every one of `sizes` (at least one)."""
        return cls(*(max(column) for column in zip(*map(dataclasses.astuple, sizes), strict=True)))


# Which fields of a bucket add up over the samples that share a row.
ADDED = np.array([field.name not in ("windows", "window_patches") for field in dataclasses.fields(Bucket)])


@dataclasses.dataclass(frozen=True)
class Read:
    """What the media of a prompt take up in it, in reading order: all that its tokens and positions want to know of them.

    Attributes:
        audio_tokens: of each sound.
        grids: of each image and video.
        seconds: that a grid step of each video lasts.
        with_sound: whether the sound of videos is among the sounds.
    """

    audio_tokens: tuple[int, ...] = ()
    grids: tuple[Grid, ...] = ()
    seconds: tuple[float, ...] = ()
    with_sound: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """One row, unpadded. The prompt comes first; a response, if there is one, follows and is all that is trained."""

    tokens: np.ndarray  # [T] int32
    labels: np.ndarray  # [T] int32, unshifted, IGNORED where not trained
    positions: np.ndarray  # [3, T] int32: time, height, width
    rope_delta: int  # 1 + maximum position - T
    prompt_length: int
    audio_chunks: np.ndarray  # [A, C, mels] float32, zero past the valid frames
    audio_frames: np.ndarray  # [A] int32 valid frames
    audio_pairs: np.ndarray  # [Na, 2] int32: the encoder states (chunk * chunk_tokens + position) pooled into audio token i
    patches: np.ndarray  # [F, W, P, patch_dim] uint8 pixels (or normalised float32), in window order
    patch_mask: np.ndarray  # [F, W, P] bool
    patch_coords: np.ndarray  # [F, W, P, 2] int32: row, column
    media: np.ndarray  # [T] int32: TEXT, AUDIO or VISION
    media_slot: np.ndarray  # [T, 3] int32: audio (i, 0, 0); vision (frame, window, cell)
    domain: int = -1  # the head that classifies this row, -1 for none (a free-form answer)
    label: int = -1  # its class among those of all heads, -1 for none
    read: Read = Read()

    def size(self) -> Bucket:
        """The smallest bucket that holds this row."""
        return Bucket(len(self.tokens), len(self.audio_chunks), len(self.audio_pairs), *self.patch_mask.shape)

    def without(self, *, audio: bool, video: bool) -> Example:
        """This row with sound turned to silence, or pictures to even grey; their places and its size stay."""
        chunks = np.full_like(self.audio_chunks, SILENCE) if audio else self.audio_chunks
        return dataclasses.replace(self, audio_chunks=chunks, patches=grey_patches(self.patches) if video else self.patches)


def build_example(
    *,
    problem: str,
    tokenizer: Tokenizer,
    config: ThinkerConfig,
    options: ProcessingConfig,
    audios: Sequence[Source] = (),
    videos: Sequence[Source] = (),
    images: Sequence[Source] = (),
    response: str | None = None,
    name: str = "sample",
    replaced: list[MediaError] | None = None,
    like: Example | None = None,
) -> Example:
    """Decodes the media of a sample and lays out its prompt; with `response` also its target, which ends with `<|im_end|>`.

    The media are those of `like`, an example of the same sample with other words, where it is given: none is opened.

    Raises MediaError for media that cannot be used, ValueError for a problem whose tags do not match the media. Both begin with `name`.
    Where `replaced` is given, such media are replaced and the reason goes into that list: half a second of silence for sound, black for
    pictures (reference section 2.5), which are 224 x 224, or as large as the file says if it says that much, so that `measure` holds.
    """
    reader = _Reader(config, options, replaced, decode=options.feed_media)
    prompt = _build_prompt(
        reader if like is None else _Remembered(like.read), config, options, problem, tokenizer, audios, videos, images, name
    )
    answer = [] if response is None else [*tokenizer.encode(response), config.tokens.im_end]
    length, total = len(prompt.tokens), len(prompt.tokens) + len(answer)
    labels = np.full(total, IGNORED, np.int32)
    labels[length:] = answer
    tokens = np.concatenate([prompt.tokens, np.asarray(answer, np.int32)])
    if not options.feed_media:
        return dataclasses.replace(lay_out_words(tokens, labels, length, config), read=prompt.read)
    # A response holds no media, whatever ids a policy may sample: it continues from the prompt's last position, on all axes alike.
    tail = prompt.positions[:, -1:] + 1 + np.arange(len(answer), dtype=np.int32)
    positions = np.concatenate([prompt.positions, tail], axis=1)
    if like is not None:
        kinds, slots = _places(tokens[:length], total, like.media_slot[like.media == VISION], config)
        said = {"tokens": tokens, "labels": labels, "positions": positions, "rope_delta": _rope_delta(positions), "prompt_length": length}
        return dataclasses.replace(like, **said, media=kinds, media_slot=slots)
    return dataclasses.replace(lay_out(tokens, labels, positions, length, reader.mels, reader.visuals, config), read=prompt.read)


def lay_out(
    tokens: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    prompt_length: int,
    mels: list[np.ndarray],
    visuals: list[tuple[np.ndarray, Grid]],
    config: ThinkerConfig,
) -> Example:
    """The row `tokens` `[T]` with its media in the encoders' layout; placeholders are looked for in the prompt only.

    `mels` (each `[frames, mels]`) and `visuals` (patches and grid of images and videos) are in reading order.
    """
    audio, vision = layout_audio(mels, config.audio), layout_vision(visuals, config.vision)
    kinds, slots = _places(tokens[:prompt_length], len(tokens), vision.slots, config)
    return Example(
        tokens=tokens,
        labels=labels,
        positions=positions,
        rope_delta=_rope_delta(positions),
        prompt_length=prompt_length,
        audio_chunks=audio.chunks,
        audio_frames=audio.frames,
        audio_pairs=audio.pairs,
        patches=vision.patches,
        patch_mask=vision.mask,
        patch_coords=vision.coords,
        media=kinds,
        media_slot=slots,
    )


def _places(prompt: np.ndarray, length: int, vision_slots: np.ndarray, config: ThinkerConfig) -> tuple[np.ndarray, np.ndarray]:
    """`media` and `media_slot` of a row of some length, by the placeholders in its prompt and the slots of pictures, in reading order."""
    kinds, slots = np.zeros(length, np.int32), np.zeros((length, 3), np.int32)
    heard = np.flatnonzero(prompt == config.tokens.audio)
    seen = np.flatnonzero(np.isin(prompt, (config.tokens.image, config.tokens.video)))
    kinds[heard], kinds[seen] = AUDIO, VISION
    slots[heard, 0], slots[seen] = np.arange(len(heard)), vision_slots
    return kinds, slots


def _rope_delta(positions: np.ndarray) -> int:
    return 1 + int(positions.max()) - positions.shape[1]


def lay_out_words(tokens: np.ndarray, labels: np.ndarray, prompt_length: int, config: ThinkerConfig) -> Example:
    """The row `tokens` `[T]` without media: placeholders are tokens like all others, and positions count tokens."""
    positions = np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
    return dataclasses.replace(lay_out(tokens, labels, positions, 0, [], [], config), prompt_length=prompt_length)


def measure(
    *,
    problem: str,
    tokenizer: Tokenizer,
    config: ThinkerConfig,
    options: ProcessingConfig,
    audios: Sequence[Source] = (),
    videos: Sequence[Source] = (),
    images: Sequence[Source] = (),
    response: str | None = None,
    name: str = "sample",
    replaced: list[MediaError] | None = None,
) -> Bucket:
    """`build_example(...).size()` without decoding a picture: only sound is decoded, videos are counted by their packets."""
    reader = _Reader(config, options, replaced, decode=False)
    prompt = _build_prompt(reader, config, options, problem, tokenizer, audios, videos, images, name)
    tokens = len(prompt.tokens) + (0 if response is None else len(tokenizer.encode(response)) + 1)
    if not options.feed_media:
        return Bucket(tokens)
    merge, side = config.vision.spatial_merge_size, config.vision.window_cells
    shapes = [window_slots(rows // merge, columns // merge, side)[1:] for _, rows, columns in reader.grids]
    return Bucket(
        tokens=tokens,
        audio_chunks=sum(-(-frames // config.audio.chunk_frames) for frames in reader.mel_frames),
        audio_tokens=sum(audio_token_count(frames) for frames in reader.mel_frames),
        frames=sum(steps for steps, _, _ in reader.grids),
        windows=max((windows for windows, _ in shapes), default=0),
        window_patches=max((cells for _, cells in shapes), default=0) * config.vision.cell_patches,
    )


def collate(examples: Sequence[Example | None], bucket: Bucket, config: ThinkerConfig) -> Batch:
    """A batch of `bucket`'s shape, one row an example; None leaves its row masked. Padding is on the right.

    `media_index` `[B, T]` is -1 for a token's own embedding, else the place of its embedding in the row's list
    `[audio tokens | frames * windows * cells]`. Raises ValueError for an example that does not fit.
    """
    batch = collate_packed([[example] for example in examples], dataclasses.replace(bucket, segments=1), config)
    return {name: array[:, 0] if name in PER_SAMPLE else array for name, array in batch.items()}


def collate_packed(rows: Sequence[Sequence[Example | None]], bucket: Bucket, config: ThinkerConfig) -> Batch:
    """As `collate`, with up to S = `bucket.segments` examples in each row, one after the other.

    Example s of a row has the number s + 1 in `segment_ids` `[B, T]`, and its own positions, from 0; the media of a row lie behind each
    other as its examples do. What is said of samples (`PER_SAMPLE`) is `[B, S]`; None leaves a place unused, its `domain` and `label` -1.
    Raises ValueError for a row that does not fit.
    """
    count, (t, a, na, f, w, p, s) = len(rows), dataclasses.astuple(bucket)
    vision, audio = config.vision, config.audio
    if p % vision.cell_patches:
        raise ValueError(f"window_patches {p} is not a multiple of the {vision.cell_patches} patches of a cell")
    kinds = {example.patches.dtype for examples in rows for example in examples if example is not None and example.patches.size}
    if len(kinds) > 1:
        raise ValueError(f"a batch takes patches of one kind, uint8 pixels or normalised ones, not {sorted(map(str, kinds))}")
    pixels = kinds.pop() if kinds else np.uint8
    batch: Batch = {
        "tokens": np.full((count, t), config.tokens.pad, np.int32),
        "labels": np.full((count, t), IGNORED, np.int32),
        "segment_ids": np.zeros((count, t), np.int32),
        "positions": np.zeros((count, 3, t), np.int32),
        "prompt_length": np.zeros((count, s), np.int32),
        "rope_delta": np.zeros((count, s), np.int32),
        "media_index": np.full((count, t), -1, np.int32),
        "audio_chunks": np.zeros((count, a, audio.chunk_frames, audio.num_mel_bins), np.float32),
        "audio_frames": np.zeros((count, a), np.int32),
        "audio_pairs": np.zeros((count, na, 2), np.int32),
        "patches": np.zeros((count, f, w, p, vision.patch_dim), pixels),
        "patch_mask": np.zeros((count, f, w, p), bool),
        "patch_coords": np.zeros((count, f, w, p, 2), np.int32),
        "row_mask": np.zeros((count, s), bool),
        "domain": np.full((count, s), -1, np.int32),
        "label": np.full((count, s), -1, np.int32),
    }
    for row, examples in enumerate(rows):
        size = Bucket.together(example.size() for example in examples if example is not None)
        if problems := bucket._too_small_for(size):
            raise ValueError(f"row {row} does not fit its bucket: {', '.join(problems)}. Shorten the sample or plan a larger bucket")
        token, chunk, sound, frame = 0, 0, 0, 0  # where the next example begins on each axis
        for segment, example in enumerate(examples):
            if example is None:
                continue
            length, (frames, windows, patches) = len(example.tokens), example.patch_mask.shape
            own = slice(token, token + length)
            batch["tokens"][row, own], batch["labels"][row, own] = example.tokens, example.labels
            batch["segment_ids"][row, own] = segment + 1
            batch["positions"][row, :, own] = example.positions
            batch["prompt_length"][row, segment], batch["rope_delta"][row, segment] = example.prompt_length, example.rope_delta
            batch["row_mask"][row, segment] = True
            batch["domain"][row, segment], batch["label"][row, segment] = example.domain, example.label
            slot = example.media_slot
            seen = na + ((frame + slot[:, 0]) * w + slot[:, 1]) * (p // vision.cell_patches) + slot[:, 2]
            batch["media_index"][row, own] = np.select([example.media == AUDIO, example.media == VISION], [sound + slot[:, 0], seen], -1)
            chunks = slice(chunk, chunk + len(example.audio_chunks))
            batch["audio_chunks"][row, chunks], batch["audio_frames"][row, chunks] = example.audio_chunks, example.audio_frames
            batch["audio_pairs"][row, sound : sound + len(example.audio_pairs)] = example.audio_pairs + chunk * audio.chunk_tokens
            for field in ("patches", "patch_mask", "patch_coords"):
                batch[field][row, frame : frame + frames, :windows, :patches] = getattr(example, field)
            token, chunk, frame = own.stop, chunks.stop, frame + frames
            sound += len(example.audio_pairs)
    return batch


@dataclasses.dataclass(frozen=True)
class _Prompt:
    tokens: np.ndarray
    positions: np.ndarray
    read: Read


class _Reader:
    """Reads media in reading order and remembers what the layouts need; without `decode` only the sizes."""

    def __init__(self, config: ThinkerConfig, options: ProcessingConfig, replaced: list[MediaError] | None, *, decode: bool):
        self.config, self.options, self.replaced, self.decode = config, options, replaced, decode
        self.mels: list[np.ndarray] = []
        self.mel_frames: list[int] = []
        self.visuals: list[tuple[np.ndarray, Grid]] = []
        self.grids: list[Grid] = []

    def has_audio(self, source: Source, name: str) -> bool:
        """Whether a video has sound. One that cannot be read has none, where stand-ins are allowed; its picture will tell why."""
        try:
            return media.has_audio(source, name=name)
        except MediaError:
            if self.replaced is None:
                raise
            return False

    def audio(self, source: Source, name: str) -> int:
        """Tokens of a clip."""
        try:
            waveform = media.decode_audio(source, seconds=self.options.audio_seconds, name=name)
        except MediaError as reason:
            waveform = np.zeros(self._stand_in(reason, STAND_IN_SAMPLES), np.float32)
        if self.decode:
            self.mels.append(log_mel(waveform, self.config.audio.num_mel_bins))
        self.mel_frames.append(mel_frames(len(waveform)))
        return audio_token_count(self.mel_frames[-1])

    def picture(self, kind: str, source: Source, name: str) -> Grid:
        """Grid of an image or video."""
        bounds = self._bounds(kind)
        if self.decode:
            try:
                self.visuals.append(_named(name, lambda: patchify(self._frames(kind, source, name), self.config.vision, **bounds)))
            except MediaError as reason:
                grid = self._stand_in(reason, self._grid_or_default(kind, source, name))
                self.visuals.append((black_patches(grid, self.config.vision), grid))
            grid = self.visuals[-1][1]
        else:
            try:
                grid = self._grid(kind, source, name)
            except MediaError as reason:
                grid = self._stand_in(reason, self._default_grid(kind))
        self.grids.append(grid)
        return grid

    def seconds_per_grid(self, source: Source, name: str) -> float:
        """What a grid step of a video lasts, as the model is told; of one that something stands in for, what the options say."""
        options, frames = self.options, self.config.vision.temporal_patch_size
        try:
            spacing = media.frame_spacing(source, frames=options.video_frames, name=name) if options.real_timing else None
        except MediaError:
            if self.replaced is None:
                raise
            spacing = None
        return frames * spacing if spacing else frames / options.fps

    def _stand_in(self, reason: MediaError, value: _T) -> _T:
        if self.replaced is None:
            raise reason
        self.replaced.append(reason)
        return value

    def _frames(self, kind: str, source: Source, name: str) -> np.ndarray:
        if kind == "image":
            return media.decode_image(source, name=name)
        return media.decode_video(source, frames=self.options.video_frames, name=name)

    def _grid(self, kind: str, source: Source, name: str) -> Grid:
        return _named(name, lambda: grid_of(*self._shape(kind, source, name), self.config.vision, **self._bounds(kind)))

    def _shape(self, kind: str, source: Source, name: str) -> tuple[int, int, int]:
        if kind == "image":
            return media.image_shape(source, name=name)
        return media.video_shape(source, frames=self.options.video_frames, name=name)

    def _grid_or_default(self, kind: str, source: Source, name: str) -> Grid:
        try:
            return self._grid(kind, source, name)
        except MediaError:
            return self._default_grid(kind)

    def _default_grid(self, kind: str) -> Grid:
        frames = 1 if kind == "image" else self.options.video_frames
        return grid_of(frames, STAND_IN_SIDE, STAND_IN_SIDE, self.config.vision, **self._bounds(kind))

    def _bounds(self, kind: str) -> dict[str, int]:
        options = self.options
        if kind == "image":
            return {"min_pixels": options.image_min_pixels, "max_pixels": options.image_max_pixels}
        return {"min_pixels": options.video_min_pixels, "max_pixels": options.video_max_pixels}


class _Remembered:
    """A reader that tells once more what another has read of the same media; nothing is opened."""

    def __init__(self, read: Read):
        self._with_sound = read.with_sound
        self._audio_tokens, self._grids, self._seconds = iter(read.audio_tokens), iter(read.grids), iter(read.seconds)

    def has_audio(self, source: Source, name: str) -> bool:
        """See `_Reader`."""
        return self._with_sound

    def audio(self, source: Source, name: str) -> int:
        """See `_Reader`."""
        return next(self._audio_tokens)

    def picture(self, kind: str, source: Source, name: str) -> Grid:
        """See `_Reader`."""
        return next(self._grids)

    def seconds_per_grid(self, source: Source, name: str) -> float:
        """See `_Reader`."""
        return next(self._seconds)


def _named(name: str, work: Callable[[], _T]) -> _T:
    try:
        return work()
    except ValueError as reason:
        raise MediaError(name, str(reason)) from reason


def _build_prompt(
    reader: _Reader | _Remembered,
    config: ThinkerConfig,
    options: ProcessingConfig,
    problem: str,
    tokenizer: Tokenizer,
    audios: Sequence[Source],
    videos: Sequence[Source],
    images: Sequence[Source],
    name: str,
) -> _Prompt:
    ids = config.tokens
    if tokenizer.ids != ids:
        raise ValueError(
            f"the tokenizer's special ids {tokenizer.ids} are not the model's {ids}: vocabulary and configuration do not belong together"
        )
    given = {"audio": audios, "video": videos, "image": images}
    try:
        messages = chat.build_messages(
            problem,
            {kind: len(sources) for kind, sources in given.items()},
            modalities=options.modalities,
            format_prompt=options.format_prompt,
            system=options.system,
        )
    except ValueError as reason:
        raise ValueError(f"{name}: {reason}") from reason
    text = np.asarray(tokenizer.encode(chat.render(messages)), np.int32)
    order = chat.media_order(messages)
    places = np.flatnonzero(np.isin(text, (ids.audio, ids.image, ids.video)))
    if len(places) != len(order):
        raise ValueError(f"{name}: the text itself holds {len(places) - len(order)} literal placeholder token(s) without media")

    audio_tokens: list[int] = []
    seconds: list[float] = []  # that a grid step of each video lasts
    grids: list[tuple[str, Grid]] = []  # and what each is of
    pieces: list[np.ndarray] = []
    following = 0
    with_sound = options.use_audio_in_video and any(reader.has_audio(v, f"{name}, video {i}") for i, v in enumerate(videos))
    sources = {kind: iter(enumerate(items)) for kind, items in given.items()}
    for place, kind in zip(places, order, strict=True):
        number, source = next(sources[kind])
        what = f"{name}, {kind} {number}"
        pieces.append(text[following:place])
        if kind == "audio":
            audio_tokens.append(reader.audio(source, what))
            span = np.full(audio_tokens[-1], ids.audio, np.int32)
        else:
            grid = reader.picture(kind, source, what)
            grids.append((kind, grid))
            span = np.full(_cells(grid, config), ids.image if kind == "image" else ids.video, np.int32)
            if kind == "video":
                seconds.append(reader.seconds_per_grid(source, what))
            if kind == "video" and with_sound:
                audio_tokens.append(reader.audio(source, f"{what}, sound track"))
                span = _video_with_sound(grid, audio_tokens[-1], config, seconds[-1])
        pieces.append(span)
        following = place + 1
    tokens = np.concatenate([*pieces, text[following:]])
    positions, _ = rope_positions(
        tokens,
        config,
        audio_tokens=audio_tokens,
        image_grids=[grid for kind, grid in grids if kind == "image"],
        video_grids=[grid for kind, grid in grids if kind == "video"],
        seconds_per_grid=seconds,
        use_audio_in_video=with_sound,
    )
    return _Prompt(tokens, positions, Read(tuple(audio_tokens), tuple(grid for _, grid in grids), tuple(seconds), with_sound))


def _cells(grid: Grid, config: ThinkerConfig) -> int:
    return grid[0] * grid[1] * grid[2] // config.vision.cell_patches


def _video_with_sound(grid: Grid, audio_tokens: int, config: ThinkerConfig, seconds_per_grid: float) -> np.ndarray:
    """Placeholders of a video and its sound, interleaved; the audio pair sits inside the vision pair."""
    ids = config.tokens
    # In double precision, unlike the positions: that is how the published processor orders the text.
    video = np.repeat(np.arange(grid[0]) * seconds_per_grid * config.position_id_per_seconds, _cells((1, *grid[1:]), config))
    order = interleave(video, np.arange(audio_tokens), config)
    spans = [np.full(end - begin, (ids.video, ids.audio)[which], np.int32) for which, begin, end in order]
    return np.concatenate([[ids.audio_bos], *spans, [ids.audio_eos]]).astype(np.int32)
