"""Decoding of audio, video and image files, from a path or from bytes. Whatever goes wrong is a MediaError that names the item."""

from __future__ import annotations

import io
from pathlib import Path

import av
import av.error
import numpy as np
import soundfile
import soxr
from av.container import InputContainer
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image

from omnisapiens_jax.processing.audio import SAMPLE_RATE, audio_token_count, mel_frames

Source = bytes | Path

# What broken files raise beside what the libraries promise: PyAV for names that are not UTF-8, Pillow for sizes that no header should hold.
_UNPLAYABLE = (av.error.FFmpegError, UnicodeDecodeError)
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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


def open_container(raw: io.BytesIO) -> InputContainer:
    """An audio or video file for FFmpeg. Titles and the like may be in any encoding: nobody asks for them."""
    return av.open(raw, "r", metadata_errors="replace")


def has_audio(source: Source, *, name: str = "video") -> bool:
    """Whether a container has a sound track."""
    name, raw = _open(source, name)
    try:
        with open_container(raw) as container:
            return bool(container.streams.audio)
    except _UNPLAYABLE as reason:
        raise MediaError(name, f"not a readable media file ({reason})") from reason


def decode_video(source: Source, *, frames: int, name: str = "video") -> np.ndarray:
    """RGB frames `[n, H, W, 3]` uint8 taken evenly from the whole clip: `round(linspace(0, total - 1, frames))`; all if it has fewer.

    What no wanted frame depends on is not decoded: nothing before the key frame that it starts from, and no frame on the way that no other
    refers to. Raises MediaError: missing, empty, no video stream, undecodable, or cut off (fewer frames than the header promises).
    """
    name, raw = _open(source, name)
    try:
        with open_container(raw) as container:
            stream, packets = _read_packets(container, name)
            total = sum(not packet.is_discard for packet in packets)
            wanted = frame_indices(total, frames)
            stream.thread_count = 1  # samples are what is worked on in parallel
            kept = _by_time(stream.codec_context, packets, wanted)
            if len(kept) < len(wanted):  # a container without times, a coded picture that shows nothing, a broken one
                kept = _in_order(stream.codec_context, packets, wanted)
    except _UNPLAYABLE as reason:
        raise MediaError(name, f"corrupt or truncated video ({reason})") from reason
    if missing := [index for index in wanted if index not in kept]:
        raise MediaError(name, f"corrupt or truncated video (frame {missing[0]} of {total} cannot be decoded)")
    return np.stack([kept[index].transpose(2, 0, 1) for index in wanted]).transpose(0, 2, 3, 1)


def frame_spacing(source: Source, *, frames: int, name: str = "video") -> float | None:
    """Seconds between the frames that `decode_video` gives, on average; None for a still, or where the container has no times.

    Raises MediaError as `decode_video` does, but nothing is decoded.
    """
    name, raw = _open(source, name)
    try:
        with open_container(raw) as container:
            stream, packets = _read_packets(container, name)
            times = sorted(packet.pts for packet in packets if packet.pts is not None and not packet.is_discard)
            base = stream.time_base
    except _UNPLAYABLE as reason:
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
    except _UNREADABLE as reason:
        raise MediaError(name, f"not a readable image ({reason})") from reason


def video_shape(source: Source, *, frames: int, name: str = "video") -> tuple[int, int, int]:
    """Shape (n, height, width) that `decode_video` gives, without decoding."""
    name, raw = _open(source, name)
    try:
        with open_container(raw) as container:
            stream, packets = _read_packets(container, name)
            total = sum(not packet.is_discard for packet in packets)
            return min(frames, total), stream.height, stream.width
    except _UNPLAYABLE as reason:
        raise MediaError(name, f"corrupt or truncated video ({reason})") from reason


def image_shape(source: Source, *, name: str = "image") -> tuple[int, int, int]:
    """Shape (1, height, width) that `decode_image` gives, without decoding."""
    name, raw = _open(source, name)
    try:
        with Image.open(raw) as image:
            return 1, image.height, image.width
    except _UNREADABLE as reason:
        raise MediaError(name, f"not a readable image ({reason})") from reason


def frame_indices(total: int, frames: int) -> list[int]:
    """Indices of the frames that are looked at in a clip of `total`."""
    return [int(i) for i in np.round(np.linspace(0, total - 1, min(frames, total)))]


def _read_packets(container: InputContainer, name: str) -> tuple[av.VideoStream, list[av.Packet]]:
    """The video stream and its coded pictures in decoding order; those with `is_discard` are only there for others to refer to.

    They are counted because headers may be silent, and a file that was cut off still promises them all.
    """
    if not container.streams.video:
        raise MediaError(name, "has no video stream, or is cut off before its index")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise MediaError(name, "its video has a codec that is not known")
    packets = [packet for packet in container.demux(stream) if packet.size]
    # An edit list takes pictures out of the index of an MP4, not out of its count of frames.
    promised = len(stream.index_entries) if "mp4" in container.format.name else stream.frames
    if len(packets) < promised:
        raise MediaError(name, f"truncated video (the header promises {promised} frames, the file holds {len(packets)})")
    if all(packet.is_discard for packet in packets):
        raise MediaError(name, "holds no video frames")
    return stream, packets


def _by_time(decoder: av.VideoCodecContext, packets: list[av.Packet], wanted: list[int]) -> dict[int, np.ndarray]:
    """RGB pictures by index, told by their times; too few if these do not tell them apart, or some cannot be decoded."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) < len(packets):
        return {}
    place_of = {time: place for place, time in enumerate(times) if not packets[place].is_discard}
    if len(place_of) < sum(not packet.is_discard for packet in packets):
        return {}
    shown = sorted(place_of)
    index_of = {shown[index]: index for index in wanted}
    to_rgb, kept, begun, whole = VideoReformatter(), {}, set(), True

    def feed(packet: av.Packet | None) -> None:
        nonlocal whole
        for frame in decoder.decode(packet):
            # A recovery point is flagged like a key frame, but the pictures after it are not whole at once.
            whole = whole and (frame.pts not in begun or frame.pict_type == PictureType.I)
            if frame.pts in index_of:
                kept[index_of[frame.pts]] = _rgb(to_rgb, frame)

    begin = 0
    for place in sorted(place_of[time] for time in index_of):
        # What is shown before a key frame that lies before it in the file may refer to what lies before that.
        keys = (at for at in range(place, begin, -1) if packets[at].is_keyframe and times[at] <= times[place])
        if (key := next(keys, begin)) > begin:
            feed(None)
            decoder.flush_buffers()
            begin = key
            begun.add(times[key])
        for at in range(begin, place + 1):
            decoder.skip_frame = "DEFAULT" if at == place else "NONREF"
            feed(packets[at])
        begin = place + 1
    feed(None)
    return kept if whole else {}


def _in_order(decoder: av.VideoCodecContext, packets: list[av.Packet], wanted: list[int]) -> dict[int, np.ndarray]:
    """RGB pictures by index, told by counting what the decoder gives."""
    decoder.flush_buffers()
    decoder.skip_frame = "DEFAULT"
    to_rgb, kept = VideoReformatter(), {}
    for index, frame in enumerate(frame for packet in (*packets, None) for frame in decoder.decode(packet)):
        if index in wanted:
            kept[index] = _rgb(to_rgb, frame)
        if index == wanted[-1]:
            break
    return kept


def _rgb(reformatter: VideoReformatter, frame: av.VideoFrame) -> np.ndarray:
    """A frame as `[H, W, 3]` uint8, each colour for itself in memory: resizing wants it so.

    One reformatter serves a clip: setting up the conversion costs more than a small frame's own.
    """
    planes = reformatter.reformat(frame, format="gbrp", threads=1).planes
    colours = [np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width] for plane in planes]
    green, blue, red = colours
    return np.stack([red, green, blue]).transpose(1, 2, 0)


def _decode_sound_track(raw: io.BytesIO, seconds: float, name: str) -> tuple[np.ndarray, int]:
    """Samples `[n, channels]` float32 and their rate, from the first audio stream of a container."""
    try:
        with open_container(raw) as container:
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
    except _UNPLAYABLE as reason:
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
