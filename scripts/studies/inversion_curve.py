"""Measure what an inversion's accuracy costs: PSNR of the reconstruction against image-forwards.

    python -m scripts.studies.inversion_curve --json inversion.json --plot docs/inversion.png

A few frames of each clip are inverted and reconstructed by plain DDIM with more and more steps,
with more and more evaluations a step, and with the early stop, of which one setting is --fast of
preprocess.py. The PSNR is that of the decoded reconstruction against the VAE's own decoding of the
frames. The released code's setting (500 plain steps, as many to reconstruct) follows --fast for
each clip, so that the ratio of their times is one of one run. Rows that the file of --json holds
already (of the same model, frames and size) are not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from scripts.shapes.world import SAMPLES, random_scene
from tokenflow.cache.options import FAST
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.inversion import inversion_timesteps, invert, reconstruct
from tokenflow.diffusion.model_names import MODELS
from tokenflow.diffusion.models import (
    StableDiffusion,
    load_stable_diffusion,
    resolve_device,
    resolve_dtype,
)
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr
from tokenflow.figures.drawing import png
from tokenflow.storage.reports import check_report_path, write_report, write_reports
from tokenflow.storage.video import clip_name, read_clip, resolve_clip
from util import ArgumentParser, UserError, at_least, command_line, setup_logging

CLIPS = tuple(f"data/{name}.mp4" for name in SAMPLES)
SAMPLING_STEPS = FAST["save_steps"]  # of an edit
BATCH = 8
FAST_LABEL = f"K <= {FAST['inversion_iters']}"
PLAIN, ITERATED, STOPPED = "plain DDIM", "K evaluations, 50 steps", "early stop, 50 steps"


class Setting(NamedTuple):
    """An inversion; each of its reconstructions is a row of the table."""

    family: str
    label: str
    steps: int
    iterations: int
    tolerance: float = 0.0
    recon_steps: tuple[int, ...] = (SAMPLING_STEPS,)


@dataclass(frozen=True)
class Row:
    """What one inversion and one reconstruction of one clip's frames took, and how good it was."""

    clip: str
    family: str
    label: str
    recon_steps: int
    forwards: float  # image-forwards a frame
    psnr: float  # against the VAE's decoding, dB
    seconds: float  # on the CPU, of processor time

    @property
    def name(self) -> str:
        return f"{self.label} (--fast)" if self.label == FAST_LABEL else self.label


def settings() -> list[Setting]:
    """All that is measured; --fast comes right before what the released code does."""
    steps, most, tolerance = FAST["steps"], FAST["inversion_iters"], FAST["inversion_tol"]
    found = [Setting(STOPPED, f"K <= {k}", steps, k, tolerance) for k in (5, 2, most)]
    for n in (500, 50, 100, 250, 1000):
        recon_steps = tuple(dict.fromkeys((n, SAMPLING_STEPS)))
        found.append(Setting(PLAIN, f"{n} steps", n, 1, 0.0, recon_steps))
    return found + [Setting(ITERATED, f"K = {k}", steps, k) for k in (1, 2, 3, 4, 5)]


@torch.inference_mode()
def measure(models: StableDiffusion, clip: str, frames: np.ndarray, setting: Setting) -> list[Row]:
    """Inverts frames (n, H, W, 3), and reconstructs them in each of the setting's step numbers."""
    prompt = random_scene(*SAMPLES[clip]).caption if clip in SAMPLES else ""
    # On the CPU the process's own time: that of other programs on the machine does not count.
    clock = time.process_time if models.device.type == "cpu" else time.perf_counter
    denoiser = make_denoiser(models, frames, prompt, None, None)
    clean = encode_frames(models, frames)
    decoding = decode_latents(models, clean)

    begun = clock()
    ascending = models.schedule.timesteps(setting.steps)[::-1]
    starts = {models.schedule.timesteps(n)[0]: None for n in setting.recon_steps}
    how = setting.iterations, setting.tolerance, BATCH
    for t, latents in invert(denoiser, clean, ascending, *how):
        if t in starts:
            starts[t] = latents
    inversion = clock() - begun, denoiser.image_forwards

    rows = []
    for n in setting.recon_steps:
        begun, before = clock(), denoiser.image_forwards
        timesteps = inversion_timesteps(models.schedule, setting.steps, n, n).reconstruction
        latents = reconstruct(denoiser, starts[timesteps[0]], timesteps, BATCH)
        seconds = inversion[0] + clock() - begun
        forwards = (inversion[1] + denoiser.image_forwards - before) / len(frames)
        quality = psnr(decode_latents(models, latents), decoding)
        rows.append(Row(clip, setting.family, setting.label, n, forwards, quality, seconds))
    return rows


# ---------------------------------------------------------------------------------------- results


def means(rows: Sequence[Row]) -> list[Row]:
    """The rows of one setting over all clips as one; each family by its forwards."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.label, row.recon_steps), []).append(row)
    found = []
    for key, group in groups.items():
        numbers = [(row.forwards, row.psnr, row.seconds) for row in group]
        found.append(Row("all", *key, *map(statistics.mean, zip(*numbers, strict=True))))
    order = (PLAIN, ITERATED, STOPPED)
    return sorted(found, key=lambda row: (order.index(row.family), row.forwards))


def time_ratios(rows: Sequence[Row]) -> list[float]:
    """For each clip, the seconds of 500 plain steps and as many to reconstruct over --fast's."""
    plain = {row.clip: row for row in rows if (row.label, row.recon_steps) == ("500 steps", 500)}
    fast = {row.clip: row for row in rows if row.label == FAST_LABEL}
    return [plain[clip].seconds / fast[clip].seconds for clip in plain if clip in fast]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows."""
    head = ["inversion", "reconstruction", "image-forwards a frame", "PSNR to the VAE's", "seconds"]
    cells = [
        (f"{row.family}: {row.name}", f"{row.recon_steps} steps",
         f"{row.forwards:.1f}", f"{row.psnr:.1f} dB", f"{row.seconds:.1f}")
        for row in rows
    ]  # fmt: skip
    return tabulate(cells, head, "pipe", disable_numparse=True)


def curve(rows: Sequence[Row]) -> Figure:
    """The picture of `means`: PSNR over image-forwards (logarithmic), a line for each family."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        line = row.family
        if line == PLAIN:
            steps = "as many" if row.label == f"{row.recon_steps} steps" else SAMPLING_STEPS
            line = f"{PLAIN}, {steps} steps to reconstruct"
        lines.setdefault(line, []).append(row)
    figure = Figure((9, 5.6), layout="constrained")
    axis = figure.subplots()
    for label, own in lines.items():
        points = [(row.forwards, row.psnr) for row in own]
        (line,) = axis.semilogx(*zip(*points, strict=True), "o-", label=label)
        style = {"color": line.get_color(), "fontsize": "small", "textcoords": "offset points"}
        for row, point in zip(own, points, strict=True):
            axis.annotate(row.name, point, (5, -12), **style)
    axis.set_xlabel("image-forwards a frame, inversion and reconstruction")
    axis.set_ylabel("PSNR against the VAE's own decoding, dB")
    axis.grid(True)
    axis.legend()
    return figure


# ------------------------------------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clips", nargs="*", default=CLIPS, help="videos or folders (default: those of data/)")
    add("--model", help="hub id or local folder (default: the small trained one)")
    add("--frames", type=at_least(1), default=1, help="of each clip, evenly spaced (default: 1)")
    add("--only", nargs="+", choices=[setting.label for setting in settings()], metavar="SETTING",
        help="the settings to measure, such as '500 steps' or 'K <= 3' (default: all)")  # fmt: skip
    add("--size", type=int, default=256, help="side of the square frames (default: 256)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--json", type=Path, help="where the rows go, and come from if they are there")
    add("--plot", type=Path, help="where the curve goes, a PNG; -: to stdout")
    args = parser.parse_args(argv)
    if args.size < 8 or args.size % 8:
        raise UserError(f"--size: {args.size}: expected a multiple of 8")
    for option in ("json", "plot"):
        if getattr(args, option):
            check_report_path(getattr(args, option), f"--{option}")
    if args.json and (str(args.json) == "-" or (args.json.exists() and not args.json.is_file())):
        raise UserError(f"--json: {args.json}: expected a file, rows are read from it too")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    setup_logging()
    args = parse_args(argv)
    device = resolve_device(args.device)
    folder = checkpoint_folder(args.model or MODELS["tiny"])
    dtype = resolve_dtype("auto", device)
    about = {
        "model": checkpoint_revision(folder),
        "frames": args.frames,
        "size": args.size,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "dtype": str(dtype),
        "fast": FAST,
    }
    rows = _known(args.json, about)
    sources = [resolve_clip(clip) for clip in args.clips]
    models = load_stable_diffusion(folder, device, dtype)
    for source in sources:
        clip = read_clip(source, 1000, size=(args.size, args.size)).frames
        chosen = np.linspace(0, len(clip) - 1, args.frames + 2)[1:-1].round().astype(int)
        name = clip_name(source)
        for setting in settings():
            known = {row.label for row in rows if row.clip == name}
            if setting.label in known or (args.only and setting.label not in args.only):
                continue
            rows += measure(models, name, clip[chosen], setting)
            if args.json:
                _save(args.json, about, rows)
    found = means([row for row in rows if row.clip in map(clip_name, sources)])
    text = table(found)
    if ratios := time_ratios(rows):
        text += (
            f"\n500 plain steps and 500 to reconstruct take {statistics.median(ratios):.1f} times "
            f"as long as --fast (from {min(ratios):.1f} to {max(ratios):.1f}, over "
            f"{len(ratios)} clips)"
        )
    if args.plot:
        text += f"\ncurve: {args.plot}"
    write_reports(text, [(args.plot, png(curve(found)))] if args.plot else [])


def _known(path: Path | None, about: dict[str, object]) -> list[Row]:
    if path is None or not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["about"] != about:
        raise UserError(f"{path}: holds rows of {data['about']}, not of {about}; name another file")
    names = [field.name for field in fields(Row)]  # a file of an earlier version has more
    return [Row(**{name: row[name] for name in names}) for row in data["rows"]]


def _save(path: Path, about: dict[str, object], rows: Sequence[Row]) -> None:
    text = json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1)
    write_report(path, text + "\n")


if __name__ == "__main__":
    command_line(main)
