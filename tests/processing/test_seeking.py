"""Frames found by seeking are those that reading in order gives, whatever the coder did."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.processing.media import decode_video, frame_indices


def clip(
    frames: int,
    *,
    gaps: list[int] | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    early: int = 0,
    seed: int = 0,
    **options: Any,
) -> bytes:
    """A clip of moving noise. `gaps` are the times between frames, in turn; the first `early` frames lie before the start."""
    file, random = io.BytesIO(), np.random.default_rng(seed)
    noise = random.integers(0, 256, (8, 10, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options={name.replace("_", "-"): str(value) for name, value in options.items()})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = 60, 48, "yuv420p", Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        times = np.concatenate([[0], np.cumsum(np.resize(gaps or [40], frames - 1))])
        for number, time in enumerate(times.tolist()):
            picture = av.VideoFrame.from_ndarray(np.roll(noise, (number, 2 * number), (0, 1)) // 2 + number % 128, format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(picture):
                out.mux(_earlier(packet, int(times[early])))
        for packet in stream.encode():
            out.mux(_earlier(packet, int(times[early])))
    return file.getvalue()


def _earlier(packet: av.Packet, time: int) -> av.Packet:
    assert packet.pts is not None and packet.dts is not None
    packet.pts, packet.dts = packet.pts - time, packet.dts - time
    return packet


def in_order(source: bytes, count: int) -> np.ndarray:
    with av.open(io.BytesIO(source), "r") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack([frames[i] for i in frame_indices(len(frames), count)])


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 60),
    count=st.sampled_from([1, 4, 8]),
    gaps=st.lists(st.integers(5, 400), min_size=1, max_size=5),
    g=st.sampled_from([1, 2, 3, 7, 20, 250]),
    bf=st.integers(0, 3),
    extra=st.sampled_from(
        [{}, {"x264_params": "open-gop=1"}, {"x264_params": "intra-refresh=1"}, {"x264_params": "scenecut=0:b-pyramid=2"}]
    ),
    early=st.sampled_from([0, 0, 1, 5]),
)
def test_seeking_finds_the_frames_of_reading_in_order(frames, count, gaps, g, bf, extra, early):
    if "intra" in str(extra):
        early = 0  # the pictures after a cut would not be whole, and a decoder shows none of them
    source = clip(frames, gaps=gaps, g=g, bf=bf, early=min(early, frames - 1), preset="veryfast", **extra)
    np.testing.assert_array_equal(decode_video(source, frames=count), in_order(source, count))


@pytest.mark.parametrize(
    ("codec", "container"),
    [("mpeg4", "matroska"), ("mpeg4", "mp4"), ("libvpx-vp9", "webm"), ("libx264", "matroska"), ("libx264", "h264")],
)
def test_other_coders_and_containers(codec, container):
    source = clip(60, codec=codec, container=container, g=6)
    np.testing.assert_array_equal(decode_video(source, frames=4), in_order(source, 4))


def test_what_lies_between_is_not_decoded():
    """Pictures far from every wanted frame may be broken: nobody looks at them. (The decoder reads a little ahead.)"""
    source = clip(120, g=10, bf=2, x264_params="scenecut=0")
    wanted = frame_indices(120, 4)
    broken = bytearray(source)
    with av.open(io.BytesIO(source), "r") as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    groups = np.cumsum([packet.is_keyframe for packet in packets]) - 1
    for packet, group in zip(packets, groups.tolist(), strict=True):
        if all(group not in (index // 10, index // 10 + 1) for index in wanted):
            assert packet.pos is not None
            broken[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    assert broken != source
    np.testing.assert_array_equal(decode_video(bytes(broken), frames=4), decode_video(source, frames=4))
