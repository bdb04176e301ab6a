"""Preprocess and edits by the whole program on a simulated GPU: no two devices meet in it."""

import numpy as np
import pytest

import run_tokenflow_controlnet
import run_tokenflow_pnp
import run_tokenflow_sdedit
from tests.helpers import HEIGHT, WIDTH, edit, invert, make_clip, save_masks
from tokenflow.editing.results import read_result
from tokenflow.ops.simulated_gpu import simulated_gpu

TOTAL = 8 << 30  # bytes
N_FRAMES = 3  # all keyframes
ON_GPU = {"device": "cuda", "dtype": "float16", "n_frames": N_FRAMES, "keyframe_interval": 1}
ON_GPU |= {"pnp_attn_t": 1, "pnp_f_t": 1}  # inject in the one step
SCRIPTS = {
    "pnp": run_tokenflow_pnp,
    "sdedit": run_tokenflow_sdedit,
    "controlnet": run_tokenflow_controlnet,
}


def prepare(folder, model, **options):
    clip = make_clip(folder / "clip.mp4", N_FRAMES)
    options = {"steps": 2, "save_steps": 1, "cache_features": "", **ON_GPU, **options}
    with simulated_gpu(TOTAL):
        invert(clip, folder / "latents", model, **options)
    return clip


@pytest.fixture(scope="module")
def clip(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    mask = np.eye(HEIGHT, WIDTH, dtype=np.uint8)[None]
    save_masks(folder / "masks", mask)
    return prepare(folder, tiny_model, inversion_iters=2, inversion_tol=0.001)


@pytest.mark.parametrize(
    ("technique", "changes"),
    [
        ("pnp", {}),  # of cached features
        ("pnp", {"source_features": "live", "pnp_attn_t": 0, "propagation": "released"}),
        ("pnp", {"keyframes": "fixed", "max_keyframes": 2, "guidance_scale": 1}),
        ("pnp", {"consistency": "extended_attention", "sampler": "dpmpp_2m"}),
        ("pnp", {"consistency": "first_frame", "mask": "masks", "decoder": "temporal"}),
        ("pnp", {"consistency": "none", "deflicker": True, "flow_model": "dis"}),
        ("pnp", {"correspondence": "hybrid", "smooth_steps": 1, "flow_model": "dis"}),
        ("sdedit", {"noise": "warped", "correspondence": "flow", "flow_model": "dis"}),
        ("sdedit", {"noise": "shared", "source_features": "save"}),
        ("controlnet", {"mask": "masks", "chunk_size": 1}),
    ],
)
def test_every_kind_of_edit(clip, tiny_model, tiny_temporal_decoder, technique, changes):
    changes = {"n_inversion_steps": 2, "n_timesteps": 1, "chunk_size": 3, **ON_GPU, **changes}
    if technique != "pnp":
        changes = {key: value for key, value in changes.items() if not key.startswith("pnp_")}
    if "mask" in changes:
        changes["mask"] = str(clip.parent / "masks" / "00000.png")
    if "decoder" in changes:
        changes["decoder_key"] = str(tiny_temporal_decoder)
    if technique == "controlnet":
        changes["controlnet_key"] = str(tiny_model / "controlnet")
    with simulated_gpu(TOTAL) as gpu:
        result = read_result(edit(SCRIPTS[technique], clip, tiny_model, **changes))
    assert 0 < result.run["peak_memory_bytes"] <= gpu.peak and result.run["device"] == "simulated"


@pytest.mark.parametrize("kind", ["depth model", "ControlNet of depth"])
def test_every_condition(tiny_model, tiny_depth_model, tmp_path, kind):
    """The depth estimator and an inversion's ControlNet."""
    options = {"sd_version": "depth", "depth_model": str(tiny_depth_model / "depth_estimator")}
    model = tiny_depth_model
    if kind != "depth model":
        model, options["sd_version"] = tiny_model, "ControlNet"
        options |= {"control": "depth", "controlnet_key": str(tiny_model / "controlnet")}
    clip = prepare(tmp_path, model, **options, save_tokens="all")
    changes = {"n_inversion_steps": 2, "n_timesteps": 1, "sd_version": options["sd_version"]}
    with simulated_gpu(TOTAL):
        edit(run_tokenflow_pnp, clip, model, **ON_GPU, **changes)
