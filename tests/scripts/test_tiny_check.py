"""The script that measures the small model: what it asks for and how it reports."""

import re

import pytest

from scripts.shapes.world import COLORS, another_color, random_scene, recolored
from scripts.tiny_model import check as check_tiny
from util import UserError

PICTURES = {
    "color_accuracy": 1.0,
    "shape_accuracy": 0.9,
    "background_accuracy": 0.95,
    "fill_accuracy": 0.5,
    "measurement": {"shape_accuracy": 0.99},
    "judge": {"fill_accuracy": 0.98, "shape_accuracy": 0.97},
}
FIGURES = {
    **PICTURES,
    "world2": PICTURES | {"surface_accuracy": 0.85},
    "two_objects": {"accuracy": 0.83, "measurement": 0.96},
    "vae_psnr": 33.0,
    "inversion_vae_psnr": 32.0,
    "inversion_psnr": 30.0,
    "inversion_iters_5_psnr": 31.9,
    "edit_color_success": 1.0,
    "background_psnr": 25.0,
    "accuracy_frames": 4,
    "accuracy_steps": 50,
}


def test_only_the_colour_of_the_object_is_replaced():
    """Not the letters "red" of "checkered", and not the background."""
    fills = set()
    for seed in range(100):
        scene = random_scene(seed, n_objects=1)
        thing, target = scene.objects[0], another_color(scene)
        fills.add((thing.fill, thing.color))
        assert target in COLORS and target not in (thing.color, scene.background)
        words, asked = scene.caption.split(), recolored(scene, target).split()
        assert [(a, b) for a, b in zip(words, asked, strict=True) if a != b] == [
            (thing.color, target)
        ]
    assert ("checkered", "red") in fills


def test_the_clips_means():
    clips = [
        {"seed": 1, "caption": "a", "vae_psnr": 30.0, "warp_error": {"vae": 1.0, "per_frame": 4.0}},
        {"seed": 2, "caption": "b", "vae_psnr": 32.0, "warp_error": {"vae": 2.0, "per_frame": 8.0}},
    ]
    assert check_tiny.summary(clips) == {
        "vae_psnr": 31.0,
        "warp_error": {"vae": 1.5, "per_frame": 6.0},
    }


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        ((0.3, 1.0, 2.0, 3.0, 4.0), "holds"),
        ((0.3, 2.0, 1.0, 3.0, 4.0), "does not hold, but vae < fixed keyframes < tokenflow < ext"),
    ],
)
def test_the_table_says_whether_the_papers_order_holds(errors, verdict):
    warp_error = dict(zip(check_tiny.ORDER, errors, strict=True))
    table = check_tiny.table(FIGURES | {"warp_error": warp_error})
    assert f"per frame: {verdict}" in table
    assert re.search(r"inversion, 50 steps +30.00 dB  >= 29.00 dB", table)
    assert re.search(r"the measurement on ground truth: shape +99.0 %", table)
    assert re.search(r"the judge on ground truth: fill +98.0 %", table)
    assert re.search(r"the judge on ground truth: shape +97.0 %  >= 90 %", table)
    assert re.search(r"text to image: shape +90.0 %  >= 90 %", table)
    assert re.search(r"text to image, world 2: surface +85.0 %", table)
    assert re.search(r"two objects, not mixed up +83.0 %  >= 80 %", table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "999999"], "--seed: expected at least 1000000"),  # scenes of the training
        (["--clips", "0"], "--clips: expected at least 1"),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        check_tiny.main(options)
