"""Trains the small model of models/tiny, a small Stable Diffusion, on the shapes world.

    python -m scripts.tiny_model.train all                # a few hours on two CPU cores
    python -m scripts.tiny_model.train all --budget gpu   # larger batches; not timed yet
    python -m scripts.tiny_model.train unet               # one part; needs those before it
    python -m scripts.tiny_model.train all --budget finetune --start models/tiny

The parts, in order: `pictures` renders the training pictures; `vae` trains the AutoencoderKL,
`vae_temporal_decoder` a decoder that sees a clip's frames together, and `unet` the UNet with its
text encoder on the latents of the pictures, first of small ones, then of full-size ones;
`controlnet` trains a ControlNet (Canny edges) for it and `judge` a CLIP model of its own, which
tells what pictures show. With --start, each begins with the weights of that model. Run the same
command again to resume an interrupted part. Each part's state, losses and sample sheets are in the
work folder; the moving average of its weights goes to the model's folder, in float16.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.shapes.pictures import SIZE, render_pictures
from scripts.tiny_model.autoencoder import train_vae
from scripts.tiny_model.denoiser import train_controlnet, train_unet
from scripts.tiny_model.judge import train_judge
from scripts.tiny_model.settings import BUDGETS, Training
from scripts.tiny_model.temporal_decoder import train_temporal_decoder
from tokenflow.diffusion.checkpoints import checkpoint_folder
from tokenflow.diffusion.models import resolve_device
from util import ArgumentParser, at_least, check_writable, command_line, setup_logging

log = logging.getLogger("tokenflow")


def make_pictures(training: Training) -> None:
    count = training.budget.pictures
    if not render_pictures(training.pictures_folder, count, (SIZE // 2, SIZE)):
        log.info("pictures: all %d exist already", count)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, work = parser.add_argument, Path("latents/tiny-training")
    add("part", choices=("all", *TRAINERS))
    add("--work", type=Path, default=work, help=f"of pictures, states, sheets (default: {work})")
    add("--model", type=Path, help="folder to fill (default: WORK/model)")
    add("--budget", choices=tuple(BUDGETS), default="cpu", help="how much of all (default: cpu)")
    add("--seed", type=at_least(0), default=0, help="of weights and batches (default: 0)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="bfloat16 is mixed precision; auto: that on CUDA, float32 elsewhere")  # fmt: skip
    add("--sheet_every", type=at_least(1), default=500, help="steps (default: 500)")
    add(
        "--start", type=Path, metavar="FOLDER", help="begin with the weights of this model's folder"
    )
    args = parser.parse_args(argv)
    setup_logging()
    model = args.model or args.work / "model"
    check_writable(model, "--model")
    check_writable(args.work, "--work")
    device = resolve_device(args.device)
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    training = Training(
        model=model,
        work=args.work,
        budget=BUDGETS[args.budget],
        seed=args.seed,
        device=device,
        dtype=torch.bfloat16 if half else torch.float32,
        sheet_every=args.sheet_every,
        start=args.start and checkpoint_folder(str(args.start)),
    )
    for part, run in TRAINERS.items():
        if args.part in ("all", part):
            run(training)


TRAINERS = {
    "pictures": make_pictures,
    "vae": train_vae,
    "vae_temporal_decoder": train_temporal_decoder,
    "unet": train_unet,
    "controlnet": train_controlnet,
    "judge": train_judge,
}

if __name__ == "__main__":
    command_line(main)
