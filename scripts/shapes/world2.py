"""The second world: scenes that tell methods apart better than those of world.py.

Their backgrounds have a texture that places can be told by (leaves, bricks, stones, waves) and a
nearer part that the camera passes faster, two objects are more frequent and may cross, one behind
the other, and the light changes. Their clips are CLIP_FRAMES long. Rendering and ground truth are
those of world.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scripts.shapes import world
from scripts.shapes.textures import TEXTURES

CLIP_FRAMES = 40
TWO_OBJECTS = 0.4  # share of scenes with two
CROSSING = 0.2  # share of those in which they cross; in the others each keeps to its side
SOFT = 0.1  # share of scenes without a texture


def random_scene(
    seed: int | Sequence[int],
    n_objects: int | None = None,
    crossing: bool | None = None,
    soft: bool | None = None,
) -> world.Scene:
    """Draw a scene; the same seed gives the same scene.

    Args:
        seed: of numpy's generator, one number or several.
        n_objects: 1 or 2; None draws it too.
        crossing: whether two objects cross; None draws it too.
        soft: whether the background has no texture; None draws it too.
    """
    # Another stream than that of world.random_scene, of which this would be a copy in part.
    rng = np.random.default_rng([2, *np.atleast_1d(seed).tolist()])
    two, crosses = rng.random() < TWO_OBJECTS, rng.random() < CROSSING
    two = two if n_objects is None else n_objects == 2
    crosses = crosses if crossing is None else crossing
    background = str(rng.choice(world.BACKGROUNDS))
    colors = rng.permutation([color for color in world.COLORS if color != background])
    objects = _two_objects(rng, colors, crosses) if two else (_one_object(rng, colors[0]),)
    hue = np.array(world.HUES.get(background, (0.5, 0.5, 0.5)))
    rgb = hue + world.MUTED * (0.45 - hue) + rng.uniform(-0.04, 0.04)
    waves = np.stack(
        [
            *rng.normal(0, 1.0, (2, world.N_WAVES)),
            rng.uniform(0, 2 * np.pi, world.N_WAVES),
            rng.normal(0, 0.10 / world.N_WAVES**0.5, world.N_WAVES),
        ],
        axis=1,
    )
    drawn_soft = rng.random() < SOFT
    surface = "" if (drawn_soft if soft is None else soft) else str(rng.choice(TEXTURES))
    side = rng.choice((-1.0, 1.0))
    return world.Scene(
        objects,
        background,
        tuple(rgb.tolist()),
        tuple(map(tuple, waves.tolist())),
        pan=(rng.uniform(-0.06, 0.06), side * rng.uniform(0.08, 0.28)),
        surface=surface,
        cells=(rng.uniform(0.12, 0.18), int(rng.integers(2**16)), rng.uniform(0.14, 0.22)),
        ridge=_ridge(rng) if surface and rng.random() < 0.7 else None,
        light=(rng.uniform(0.04, 0.18), rng.uniform(0.3, 0.9), rng.uniform(0, 2 * np.pi)),
    )


def _ridge(rng: np.random.Generator) -> world.Ridge:
    waves = [(f, rng.uniform(0, 2 * np.pi), rng.uniform(0.01, 0.025) / f) for f in (0.7, 1.6, 3.1)]
    return world.Ridge(
        top=rng.uniform(0.1, 0.3),
        waves=tuple(waves),
        nearness=rng.uniform(1.7, 2.3),
        shade=float(rng.choice((0.72, 1.28))),
    )


def _one_object(rng: np.random.Generator, color: str) -> world.ShapeObject:
    place = tuple(rng.uniform(-0.13, 0.13, 2).tolist())
    return world.random_object(rng, str(color), place, (0.20, 0.30))


def _two_objects(
    rng: np.random.Generator, colors: Sequence[str], crosses: bool
) -> tuple[world.ShapeObject, ...]:
    """The first begins at the left. Who crosses goes to the other's place; else each keeps its
    side, so that most pictures show two objects apart, and most captions name the left one first.
    """
    objects = []
    for side, color in zip((-1, 1), colors, strict=False):
        place = (rng.uniform(-0.10, 0.10), side * rng.uniform(0.23, 0.28))
        thing = world.random_object(rng, str(color), place, (0.15, 0.19))
        across = -2 * place[1] if crosses else side * rng.uniform(-0.04, 0.03)
        travel = (rng.uniform(-0.12, 0.12) - place[0], across)
        objects.append(replace(thing, travel=travel, growth=0.5 * thing.growth))
    return tuple(objects)
