"""Drawn faces for the miniature atlas, and their landmarks, both from one set of numbers.

A face is a `Look` (who) and an `Expression` (what is shown). Lengths are in units of half the picture's side, the origin is the
middle of the picture, y points down.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

SIZE = 112  # pixels, both sides
FPS = 10
_DRAWN = 2 * SIZE  # drawn larger, then reduced: smooth edges

Lines = dict[str, np.ndarray]  # of one face by name, each `[points, 2]`


@dataclasses.dataclass(frozen=True)
class Look:
    """Who is drawn."""

    skin: tuple[int, int, int]
    hair: tuple[int, int, int]
    background: tuple[int, int, int]
    width: float  # of the head
    eyes: float  # distance of an eye from the middle
    brow: float  # thickness
    style: int  # of the hair, 0..3
    glasses: bool


@dataclasses.dataclass(frozen=True)
class Expression:
    """What a face shows: action units boiled down to numbers that mix linearly."""

    brow_raise: float = 0.0
    brow_tilt: float = 0.0  # 1: inner ends down (anger), -1: inner ends up (sadness)
    brow_skew: float = 0.0  # one brow higher than the other
    eye_open: float = 1.0
    gaze: float = 0.0  # 1 is down
    mouth_curve: float = 0.0  # 1 is a smile
    mouth_open: float = 0.08
    mouth_width: float = 1.0
    mouth_skew: float = 0.0
    teeth: float = 0.0
    nose: float = 0.0  # wrinkles
    drop: float = 0.0  # of the head

    def toward(self, other: Expression, amount: float) -> Expression:
        """This face moved by `amount` (0..1) towards another."""
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Expression(*(a + amount * (b - a) for a, b in zip(mine, theirs, strict=True)))


EXPRESSIONS: dict[str, Expression] = {
    "neutral": Expression(),
    "happy": Expression(brow_raise=0.4, eye_open=0.75, mouth_curve=1.0, mouth_open=0.4, mouth_width=1.35, teeth=1.0),
    "anger": Expression(brow_raise=-0.7, brow_tilt=1.1, eye_open=0.8, mouth_curve=-0.6, mouth_open=0.35, mouth_width=1.15, teeth=1.0),
    "fear": Expression(brow_raise=1.1, brow_tilt=-0.6, eye_open=1.6, mouth_curve=-0.25, mouth_open=0.7, mouth_width=0.75),
    "sad": Expression(brow_raise=0.1, brow_tilt=-1.1, eye_open=0.5, gaze=1.0, mouth_curve=-1.0, mouth_open=0.02, drop=0.1),
    "disgust": Expression(brow_raise=-0.5, brow_tilt=0.5, eye_open=0.4, mouth_curve=-0.5, mouth_open=0.15, mouth_skew=1.0, nose=1.0),
    "flat": Expression(brow_skew=1.0, eye_open=0.4, mouth_curve=0.0, mouth_open=0.02, mouth_width=1.2),
}


def draw_look(rng: np.random.Generator) -> Look:
    """A random person. Skin stays light enough for dark brows and mouth to stand out."""
    tone = rng.uniform(0.62, 1.0)
    return Look(
        skin=_colour(np.array([255, 216, 178]) * tone + rng.normal(0, 5, 3)),
        hair=_colour(rng.uniform(10, 120) * np.array([1.0, 0.75, 0.5]) + rng.normal(0, 8, 3)),
        background=_colour(rng.uniform(60, 230) + rng.normal(0, 25, 3)),
        width=float(rng.uniform(0.68, 0.8)),
        eyes=float(rng.uniform(0.29, 0.35)),
        brow=float(rng.uniform(0.065, 0.1)),
        style=int(rng.integers(4)),
        glasses=bool(rng.random() < 0.2),
    )


def animate(
    look: Look, style: str, loudness: np.ndarray, rng: np.random.Generator, *, late: bool | None = None
) -> tuple[np.ndarray, list[Lines]]:
    """Draws one clip, its mouth driven by `loudness` `[T]` in 0..1.

    `style` names an expression; it rises from neutral in the first frames and stays, unless `late` is given: then it fills only the
    second half of the clip (True) or only the first (False). Returns frames `[T, SIZE, SIZE, 3]` uint8 and the lines
    of each, from which `landmarks` are made.
    """
    count = len(loudness)
    strength = rng.uniform(0.55, 1.1)
    roll, light = rng.normal(0, 5.0), rng.uniform(0.85, 1.1)
    place, drift = rng.normal(0, 0.04, 2), rng.normal(0, 0.01, 2)
    blink = int(rng.integers(count)) if rng.random() < 0.3 else -1
    frames, drawn = [], []
    for t in range(count):
        when = (t + 0.5) / count
        amount = min(1.0, 0.5 + 0.25 * t) if late is None else float(when > 0.55 if late else when < 0.45)
        shown = EXPRESSIONS["neutral"].toward(EXPRESSIONS[style], amount * strength)
        talk = 0.18 * float(loudness[t])
        shown = dataclasses.replace(shown, mouth_open=shown.mouth_open + talk, eye_open=0.1 if t == blink else shown.eye_open)
        shape = _geometry(look, shown)
        angle = np.deg2rad(roll + 2.0 * np.sin(2.2 * np.pi * when))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = place + drift * np.sin(2 * np.pi * when) + [0.0, shown.drop]
        shape = {name: line @ turn.T + offset for name, line in shape.items()}
        picture = np.asarray(_paint(look, shown, shape), np.float32) * light + rng.normal(0, 3.0, (SIZE, SIZE, 1))
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
        drawn.append(shape)
    return np.stack(frames), drawn


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.round(values), 0, 255).astype(int).tolist()
    return red, green, blue


@functools.cache
def _circle(points: int) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _oval(x: float, y: float, rx: float, ry: float, points: int) -> np.ndarray:
    return np.array([x, y]) + np.array([rx, ry]) * _circle(points)


def _geometry(look: Look, e: Expression) -> Lines:
    across = np.linspace(-1, 1, 20)
    shape = {"head": _oval(0, 0.06, look.width, 0.88, 36), "crown": _oval(0, -0.02, look.width + 0.06, 0.94, 36)}
    for side, name in ((-1, "left"), (1, "right")):
        eye = np.array([side * look.eyes, -0.16])
        lid = 0.105 * max(e.eye_open, 0.06)
        shape[f"{name}_eye"] = _oval(eye[0], eye[1], 0.165, lid, 16)
        shape[f"{name}_iris"] = _oval(eye[0], eye[1] + 0.05 * e.gaze, 0.07, min(0.07, lid), 5)
        inward = np.linspace(-0.2, 0.2, 10)  # from the outer to the inner end
        lift = 0.2 + 0.13 * e.brow_raise + (0.14 * e.brow_skew if side > 0 else -0.04 * e.brow_skew)
        height = eye[1] - lift + e.brow_tilt * 0.55 * inward - 0.04 * (1 - (inward / 0.2) ** 2)
        shape[f"{name}_brow"] = np.stack([eye[0] - side * inward, height], axis=1)
    shape["nose"] = np.stack(
        [
            0.07 * np.array([-0.3, -0.5, -0.8, -1.3, -0.6, 0.6, 1.3, 0.8, 0.5, 0.3]),
            np.array([-0.1, 0.0, 0.1, 0.2, 0.24, 0.24, 0.2, 0.1, 0.0, -0.1]),
        ],
        axis=1,
    )
    x = 0.29 * e.mouth_width * across
    middle = 0.5 - 0.2 * e.mouth_curve * (across**2 - 0.5) - 0.09 * e.mouth_skew * across
    gape = 0.24 * e.mouth_open * np.sqrt(np.clip(1 - across**2, 0, 1))
    shape["upper_lip"] = np.stack([x, middle - gape], axis=1)
    shape["lower_lip"] = np.stack([x, middle + gape], axis=1)
    return shape


def _paint(look: Look, e: Expression, shape: Lines) -> Image.Image:
    def pixels(line: np.ndarray) -> list[tuple[float, float]]:
        return [(x, y) for x, y in ((line + 1) * (_DRAWN / 2)).tolist()]

    def thick(amount: float) -> int:
        return max(1, round(amount * _DRAWN / 2))

    image = Image.new("RGB", (_DRAWN, _DRAWN), look.background)
    pen = ImageDraw.Draw(image)
    head, crown = shape["head"], shape["crown"]
    if look.style > 0:
        pen.polygon(pixels(crown), fill=look.hair)
    pen.polygon(pixels(head), fill=look.skin)
    if look.style != 3:  # a fringe, its lower edge above every brow
        pen.polygon(pixels(np.concatenate([crown[20:35], head[32:33] * [0.9, 1.0], head[22:23] * [0.9, 1.0]])), fill=look.hair)
    shade = _colour(np.array(look.skin) * 0.7)
    pen.line(pixels(shape["nose"][3:7]), fill=shade, width=thick(0.04), joint="curve")
    if e.nose > 0.3:
        for side in (-1, 1):
            for k in range(3):
                start = shape["nose"][4] + [0.07 + side * 0.1, -0.16 - 0.09 * k]
                pen.line(pixels(np.stack([start, start + [side * 0.12, -0.05]])), fill=shade, width=thick(0.035))
    for name in ("left", "right"):
        pen.polygon(pixels(shape[f"{name}_eye"]), fill=(250, 250, 250), outline=(30, 20, 20))
        iris = shape[f"{name}_iris"]
        middle, radius = iris.mean(axis=0), np.ptp(iris, axis=0) / 2
        pen.polygon(pixels(_oval(middle[0], middle[1], radius[0], radius[1], 14)), fill=(25, 20, 20))
        pen.line(pixels(shape[f"{name}_brow"]), fill=(25, 18, 15), width=thick(look.brow), joint="curve")
        if look.glasses:
            middle = shape[f"{name}_eye"].mean(axis=0)
            pen.line(pixels(_oval(middle[0], middle[1], 0.23, 0.19, 25)), fill=(60, 60, 70), width=thick(0.025))
    upper, lower = shape["upper_lip"], shape["lower_lip"]
    lips = np.concatenate([upper, lower[::-1]])
    pen.polygon(pixels(lips), fill=(70, 10, 20))
    if e.teeth > 0.4:
        bite = upper + 0.45 * (lower - upper)
        pen.polygon(pixels(np.concatenate([upper, bite[::-1]])), fill=(245, 245, 240))
    pen.line(pixels(np.concatenate([lips, lips[:1]])), fill=(120, 25, 35), width=thick(0.055), joint="curve")
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def landmarks(drawn: list[Lines]) -> np.ndarray:
    """Points `[T, 478, 3]` float32 of a clip's lines: x and y in 0..1 of the picture, z zero."""
    return np.stack([_landmarks(shape) for shape in drawn]).astype(np.float32)


def _landmarks(shape: Lines) -> np.ndarray:
    """478 points, the counts of a face mesh: lines first, skin points between them, the ten of the irises last."""
    lines = ("head", "left_brow", "right_brow", "left_eye", "right_eye", "nose", "upper_lip", "lower_lip")
    drawn = np.concatenate([shape[name] for name in lines])
    irises = np.concatenate([shape["left_iris"], shape["right_iris"]])
    middle = shape["nose"].mean(axis=0)
    missing = 478 - len(drawn) - len(irises)
    spread = (np.arange(missing) + 0.5) / missing
    skin = drawn[np.arange(missing) % len(drawn)] * (1 - 0.6 * spread[:, None]) + middle * 0.6 * spread[:, None]
    flat = (np.concatenate([drawn, skin, irises]) + 1) / 2
    return np.concatenate([flat, np.zeros((478, 1))], axis=1)
