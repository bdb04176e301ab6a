"""The training of the small model: every part runs, goes on where it was, and writes what loads."""

from pathlib import Path

import pytest
import torch
import train_tiny
from diffusers import StableDiffusionControlNetPipeline
from shapes_world import random_scene
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from checkpoints import check_controlnet_fits
from diffusion import encode_prompts, load_stable_diffusion
from util import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_tiny.py all` leaves after a few steps of each part: model/ and work/."""
    folder = tmp_path_factory.mktemp("train")
    run(folder, "all")
    return folder


def run(folder: Path, part: str) -> None:
    folders = ["--model", str(folder / "model"), "--work", str(folder / "work")]
    train_tiny.main([part, "--budget", "smoke", "--device", "cpu", *folders])


def test_the_model_loads_as_a_stable_diffusion_with_its_controlnet(trained):
    model = trained / "model"
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model,
        controlnet=train_tiny.ControlNetModel.from_pretrained(model / "controlnet"),
        safety_checker=None,
    )
    assert len(pipe.unet.attn_processors) == 32
    check_controlnet_fits(model, str(model / "controlnet"))
    text = encode_prompts(
        load_stable_diffusion(model, torch.device("cpu"), torch.float32),
        [random_scene(0).caption, ""],
    )
    assert text.shape == (2, train_tiny.MAX_TOKENS, train_tiny.WIDTH)


def test_the_judge_loads_as_a_clip_model(trained):
    judge = trained / "model" / "judge"
    model = CLIPModel.from_pretrained(judge)
    pixels = CLIPImageProcessor.from_pretrained(judge)(
        images=[torch.zeros(3, 100, 100)], return_tensors="pt"
    ).pixel_values
    tokens = CLIPTokenizer.from_pretrained(judge)(["a red star"], return_tensors="pt").input_ids
    assert model.float()(input_ids=tokens, pixel_values=pixels).logits_per_image.shape == (1, 1)


def test_each_part_leaves_its_state_losses_and_a_sheet(trained):
    for part in ("vae", "unet_small", "unet", "controlnet"):
        folder = trained / "work" / part
        assert (folder / "state.safetensors").is_file()
        assert (folder / "sheet_000004.png").is_file()
        assert "loss" in (folder / "log.csv").read_text()


def test_a_finished_training_is_not_repeated(trained):
    made = [*(trained / "work").rglob("*.npy"), *(trained / "work").rglob("state.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len(made) == 7
    run(trained, "pictures")
    run(trained, "judge")
    assert {path: path.stat().st_mtime_ns for path in made} == before


def test_every_word_of_a_caption_is_one_token(trained):
    tokenizer = CLIPTokenizer.from_pretrained(trained / "model" / "tokenizer")
    for seed in range(200):
        caption = random_scene(seed).caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_pictures_that_are_missing_are_asked_for(tmp_path):
    with pytest.raises(UserError, match="missing; run `train_tiny"):
        run(tmp_path, "vae")
