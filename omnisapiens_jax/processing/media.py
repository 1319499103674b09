"""Decoding of audio, video and image files, from a path or from bytes. Whatever goes wrong is a MediaError that names the item."""

from __future__ import annotations

import bisect
import dataclasses
import io
import itertools
from pathlib import Path

import av
import av.error
import numpy as np
import soundfile
import soxr
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image

from omnisapiens_jax.processing.audio import SAMPLE_RATE, audio_token_count, mel_frames

Source = bytes | Path

_SEEK_BELOW = 0.5  # seeking must spare this share of the frames at least: each seek also opens the decoder anew


class MediaError(Exception):
    """A medium could not be used. The message says which one and why."""

    def __init__(self, name: str, cause: str):
        super().__init__(f"{name}: {cause}")


def decode_audio(source: Source, *, seconds: float, name: str = "audio") -> np.ndarray:
    """Mono float32 waveform `[samples]` at 16 kHz: the mean of the channels, resampled (soxr HQ), the first `seconds`.

    WAV, FLAC, OGG and MP3 go through libsndfile, everything else (and the sound track of a video) through FFmpeg.
    Raises MediaError: missing, empty, undecodable, not finite, or too short to give one token (3 mel frames, 20 ms).
    """
    name, raw = _open(source, name)
    try:
        with soundfile.SoundFile(raw) as file:
            rate = file.samplerate
            # A little more than asked, so that the resampler's last samples do not see an artificial end.
            samples = file.read(int((seconds + 0.1) * rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as reason:
        raw.seek(0)
        if raw.read(4) in (b"RIFF", b"fLaC", b"OggS"):
            raise MediaError(name, f"corrupt audio file ({reason})") from reason
        raw.seek(0)
        samples, rate = _decode_sound_track(raw, seconds + 0.1, name)
    if not len(samples):
        raise MediaError(name, "holds no audio samples")
    if not np.isfinite(samples).all():
        raise MediaError(name, "holds samples that are NaN or infinite")
    mono = samples.mean(axis=1, dtype=np.float32)
    mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")[: round(seconds * SAMPLE_RATE)]
    if audio_token_count(mel_frames(len(mono))) == 0:
        raise MediaError(name, f"only {len(mono) / SAMPLE_RATE * 1000:.0f} ms of sound; at least 20 ms are needed")
    return mono


def has_audio(source: Source, *, name: str = "video") -> bool:
    """Whether a container has a sound track."""
    name, raw = _open(source, name)
    try:
        with av.open(raw, "r") as container:
            return bool(container.streams.audio)
    except av.error.FFmpegError as reason:
        raise MediaError(name, f"not a readable media file ({reason})") from reason


def decode_video(source: Source, *, frames: int, name: str = "video") -> np.ndarray:
    """RGB frames `[n, H, W, 3]` uint8 taken evenly from the whole clip: `round(linspace(0, total - 1, frames))`; all if it has fewer.

    A clip is read in order up to the last wanted frame, or, where that decodes less than half as much, from the key frame before each
    wanted one; the frames are the same. Only the wanted ones are converted and kept. Raises MediaError: missing, empty, no video stream,
    undecodable, or cut off (fewer frames than the header promises).
    """
    name, raw = _open(source, name)
    try:
        packets = _packets(raw, name)
        wanted = frame_indices(len(packets), frames)
        raw.seek(0)
        kept = _sought(raw, jumps) if (jumps := _jumps(packets, wanted)) else []
        if len(kept) < len(wanted):
            raw.seek(0)
            kept = _in_order(raw, wanted)
    except av.error.FFmpegError as reason:
        raise MediaError(name, f"corrupt or truncated video ({reason})") from reason
    if len(kept) < len(wanted):
        raise MediaError(name, f"corrupt or truncated video (frame {wanted[len(kept)]} of {len(packets)} cannot be decoded)")
    return np.stack(kept)


def frame_spacing(source: Source, *, frames: int, name: str = "video") -> float | None:
    """Seconds between the frames that `decode_video` gives, on average; None for a still, or where the container has no times.

    Raises MediaError as `decode_video` does, but nothing is decoded.
    """
    name, raw = _open(source, name)
    try:
        times = sorted(packet.time for packet in _packets(raw, name) if packet.time is not None)
        raw.seek(0)
        with av.open(raw, "r") as container:
            base = container.streams.video[0].time_base
    except av.error.FFmpegError as reason:
        raise MediaError(name, f"corrupt or truncated video ({reason})") from reason
    if len(times) < 2 or frames < 2 or base is None:
        return None
    return float((times[-1] - times[0]) * base) / (len(frame_indices(len(times), frames)) - 1)


def decode_image(source: Source, *, name: str = "image") -> np.ndarray:
    """A picture as RGB `[1, H, W, 3]` uint8. Raises MediaError when it is missing, empty or undecodable."""
    name, raw = _open(source, name)
    try:
        with Image.open(raw) as image:
            return np.asarray(image.convert("RGB"))[None]
    except (OSError, SyntaxError, ValueError) as reason:  # Pillow raises all three for broken files
        raise MediaError(name, f"not a readable image ({reason})") from reason


def video_shape(source: Source, *, frames: int, name: str = "video") -> tuple[int, int, int]:
    """Shape (n, height, width) that `decode_video` gives, without decoding."""
    name, raw = _open(source, name)
    try:
        total = len(_packets(raw, name))
        raw.seek(0)
        with av.open(raw, "r") as container:
            stream = container.streams.video[0]
            return min(frames, total), stream.height, stream.width
    except av.error.FFmpegError as reason:
        raise MediaError(name, f"corrupt or truncated video ({reason})") from reason


def image_shape(source: Source, *, name: str = "image") -> tuple[int, int, int]:
    """Shape (1, height, width) that `decode_image` gives, without decoding."""
    name, raw = _open(source, name)
    try:
        with Image.open(raw) as image:
            return 1, image.height, image.width
    except (OSError, SyntaxError, ValueError) as reason:
        raise MediaError(name, f"not a readable image ({reason})") from reason


def frame_indices(total: int, frames: int) -> list[int]:
    """Indices of the frames that are looked at in a clip of `total`."""
    return [int(i) for i in np.round(np.linspace(0, total - 1, min(frames, total)))]


@dataclasses.dataclass(frozen=True)
class _Packet:
    """A coded picture: when it is shown, in its stream's units (None: the container does not say), and whether decoding can begin there."""

    time: int | None
    key: bool


def _packets(raw: io.BytesIO, name: str) -> list[_Packet]:
    """The coded pictures that are shown, in coded order, from the packets alone.

    Headers may be silent about their number, and a file that was cut off still promises them all.
    """
    with av.open(raw, "r") as container:
        if not container.streams.video:
            raise MediaError(name, "has no video stream, or is cut off before its index")
        stream = container.streams.video[0]
        # An edit list takes pictures out of the index of an MP4, not out of its count of frames.
        promised = len(stream.index_entries) if "mp4" in container.format.name else stream.frames
        packets = [packet for packet in container.demux(stream) if packet.size]
        if len(packets) < promised:
            raise MediaError(name, f"truncated video (the header promises {promised} frames, the file holds {len(packets)})")
    shown = [_Packet(packet.pts, packet.is_keyframe) for packet in packets if not packet.is_discard]  # the others only lead up to them
    if not shown:
        raise MediaError(name, "holds no video frames")
    return shown


def _jumps(packets: list[_Packet], wanted: list[int]) -> list[tuple[int, int]]:
    """(time of the key frame to begin at, time) of each wanted frame; none where reading in order is as good, or times are missing."""
    times = [packet.time for packet in packets if packet.time is not None]
    shown = sorted(set(times))
    if len(shown) < len(packets):
        return []
    coded = {time: place for place, time in enumerate(times)}
    keys = [packet.time for packet in packets if packet.key and packet.time is not None]
    if keys != sorted(keys) or not keys or keys[0] > shown[0]:
        return []
    jumps, decoded, reached = [], 0, -1  # `reached`: how far in coded order the decoder has come
    for time in (shown[index] for index in wanted):
        key = keys[bisect.bisect_right(keys, time) - 1]
        decoded += max(coded[time] - max(coded[key] - 1, reached), 0)
        reached = max(coded[time], reached)
        jumps.append((key, time))
    return jumps if decoded < _SEEK_BELOW * (wanted[-1] + 1) else []


def _sought(raw: io.BytesIO, jumps: list[tuple[int, int]]) -> list[np.ndarray]:
    """The frames shown at the times of `jumps`, fewer if one does not turn up, or if a key frame is none to begin at after all."""
    kept: list[np.ndarray] = []
    to_rgb = VideoReformatter()
    with av.open(raw, "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        begun, frames = None, iter(())
        for key, time in jumps:
            if key != begun:
                container.seek(key, stream=stream)
                begun, frames = key, container.decode(stream)
                first = next(frames, None)
                # A recovery point is flagged like a key frame, but the pictures after it are not whole at once.
                if first is None or first.pict_type != PictureType.I:
                    return kept
                frames = itertools.chain([first], frames)
            found = next((frame for frame in frames if frame.pts is None or frame.pts >= time), None)
            if found is None or found.pts != time:
                return kept
            kept.append(_rgb(found, to_rgb))
    return kept


def _in_order(raw: io.BytesIO, wanted: list[int]) -> list[np.ndarray]:
    """The frames of these numbers, fewer if the clip ends before."""
    kept: list[np.ndarray] = []
    to_rgb = VideoReformatter()  # one for all frames: setting up the conversion costs more than a small frame's own
    with av.open(raw, "r") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # samples are what is worked on in parallel
        for index, frame in enumerate(container.decode(stream)):
            if index == wanted[len(kept)]:
                kept.append(_rgb(frame, to_rgb))
                if len(kept) == len(wanted):
                    break
    return kept


def _rgb(frame: av.VideoFrame, to_rgb: VideoReformatter) -> np.ndarray:
    return to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()


def _decode_sound_track(raw: io.BytesIO, seconds: float, name: str) -> tuple[np.ndarray, int]:
    """Samples `[n, channels]` float32 and their rate, from the first audio stream of a container."""
    try:
        with av.open(raw, "r") as container:
            if not container.streams.audio:
                raise MediaError(name, "has no audio stream")
            stream = container.streams.audio[0]
            planar = av.AudioResampler(format="fltp")
            blocks: list[np.ndarray] = []
            for frame in container.decode(stream):
                blocks += [block.to_ndarray() for block in planar.resample(frame)]
                if sum(block.shape[1] for block in blocks) >= seconds * stream.rate:
                    break
            return np.concatenate(blocks, axis=1).T if blocks else np.zeros((0, 1), np.float32), stream.rate
    except av.error.FFmpegError as reason:
        raise MediaError(name, f"not a readable audio file ({reason})") from reason


def _open(source: Source, name: str) -> tuple[str, io.BytesIO]:
    """The full name of an item, for messages, and its bytes."""
    if isinstance(source, Path):
        name = f"{name} ({source})"
        try:
            source = source.read_bytes()
        except OSError as reason:
            raise MediaError(name, f"cannot be read ({reason.strerror})") from reason
    else:
        name = f"{name} ({len(source)} bytes)"
    if not source:
        raise MediaError(name, "is empty")
    return name, io.BytesIO(source)
