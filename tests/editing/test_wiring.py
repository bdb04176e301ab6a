"""Every option of an edit on a real clip: frames of an odd grid, a short last interval and chunk.

The model is random: these tests show that options run and act together, not what they look like.
"""

import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import run_tokenflow_controlnet
import run_tokenflow_pnp
import run_tokenflow_sdedit
from run_tokenflow_controlnet import ControlNetConfig
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig
from tests.helpers import edit, edit_keys, invert, save_masks, video_facts
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.results import read_result
from tokenflow.storage.images import load_frames

WOLF = Path(__file__).resolve().parents[2] / "../shared/data/wolf.mp4"
pytestmark = pytest.mark.skipif(not WOLF.is_file(), reason="the sample clip is not here")

HEIGHT, WIDTH = 72, 88  # latents of 9x11, and odd sizes in most of the UNet
N_FRAMES = 5  # in intervals of 3 and 2
SCRIPTS = {
    "pnp": (run_tokenflow_pnp, PnPConfig),
    "sdedit": (run_tokenflow_sdedit, SDEditConfig),
    "controlnet": (run_tokenflow_controlnet, ControlNetConfig),
}
BEST = {"preset": "best", "flow_model": "dis", "n_timesteps": 5}


def prepare(folder, model, **options):
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(WOLF, folder / "clip.mp4")
    size = {"H": HEIGHT, "W": WIDTH, "n_frames": N_FRAMES}
    invert(folder / "clip.mp4", folder / "latents", model, **size, **options)
    return folder


@pytest.fixture(scope="module")
def wolf(tiny_model, tmp_path_factory):
    """The clip, its cache, and masks of a square that moves and of one that does not."""
    folder = prepare(tmp_path_factory.mktemp("wolf"), tiny_model, reconstruction="sample")
    masks = np.zeros((N_FRAMES, HEIGHT, WIDTH), np.uint8)
    for i, mask in enumerate(masks):
        mask[24:48, 8 + 4 * i : 32 + 4 * i] = 1
    save_masks(folder / "masks", masks)
    return folder


def latents_of(folder, model, technique, **changes):
    """The session of an edit, and its latents."""
    script, config = SCRIPTS[technique]
    session = EditSession(open_edit_inputs(config(**edit_keys(folder, model, **changes))))
    return session, session.edit_latents(script.plan(session))


@pytest.mark.parametrize(
    ("technique", "changes", "method"),
    [
        ("pnp", BEST, "optical flow and nearest tokens, deflickered, smoothed"),
        (
            "pnp",
            {"correspondence": "flow", "sampler": "dpmpp_2m", "decoder": "temporal"},
            "optical flow, DPM-Solver++, temporal decoder",
        ),
        ("pnp", {"preset": "released", "mask": "masks"}, "released, masked"),
        (
            "sdedit",
            {**BEST, "noise": "warped", "mask": "masks"},
            "optical flow, warped noise, deflickered, smoothed, masked",
        ),
        (
            "sdedit",
            {"noise": "shared", "smooth_steps": 1.0, "mask": "masks/00002.png"},
            "shared noise, smoothed, masked",
        ),
        (
            "controlnet",
            {**BEST, "mask": "masks", "composite": False, "decoder": "temporal"},
            "optical flow, temporal decoder, deflickered, smoothed, masked",
        ),
        (
            "controlnet",
            {"noise": "warped", "correspondence": "hybrid", "sampler": "dpmpp_2m"},
            "optical flow and nearest tokens, warped noise, DPM-Solver++",
        ),
    ],
)
def test_options_act_together(wolf, tiny_model, tiny_temporal_decoder, technique, changes, method):
    changes = {"flow_model": "dis", "chunk_size": 2, **changes}
    if technique == "controlnet":
        changes["controlnet_key"] = str(tiny_model / "controlnet")
    if "mask" in changes:
        changes["mask"] = str(wolf / changes["mask"])
    if "decoder" in changes:
        changes["decoder_key"] = str(tiny_temporal_decoder)
    folder = edit(SCRIPTS[technique][0], wolf / "clip.mp4", tiny_model, **changes)
    result = read_result(folder)
    assert result.method.endswith(f", TokenFlow ({method})")
    assert video_facts(folder / "edited.mp4") == (N_FRAMES, Fraction(20), (HEIGHT, WIDTH))
    frames, source = load_frames(folder / "frames"), result.cache().frames(N_FRAMES)
    assert frames.shape == source.shape
    assert (frames[:, 30:42, 16:24] != source[:, 30:42, 16:24]).any(axis=(1, 2, 3)).all()
    if "mask" in changes:
        kept = frames[:, :, 72:], source[:, :, 72:]  # no mask comes near
        assert np.array_equal(*kept) == changes.get("composite", True)


@pytest.mark.parametrize("technique", SCRIPTS)
def test_a_chunk_size_changes_nothing(wolf, tiny_model, technique):
    changes = {**BEST, "mask": str(wolf / "masks"), "source_features": "live"}
    if technique == "controlnet":
        changes["controlnet_key"] = str(tiny_model / "controlnet")
    results = partial(latents_of, wolf, tiny_model, technique, **changes)
    whole, parts = results(chunk_size=5)[1], results(chunk_size=2)[1]
    assert torch.allclose(parts, whole, atol=1e-4)


@pytest.mark.parametrize(
    ("reconstruction", "source_features", "options", "used"),
    [
        ("full", "auto", {"cache_features": "", "correspondence": "hybrid"}, ["cached", "cached"]),
        ("none", "save", {}, ["live", "cached"]),
    ],
)
def test_an_edit_is_the_same_whoever_computed_its_features(
    wolf, tiny_model, tmp_path, reconstruction, source_features, options, used
):
    """preprocess.py, the first edit for later ones, or each edit for itself."""
    options = {"keyframe_interval": 3, **options, "reconstruction": reconstruction}
    folder, found = prepare(tmp_path, tiny_model, **options), []
    for prompt in ("a robot", "a marble wolf"):
        edits = partial(latents_of, model=tiny_model, technique="pnp", prompt=prompt, **BEST)
        session, latents = edits(folder, source_features=source_features)
        found.append(session.source_features)
        assert torch.allclose(latents, edits(wolf, source_features="live")[1], atol=1e-4)
    assert found == used
    assert (session.cache.folder / "inverted.mp4").exists() == (reconstruction == "full")
