"""The world that the small model is trained on: pictures and clips drawn from parameters.

A scene is one or two objects in a named colour and fill before a background of a named colour; its
caption says all of it: "a striped red star on a blue background". Over a clip's time the objects
travel, turn and grow, and the camera pans the background. Whatever a point of the scene looks like
it keeps (light and texture move along with it), so that the ground truth is exact: object masks,
dense optical flow between any two times, and what is occluded between them.

The scenes of world2.py have more to tell places apart by: a textured background ("on blue
bricks"), a nearer part of it, which the camera passes faster, and light that changes over time (the
one thing that a point does not keep).

Lengths are in units of a frame's short side, angles in radians, places (y, x); one seed gives one
scene, at any size and number of frames.

    python -m scripts.shapes.world clip.mp4 --seed 7    # writes a clip, prints its caption
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from scripts.shapes import textures
from tokenflow.storage.images import MAX_PIXELS
from tokenflow.storage.video import MAX_FPS, save_video
from util import ArgumentParser, UserError, at_least, check_writable, command_line

SHAPES = ("circle", "square", "triangle", "star", "ring")
FILLS = ("plain", "striped", "dotted", "checkered")
HUES = {  # RGB, of an object's colour
    "red": (0.90, 0.14, 0.12),
    "yellow": (0.95, 0.80, 0.10),
    "green": (0.18, 0.72, 0.15),
    "teal": (0.08, 0.74, 0.72),
    "blue": (0.15, 0.28, 0.92),
    "purple": (0.66, 0.18, 0.82),
}
COLORS = tuple(HUES)
BACKGROUNDS = (*COLORS, "gray")

TINT = 0.62  # how far towards white the second tone of a fill is
MUTED = 0.55  # how far towards its grey a background's colour is
TWO_OBJECTS = 0.15  # share of scenes with two
N_WAVES = 6  # of a background's texture
REACH = 1.03  # of the farthest point of a shape, a square's corner, in radii
NEAR = 255  # the number of the nearer background among the layers; its mask is 0

# The clips in data/, SAMPLE_FRAMES of 256x256 each: seed and number of objects of their scenes.
SAMPLE_FRAMES = 16
SAMPLES = {"star": (2_000_024, 1), "ring": (2_000_035, 1), "two": (2_000_041, 2)}


@dataclass(frozen=True)
class ShapeObject:
    """One object at time 0, and how it moves until time 1."""

    shape: str
    fill: str
    color: str
    rgb: tuple[float, float, float]
    center: tuple[float, float]  # from the frame's centre
    radius: float
    angle: float
    travel: tuple[float, float] = (0.0, 0.0)
    turn: float = 0.0  # of the angle
    growth: float = 0.0  # logarithm of the scale

    def pose(self, time: float) -> tuple[np.ndarray, float, float]:
        """Centre (2,), radius and angle at a time in [0, 1]."""
        center = np.add(self.center, np.multiply(self.travel, time))
        return center, self.radius * math.exp(self.growth * time), self.angle + self.turn * time


@dataclass(frozen=True)
class Ridge:
    """A nearer part of a textured background: all below an uneven edge."""

    top: float  # of the edge in the mean, from the frame's centre
    waves: tuple[tuple[float, float, float], ...]  # of the edge: frequency, phase, amplitude
    nearness: float  # its travel by that of the background behind it; and the cells' sizes
    shade: float  # its brightness by that of the background behind it

    def below(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """How far below its edge places of its own plane are."""
        edge = np.full_like(y, self.top)
        for frequency, phase, amplitude in self.waves:
            edge += amplitude * np.sin(np.float32(2 * np.pi * frequency) * x + phase)
        return y - edge


@dataclass(frozen=True)
class Scene:
    """Everything about a picture or clip but its size; later objects hide earlier ones."""

    objects: tuple[ShapeObject, ...]
    background: str
    background_rgb: tuple[float, float, float]
    texture: tuple[tuple[float, ...], ...]  # waves: frequency y and x, phase, amplitude
    pan: tuple[float, float]  # travel of the background
    surface: str = ""  # one of textures.TEXTURES; "" is the soft texture alone
    cells: tuple[float, int, float] = (0.0, 0, 0.0)  # of the surface: size, seed, contrast
    ridge: Ridge | None = None
    light: tuple[float, float, float] = (0.0, 0.0, 0.0)  # over time: amplitude, frequency, phase

    @property
    def caption(self) -> str:
        """What is to be seen, in the words that the model is trained on."""
        things = [(thing.fill, thing.color, thing.shape) for thing in self.objects]
        return caption_of(things, self.background, self.surface)

    def brightness(self, time: float) -> float:
        """The light on everything at a time in [0, 1]; 1 is that of colours as they are named."""
        amplitude, frequency, phase = self.light
        return 1 + amplitude * math.sin(2 * math.pi * frequency * time + phase)


def caption_of(things: Sequence[tuple[str, str, str]], background: str, surface: str = "") -> str:
    """The caption of objects, each a (fill, colour, shape), on a background of a colour.

    Args:
        surface: what the background is made of, one of textures.TEXTURES; "" for none of them.
    """
    names = " and ".join(f"a {' '.join(words)}" for words in things).replace("a plain ", "a ")
    ground = f"{background} {surface}" if surface else f"a {background} background"
    return f"{names} on {ground}"


def recolored(scene: Scene, color: str) -> str:
    """The caption of a scene with its first object of another colour."""
    thing = scene.objects[0]
    return replace(scene, objects=(replace(thing, color=color), *scene.objects[1:])).caption


def another_color(scene: Scene) -> str:
    """A colour for the first object of a scene, far from its own: red to green, ...

    The next but one in COLORS, or the next after that which neither the background nor another
    object has.
    """
    first = COLORS.index(scene.objects[0].color) + 2
    turned = [*COLORS[first:], *COLORS[:first]]
    taken = {scene.background, *(thing.color for thing in scene.objects)}
    return next(color for color in turned if color not in taken)


@dataclass(frozen=True)
class ShapesClip:
    """Rendered frames with their ground truth.

    frames: (n, H, W, 3) uint8 RGB.
    masks: (n, H, W) uint8; 0 is background, k the k-th object, by the pixel's centre.
    """

    scene: Scene
    times: tuple[float, ...]
    frames: np.ndarray
    masks: np.ndarray

    def flow(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ground-truth `optical_flow` of this clip between two of its frames."""
        return optical_flow(self.scene, self.times[start], self.times[end], self.masks.shape[1:])


# ------------------------------------------------------------------------------ random scenes


def random_scene(seed: int | Sequence[int], n_objects: int | None = None) -> Scene:
    """Draw a scene; the same seed gives the same scene.

    Args:
        seed: of numpy's generator, one number or several.
        n_objects: 1 or 2; None draws it too.
    """
    rng = np.random.default_rng(seed)
    two = rng.random() < TWO_OBJECTS
    if n_objects is not None:
        two = n_objects == 2
    places = [(rng.uniform(-0.08, 0.08), side * rng.uniform(0.20, 0.26)) for side in (-1, 1)]
    if not two:
        places = [tuple(rng.uniform(-0.13, 0.13, 2))]
    background = str(rng.choice(BACKGROUNDS))
    free = [color for color in COLORS if color != background]
    colors = rng.permutation(free)[: len(places)]
    sizes = (0.16, 0.20) if two else (0.22, 0.33)
    objects = tuple(
        random_object(rng, str(color), place, sizes)
        for color, place in zip(colors, places, strict=True)
    )
    hue = np.array(HUES.get(background, (0.5, 0.5, 0.5)))
    rgb = hue + MUTED * (0.45 - hue) + rng.uniform(-0.04, 0.04)
    texture = np.stack(
        [
            *rng.normal(0, 1.3, (2, N_WAVES)),
            rng.uniform(0, 2 * np.pi, N_WAVES),
            rng.normal(0, 0.14 / N_WAVES**0.5, N_WAVES),
        ],
        axis=1,
    )
    pan = tuple(rng.uniform(-0.3, 0.3, 2))
    return Scene(objects, background, tuple(rgb), tuple(map(tuple, texture.tolist())), pan)


def random_object(
    rng: np.random.Generator, color: str, center: tuple[float, float], sizes: tuple[float, float]
) -> ShapeObject:
    radius = rng.uniform(*sizes)
    # To the other side of the frame, so that hardly anything leaves it.
    travel = -np.array(center) * rng.uniform(0.6, 2.0, 2) + rng.uniform(-0.05, 0.05, 2)
    return ShapeObject(
        shape=str(rng.choice(SHAPES)),
        # Plain ones more often: a ring or a small star has little room for a pattern.
        fill=str(rng.choice(FILLS, p=(0.4, 0.2, 0.2, 0.2))),
        color=color,
        rgb=tuple(np.clip(np.array(HUES[color]) + rng.uniform(-0.05, 0.05, 3), 0, 1)),
        center=center,
        radius=radius,
        # Upright give or take: a square on its tip is another shape to the eye.
        angle=rng.uniform(-0.35, 0.35),
        travel=tuple(travel),
        turn=rng.uniform(-0.5, 0.5),
        growth=rng.uniform(-0.2, 0.2),
    )


# ---------------------------------------------------------------------------------- rendering


def render_clip(scene: Scene, n_frames: int, size: int | tuple[int, int]) -> ShapesClip:
    """Draw a scene at evenly spaced times from 0 to 1.

    Args:
        n_frames: at least 1.
        size: the side of square frames, or (height, width); in pixels, at least 16.
    """
    size = (size, size) if isinstance(size, int) else size
    times = tuple(np.linspace(0, 1, n_frames).tolist())
    frames, masks = zip(*(render(scene, time, size) for time in times), strict=True)
    return ShapesClip(scene, times, np.stack(frames), np.stack(masks))


def render(scene: Scene, time: float, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene at one time.

    Args:
        time: 0 at a clip's beginning, 1 at its end.
        size: (height, width) in pixels.

    Returns:
        The frame (H, W, 3) uint8 RGB, and its mask (H, W) uint8 as in `ShapesClip`.
    """
    y, x = _grid(size)
    light = _background_light(scene, time, y, x, 1 / min(size))
    picture = light[..., None] * np.asarray(scene.background_rgb, np.float32)
    mask = np.zeros(size, np.uint8)
    for number, thing in enumerate(scene.objects, start=1):
        center, radius, angle = thing.pose(time)
        # All of it lies within this window, with room for anti-aliasing.
        reach = REACH * radius + 2 / min(size)
        rows = np.flatnonzero(np.abs(y[:, 0] - center[0]) < reach)
        columns = np.flatnonzero(np.abs(x[0] - center[1]) < reach)
        if not len(rows) or not len(columns):
            continue
        window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        v, u = _to_object(y[window] - center[0], x[window] - center[1], radius, angle)
        pixel = 1 / (radius * min(size))  # a pixel in the object's units
        distance = _signed_distance(thing.shape, v, u)
        coverage = np.clip(0.5 - distance / pixel, 0, 1)[..., None]
        colors = _surface(thing, v, u, pixel)
        picture[window] += coverage * (colors - picture[window])
        mask[window][distance < 0] = number
    picture *= np.float32(scene.brightness(time))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8), mask


def _background_light(
    scene: Scene, time: float, y: np.ndarray, x: np.ndarray, pixel: float
) -> np.ndarray:
    """How bright the background is at places of the frame, by its colour; like y, float32."""
    travel = np.multiply(scene.pan, time)
    light = 1 + _texture(scene.texture, y - travel[0], x - travel[1])
    if not scene.surface:
        return light
    cell, seed, contrast = scene.cells

    def tone(seed: int, y: np.ndarray, x: np.ndarray, cell: float) -> np.ndarray:
        return contrast * textures.tone(scene.surface, seed, y / cell, x / cell, pixel / cell)

    light += tone(seed, y - travel[0], x - travel[1], np.float32(cell))
    if scene.ridge:
        y, x = y - scene.ridge.nearness * travel[0], x - scene.ridge.nearness * travel[1]
        y, x = y.astype(np.float32), x.astype(np.float32)
        near = 1 + _texture(scene.texture, x, y)
        near += tone(seed + 1, y, x, np.float32(cell * math.sqrt(scene.ridge.nearness)))
        coverage = np.clip(0.5 + scene.ridge.below(y, x) / pixel, 0, 1)
        light += coverage * (scene.ridge.shade * near - light)
    return light.astype(np.float32)


def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The pixels' centres from the frame's centre, in short sides; two (H, W) float32."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return (y + 0.5 - height / 2) / min(size), (x + 0.5 - width / 2) / min(size)


def _to_object(
    y: np.ndarray, x: np.ndarray, radius: float, angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets from an object's centre in the object's own frame, where its radius is 1."""
    cos, sin = np.float32(math.cos(angle) / radius), np.float32(math.sin(angle) / radius)
    return cos * y - sin * x, sin * y + cos * x


def _texture(waves: Sequence[Sequence[float]], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A sum of plane waves: soft, and without seams wherever the camera pans."""
    total = np.zeros_like(y)
    for frequency_y, frequency_x, phase, amplitude in waves:
        angle = np.float32(2 * np.pi) * (frequency_y * y + frequency_x * x) + phase
        total += amplitude * np.cos(angle)
    return total


def _signed_distance(shape: str, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Distance to a shape's outline in units of its radius, negative inside; within REACH.

    Exact at the outline's straight and round parts, a lower bound elsewhere.
    """
    if shape == "circle":
        return np.hypot(v, u) - 0.9
    if shape == "ring":
        return np.abs(np.hypot(v, u) - 0.68) - 0.26
    if shape == "square":
        return np.maximum(np.abs(v), np.abs(u)) - 0.72
    if shape == "triangle":  # equilateral, tip up
        return np.maximum(v, -0.5 * v + math.sqrt(0.75) * np.abs(u)) - 0.5
    return _star_distance(v, u)


def _star_distance(v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The five-pointed star, tip up: the angle is folded into half a point, which is an edge."""
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(u, -v)  # from the tip
    folded = np.abs((angle + sector / 2) % sector - sector / 2)
    radius = np.hypot(v, u)
    along, across = radius * np.cos(folded), radius * np.sin(folded)
    inner = 0.48  # radius of the inner corners; the tips' is 1
    corner = np.array([inner * math.cos(sector / 2), inner * math.sin(sector / 2)])
    normal = np.array([corner[1], 1 - corner[0]])
    normal /= np.linalg.norm(normal)
    return ((along - 1) * normal[0] + across * normal[1]).astype(np.float32)


def _surface(thing: ShapeObject, v: np.ndarray, u: np.ndarray, pixel: float) -> np.ndarray:
    """The colour of an object's points, (H, W, 3) float32: its fill, and a soft light on it."""
    base = np.asarray(thing.rgb, np.float32)
    tone = np.clip(0.5 - _fill_distance(thing.fill, v, u) / pixel, 0, 1)[..., None]
    colors = base + (TINT * tone) * (1 - base)
    light = 1.06 - 0.14 * (v**2 + u**2)  # brightest in the middle
    return np.minimum(colors * light[..., None], 1)


def _fill_distance(fill: str, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Signed distance to the places of the second tone, negative in them."""
    if fill == "plain":
        return np.ones_like(v)
    if fill == "striped":
        return _band(u, 0.6)
    if fill == "dotted":
        period = 0.58
        return np.hypot(_fold(v, period), _fold(u, period)) - 0.19
    rows, columns = _band(v, 0.8), _band(u, 0.8)  # checkered: in one band, but not in both
    return np.where(rows * columns > 0, 1, -1) * np.minimum(np.abs(rows), np.abs(columns))


def _band(x: np.ndarray, period: float) -> np.ndarray:
    """Signed distance to bands of half a period, with an edge at 0."""
    return np.abs(_fold(x - period / 4, period)) - period / 4


def _fold(x: np.ndarray, period: float) -> np.ndarray:
    """x less the nearest multiple of the period."""
    return (x + period / 2) % period - period / 2


# ------------------------------------------------------------------------------- ground truth


def optical_flow(
    scene: Scene, start: float, end: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of one time is at another.

    Args:
        start, end: times in [0, 1].
        size: (height, width) in pixels.

    Returns:
        flow: (H, W, 2) float32, (dx, dy) in pixels, as OpenCV's flows are.
        visible: (H, W) bool; False where the point is outside the frame or hidden at `end`.
    """
    y, x = _grid(size)
    layer = _layer_at(scene, start, y, x)
    travel = np.multiply(scene.pan, end - start).astype(np.float32)
    new_y, new_x = y + travel[0], x + travel[1]
    if scene.ridge:
        near = layer == NEAR
        new_y[near] += (scene.ridge.nearness - 1) * travel[0]
        new_x[near] += (scene.ridge.nearness - 1) * travel[1]
    for number, thing in enumerate(scene.objects, start=1):
        here = layer == number
        center, radius, angle = thing.pose(start)
        new_center, new_radius, new_angle = thing.pose(end)
        offset = y[here] - center[0], x[here] - center[1]
        v, u = _to_object(*offset, radius / new_radius, angle - new_angle)
        new_y[here], new_x[here] = new_center[0] + v, new_center[1] + u
    half_height, half_width = (side / (2 * min(size)) for side in size)
    inside = (np.abs(new_y) < half_height) & (np.abs(new_x) < half_width)
    visible = inside & (_layer_at(scene, end, new_y, new_x) == layer)
    flow = np.stack([new_x - x, new_y - y], axis=-1) * min(size)
    return flow.astype(np.float32), visible


def _layer_at(scene: Scene, time: float, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Which object is on top at each place, 0 for the background, NEAR for its nearer part; like
    y, uint8.
    """
    layer = np.zeros(y.shape, np.uint8)
    if scene.ridge:
        travel = scene.ridge.nearness * time * np.asarray(scene.pan, np.float32)
        layer[scene.ridge.below(y - travel[0], x - travel[1]) > 0] = NEAR
    for number, thing in enumerate(scene.objects, start=1):
        center, radius, angle = thing.pose(time)
        v, u = _to_object(y - center[0], x - center[1], radius, angle)
        within = np.maximum(np.abs(v), np.abs(u)) < REACH
        layer[within & (_signed_distance(thing.shape, v, u) < 0)] = number
    return layer


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("path", metavar="OUT.mp4", type=Path, help="video to write")
    add("--seed", type=at_least(0), default=0)
    add("--objects", type=int, choices=(1, 2), help="(default: drawn too)")
    add("--frames", type=at_least(1), default=SAMPLE_FRAMES)
    add("--size", type=at_least(16), default=256, help="height and width, even")
    add("--fps", type=at_least(1, MAX_FPS), default=10)
    args = parser.parse_args(argv)
    if args.size % 2:
        raise UserError(f"--size: video needs an even size, got {args.size}")
    if args.frames * args.size**2 > MAX_PIXELS:
        raise UserError(
            f"--frames, --size: {args.frames} frames of {args.size}x{args.size} are too many; at "
            f"most {MAX_PIXELS // 10**6} megapixels in all"
        )
    if args.path.suffix != ".mp4":
        raise UserError(f"{args.path}: expected a name that ends with .mp4")
    check_writable(args.path.parent, "OUT.mp4")
    scene = random_scene(args.seed, args.objects)
    clip = render_clip(scene, args.frames, args.size)
    save_video(args.path, clip.frames, Fraction(args.fps))
    print(f"{args.path}: {scene.caption}")


if __name__ == "__main__":
    command_line(main)
