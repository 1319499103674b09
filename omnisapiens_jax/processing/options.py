"""How media are decoded and prompts are built: one frozen dataclass, shared by every caller so that all see the same tokens."""

from __future__ import annotations

import dataclasses

MODALITIES = ("audio", "video", "image")
SYSTEM = ("always", "with_audio")  # when the official system sentence comes first


@dataclasses.dataclass(frozen=True)
class ProcessingConfig:
    """Bounds of the media and shape of the prompt.

    Pixels are areas (height x width) after resizing. The defaults for video are the ones the published processor enforces; images take
    the bounds of the reference's path loader. `REFERENCE` has the sizes that the paper's runs saw.
    """

    audio_seconds: float = 10.0  # a clip is cut after this
    video_frames: int = 4  # frames taken evenly from the whole clip; a shorter clip keeps all it has
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    image_min_pixels: int = 65_536
    image_max_pixels: int = 524_288
    fps: float = 2.0  # what the model is told, whatever the clip's true rate: one grid step lasts temporal_patch_size / fps seconds
    real_timing: bool = False  # tell it the clip's own time between the frames instead, so that positions follow the clock
    use_audio_in_video: bool = False  # take the sound track out of each video and interleave it with its frames
    modalities: tuple[str, ...] = MODALITIES  # tags of the others stay in the text as they are, their media are not read
    format_prompt: str = ""  # instruction appended to the problem, see chat.FORMAT_PROMPTS
    # False: of media only the placeholders are left, which are tokens like all others, and positions count tokens (the published SFT).
    feed_media: bool = True
    system: str = "always"  # or with_audio: a row without sound has the template's plain sentence

    def __post_init__(self) -> None:
        unknown = set(self.modalities) - set(MODALITIES)
        if unknown:
            raise ValueError(f"unknown modalities {sorted(unknown)}; known: {', '.join(MODALITIES)}")
        for kind, low, high in (
            ("video", self.video_min_pixels, self.video_max_pixels),
            ("image", self.image_min_pixels, self.image_max_pixels),
        ):
            if not 0 < low <= high:
                raise ValueError(f"{kind}_min_pixels {low} must be positive and at most {kind}_max_pixels {high}")
        if self.system not in SYSTEM:
            raise ValueError(f"unknown system {self.system!r}; known: {', '.join(SYSTEM)}")
        if self.audio_seconds <= 0 or self.video_frames < 1 or self.fps <= 0:
            raise ValueError(
                f"audio_seconds {self.audio_seconds}, video_frames {self.video_frames} and fps {self.fps} must all be positive"
            )
        if self.use_audio_in_video and not {"audio", "video"} <= set(self.modalities):
            raise ValueError("use_audio_in_video needs both the audio and the video modality")


# The sizes of the paper's runs over files: every frame is scaled to 147,456 pixels.
REFERENCE = ProcessingConfig(video_min_pixels=147_456, video_max_pixels=147_456)
