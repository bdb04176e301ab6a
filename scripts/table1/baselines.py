"""Make the baselines of Table 1 that are no editing technique, as results like any other.

    python -m scripts.table1.baselines reconstruction --config configs/config_pnp.yaml
    python -m scripts.table1.baselines rgb_propagation --config configs/config_pnp.yaml
    python -m scripts.table1.baselines patch_propagation --config configs/config_pnp.yaml

`reconstruction` is the clip encoded and decoded by the VAE: what no latent diffusion edit can
flicker less than ("LDM recon."). The two others edit the middle frame alone, by PnP, and bring it
to all frames: `rgb_propagation` its pixels, along the optical flow, and `patch_propagation` its
patches, by PatchMatch guided by that flow. That is the role of "Stylizing Video by Example"
(Jamriska et al. 2019). The config is run_tokenflow_pnp.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import run_tokenflow_pnp as pnp
from tokenflow.cache.source_cache import CLEAN_LATENTS
from tokenflow.diffusion.models import Loader
from tokenflow.diffusion.optical_flow import dis_flow, warp
from tokenflow.diffusion.vae import encode_frames
from tokenflow.editing.config import EditConfig, read_configs
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.run import open_result, save_result
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, command_line, setup_logging

PATCH_RADIUS, GUIDE_WEIGHT = 3, 1.0  # of patch_propagation: patches of 7x7 pixels


def reconstruction(
    config: pnp.PnPConfig, overwrite: bool = False, load: Loader | None = None
) -> Path:
    """The result whose frames are the VAE's reconstruction; returns its folder."""
    inputs = open_edit_inputs(config)
    with open_result("reconstruction", inputs, overwrite) as (folder, work):
        if work is not None:
            session = EditSession(inputs, load=load, work=work)
            latents = session.latents(CLEAN_LATENTS)
            save_result("reconstruction", session, session.decode(latents), latents)
    return folder


def rgb_propagation(
    config: pnp.PnPConfig, overwrite: bool = False, load: Loader | None = None
) -> Path:
    """The result whose frames are warps of the edited middle frame; returns its folder."""
    return _propagation("rgb_propagation", propagate_rgb, config, overwrite, load)


def patch_propagation(
    config: pnp.PnPConfig, overwrite: bool = False, load: Loader | None = None
) -> Path:
    """The result whose frames are of patches of the edited middle frame; returns its folder.

    Raises:
        UserError: PyPatchMatch is not installed.
    """
    if not has_patch_match():
        raise UserError(
            "patch_propagation needs PyPatchMatch: python -m pip install -r "
            "requirements-optional.txt (Python 3.11 or newer)"
        )
    return _propagation("patch_propagation", propagate_patches, config, overwrite, load)


def has_patch_match() -> bool:
    """Whether PyPatchMatch is installed."""
    return find_spec("patchmatch") is not None


def _propagation(
    name: str,
    propagate: Callable[[np.ndarray, np.ndarray, int], np.ndarray],
    config: pnp.PnPConfig,
    overwrite: bool,
    load: Loader | None,
) -> Path:
    inputs = open_edit_inputs(config)
    per_frame = pnp.edit(config.model_copy(update={"consistency": "none"}), overwrite, load)
    with open_result(name, inputs, overwrite) as (folder, work):
        if work is not None:
            session = EditSession(inputs, load=load, work=work)
            middle = inputs.n_frames // 2
            size = session.frames.shape[1:3]  # whatever output_size is
            keyframe = load_frames(per_frame / "frames", middle + 1, size)[middle]
            with session.watch("edit"):
                frames = propagate(keyframe, session.frames, middle)
            for stage in ("edit", "decode"):  # the keyframe's edit, which was of all frames
                session.watch.add(stage, load_yaml(per_frame / "run.yaml")["seconds"][stage])
            # No latents were edited: those of the frames stand in their place.
            latents = encode_frames(session.models, frames, session.chunk_size)
            save_result(name, session, frames, latents)
    return folder


def propagate_rgb(keyframe: np.ndarray, source: np.ndarray, number: int) -> np.ndarray:
    """Bring a keyframe's pixels to all frames along the source's optical flow.

    The flows of consecutive frames are chained, and the keyframe is sampled once: warping each
    frame from its neighbour would blur it more with every step.

    Args:
        keyframe: (H, W, 3) uint8, the edited frame.
        source: (n, H, W, 3) uint8.
        number: of the keyframe in the source.

    Returns:
        (n, H, W, 3) uint8; the keyframe itself at its number.
    """
    frames = np.empty_like(source)
    frames[number] = keyframe
    for i, flow in flows_to(number, source):
        frames[i] = warp(keyframe, flow).round()
    return frames


def flows_to(number: int, source: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    """For each other frame its number and its flow to frame `number`, (2, H, W) in pixels."""
    for step, numbers in ((1, range(number + 1, len(source))), (-1, range(number - 1, -1, -1))):
        chained = torch.zeros(2, *source.shape[1:3])
        for i in numbers:
            flow = dis_flow(source[i], source[i - step])
            further = torch.from_numpy(warp(chained.permute(1, 2, 0).numpy(), flow))
            chained = flow + further.permute(2, 0, 1)
            yield i, chained


def propagate_patches(keyframe: np.ndarray, source: np.ndarray, number: int) -> np.ndarray:
    """Put all frames together from a keyframe's patches, each near where the flow leads.

    PyPatchMatch fills holes in one picture: here the right half of one whose left half is the
    keyframe. Its map of coordinates, which patches are also compared by, has the places in the
    keyframe on the left, and on the right where the source's optical flow leads: the positional
    guide of "Stylizing Video by Example".

    Args and returns: as `propagate_rgb`'s.
    """
    import patchmatch

    frames = np.empty_like(source)
    frames[number] = keyframe
    height, width = keyframe.shape[:2]
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    hole = np.repeat([[0, 1]], width, axis=1).astype(np.uint8).repeat(height, axis=0)
    picture = np.concatenate([keyframe, np.zeros_like(keyframe)], axis=1)
    for i, flow in flows_to(number, source):
        both = torch.cat([places, places + flow.flip(0)], dim=2) / max(height, width)
        guide = torch.cat([both, torch.zeros_like(both[:1])]).permute(1, 2, 0).contiguous()
        patchmatch.set_random_seed(i)
        filled = patchmatch.inpaint_regularity(
            picture, hole, guide.numpy(), patch_size=PATCH_RADIUS, guide_weight=GUIDE_WEIGHT
        )
        frames[i] = filled[:, width:]
    return frames


BASELINES = {
    "reconstruction": reconstruction,
    "rgb_propagation": rgb_propagation,
    "patch_propagation": patch_propagation,
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the script; returns the result's folder."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        rest = [name]
    elif name not in BASELINES:
        raise UserError(f"expected {' or '.join(BASELINES)} as the first word, got {name!r}")
    about = __doc__.splitlines()[0]
    return edit_all(pnp.PnPConfig, rest, pnp.TECHNIQUE.name, about, BASELINES[name])


def edit_all(
    config: type[EditConfig],
    argv: Sequence[str] | None,
    name: str,
    about: str,
    edit: Callable[[EditConfig, bool], Path],
) -> Path:
    """Runs a baseline's script: edits by each configuration of its command line.

    Args:
        config, argv, name, about: as `read_configs`'s.
        edit: makes a result from a configuration and --overwrite.

    Returns:
        the result's folder, of several prompts the last one's.
    """
    setup_logging()
    configs, overwrite = read_configs(config, argv, name, about)
    for each in configs:
        folder = edit(each, overwrite)
        print(f"result: {folder}", flush=True)
    return folder


if __name__ == "__main__":
    command_line(main)
