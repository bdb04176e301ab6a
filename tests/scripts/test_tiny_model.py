"""The random models: that they are what the other tests rely on."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTokenizer, DPTForDepthEstimation, DPTImageProcessor

from scripts.tiny_model import make_random as make_tiny_model
from scripts.tiny_model.make_random import make_depth_model, make_model
from scripts.tiny_model.model_files import make_unet
from tests.helpers import contents, shapes_frames
from tokenflow.diffusion.ddim import CLEAN, NoiseSchedule, ddim_inversion_step, ddim_step
from tokenflow.diffusion.denoiser import encode_prompts
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr
from tokenflow.ops.simulated_gpu import simulated_gpu
from util import UserError, sha256_file

CPU = torch.device("cpu")
# Decoder self-attention layers 4-11, in which PnP injects queries and keys.
PNP_LAYERS = [f"up_blocks.{block}.attentions.{i}" for block in (1, 2, 3) for i in range(3)][1:]


@pytest.fixture(scope="module")
def models(tiny_model):
    return load_stable_diffusion(tiny_model, CPU, torch.float32)


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def predict(unet, x, t=500, text=None, **residuals):
    if text is None:
        text = torch.zeros(len(x), 77, unet.config.cross_attention_dim)
    with torch.inference_mode():
        return unet(x, t, encoder_hidden_states=text, **residuals).sample


def unit_latents(channels=4):
    return torch.randn(4, channels, 16, 16, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_depth_model", "tiny_v_model"])
def test_diffusers_loads_the_whole_folder(fixture, request):
    folder = request.getfixturevalue(fixture)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    depth = fixture == "tiny_depth_model"
    assert ("Depth2Img" in type(pipeline).__name__) == depth
    assert pipeline.unet.config.in_channels == (5 if depth else 4)
    assert pipeline.vae.config.scaling_factor == 0.18215
    schedule = DDIMScheduler.from_pretrained(folder, subfolder="scheduler").config
    wanted = "v_prediction" if fixture == "tiny_v_model" else "epsilon"
    assert (schedule.prediction_type, schedule.steps_offset) == (wanted, 1)
    assert not schedule.clip_sample
    assert not schedule.set_alpha_to_one


def test_text_encoder_has_the_published_tensor_names(models, tiny_model):
    # A tensor that is not found would be replaced by a random one, and only a warning say so.
    again = load_stable_diffusion(tiny_model, CPU, torch.float32)
    prompts = ["a wolf", "a marble wolf"]
    first, second = encode_prompts(models, prompts), encode_prompts(again, prompts)
    assert torch.equal(first, second)
    assert first.shape == (2, 77, models.unet.config.cross_attention_dim)
    assert (first[0] - first[1]).std() > 0.1


def test_one_seed_gives_the_same_files_and_another_does_not(tiny_model, tmp_path, request):
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    for name, seed in (("same", 0), ("other", 1)):
        make_model(tmp_path / name, seed=seed, controlnet=True)
        make_depth_model(tmp_path / name / "depth_estimator", seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    first, other = fingerprint(tiny_model), fingerprint(tmp_path / "other")
    assert first == fingerprint(tmp_path / "same")
    weights = [name for name in first if name.endswith(".safetensors")]
    assert len(weights) == 5
    assert all(first[name] != other[name] for name in weights)


def test_the_command_line_writes_every_part_in_half_precision(tmp_path):
    make_tiny_model.main(
        [str(tmp_path / "m"), "--controlnet", "--depth_estimator", "--dtype", "float16"]
    )
    files = {path.parent.name: path for path in (tmp_path / "m").rglob("*.safetensors")}
    assert set(files) == {"unet", "vae", "text_encoder", "controlnet", "depth_estimator"}
    for part in ("unet", "vae", "text_encoder", "controlnet"):
        tensors = load_file(files[part])
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"OUT: .*: is not empty; remove it or name another"):
        make_tiny_model.main([str(tmp_path / "m")])
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return CLIPTokenizer.from_pretrained(tiny_model, subfolder="tokenizer")


def test_a_model_without_weights_has_their_sizes(tmp_path):
    make_model(tmp_path, architecture="sd21", controlnet=True, weights=False)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 1e6
    with simulated_gpu(1 << 30) as gpu:
        models = load_stable_diffusion(tmp_path, torch.device("cuda"), torch.float16)
        parts = models.unet, models.vae, models.text_encoder
        numbers = [sum(x.numel() for x in part.parameters()) for part in parts]
        assert numbers == [865_910_724, 83_653_863, 340_387_840]
        assert 2 * sum(numbers) < gpu.allocated < 2.001 * sum(numbers)


def test_listed_words_are_single_tokens_and_other_text_is_spelled_out(tokenizer):
    words = make_tiny_model.WORDS.split()
    assert len(tokenizer(" ".join(words)).input_ids) == len(words) + 2
    for text in ("a marble sculpture of a woman", "qzx snowdrift , very sharp !"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["ÀÉß", "日本語", "🙂 120%", "tab\tand\nline", "#[]{}~\\'\"`|", ""]
)
def test_nothing_is_unknown_to_the_tokenizer(tokenizer, text):
    tokens = tokenizer(text).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    # The unknown token is the end token, as in CLIP: one at the end, and no other.
    assert tokens.index(tokenizer.unk_token_id) == len(tokens) - 1


def test_prompts_are_padded_and_cut_to_77_tokens(tokenizer):
    prompts = ["a wolf", "wolf " * 100]
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    assert tokens.input_ids.shape == (2, tokenizer.model_max_length) == (2, 77)


# ---------------------------------------------------------------- networks


def test_unet_has_the_layers_of_stable_diffusion(models):
    attention = {name for name in models.unet.attn_processors if ".attn1." in name}
    assert len(attention) == 16
    assert {f"{layer}.transformer_blocks.0.attn1.processor" for layer in PNP_LAYERS} < attention
    assert isinstance(models.unet.get_submodule("up_blocks.1.resnets.1.conv2"), torch.nn.Conv2d)
    heads = [m.heads for name, m in models.unet.named_modules() if name.endswith(".attn1")]
    assert min(heads) > 1


def test_prediction_is_of_unit_size_and_follows_every_input(models):
    x = unit_latents()
    for t in (1, 261, 521, 981):
        assert predict(models.unet, x, t).std() == pytest.approx(1.0, abs=0.25)
    text = encode_prompts(models, ["a red wolf", "a marble robot"])
    red, marble = (predict(models.unet, x, text=one.expand(4, -1, -1)) for one in text)
    assert (red - marble).std() > 0.02
    assert (predict(models.unet, x, 101) - predict(models.unet, x, 901)).std() > 0.05
    assert (predict(models.unet, x) - predict(models.unet, x.flip(-1))).std() > 0.5


def test_depth_model_sees_its_depth_channel(tiny_depth_model):
    unet = UNet2DConditionModel.from_pretrained(tiny_depth_model, subfolder="unet")
    x = unit_latents(channels=5)
    changed = x.clone()
    changed[:, 4] *= -1
    assert (predict(unet, x) - predict(unet, changed)).std() > 0.02


@pytest.mark.parametrize("fixture", ["tiny_model", "tiny_v_model"])
def test_ddim_inverts_the_unet_and_fixed_point_iterations_do_it_better(fixture, request):
    folder = request.getfixturevalue(fixture)
    models = load_stable_diffusion(folder, CPU, torch.float32)
    schedule: NoiseSchedule = models.schedule
    coarse = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    clean = F.interpolate(coarse, scale_factor=2, mode="bicubic")
    levels = [CLEAN, *reversed(schedule.timesteps(25))]
    steps = list(itertools.pairwise(levels))  # from clean to noise

    def eps(x, t, rows=None):
        prediction = predict(models.unet, x, t)
        if schedule.prediction_type == "epsilon":
            return prediction
        alpha, sigma = schedule.alpha_sigma(t)
        return alpha * prediction + sigma * x

    errors = []
    for iterations in (1, 2):
        x = clean
        for t_from, t_to in steps:
            x = ddim_inversion_step(eps, x, schedule, t_from, t_to, iterations)
        for t_to, t_from in reversed(steps):
            x = ddim_step(x, eps(x, t_from), schedule, t_from, t_to)
        errors.append((x - clean).norm() / clean.norm())
    assert errors[0] < 0.5
    assert errors[1] < errors[0] / 4


def test_vae_gives_latents_of_unit_size_and_recognisable_pictures(models):
    frames = shapes_frames(2, 64, 64)
    latents = encode_frames(models, frames)
    assert latents.shape == (2, 4, 8, 8)
    assert 0.4 < latents.std() < 2.0
    decoded = decode_latents(models, latents)
    assert psnr(decoded, frames) > 11
    # Nearer to its own frame than to the other one.
    assert psnr(decoded[:1], frames[:1]) > psnr(decoded[:1], frames[1:]) + 1


def test_controlnet_changes_the_prediction(models, tiny_model):
    controlnet = ControlNetModel.from_pretrained(tiny_model / "controlnet").eval()
    x, text = unit_latents(), torch.zeros(4, 77, 32)
    dark, bright = torch.zeros(4, 3, 128, 128), torch.ones(4, 3, 128, 128)
    bright[..., :64] = 0
    predictions = [predict(models.unet, x)]
    for picture in (dark, bright):
        with torch.inference_mode():
            down, mid = controlnet(x, 500, text, controlnet_cond=picture, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predictions.append(predict(models.unet, x, **residuals))
    plain, with_dark, with_bright = predictions
    assert 0.02 < (with_dark - plain).std() < 1.0
    assert (with_bright - with_dark).std() > 0.005


def test_depth_estimator_tells_pixels_and_frames_apart(tiny_model):
    folder = tiny_model / "depth_estimator"
    model = DPTForDepthEstimation.from_pretrained(folder)
    processor = DPTImageProcessor.from_pretrained(folder)
    inputs = processor(images=list(shapes_frames(2, 64, 64)), return_tensors="pt")
    with torch.inference_mode():
        depth = model(**inputs).predicted_depth
    assert depth.shape == (2, 64, 64)
    assert depth.std((1, 2)).min() > 0.1
    assert (depth[0] - depth[1]).std() > 0.1


def test_sd21_has_the_parameters_of_stable_diffusion_2_1():
    with torch.device("meta"):
        unet = make_unet("sd21")
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
