"""Masked edits: the masks of latents and pixels, and whole edits on the tiny model."""

import shutil
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import run_tokenflow_pnp
import run_tokenflow_sdedit
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig
from tests.helpers import HEIGHT, WIDTH, edit, edit_keys, invert, make_clip, randn, save_masks
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.masks import FEATHER, composite, edited_cells
from tokenflow.editing.results import read_result, result_folder
from tokenflow.storage.images import load_frames
from util import UserError

N_FRAMES = 5


def some_masks(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Masks of a few single pixels, most at the edges of cells."""
    return (randn(n, height, width, seed=seed) > 2.6).numpy()


@pytest.mark.parametrize(("h", "w", "factor"), [(5, 7, 4), (1, 3, 8)])
def test_cells_that_the_mask_touches_are_edited(h, w, factor):
    masks = some_masks(3, h * factor, w * factor)
    found = edited_cells(masks, factor)
    assert found.shape == (3, 1, h, w)
    for i, y, x in product(range(3), range(h), range(w)):
        rows, columns = (slice(k * factor, (k + 1) * factor) for k in (y, x))
        assert found[i, 0, y, x] == masks[i, rows, columns].any()
    assert found.any() and not found.all()


def test_composite_equals_a_loop():
    masks = some_masks(3, 13, 22)
    masks[1] = False
    edited, source = np.random.default_rng(0).integers(0, 256, (2, *masks.shape, 3), np.uint8)
    expected = source.astype(float)
    for i, y, x in np.ndindex(*masks.shape):
        distances = [np.hypot(y - row, x - column) for row, column in np.argwhere(masks[i])]
        weight = max(0.0, 1 - min(distances, default=np.inf) / FEATHER)
        expected[i, y, x] += weight * (edited[i, y, x].astype(float) - source[i, y, x])
    found = composite(edited, source, masks)
    assert found.dtype == np.uint8
    assert np.abs(found - expected).max() <= 0.5 + 1e-3
    assert np.array_equal(found[masks], edited[masks])
    changed = (found != source).any(-1)
    assert (changed & ~masks).any() and not changed[1].any() and not changed.all()


# ---------------------------------------------------------------- whole edits


@pytest.fixture(scope="module")
def keys(tiny_model, tmp_path_factory):
    """What finds a cache of 5 frames, and masks of 6 whose object moves."""
    folder = tmp_path_factory.mktemp("cache")
    invert(make_clip(folder / "clip.mp4", N_FRAMES), folder / "latents", tiny_model)
    masks = np.zeros((N_FRAMES + 1, HEIGHT, WIDTH), np.uint8)
    for i, mask in enumerate(masks):
        mask[8 : 16 + i, 16:24] = 3
    save_masks(folder / "masks" / "clip", masks)
    return edit_keys(folder, tiny_model, mask=str(folder / "masks"))


def edited(script, config):
    session = EditSession(open_edit_inputs(config))
    return session, session.edit_latents(script.plan(session))


@pytest.mark.parametrize(
    ("script", "cls", "changes"),
    [
        (run_tokenflow_pnp, PnPConfig, {}),
        (run_tokenflow_pnp, PnPConfig, {"n_frames": 4, "correspondence": "flow"}),
        (run_tokenflow_pnp, PnPConfig, {"propagation": "released"}),
        (run_tokenflow_pnp, PnPConfig, {"consistency": "none"}),
        (run_tokenflow_sdedit, SDEditConfig, {"noise": "shared", "smooth_steps": 0.5}),
    ],
)
def test_outside_of_the_mask_the_source_is_kept(keys, script, cls, changes):
    session, latents = edited(script, cls(**{**keys, **changes}))
    source, n = session.latents("clean"), len(latents)
    assert n == changes.get("n_frames", N_FRAMES)
    inside = edited_cells(session.inputs.masks, 8).expand_as(source)
    assert torch.equal(latents[~inside], source[~inside])
    assert (latents - source)[inside].abs().mean() > 0.05
    frames = session.decode(latents)
    whole = session.composite(frames)
    masks = session.inputs.masks
    assert masks.sum((1, 2)).tolist() == [8 * (8 + i) for i in range(n)]
    assert np.array_equal(whole[masks], frames[masks])
    assert np.array_equal(whole[:, 32:], session.frames[:, 32:])
    session.inputs = replace(session.inputs, masks=None)
    assert session.composite(frames) is frames


def test_a_mask_of_other_proportions_is_refused(keys, tmp_path):
    save_masks(tmp_path / "tall", np.ones((1, 60, 40), np.uint8))
    mask = str(tmp_path / "tall" / "00000.png")
    with pytest.raises(UserError, match=r"mask: .*00000.png: is of 40x60, the clip of 80x48 or"):
        open_edit_inputs(PnPConfig(**{**keys, "mask": mask}))


def test_a_mask_of_all_changes_nothing(keys, tmp_path):
    save_masks(tmp_path / "all", np.ones((1, HEIGHT, WIDTH), np.uint8))
    one = str(tmp_path / "all" / "00000.png")
    masked = edited(run_tokenflow_pnp, PnPConfig(**{**keys, "mask": one}))[1]
    free = edited(run_tokenflow_pnp, PnPConfig(**{**keys, "mask": None}))[1]
    assert torch.equal(masked, free)
    assert not torch.equal(free, edited(run_tokenflow_pnp, PnPConfig(**keys))[1])


def test_a_result_depends_on_what_its_mask_shows(keys, tmp_path):
    def folder(**changes):
        return result_folder(open_edit_inputs(PnPConfig(**{**keys, **changes})), "pnp")

    copied = shutil.copytree(keys["mask"], tmp_path / "copied")
    assert folder(mask=str(copied)) == folder()
    save_masks(tmp_path / "other", np.ones((N_FRAMES, HEIGHT, WIDTH), np.uint8))
    other = str(tmp_path / "other")
    assert len({folder(), folder(composite=False), folder(mask=other), folder(mask=None)}) == 4
    assert folder(mask=None, composite=False) == folder(mask=None)


def test_a_masked_result_is_written_whole(keys, tiny_model, tmp_path):
    """By the run script, with a picture as the mask; the frames are the composite."""
    clip = make_clip(tmp_path / "clip.mp4", N_FRAMES)
    shutil.copytree(keys["latents_path"], tmp_path / "latents")
    save_masks(tmp_path / "mask", np.pad(np.ones((1, 8, 8), np.uint8), [(0, 0), (0, 40), (0, 72)]))
    mask = str(tmp_path / "mask" / "00000.png")
    folder = edit(run_tokenflow_pnp, clip, tiny_model, mask=mask)
    result = read_result(folder)
    assert result.method == "PnP, TokenFlow (masked)"
    source, frames = result.cache().frames(N_FRAMES), load_frames(folder / "frames")
    assert np.array_equal(frames[:, 20:], source[:, 20:])
    assert (frames[:, :8, :8] != source[:, :8, :8]).any(axis=(1, 2, 3)).all()
    decoded = load_frames(
        edit(run_tokenflow_pnp, clip, tiny_model, mask=mask, composite=False) / "frames"
    )
    assert np.array_equal(decoded[:, :8, :8], frames[:, :8, :8])
    assert not np.array_equal(decoded[:, 20:], source[:, 20:])
