"""The training of the small model: every part runs, resumes, and writes weights that load."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from scripts.shapes.pictures import scene_of_picture
from scripts.tiny_model import judge, train, trainer
from scripts.tiny_model.denoiser import NoisyLatents
from scripts.tiny_model.settings import MAX_TOKENS
from tokenflow.diffusion.checkpoints import check_controlnet_fits
from tokenflow.diffusion.denoiser import encode_prompts
from tokenflow.diffusion.models import load_stable_diffusion
from util import UserError, load_tensors, save_tensors

pytestmark = pytest.mark.slow  # it trains every part for some steps


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train all` leaves after a few steps of each part: model/ and work/."""
    folder = tmp_path_factory.mktemp("train")
    run(folder, "all")
    return folder


def run(folder: Path, part: str, *options: str) -> None:
    folders = ["--model", str(folder / "model"), "--work", str(folder / "work")]
    train.main([part, "--budget", "smoke", "--device", "cpu", *folders, *options])


def test_the_model_loads_as_a_stable_diffusion_with_its_controlnet(trained):
    model = trained / "model"
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=ControlNetModel.from_pretrained(model / "controlnet"), safety_checker=None
    )
    assert len(pipe.unet.attn_processors) == 32
    check_controlnet_fits(model, str(model / "controlnet"))
    text = encode_prompts(
        load_stable_diffusion(model, torch.device("cpu"), torch.float32),
        [scene_of_picture(0).caption, ""],
    )
    assert text.shape == (2, MAX_TOKENS, 128)


def test_the_judge_loads_as_a_clip_model(trained):
    folder = trained / "model" / "judge"
    model = CLIPModel.from_pretrained(folder)
    pixels = CLIPImageProcessor.from_pretrained(folder)(
        images=[torch.zeros(3, 100, 100)], return_tensors="pt"
    ).pixel_values
    tokens = CLIPTokenizer.from_pretrained(folder)(["a red star"], return_tensors="pt").input_ids
    assert model.float()(input_ids=tokens, pixel_values=pixels).logits_per_image.shape == (1, 1)


def test_each_part_leaves_its_state_losses_and_a_sheet(trained):
    for part in ("vae", "vae_temporal_decoder", "unet_small", "unet", "controlnet", "judge"):
        folder = trained / "work" / part
        names = {"recipe.yaml", "state.safetensors", "sheet_000004.png", "log.csv"}
        assert names <= {path.name for path in folder.iterdir()}
    # The last is the judge's, which says what it found.
    assert len((folder / "sheet_000004.txt").read_text().splitlines()) == 16


def test_a_finished_training_is_not_repeated(trained):
    made = [*(trained / "work").rglob("*.npy"), *(trained / "work").rglob("state.safetensors")]
    made += (trained / "work").glob("latents_*")
    before = {path: path.stat().st_mtime_ns for path in made}
    assert len(made) == 10
    weights = {path: path.read_bytes() for path in (trained / "model").rglob("*.safetensors")}
    run(trained, "all")
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert weights == {path: path.read_bytes() for path in weights}


def test_an_interrupted_part_ends_as_one_in_one_piece(trained, tmp_path, monkeypatch):
    """In the middle of the UNet's second stage, which begins with what the first has learnt."""
    for part in ("pictures", "vae"):
        run(tmp_path, part)
    steps = iter(range(6))
    draw = NoisyLatents.draw

    def interrupted(batches, generator):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return draw(batches, generator)

    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)
    with monkeypatch.context() as context:
        context.setattr(NoisyLatents, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "unet")
    assert not (tmp_path / "model" / "unet").exists()
    run(tmp_path, "unet")
    name = Path("model", "unet", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


def test_a_state_from_other_weights_is_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    weights = tmp_path / "copy/model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_tensors(weights)
    save_tensors(weights, {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(UserError, match="controlnet: was trained with another unet; remove"):
        run(tmp_path / "copy", "controlnet")


def test_a_part_asks_for_those_before_it(tmp_path):
    with pytest.raises(UserError, match=r"missing; run `.*train pictures` first"):
        run(tmp_path, "vae")
    run(tmp_path, "pictures")
    for part, missing in (("unet", "vae"), ("controlnet", "unet")):
        with pytest.raises(UserError, match=f"{missing}: missing; run `.*train {missing}` first"):
            run(tmp_path, part)


def test_a_training_begins_with_the_weights_of_another_model(trained, tmp_path, monkeypatch):
    for part in ("pictures", "vae", "unet"):
        run(tmp_path, part, "--start", str(trained / "model"))
    for part in ("vae", "unet", "text_encoder"):
        first, then = (load_tensors(next((folder / "model" / part).glob("*.safetensors")))
                       for folder in (trained, tmp_path))  # fmt: skip
        moved = [(then[name] - value).abs().max() for name, value in first.items()]
        assert 0 < max(moved) < 0.02, part
    with pytest.raises(UserError, match="vae: was trained with another start; remove"):
        run(tmp_path, "vae")


@pytest.mark.parametrize("option", ["--seed=-1", "--sheet_every=0"])
def test_numbers_out_of_range_are_refused(option):
    with pytest.raises(UserError, match="expected at least"):
        train.main(["all", option])


def test_every_word_of_a_caption_is_one_token(trained):
    tokenizer = CLIPTokenizer.from_pretrained(trained / "model" / "tokenizer")
    for number in range(200):
        caption = scene_of_picture(number).caption
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2


def test_a_batch_of_the_judge_is_of_few_groups_of_look_alikes():
    groups = judge._look_alikes(2000)
    assert sorted(torch.cat(groups).tolist()) == list(range(2000))
    drawn = judge._draw_alike(groups, 64, torch.Generator().manual_seed(0)).tolist()
    assert len(drawn) == 64
    scenes = [scene_of_picture(number) for number in set(drawn)]
    pairs = {(scene.background, scene.surface, scene.objects[0].color) for scene in scenes}
    assert 1 < len(pairs) <= judge.GROUPS
    assert len({scene.objects[0].shape for scene in scenes}) == 5


def test_the_judge_is_asked_for_the_shape_alone():
    shapes = torch.tensor([5, 6])
    captions = torch.tensor([[1, 3, 6, 1, 3, 5], [1, 5, 1, 6, 0, 0]])
    others = judge._other_shapes(captions, shapes)
    assert others[0].tolist() == [[1, 3, 5, 1, 3, 5], [1, 3, 6, 1, 3, 5]]
    assert others[1].tolist() == [[1, 5, 1, 6, 0, 0], [1, 6, 1, 6, 0, 0]]


def test_the_judge_s_pictures_are_moved_round():
    picture = torch.arange(judge.JUDGE_SIZE**2).view(judge.JUDGE_SIZE, -1)
    moved = judge._shifted(picture.expand(20, 3, -1, -1), torch.Generator().manual_seed(0))
    shifts = {divmod(int(first), judge.JUDGE_SIZE) for first in moved[:, 0, 0, 0]}
    assert len(shifts) > 10
    for one in moved:
        down, right = divmod(int(one[0, 0, 0]), judge.JUDGE_SIZE)
        assert torch.equal(one, picture.roll((-down, -right), (0, 1)).expand(3, -1, -1))
        assert all(min(by, judge.JUDGE_SIZE - by) <= judge.PATCH for by in (down, right))
