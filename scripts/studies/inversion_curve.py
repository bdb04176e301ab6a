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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from scripts.shapes.world import SAMPLES, random_scene
from tokenflow.cache.options import FAST
from tokenflow.diffusion.checkpoints import checkpoint_folder, checkpoint_revision, model_key_for
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.diffusion.inversion import inversion_timesteps, invert, reconstruct
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
from util import ArgumentParser, UserError, command_line, setup_logging

CLIPS = tuple(f"data/{name}.mp4" for name in SAMPLES)
SAMPLING_STEPS = FAST["save_steps"]  # of an edit
BATCH = 8
FAST_LABEL = f"K <= {FAST['inversion_iters']}"
PLAIN, ITERATED, STOPPED = "plain DDIM", "K evaluations, 50 steps", "early stop, 50 steps"


@dataclass(frozen=True)
class Setting:
    """An inversion; each of its reconstructions is a row of the table."""

    family: str
    label: str
    steps: int
    iterations: int
    tolerance: float
    recon_steps: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What one inversion and one reconstruction of one clip's frames took, and how good it was."""

    clip: str
    family: str
    label: str
    recon_steps: int
    forwards: float  # image-forwards a frame, of the inversion and the reconstruction
    inversion_forwards: float
    psnr: float  # against the VAE's decoding, dB
    seconds: float  # of the inversion and the reconstruction; on the CPU, of processor time
    inversion_seconds: float


def settings() -> list[Setting]:
    """All that is measured; --fast comes right before what the released code does."""
    how = FAST["steps"], SAMPLING_STEPS
    stopped = [
        Setting(STOPPED, f"K <= {k}", how[0], k, FAST["inversion_tol"], how[1:])
        for k in (5, 2, FAST["inversion_iters"])
    ]
    plain = [
        Setting(PLAIN, f"{n} steps", n, 1, 0.0, tuple(dict.fromkeys((n, SAMPLING_STEPS))))
        for n in (500, 50, 100, 250, 1000)
    ]
    iterated = [Setting(ITERATED, f"K = {k}", how[0], k, 0.0, how[1:]) for k in (1, 2, 3, 4, 5)]
    return [*stopped, *plain, *iterated]


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
    inversion_seconds = clock() - begun
    inversion_forwards = denoiser.image_forwards

    rows = []
    for n in setting.recon_steps:
        begun, before = clock(), denoiser.image_forwards
        timesteps = inversion_timesteps(models.schedule, setting.steps, n, n).reconstruction
        latents = reconstruct(denoiser, starts[timesteps[0]], timesteps, BATCH)
        seconds = clock() - begun
        forwards = inversion_forwards + denoiser.image_forwards - before
        rows.append(
            Row(
                clip=clip,
                family=setting.family,
                label=setting.label,
                recon_steps=n,
                forwards=forwards / len(frames),
                inversion_forwards=inversion_forwards / len(frames),
                psnr=psnr(decode_latents(models, latents), decoding),
                seconds=inversion_seconds + seconds,
                inversion_seconds=inversion_seconds,
            )
        )
    return rows


# ---------------------------------------------------------------------------------------- results


def means(rows: Sequence[Row]) -> list[Row]:
    """The rows of one setting over all clips as one, in the order of the first clip's."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.family, row.label, row.recon_steps), []).append(row)
    numbers = ("forwards", "inversion_forwards", "psnr", "seconds", "inversion_seconds")
    found = []
    for (family, label, recon_steps), group in groups.items():
        mean = {name: statistics.mean(getattr(row, name) for row in group) for name in numbers}
        found.append(Row("all", family, label, recon_steps, **mean))
    order = (PLAIN, ITERATED, STOPPED)
    return sorted(found, key=lambda row: (order.index(row.family), row.forwards))


def time_ratios(rows: Sequence[Row]) -> list[float]:
    """For each clip, the seconds of 500 plain steps and as many to reconstruct over --fast's."""
    plain = {row.clip: row for row in rows if (row.label, row.recon_steps) == ("500 steps", 500)}
    fast = {row.clip: row for row in rows if row.label == FAST_LABEL}
    return [plain[clip].seconds / fast[clip].seconds for clip in plain if clip in fast]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows."""
    return tabulate(
        [
            (
                f"{row.family}: {_name(row)}",
                f"{row.recon_steps} steps",
                f"{row.forwards:.1f}",
                f"{row.psnr:.1f} dB",
                f"{row.seconds:.1f}",
            )
            for row in rows
        ],
        ["inversion", "reconstruction", "image-forwards a frame", "PSNR to the VAE's", "seconds"],
        "pipe",
        disable_numparse=True,
    )


def _name(row: Row) -> str:
    return f"{row.label} (--fast)" if row.label == FAST_LABEL else row.label


FAMILIES = (  # of settings, a line for each
    f"{PLAIN}, as many steps to reconstruct",
    f"{PLAIN}, 50 steps to reconstruct",
    ITERATED,
    STOPPED,
)


def curve(rows: Sequence[Row]) -> Figure:
    """The picture of `means`: PSNR over image-forwards (logarithmic), a line for each family."""
    figure = Figure((9, 5.6), layout="constrained")
    axis = figure.subplots()
    for family in FAMILIES:
        own = [row for row in rows if _of(row, family)]
        (line,) = axis.semilogx(
            [row.forwards for row in own], [row.psnr for row in own], "o-", label=family
        )
        for row in own:
            axis.annotate(
                _name(row),
                (row.forwards, row.psnr),
                (5, -12),
                textcoords="offset points",
                color=line.get_color(),
                fontsize="small",
            )
    axis.set_xlabel("image-forwards a frame, inversion and reconstruction")
    axis.set_ylabel("PSNR against the VAE's own decoding, dB")
    axis.grid(True)
    axis.legend()
    return figure


def _of(row: Row, family: str) -> bool:
    if row.family != PLAIN:
        return row.family == family
    same = row.label == f"{row.recon_steps} steps"
    first = f"{PLAIN}, as many steps to reconstruct"
    return family == first if same else family == f"{PLAIN}, 50 steps to reconstruct"


# ------------------------------------------------------------------------------------------- main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads and checks the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("clips", nargs="*", default=CLIPS, help="videos or folders (default: those of data/)")
    add("--model", help="hub id or local folder (default: the small trained one)")
    add("--frames", type=int, default=1, help="of each clip, evenly spaced (default: 1)")
    add("--only", nargs="+", choices=[setting.label for setting in settings()], metavar="SETTING",
        help="the settings to measure, such as '500 steps' or 'K <= 3' (default: all)")  # fmt: skip
    add("--size", type=int, default=256, help="side of the square frames (default: 256)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--json", type=Path, help="where the rows go, and come from if they are there")
    add("--plot", type=Path, help="where the curve goes, a PNG; -: to stdout")
    args = parser.parse_args(argv)
    if args.frames < 1 or args.size < 8 or args.size % 8:
        raise UserError("--frames: expected at least 1, and --size: a multiple of 8")
    for option in ("json", "plot"):
        if getattr(args, option):
            check_report_path(getattr(args, option), f"--{option}")
    if args.json and (str(args.json) == "-" or (args.json.exists() and not args.json.is_file())):
        raise UserError(f"--json: {args.json}: expected a file, rows are read from it too")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    setup_logging()
    args = parse_args(argv)
    device = resolve_device(args.device)
    folder = checkpoint_folder(model_key_for("tiny", args.model))
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
        for setting in settings():
            name = clip_name(source)
            if args.only and setting.label not in args.only:
                continue
            if any((r.clip, r.family, r.label) == (name, setting.family, setting.label)
                   for r in rows):  # fmt: skip
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
    return [Row(**row) for row in data["rows"]]


def _save(path: Path, about: dict[str, object], rows: Sequence[Row]) -> None:
    text = json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1)
    write_report(path, text + "\n")


if __name__ == "__main__":
    command_line(main)
