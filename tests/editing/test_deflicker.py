"""Deflickering against a loop-written reference, and the direction of its flow."""

import itertools
import math

import numpy as np
import torch

import run_tokenflow_pnp as pnp
from tests.helpers import edit, invert, make_clip, shapes_frames
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion.optical_flow import ALPHA1, ALPHA2, dis_flow
from tokenflow.editing.deflicker import deflicker
from tokenflow.editing.results import read_result
from tokenflow.ops.distributed import ProcessGroup, Shard
from tokenflow.storage.images import load_frames

N, H, W = 5, 6, 9


def bilinear(x):
    return max(0.0, 1 - abs(x))


def bicubic(x, a=-0.75):
    """Keys' kernel (1981), with OpenCV's a."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def look_up(image, y, x, kernel):
    """The border repeated, number by number."""
    (top, left), (height, width), total = (math.floor(y), math.floor(x)), image.shape[:2], 0.0
    for row, column in itertools.product(range(top - 1, top + 3), range(left - 1, left + 3)):
        pixel = image[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
        total = total + kernel(y - row) * kernel(x - column) * pixel.astype(float)
    return total


def reference(frames, flows, radius, scale):
    averaged = np.empty(frames.shape)
    for i, y, x in np.ndindex(frames.shape[:3]):
        own = frames[i, y, x].astype(float)
        total, weights = own.copy(), 1.0
        for j in range(len(frames)):
            if not 0 < abs(j - i) <= radius:
                continue
            dx, dy = flows[i, j][:, y, x].tolist()
            back = look_up(flows[j, i].permute(1, 2, 0).numpy(), y + dy, x + dx, bilinear)
            lengths = dx**2 + dy**2 + (back**2).sum()
            agrees = (dx + back[0]) ** 2 + (dy + back[1]) ** 2 < ALPHA1 * lengths + ALPHA2
            inside = -0.5 < x + dx < W - 0.5 and -0.5 < y + dy < H - 0.5
            if agrees and inside:
                there = look_up(frames[j], y + dy, x + dx, bicubic)
                weight = math.exp(-np.square((own - there) / 255).mean() / scale)
                total, weights = total + weight * there, weights + weight
        averaged[i, y, x] = total / weights
    return averaged


def test_each_frame_is_averaged_along_the_flow():
    """Flows in quarters of a pixel: OpenCV looks images up at 1/32 of one."""
    rng = np.random.default_rng(0)
    source = np.arange(N, dtype=np.uint8)[:, None, None, None] * np.ones((1, H, W, 3), np.uint8)
    frames = rng.integers(90, 160, source.shape, dtype=np.uint8)
    shift = rng.integers(-8, 9, (2, 1, 1)) / 4
    flows = {}
    for i, j in np.ndindex(N, N):  # consistent in most places
        noise = rng.integers(-2, 3, (2, H, W)) / 4
        flows[i, j] = torch.from_numpy((j - i) * shift / 2 + noise).float()
    model = lambda a, b: flows[int(a[0, 0, 0]), int(b[0, 0, 0])]  # noqa: E731
    for radius, scale in ((1, 0.01), (3, 0.05)):
        found = deflicker(frames, source, model, radius, scale)
        expected = reference(frames, flows, radius, scale)
        assert np.abs(found - expected).max() < 0.51  # rounded
        assert np.abs(found - frames.astype(float)).mean() > 3


def test_noise_on_a_moving_clip_is_averaged_away_and_a_wrong_flow_does_not_do_it(monkeypatch):
    rng = np.random.default_rng(0)
    wide = shapes_frames(1, 64, 96)[0]
    clip = np.stack([wide[4 * i : 4 * i + 40, 7 * i : 7 * i + 50] for i in range(6)])
    noisy = (clip + rng.normal(0, 8, clip.shape)).clip(0, 255).round().astype(np.uint8)
    numbered = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones_like(clip)

    def model(sign):
        def flow(a, b):
            frames = int(b[0, 0, 0]) - int(a[0, 0, 0])
            return torch.tensor([-7.0, -4.0])[:, None, None].expand(2, 40, 50) * frames * sign

        return flow

    def error(frames):
        return float(np.abs(frames.astype(float) - clip).mean())

    averaged = deflicker(noisy, numbered, model(1))
    assert error(averaged) < 0.65 * error(noisy)
    assert error(deflicker(noisy, numbered, model(-1))) > 1.3 * error(averaged)
    # What no neighbour shares stays: another colour in one frame, and a clip of one frame.
    changed = noisy.copy()
    changed[2] ^= 128
    strange = deflicker(changed, numbered, model(1))[2]
    assert np.array_equal(strange, changed[2])
    assert np.array_equal(deflicker(noisy[:1], numbered[:1], model(1)), noisy[:1])
    # Of two processes, each averages its own frames.
    monkeypatch.setattr(Shard, "gather", lambda self, x: x)
    groups = [ProcessGroup(rank, 2) for rank in (0, 1)]
    halves = [deflicker(noisy, numbered, model(1), group=group) for group in groups]
    assert np.array_equal(np.concatenate(halves), averaged)


def test_an_edit_is_deflickered_along_its_source_s_flow(tiny_model, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4")
    cache = invert(clip, tmp_path / "latents", tiny_model)
    plain, averaged = (
        read_result(edit(pnp, clip, tiny_model, n_inversion_steps=10, **keys))
        for keys in ({}, {"deflicker": True, "flow_model": "dis"})
    )
    assert averaged.method == "PnP, TokenFlow (deflickered)"
    assert "deflicker" in averaged.run["seconds"].keys() - plain.run["seconds"].keys()
    frames, found = (load_frames(result.folder / "frames") for result in (plain, averaged))
    source = open_cache(cache).frames(len(frames))
    assert np.array_equal(found, deflicker(frames, source, dis_flow))
    assert not np.array_equal(found, frames)
