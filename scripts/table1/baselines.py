"""Make the baselines of Table 1 that are no editing technique, as results like any other.

    python -m scripts.table1.baselines reconstruction --config configs/config_pnp.yaml
    python -m scripts.table1.baselines rgb_propagation --config configs/config_pnp.yaml

`reconstruction` is the clip encoded and decoded by the VAE: what no latent diffusion edit can
flicker less than ("LDM recon."). `rgb_propagation` edits the middle frame alone, by PnP, and brings
its pixels to all frames along the optical flow: the role of "Stylizing Video by Example" (Jamriska
et al. 2019), which propagates one edited keyframe too. The config is run_tokenflow_pnp.py's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import run_tokenflow_pnp as pnp
from tokenflow.cache.source_cache import CLEAN_LATENTS
from tokenflow.diffusion.models import Loader
from tokenflow.diffusion.optical_flow import dis_flow, warp
from tokenflow.diffusion.vae import encode_frames
from tokenflow.editing.config import read_configs
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.run import open_result, save_result
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, command_line, setup_logging


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
    inputs = open_edit_inputs(config)
    per_frame = pnp.edit(config.model_copy(update={"consistency": "none"}), overwrite, load)
    with open_result("rgb_propagation", inputs, overwrite) as (folder, work):
        if work is not None:
            session = EditSession(inputs, load=load, work=work)
            middle = inputs.n_frames // 2
            size = session.frames.shape[1:3]  # whatever output_size is
            keyframe = load_frames(per_frame / "frames", middle + 1, size)[middle]
            with session.watch("edit"):
                frames = propagate_rgb(keyframe, session.frames, middle)
            for stage in ("edit", "decode"):  # the keyframe's edit, which was of all frames
                session.watch.add(stage, load_yaml(per_frame / "run.yaml")["seconds"][stage])
            # No latents were edited: those of the frames stand in their place.
            latents = encode_frames(session.models, frames, session.chunk_size)
            save_result("rgb_propagation", session, frames, latents)
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
    for step, numbers in ((1, range(number + 1, len(source))), (-1, range(number - 1, -1, -1))):
        chained = torch.zeros(2, *keyframe.shape[:2])
        for i in numbers:
            flow = dis_flow(source[i], source[i - step])
            further = torch.from_numpy(warp(chained.permute(1, 2, 0).numpy(), flow))
            chained = flow + further.permute(2, 0, 1)
            frames[i] = warp(keyframe, chained).round()
    return frames


BASELINES = {"reconstruction": reconstruction, "rgb_propagation": rgb_propagation}


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the script; returns the result's folder."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(__doc__)
        rest = [name]
    elif name not in BASELINES:
        raise UserError(f"expected {' or '.join(BASELINES)} as the first word, got {name!r}")
    setup_logging()
    configs, overwrite = read_configs(
        pnp.PnPConfig, rest, pnp.TECHNIQUE.name, __doc__.splitlines()[0]
    )
    for config in configs:
        folder = BASELINES[name](config, overwrite)
        print(f"result: {folder}")
    return folder


if __name__ == "__main__":
    command_line(main)
