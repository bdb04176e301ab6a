"""benchmark.py --simulate: the GPU memory of preprocess and edits, without a GPU."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

import torch

from tokenflow.benchmarks.modes import table
from tokenflow.benchmarks.options import Options
from tokenflow.benchmarks.runs import Bench
from tokenflow.cache.inputs import PreprocessInputs, open_preprocess_inputs
from tokenflow.cache.simulation import SimulatedCache, simulated_preprocess
from tokenflow.diffusion.adapters import NO_ADAPTERS
from tokenflow.editing.inputs import EditInputs
from tokenflow.editing.simulation import simulated_edit
from tokenflow.editing.techniques import load_technique

log = logging.getLogger("tokenflow")

GIB = 1 << 30
TOTAL_GIB = 80  # of the simulated GPU, unless --memory_limit says less
# Columns: the technique, and whether it reads the cache's features.
EDITS = {"pnp, cached": True, "pnp, live": False, "controlnet": False}


def simulate(options: Options, args: argparse.Namespace) -> tuple[dict, str]:
    """A row for each number of frames: the peak of each stage in GiB, weights included.

    Args:
        args: frames, the numbers; set and preprocess_options.
    """
    total = int((options.memory_limit or TOTAL_GIB) * GIB)
    dtype = "float16" if options.dtype == "auto" else options.dtype  # as on a GPU
    one = options.model_copy(update={"frames": 1, "device": "cpu", "dtype": dtype})
    bench = Bench(one, args.set, args.preprocess_options, weights=False)
    inputs, rows = open_preprocess_inputs(bench.cache), []
    for frames in args.frames:
        row: dict = {"frames": frames, **simulated_preprocess(_longer(inputs, frames), total)}
        for name, cached in EDITS.items():
            technique, config = name.partition(",")[0], {"n_frames": frames}
            if technique == "controlnet":
                config["controlnet_key"] = str(bench.checkpoint / "controlnet")
            bench.technique = load_technique(technique)
            edit = EditInputs(
                config=bench.edit_config().model_copy(update=config),
                cache=SimulatedCache(inputs.folder, _longer(inputs, frames).manifest),
                n_frames=frames,
                checkpoint=bench.checkpoint,
                adapters=NO_ADAPTERS,
                timesteps=inputs.timesteps.sampling,
                device=torch.device("cpu"),
                dtype=inputs.dtype,
            )
            peaks = simulated_edit(bench.technique, edit, cached)
            row[name] = peaks["edit"]
            row.setdefault("decode", peaks["decode"])  # of PnP: without a ControlNet's weights
        log.info("%d frames: done", frames)
        rows.append({key: x if key == "frames" else x / GIB for key, x in row.items()})
    return {"rows": rows, "total_gib": total / GIB}, table(rows)


def _longer(inputs: PreprocessInputs, frames: int) -> PreprocessInputs:
    """Inputs for that many frames, of which none were read."""
    features = inputs.features and inputs.features.model_copy(update={"n_frames": frames})
    manifest = inputs.manifest.model_copy(update={"n_frames": frames})
    return replace(inputs, manifest=manifest, features=features)
