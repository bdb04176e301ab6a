"""What benchmark.py runs: preprocess and edits of one clip by one model, under named settings."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tokenflow.benchmarks.meters import TOTAL, Meter
from tokenflow.benchmarks.options import RANDOM_MODELS, ROOT, Options, read_setting
from tokenflow.benchmarks.three_branch import ThreeBranchSession
from tokenflow.cache.build import build_cache
from tokenflow.cache.options import FEATURE_OPTIONS, PreprocessOptions, arguments, parse_args
from tokenflow.cache.source_cache import FORMAT
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.techniques import EditPlan, load_technique
from tokenflow.storage.schema import load_config
from tokenflow.storage.video import clip_name, read_clip, resolve_clip, save_video, source_sha256
from tokenflow.storage.yaml_files import save_yaml
from util import UserError

log = logging.getLogger("tokenflow")

SOURCE_PROMPT = "a red star on a yellow background"
PROMPT = "a blue star on a yellow background"


# ---------------------------------------------------------------------------------------------
# Runs


class Bench:
    """Preprocess and edits of one clip by one model; writes a random model or a longer clip first.

    Args:
        overrides: key=value of the edit's config.
        more: further words of preprocess.py's command line.
        weights: whether a random model that is written gets weights.

    Raises:
        UserError: naming the option that cannot be met.
    """

    def __init__(
        self,
        options: Options,
        overrides: Sequence[str] = (),
        more: Sequence[str] = (),
        weights: bool = True,
    ) -> None:
        self.options, self.overrides, self.more = options, overrides, more
        self.work = Path(options.work)
        self.technique = load_technique(options.technique)
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device)
        self.checkpoint = model_folder(options.model, self.work, weights)
        self.clip = clip_of(Path(options.data_path), options.frames, self.work)
        height, _, width = options.size.partition("x")
        self.height, self.width = height, width or height
        self.shared = {  # keys of preprocess and of edits
            "model_key": str(self.checkpoint),
            "data_path": str(self.clip),
            "n_frames": options.frames,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        self.cache = self.preprocess_options(options.inversion)

    def load(self) -> StableDiffusion:
        return load_stable_diffusion(self.checkpoint, self.device, self.dtype)

    def preprocess_options(self, name: str) -> PreprocessOptions:
        """preprocess.py's command line for a setting.

        Raises:
            UserError: if there is no such setting, or preprocess.py refuses its options.
        """
        steps = self.options.steps
        kind, setting = read_setting(name, steps)
        if kind == "edit":
            raise UserError(f"{name}: is a setting of an edit, expected one of preprocess")
        own = {"H": self.height, "W": self.width, "inversion_prompt": SOURCE_PROMPT}
        words = arguments({**self.shared, **own, "save_steps": steps}) + setting
        for key, _, value in (override.partition("=") for override in self.overrides):
            key = EditConfig.ALIASES.get(key, key)
            words += [f"--{key}", value] if key in FEATURE_OPTIONS else []
        words += self.more
        # One folder for each set of options: a cache's own name says only the clip and the steps.
        options = json.dumps([words, checkpoint_revision(self.checkpoint), FORMAT])
        digest = hashlib.sha256(options.encode()).hexdigest()[:12]
        return parse_args([*words, "--save_dir", str(self.work / "caches" / digest)])

    def edit_config(self, name: str = "tokenflow") -> EditConfig:
        """The configuration of an edit under a setting, read as a run script reads it."""
        config = {
            **self.shared,
            "latents_path": self.cache.save_dir,
            "output_path": str(self.work / "results"),
            "n_inversion_steps": self.cache.steps,
            "n_timesteps": self.options.steps,
            "prompt": PROMPT,
            "negative_prompt": SOURCE_PROMPT,
        }
        path = self.work / "config.yaml"
        save_yaml(path, config)
        return load_config(self.technique.config, path, [*self.overrides, *read_setting(name)[1]])

    def ensure_cache(self, models: StableDiffusion) -> None:
        """Builds the cache that is edited, unless it exists."""
        build_cache(self.cache, load=lambda *_: models)

    def run(self, part: str, models: StableDiffusion, count_flops: bool = False) -> Meter:
        """All that preprocess.py or a run script does, apart from loading models.

        The stage "rest" is what no other stage times: checks, writing the cache, and checksums.
        """
        meter = Meter(self.device, count_flops)
        start = time.perf_counter()
        with meter.watching(models.unet):
            if part == "preprocess":
                self.build(self.options.inversion, models, meter)
            else:
                config = self.edit_config()
                self.technique.edit(config, overwrite=True, load=lambda *_: models, watch=meter)
        meter.add("rest", time.perf_counter() - start - sum(meter.seconds.values()))
        meter.add_total()
        return meter

    def build(self, name: str, models: StableDiffusion, meter: Meter, **changes: object) -> Path:
        """Builds a setting's cache in any case, with changed options; returns its folder."""
        options = self.preprocess_options(name).model_copy(update=changes)
        shutil.rmtree(options.save_dir, ignore_errors=True)  # of this setting's caches alone
        return build_cache(options, load=lambda *_: models, watch=meter)

    def prepare_edit(self, name: str, models: StableDiffusion) -> tuple[EditSession, EditPlan]:
        """Opens an edit under a setting; it shares the models unless it compiles its own."""
        self.ensure_cache(models)
        inputs = open_edit_inputs(self.edit_config(name))
        self.technique.check(inputs.config, inputs.checkpoint, inputs.cache.has_depth)
        kind = ThreeBranchSession if "three_branch" in name.split("+") else EditSession
        own = self.load() if inputs.config.compile else models
        session = kind(inputs, load=lambda *_: own)
        return session, self.technique.plan(session)

    def time_preprocess(self, name: str, models: StableDiffusion) -> tuple[Meter, Path]:
        """Times inversion and reconstruction of latents, without the VAE, reading and writing.

        Returns:
            a meter whose TOTAL is of these two, and the cache's folder.
        """
        meter = Meter(self.device)
        with meter.watching(models.unet):
            folder = self.build(name, models, meter, cache_features=False)
        meter.add_total("inversion", "reconstruction")
        return meter, folder


def time_edit(name: str, session: EditSession, plan: EditPlan) -> tuple[Meter, Tensor]:
    """Times a prepared edit's denoising loop, as the stage TOTAL; also returns its latents.

    Raises:
        UserError: if the setting is `cached`, and the cached features did not serve it.
    """
    meter = Meter(session.models.device)
    with meter.watching(session.models.unet), meter(TOTAL):
        latents = session.edit_latents(plan)
    if "cached" in name.split("+") and session.source_features != "cached":
        raise UserError(f"{name}: the edit was computed live; the log says why")
    return meter, latents


# ---------------------------------------------------------------------------------------------
# What is run on


def model_folder(name: str, work: Path, weights: bool = True) -> Path:
    """The checkpoint of `--model`: a folder, one of the table, or a random one that is written.

    Args:
        weights: False: a random one has none, and a ControlNet in its folder.
    """
    if name in RANDOM_MODELS:
        folder = work / "models" / (name if weights else f"{name}-without-weights")
        if not (folder / "model_index.json").is_file():
            log.info("writing %s to %s", name, folder)
            # In a process of its own, whose memory is not this one's.
            command = [sys.executable, "-m", "scripts.tiny_model.make_random", folder.resolve()]
            command += RANDOM_MODELS[name] + (() if weights else ("--no_weights", "--controlnet"))
            subprocess.run(command, check=True, cwd=ROOT)
        return folder
    if name not in MODELS and not Path(name).is_dir():
        known = ", ".join([*RANDOM_MODELS, *MODELS])
        raise UserError(f"--model: {name}: no such folder, and none of {known}")
    return checkpoint_folder(MODELS.get(name, name))


def clip_of(source: Path, n_frames: int, work: Path) -> Path:
    """The clip itself if it is long enough, else one in `work` that plays it back and forth."""
    source = resolve_clip(source)
    clip = read_clip(source, n_frames, own_size=True)
    missing = n_frames - len(clip.frames)
    if not missing:
        return source
    digest = source_sha256(source)[:8]
    path = work / "clips" / f"{clip_name(source)}-{digest}-{n_frames}.mp4"
    if not path.is_file():
        log.info("%s: played back and forth for %d frames", source, n_frames)
        save_video(path, np.pad(clip.frames, [(0, missing), *[(0, 0)] * 3], "reflect"), clip.fps)
    return path
