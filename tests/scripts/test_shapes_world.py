"""The world of shapes: its pictures and captions, and the ground truth that comes with them."""

import math
from fractions import Fraction

import cv2
import numpy as np
import pytest

from scripts.shapes import world as shapes_world
from scripts.shapes.world import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    HUES,
    N_WAVES,
    SHAPES,
    Scene,
    ShapeObject,
    optical_flow,
    random_scene,
    render,
    render_clip,
)
from tests.helpers import video_facts
from tokenflow.storage.video import read_clip
from util import UserError

SIZE = 64
FLAT = np.zeros((N_WAVES, 4), np.float32)
# Soft waves in several directions, so that no place of a background looks like another.
WAVY = np.array([[(-1) ** k * 0.5 * k, 0.4 + 0.3 * k, k, 0.07] for k in range(N_WAVES)], np.float32)
# From the frame's centre, where four pixels meet, to the centre of the pixel (32, 32).
HALF_PIXEL = (0.5 / SIZE, 0.5 / SIZE)


def a_thing(**changes: object) -> ShapeObject:
    """A plain red circle in the middle of the frame that does not move, but for the changes."""
    values = {"shape": "circle", "fill": "plain", "color": "red", "rgb": HUES["red"]}
    values |= {"center": (0.0, 0.0), "radius": 0.25, "angle": 0.0}
    return ShapeObject(**(values | changes))


def a_scene(*objects, rgb=(0.4, 0.4, 0.4), texture=FLAT, pan=(0.0, 0.0)):
    return Scene(objects, "gray", rgb, texture, pan)


def polar(radii: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Points (v, u) at angles from straight up, clockwise; (k, 2)."""
    return np.stack([-radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def outlines(shape: str) -> list[np.ndarray]:
    """A shape as polygons of points (v, u) where its radius is 1; the second is a hole."""
    if shape in ("circle", "ring"):
        turn = np.linspace(0, 2 * np.pi, 720, endpoint=False)
        radii = {"circle": (0.9,), "ring": (0.94, 0.42)}[shape]
        return [polar(np.full(720, radius), turn) for radius in radii]
    corners = {"square": 4, "triangle": 3, "star": 10}[shape]
    turn = np.arange(corners) * 2 * np.pi / corners
    if shape == "square":
        return [polar(np.full(4, 0.72 * 2**0.5), turn + np.pi / 4)]
    return [polar(np.where(np.arange(corners) % 2 & (shape == "star"), 0.48, 1.0), turn)]


def distances(thing: ShapeObject, time: float, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's distance from each pixel's centre to the posed outlines, in pixels, positive inside.

    Independent of the code under test, but for the names of the shapes: (H, W).
    """
    height, width = size
    radius = thing.radius * math.exp(thing.growth * time)
    angle = thing.angle + thing.turn * time
    center = [c + t * time for c, t in zip(thing.center, thing.travel, strict=True)]
    found = []
    for points in outlines(thing.shape):
        v, u = points.T
        y = center[0] + radius * (math.cos(angle) * v + math.sin(angle) * u)
        x = center[1] + radius * (math.cos(angle) * u - math.sin(angle) * v)
        pixels = np.stack([x, y], axis=1) * min(size) + (width / 2 - 0.5, height / 2 - 0.5)
        polygon = pixels.astype(np.float32)
        found.append(
            [
                [cv2.pointPolygonTest(polygon, (float(i), float(j)), True) for i in range(width)]
                for j in range(height)
            ]
        )
    body, *holes = np.array(found)
    return np.minimum(body, -holes[0]) if holes else body


def coverage(thing: ShapeObject, size: int, time: float = 0.0) -> np.ndarray:
    """The share of each pixel that hides what is behind: from pictures before black and white."""
    black, white = (
        render(a_scene(thing, rgb=(level,) * 3), time, (size, size))[0][..., 0].astype(float)
        for level in (0.0, 1.0)
    )
    return 1 - (white - black) / 255


def warp(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Fetch for each pixel what the frame shows where the flow leads."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = x + flow[..., 0], y + flow[..., 1]
    return cv2.remap(frame, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def hue_of(rgb: np.ndarray) -> str:
    """The name of the colour whose hue is nearest; gray if there is hardly any."""
    tint = np.asarray(rgb) - np.mean(rgb)
    if np.abs(tint).max() < 0.05:
        return "gray"
    pure = {name: np.array(value) - np.mean(value) for name, value in HUES.items()}
    return max(pure, key=lambda name: tint @ pure[name] / np.linalg.norm(pure[name]))


# ---------------------------------------------------------------- scenes from seeds


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_gives_the_same_scene_at_any_number_of_frames(seed):
    five, nine, other = (render_clip(random_scene(s), n, 32)
                         for s, n in ((seed, 5), (seed, 9), (seed + 1, 5)))  # fmt: skip
    assert five.times == (0, 0.25, 0.5, 0.75, 1)
    assert np.array_equal(five.frames, nine.frames[::2])
    assert np.array_equal(five.masks, nine.masks[::2])
    assert not np.array_equal(nine.frames[0], nine.frames[-1])
    assert np.abs(five.frames.astype(float) - other.frames).mean() > 5
    assert np.array_equal(render_clip(random_scene(seed), 1, 32).frames[0], five.frames[0])


@pytest.mark.parametrize("seed", range(6))
def test_a_scene_looks_the_same_at_another_size(seed):
    scene = random_scene(seed)
    small = render_clip(scene, 2, 64).frames.astype(float)
    large = render_clip(scene, 2, 128).frames.reshape(2, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(small - large).mean() < 0.6
    assert np.abs(small - large).max() < 48  # at corners, where anti-aliasing is approximate
    assert np.abs(small - np.roll(large, 1, axis=2)).mean() > 1.2  # the bound sees one pixel


def test_seeds_draw_every_attribute():
    scenes = [random_scene(seed) for seed in range(300)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.fill for thing in things} == set(FILLS)
    assert {thing.color for thing in things} == set(COLORS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert 0.08 < np.mean([len(scene.objects) == 2 for scene in scenes]) < 0.25


@pytest.mark.parametrize("n_objects", [1, 2])
def test_as_many_objects_as_asked_for_stay_inside_the_frame(n_objects):
    reach = {shape: np.concatenate(outlines(shape)) for shape in SHAPES}
    seen = []
    for seed in range(400):
        scene = random_scene(seed, n_objects)
        assert len(scene.objects) == n_objects
        for thing in scene.objects:
            for time in np.linspace(0, 1, 5):
                center, radius, angle = thing.pose(time)
                v, u = reach[thing.shape].T * radius
                y = center[0] + math.cos(angle) * v + math.sin(angle) * u
                x = center[1] + math.cos(angle) * u - math.sin(angle) * v
                seen.append(max(np.abs(y).max(), np.abs(x).max()))
    assert max(seen) < 0.5
    assert max(seen) > 0.4  # they come near: the bound above is not met by tiny objects


def test_random_objects_differ_in_colour_from_the_background_and_each_other():
    for seed in range(200):
        scene = random_scene(seed, 2)
        names = [scene.background, *(thing.color for thing in scene.objects)]
        assert len(set(names)) == 3
        colors = np.array([scene.background_rgb, *(thing.rgb for thing in scene.objects)])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert np.abs(colors[i] - colors[j]).max() > 0.15, scene.caption


def test_random_pictures_show_the_colours_that_their_captions_name():
    for seed in range(60):
        scene = random_scene(seed)
        frame, mask = render(scene, 0, (48, 48))
        names = [scene.background, *(thing.color for thing in scene.objects)]
        assert set(np.unique(mask)) == set(range(len(names)))
        for number, name in enumerate(names):
            assert hue_of(np.median(frame[mask == number], axis=0) / 255) == name


# ---------------------------------------------------------------- captions


@pytest.mark.parametrize("fill", FILLS)
def test_a_caption_says_every_attribute_but_not_plain(fill):
    caption = a_scene(a_thing(shape="ring", fill=fill, color="teal")).caption
    words = f"{fill} teal" if fill != "plain" else "teal"
    assert caption == f"a {words} ring on a gray background"


def test_a_caption_says_both_objects_in_order():
    first = a_thing(shape="star", fill="dotted", color="yellow")
    second = a_thing(shape="ring", color="blue")
    names = "a dotted yellow star", "a blue ring"
    assert a_scene(first, second).caption == f"{names[0]} and {names[1]} on a gray background"
    assert a_scene(second, first).caption == f"{names[1]} and {names[0]} on a gray background"


# ---------------------------------------------------------------- pictures and masks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(48, 48), (36, 60), (60, 36)])
def test_the_mask_is_the_outline_that_opencv_fills(shape, size):
    motion = {"travel": (0.1, -0.15), "turn": 0.7, "growth": -0.3}
    thing = a_thing(shape=shape, center=(-0.06, 0.08), radius=0.35, angle=-0.2, **motion)
    for time in (0.0, 0.6):
        mask = render(a_scene(thing), time, size)[1]
        distance = distances(thing, time, size)
        clear = np.abs(distance) > 0.01  # the circles are polygons there
        assert clear.mean() > 0.95
        assert np.array_equal(mask[clear] == 1, distance[clear] > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased_and_the_mask_is_where_half_is_covered(shape):
    thing = a_thing(shape=shape, radius=0.35, angle=0.2, center=(0.02, -0.03), rgb=(0.8, 0.0, 0.0))
    covered = coverage(thing, SIZE)
    frame, mask = render(a_scene(thing, rgb=(0.0, 0.2, 0.4)), 0, (SIZE, SIZE))
    partly = (covered > 0.1) & (covered < 0.9)
    # A band about as wide as a pixel along the outline, and nowhere else.
    distance = distances(thing, 0, (SIZE, SIZE))
    inside, outside = distance > 1, distance < -1.3
    assert partly.sum() > 0.5 * (np.abs(distance) < 0.5).sum()
    assert np.abs(distance[partly]).max() < 1.3
    assert covered[inside].min() > 0.99
    assert covered[outside].max() < 0.01
    clear = np.abs(covered - 0.5) > 0.01
    assert np.array_equal(mask[clear] == 1, covered[clear] > 0.5)
    # The object's colour is inside, in a light within 8 % of 1, and the background's outside.
    assert np.all(frame[outside] == (0, 51, 102))
    assert np.all(frame[inside][:, 1:] == 0)
    assert frame[inside][:, 0].min() > 0.92 * 204 - 1
    assert frame[inside][:, 0].max() < 1.08 * 204 + 1


@pytest.mark.parametrize(
    ("fill", "share"), [("plain", 0.0), ("striped", 0.5), ("dotted", 0.441), ("checkered", 0.5)]
)
def test_a_fill_s_second_tone_has_its_share_of_a_square(fill, share):
    """The dots: nine of radius 0.19, less the twelve segments beyond the edges at 0.72."""
    thing = a_thing(shape="square", fill=fill, rgb=(1.0, 0.0, 0.0), radius=0.6)
    frame, mask = render(a_scene(thing), 0, (128, 128))
    second = frame[mask == 1][:, 1] > 128 * shapes_world.TINT
    assert second.mean() == pytest.approx(share, abs=0.015)


def test_stripes_run_from_top_to_bottom_of_an_upright_object():
    thing = a_thing(shape="square", fill="striped", rgb=(1.0, 0.0, 0.0), radius=0.625)
    frame, mask = render(a_scene(thing), 0, (SIZE, SIZE))  # stripes of 12 pixels
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    second = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, 1] > 80
    assert np.array_equal(second, np.broadcast_to(second[:1], second.shape))
    assert second[0].tolist() == np.repeat([False, True] * 3, [5, 12, 12, 12, 12, 5]).tolist()


def test_a_later_object_hides_an_earlier_one():
    below = a_thing(shape="square", radius=0.4)
    above = a_thing(radius=0.2, center=(0.0, 0.2), color="blue", rgb=(0.0, 0.0, 0.9))
    frame, mask = render(a_scene(below, above), 0, (SIZE, SIZE))
    alone = [render(a_scene(thing), 0, (SIZE, SIZE))[1] == 1 for thing in (below, above)]
    assert (alone[0] & alone[1]).sum() > 100
    assert np.array_equal(mask == 2, alone[1])
    assert np.array_equal(mask == 1, alone[0] & ~alone[1])
    assert frame[32, 44].argmax() == 2
    assert frame[32, 20].argmax() == 0


def test_an_object_partly_or_wholly_outside_is_cut_at_the_frame():
    half = render(a_scene(a_thing(center=(0.0, 0.5))), 0, (SIZE, SIZE))[1]
    assert half.mean() == pytest.approx(0.5 * math.pi * (0.9 * 0.25) ** 2, rel=0.03)
    frame, mask = render(a_scene(a_thing(center=(0.0, 0.9))), 0, (SIZE, SIZE))
    assert not mask.any()
    assert np.all(frame == 102)


@pytest.mark.parametrize("size", [(48, 80), (80, 48)])
def test_a_wider_or_higher_frame_shows_more_of_the_same_scene(size):
    scene = random_scene(3)
    clip, square = render_clip(scene, 2, size), render_clip(scene, 2, 48)
    assert clip.frames.shape == (2, *size, 3)
    assert clip.masks.shape == (2, *size)
    top, left = (size[0] - 48) // 2, (size[1] - 48) // 2
    middle = np.s_[:, top : top + 48, left : left + 48]
    assert np.abs(clip.frames[middle].astype(int) - square.frames).max() <= 1
    assert np.array_equal(clip.masks[middle], square.masks)
    # What was not in the square is background that goes on, neither padding nor a seam.
    assert clip.frames.std((1, 2)).min() > 1
    assert not clip.masks[:, 0].any()


# ---------------------------------------------------------------- flow


@pytest.mark.parametrize(
    ("motion", "offset", "expected"),
    [
        (dict(travel=(0.0, 0.25)), (0, 0), (16, 0)),  # to the right is +dx
        (dict(travel=(0.0, 0.25)), (-5, 7), (16, 0)),
        (dict(travel=(-0.125, 0.0)), (0, 0), (0, -8)),  # up is -dy
        (dict(turn=math.pi / 2), (0, 0), (0, 0)),
        (dict(turn=math.pi / 2), (0, 8), (-8, 8)),  # clockwise: right goes down
        (dict(turn=math.pi / 2), (-8, 0), (8, 8)),  # and up goes right
        (dict(turn=math.pi), (3, -5), (10, -6)),
        (dict(growth=math.log(1.5)), (4, -6), (-3, 2)),  # away from the centre
        (dict(growth=-math.log(2)), (4, -6), (3, -2)),
        (dict(travel=(0.125, 0.25), turn=math.pi / 2, growth=math.log(2)), (0, 4), (16 - 4, 8 + 8)),
    ],
)
def test_an_object_flows_as_computed_by_hand(motion, offset, expected):
    thing = a_thing(center=HALF_PIXEL, angle=0.3, **motion)
    # The background's pan is nothing to the object.
    flow, _ = optical_flow(a_scene(thing, pan=(0.2, 0.1)), 0, 1, (SIZE, SIZE))
    assert flow[32 + offset[0], 32 + offset[1]] == pytest.approx(expected, abs=1e-3)


def test_the_length_of_a_flow_is_in_pixels_of_a_frame_that_is_not_square():
    scene = a_scene(a_thing(center=(0.0, -0.4), travel=(0.125, 0.5)), pan=(-0.25, 0.125))
    for size in ((48, 80), (80, 48)):
        flow, visible = optical_flow(scene, 0, 1, size)
        mask = render(scene, 0, size)[1]
        assert flow.shape == (*size, 2)
        assert visible.shape == size
        assert np.abs(flow[mask == 1] - (24, 6)).max() < 1e-3
        assert np.abs(flow[mask == 0] - (6, -12)).max() < 1e-3


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("pair", [(0, 1), (1, 0)])
def test_warping_one_frame_by_the_flow_gives_the_other(seed, pair):
    clip = render_clip(random_scene(seed), 2, 80 if seed % 2 else (64, 96))
    start, end = pair
    flow, visible = clip.flow(start, end)
    source, target = (clip.frames[i].astype(np.float32) for i in (end, start))

    def error(flow: np.ndarray) -> float:
        return np.abs(warp(source, flow) - target)[visible].mean()

    assert visible.mean() > 0.25
    assert np.median(np.abs(warp(source, flow) - target)[visible]) < 1
    assert error(flow) < 5
    assert error(-flow) > 8 * error(flow)
    assert error(flow[..., ::-1]) > 4 * error(flow)  # (dy, dx) is another flow
    assert error(0 * flow) > 4 * error(flow)


# ---------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("shape", ["star", "ring"])
def test_what_a_moving_object_covers_is_not_visible(shape):
    thing = a_thing(shape=shape, center=(0.0, -0.2), travel=(0.05, 0.3), turn=0.5)
    clip = render_clip(a_scene(thing, texture=WAVY), 2, SIZE)
    for start, end in ((0, 1), (1, 0)):
        _, visible = clip.flow(start, end)
        behind = clip.masks[start] == 0
        covered = behind & (clip.masks[end] == 1)
        assert covered.sum() > 100
        assert np.array_equal(~visible[behind], covered[behind])
        assert visible[~behind].all()


def test_what_leaves_the_frame_is_not_visible():
    _, visible = optical_flow(a_scene(pan=(0.25, -0.125)), 0, 1, (48, 80))
    expected = np.zeros((48, 80), bool)
    expected[:36, 6:] = True  # 12 rows leave below and 6 columns at the left
    assert np.array_equal(visible, expected)


def test_an_earlier_object_goes_behind_a_later_one():
    still = a_thing(shape="square", center=(0.0, 0.2), radius=0.2, color="blue")
    moving = a_thing(center=(0.0, -0.2), radius=0.2, travel=(0.0, 0.375))
    size = (SIZE, SIZE)
    alone = render(a_scene(still), 0, size)[1] == 1
    mask = render(a_scene(moving), 0, size)[1] == 1
    # The circle moves by 24 whole pixels.
    arrived = np.roll(mask, 24, axis=1)
    assert (arrived & alone).sum() > 100

    _, behind = optical_flow(a_scene(moving, still), 0, 1, size)
    assert np.array_equal(behind[mask], ~np.roll(alone, -24, axis=1)[mask])
    assert behind[alone].all()

    _, before = optical_flow(a_scene(still, moving), 0, 1, size)
    assert before[mask].all()
    assert np.array_equal(before[alone], ~arrived[alone])


# ---------------------------------------------------------------- the command line


def test_the_command_line_writes_a_clip_and_says_its_caption(tmp_path, capsys):
    path = tmp_path / "folder" / "clip.mp4"
    options = ["--seed=7", "--objects=2", "--frames=3", "--size=48", "--fps=12"]
    shapes_world.main([str(path), *options])
    scene = random_scene(7, 2)
    assert capsys.readouterr().out == f"{path}: {scene.caption}\n"
    assert video_facts(path) == (3, Fraction(12), (48, 48))
    frames = read_clip(path, 3, size=(48, 48)).frames
    # What H.264 leaves of it at half the resolution of colours.
    assert np.abs(frames.astype(float) - render_clip(scene, 3, 48).frames).mean() < 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT.mp4"),
        (["c.mp4", "--frames", "0"], "frames: expected at least 1, got 0"),
        (["c.mp4", "--size", "14"], "size: expected at least 16, got 14"),
        (["c.mp4", "--size", "33"], "--size: video needs an even size, got 33"),
        (["c.mp4", "--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["c.mp4", "--frames", "many"], "--frames: invalid number value: 'many'"),
        (["c.mp4", "--size", "100000"], "--frames, --size: 16 frames of 100000x100000 are too ma"),
        (["c.mp4", "--fps", "1001"], "--fps: expected at least 1 and at most 1000, got 1001"),
        (["c.avi"], "c.avi: expected a name that ends with .mp4"),
    ],
)
def test_bad_options_are_refused(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        shapes_world.main(arguments)
    assert not list(tmp_path.iterdir())
