"""preprocess.py from the command line to the cache, on the tiny model."""

import json
import logging
import math
import re
import shlex
import shutil
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import preprocess
import run_tokenflow_pnp
from tests.helpers import (
    HEIGHT,
    WIDTH,
    arguments,
    contents,
    invert,
    make_clip,
    make_image_folder,
    no_model_may_load,
    preprocess_words,
    shapes_frames,
    video_facts,
)
from tokenflow.cache import build
from tokenflow.cache import options as preprocess_options
from tokenflow.cache.source_cache import CLEAN_LATENTS, find_cache, open_cache, read_manifest
from tokenflow.cache.source_features import find_features
from tokenflow.diffusion.denoiser import Denoiser, encode_prompts
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.diffusion.vae import decode_latents, encode_frames, psnr
from tokenflow.storage.images import load_frames
from tokenflow.storage.video import read_clip, save_video
from tokenflow.storage.yaml_files import load_yaml
from util import (
    MissingFileError,
    UserError,
    load_tensors,
    save_tensors,
    sha256_file,
)

PROMPT = 'a star,\n"turning" on a wall \N{GLOWING STAR}'
SAMPLING = [801, 601, 401, 201, 1]  # 5 steps
SAVED = [901, *SAMPLING]  # and the noisiest of 10


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Six frames, of which caches take five."""
    return make_clip(tmp_path_factory.mktemp("clip") / "star.mp4", n_frames=6, fps=Fraction(25, 2))


@pytest.fixture(scope="module")
def cache(clip, tiny_model, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("latents")
    return invert(clip, save_dir, tiny_model, inversion_prompt=PROMPT, batch_size=2)


def save_dir_of(cache):
    return cache.parents[3]


def reconstruction_db(folder):
    return read_manifest(folder).psnr


# ---------------------------------------------------------------- what a run leaves


def test_the_cache_holds_what_the_design_says_and_nothing_else(cache):
    folder = cache.relative_to(save_dir_of(cache)).as_posix()
    assert re.fullmatch(r"sd_2\.1/star/steps_10/nframes_5-[0-9a-f]{8}", folder)
    files = {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()}
    assert files == {
        "manifest.yaml",
        "inversion_prompt.txt",
        "inverted.mp4",
        "latents/clean.safetensors",
        *(f"latents/noisy_latents_{t}.safetensors" for t in SAVED),
        *(f"frames/0000{i}.png" for i in range(5)),
    }
    assert (cache / "inversion_prompt.txt").read_text(encoding="utf-8") == PROMPT


def test_the_manifest_says_what_the_cache_depends_on(cache, clip, tiny_model):
    manifest = read_manifest(cache)
    assert (manifest.clip, manifest.source_name) == ("star", "star.mp4")
    assert manifest.source_sha256 == sha256_file(clip)
    assert (manifest.height, manifest.width, manifest.n_frames) == (HEIGHT, WIDTH, 5)
    assert (manifest.steps, manifest.save_steps, manifest.recon_steps) == (10, 5, 5)
    assert manifest.timesteps == SAVED
    assert Fraction(manifest.fps) == Fraction(25, 2)
    assert (manifest.inversion_prompt, manifest.dtype) == (PROMPT, "float32")
    assert (manifest.sd_version, manifest.model_key) == ("2.1", str(tiny_model))
    assert (manifest.control, manifest.depth_model) == (None, None)
    assert (manifest.inversion_iters, manifest.inversion_tol) == (1, 0.0)
    assert manifest.image_forwards == {"inversion": 10 * 5, "reconstruction": 5 * 5}
    assert set(manifest.seconds) == {"read", "load", "vae", "inversion", "reconstruction"}
    assert min(manifest.seconds.values()) >= 0
    recorded = {name: entry["sha256"] for name, entry in manifest.files.items()}
    assert recorded == {
        path.relative_to(cache).as_posix(): sha256_file(path)
        for path in cache.rglob("*")
        if path.is_file() and path.name != "manifest.yaml"
    }


def test_frames_are_the_clip_s(cache, clip):
    frames = read_clip(clip, 5, size=(HEIGHT, WIDTH)).frames
    assert np.array_equal(load_frames(cache / "frames"), frames)


@torch.inference_mode()
def test_latents_are_ddim_s(cache, tiny_model):
    """Against a plain loop over single frames with DDIM's formula written out."""
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    opened = open_cache(cache)
    clean = encode_frames(models, opened.frames(5), batch_size=5)
    torch.testing.assert_close(opened.latents(CLEAN_LATENTS, 5), clean, rtol=1e-4, atol=1e-5)

    text = encode_prompts(models, [PROMPT])
    levels = models.schedule.alphas_cumprod
    for frame in (0, 4):  # the last one is a chunk of its own
        x, have = clean[frame : frame + 1], levels[0]  # SD takes its first level for clean
        for t in range(1, 1000, 100):
            eps = models.unet(x, t, encoder_hidden_states=text).sample
            x0 = (x - (1 - have) ** 0.5 * eps) / have**0.5
            x, have = levels[t] ** 0.5 * x0 + (1 - levels[t]) ** 0.5 * eps, levels[t]
            if t in SAVED:
                found = opened.latents(t, 5)
                assert found.dtype == torch.float32
                assert found.shape == (5, 4, HEIGHT // 8, WIDTH // 8)
                torch.testing.assert_close(found[frame : frame + 1], x, rtol=1e-3, atol=1e-3)


def test_inverted_video_is_the_reconstruction_at_the_clip_s_rate(cache, tiny_model):
    assert video_facts(cache / "inverted.mp4") == (5, Fraction(25, 2), (HEIGHT, WIDTH))
    shown = read_clip(cache / "inverted.mp4", 5, size=(HEIGHT, WIDTH)).frames
    found = psnr(shown, load_frames(cache / "frames"))
    assert found == pytest.approx(reconstruction_db(cache), abs=1.0)  # H.264 loses a little

    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    bound = decode_latents(models, open_cache(cache).latents(CLEAN_LATENTS, 5))
    closeness = np.array([[psnr(ours, best) for best in bound] for ours in shown])
    assert (closeness[0].argmax(), closeness[-1].argmax()) == (0, 4)  # in order


def test_main_prints_where_the_cache_is(cache, clip, tiny_model, capsys):
    save_dir = save_dir_of(cache)
    preprocess.main(preprocess_words(clip, save_dir, tiny_model, inversion_prompt=PROMPT))
    assert capsys.readouterr().out == f"cache: {cache}\n"


def test_it_says_what_it_will_do_and_how_to_go_on(tiny_model, tmp_path, caplog, monkeypatch):
    """The command that it prints makes an edit from the cached features."""
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    save_video(Path("clip.mp4"), shapes_frames(9, 64, 96), Fraction(10))
    options = {"frame_start": 1, "frame_stride": 2, "n_frames": 3, "keyframe_interval": 2}
    words = preprocess_words("clip.mp4", "caches", tiny_model, cache_features="", **options)
    preprocess.main(words)
    assert (
        "clip.mp4: frames 1-5 of 9 with stride 2 (0.6 s of 0.9 s; --n_frames for more), "
        "96x64 resized to 80x48; steps: inversion 10, reconstruction 5, source features 5"
    ) in caplog.messages
    command = next(text for text in caplog.messages if text.startswith("edit it: "))
    program, script, *argv = shlex.split(command.removeprefix("edit it: "))
    assert (program, script) == ("python", "run_tokenflow_pnp.py")
    run_tokenflow_pnp.main([*argv, "--set", "prompt=a robot", "--device", "cpu"])
    assert "PnP edit of clip: 3 of the cache's 3 frames of 80x48, 5 steps on cpu: 'a robot'" in (
        caplog.messages
    )
    assert "source features: read from" in caplog.text
    assert caplog.messages[-1].endswith("python report.py tokenflow-results")


# ---------------------------------------------------------------- how good it is


def test_the_reconstruction_is_reported_beside_its_bound(clip, tiny_model, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    manifest = read_manifest(invert(clip, tmp_path, tiny_model))
    expected = (
        f"reconstruction PSNR {manifest.psnr:.2f} dB "
        f"(upper bound of the VAE: {manifest.vae_psnr:.2f} dB)"
    )
    assert expected in caplog.text
    assert f"{manifest.psnr_to_vae:.2f} dB against the VAE's" in caplog.text
    assert "image-forwards a frame: 10.0 inversion, 5.0 reconstruction" in caplog.text
    assert "below the VAE's" not in caplog.text


def test_the_three_psnrs_are_of_what_they_say(cache, tiny_model):
    """Whatever the chunks in which they were summed up: here, of two frames."""
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    opened = open_cache(cache)
    frames, manifest = opened.frames(5), opened.manifest
    text = encode_prompts(models, [PROMPT])
    latents = reconstruct(Denoiser(models, text), opened.latents(801, 5), SAMPLING, 5)
    bound, found = (decode_latents(models, x) for x in (opened.latents(CLEAN_LATENTS, 5), latents))
    assert manifest.vae_psnr == pytest.approx(psnr(bound, frames), abs=0.01)
    assert manifest.psnr == pytest.approx(psnr(found, frames), abs=0.01)
    assert manifest.psnr_to_vae == pytest.approx(psnr(found, bound), abs=0.05)


def test_latents_are_written_as_they_are_reached(clip, tiny_model, tmp_path, monkeypatch):
    """A timestep's file is there before the next one is evaluated, and its latents are let go."""
    events, given = [], []

    def spied(*args, **options):
        for t, latents in invert_clip(*args, **options):
            assert sum(reference() is not None for reference in given) <= 1  # the last step's
            given.append(weakref.ref(latents))
            events.append(("reached", str(t)))
            yield t, latents

    def spied_save(path, tensors):
        events.append(("written", path.stem.removeprefix("noisy_latents_")))
        save(path, tensors)

    invert_clip, save = build.invert, build.save_tensors
    monkeypatch.setattr(build, "invert", spied)
    monkeypatch.setattr(build, "save_tensors", spied_save)
    invert(clip, tmp_path, tiny_model, steps=5, n_frames=2)
    ascending = map(str, SAMPLING[::-1])
    expected = [event for t in ascending for event in (("reached", t), ("written", t))]
    assert events == [("written", CLEAN_LATENTS), *expected]


def test_a_cache_can_be_built_with_loaded_models_in_other_batches(
    clip, tiny_model, tmp_path, monkeypatch
):
    models = load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    few = {"n_frames": 2, "steps": 2, "save_steps": 2, "overwrite": ""}
    made = []
    for batch_size in (1, 2):
        words = preprocess_words(clip, tmp_path, tiny_model, **few, batch_size=batch_size)
        folder = preprocess.preprocess(preprocess.parse_args(words), lambda *key: models)
        made.append(read_manifest(folder))
    assert made[0].image_forwards == made[1].image_forwards
    assert made[0].psnr == pytest.approx(made[1].psnr, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "n_frames", "shown"), [("sample", 9, 2), ("sample", 1, 1), ("none", 3, 0)]
)
def test_a_reconstruction_of_some_frames_or_none(
    kind, n_frames, shown, tiny_model, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    clip = make_clip(tmp_path / "clip.mp4", n_frames)
    options = {"n_frames": n_frames, "batch_size": 4}
    full = invert(clip, tmp_path / "full", tiny_model, **options)
    folder = invert(clip, tmp_path / "some", tiny_model, **options, reconstruction=kind)
    whole, some = read_manifest(full), read_manifest(folder)
    assert whole.files.keys() - some.files.keys() == {"inverted.mp4"}
    assert {name: whole.files[name] for name in some.files} == some.files
    assert some.image_forwards == whole.image_forwards | {"reconstruction": 5 * shown}
    assert math.isfinite(some.psnr) == math.isfinite(some.psnr_to_vae) == (shown > 0)
    assert (some.psnr == whole.psnr) == (shown == n_frames)
    assert ("every eighth frame" in caplog.text) == (kind == "sample")
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    serves = invert(clip, tmp_path / "full", tiny_model, **options, reconstruction=kind)
    assert serves == full
    with pytest.raises(UserError, match=f"made with --reconstruction {kind}, full here; edits nee"):
        invert(clip, tmp_path / "some", tiny_model, **options)


# ---------------------------------------------------------------- the fast preset


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (500, 50, 1, 0.0, 50)),
        (["--fast"], (50, 50, 1, 0.0, 50)),
        (["--fast", "--recon_steps", "25"], (50, 50, 1, 0.0, 25)),
    ],
)
def test_fast_is_what_its_help_says(words, expected):
    args = preprocess.parse_args(["--data_path", "clip.mp4", *words])
    names = ("steps", "save_steps", "inversion_iters", "inversion_tol", "recon_steps")
    assert tuple(getattr(args, name) for name in names) == expected
    assert args.batch_size is None


@pytest.mark.parametrize("option", ["steps", "save_steps", "inversion_iters"])
def test_fast_and_what_it_sets_do_not_go_together(option):
    value = str(preprocess_options.FAST[option])  # not even the same value
    with pytest.raises(UserError, match=rf"--fast and --{option} .*: --fast sets --{option}"):
        preprocess.parse_args(["--data_path", "clip.mp4", "--fast", f"--{option}", value])


def test_the_early_stop_inverts_in_few_evaluations(clip, tiny_model, tmp_path):
    stop = {"inversion_iters": 3, "inversion_tol": 1e-3}
    options = {"steps": 50, "save_steps": 50, "n_frames": 2} | stop
    folder = invert(clip, tmp_path, tiny_model, **options)
    assert folder.parent.name == "steps_50"
    manifest = read_manifest(folder)
    assert manifest.image_forwards["reconstruction"] == 50 * 2
    assert 50 * 2 <= manifest.image_forwards["inversion"] < 2.5 * 50 * 2  # of 3 at most
    assert manifest.psnr_to_vae > 50


def test_a_bad_inversion_is_warned_of_and_iterations_mend_it(
    tiny_model, tmp_path, caplog, monkeypatch
):
    """Two steps through all noise levels are far too few, even for a ramp of greys."""
    monkeypatch.setattr(build, "WARN_GAP_DB", 1.0)  # of a random model, 2 to 4 dB
    (tmp_path / "ramp").mkdir()
    ramp = np.tile(np.linspace(0, 237, WIDTH).astype(np.uint8), (HEIGHT, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp" / "0.png")
    found = []
    for iters in (1, 2, 3):
        options = {"n_frames": 1, "steps": 2, "save_steps": 2, "inversion_iters": iters}
        folder = invert(tmp_path / "ramp", tmp_path / str(iters), tiny_model, **options)
        found.append(reconstruction_db(folder))
        if iters == 1:
            gap = read_manifest(folder).vae_psnr - found[0]
            assert gap > 1.0
            assert f"{gap:.1f} dB below the VAE's" in caplog.text
            assert "--inversion_iters 3" in caplog.text
    assert found[0] < min(found[1:])


def test_a_nan_stops_the_inversion_and_names_the_step(clip, tiny_model, tmp_path):
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_tensors(weights)
    tensors["conv_out.bias"][0] = torch.nan
    save_tensors(weights, tensors)
    with pytest.raises(UserError, match=r"timestep 1 is not finite .*--dtype bfloat16 or float32"):
        invert(clip, tmp_path / "latents", broken)
    assert not list(tmp_path.glob("latents/**/manifest.yaml"))


# ---------------------------------------------------------------- a second run


def test_a_second_run_computes_nothing(cache, clip, tiny_model, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    before = contents(cache)
    again = invert(clip, save_dir_of(cache), tiny_model, inversion_prompt=PROMPT, batch_size=5)
    assert again == cache
    assert contents(cache) == before
    assert "already exists with these settings" in caplog.text


@pytest.mark.parametrize(
    ("option", "value", "difference"),
    [
        ("inversion_prompt", "a disc", r"inversion_prompt is 'a star,.*' there, 'a disc' here"),
        ("inversion_iters", 2, "inversion_iters is 1 there, 2 here"),
        ("inversion_tol", 0.1, "inversion_tol is 0.0 there, 0.1 here"),
        ("save_steps", 2, "save_steps is 5 there, 2 here"),
        ("recon_steps", 10, "recon_steps is 5 there, 10 here"),
        ("H", 64, "height is 48 there, 64 here"),
        ("W", 64, "width is 80 there, 64 here"),
        ("fit", "crop", "fit is 'stretch' there, 'crop' here"),
        ("fps", 5, "fps is '25/2' there, '5' here"),
        ("dtype", "bfloat16", "dtype is 'float32' there, 'bfloat16' here"),
    ],
)
def test_other_settings_are_refused(
    cache, clip, tiny_model, monkeypatch, option, value, difference
):
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    before = contents(cache)
    options = {"inversion_prompt": PROMPT, option: value}
    with pytest.raises(UserError, match=rf"made with other settings \({difference}.*--overwrite"):
        invert(clip, save_dir_of(cache), tiny_model, **options)
    assert contents(cache) == before


def test_overwrite_leaves_nothing_of_the_other_cache(cache, clip, tiny_model, tmp_path):
    shutil.copytree(save_dir_of(cache), tmp_path, dirs_exist_ok=True)
    folder = invert(clip, tmp_path, tiny_model, save_steps=2, overwrite="")
    assert folder.relative_to(tmp_path) == cache.relative_to(save_dir_of(cache))
    assert sorted(path.stem for path in (folder / "latents").iterdir()) == sorted(
        ["clean", *(f"noisy_latents_{t}" for t in (901, 501, 1))]
    )
    assert read_manifest(folder).inversion_prompt == ""
    open_cache(folder)


def test_an_interrupted_run_is_unfinished_and_the_next_goes_on(
    cache, clip, tiny_model, tmp_path, monkeypatch
):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            invert(clip, tmp_path, tiny_model, inversion_prompt=PROMPT, batch_size=2)
    assert list(tmp_path.rglob("noisy_latents_*"))  # it was in the middle
    assert not list(tmp_path.rglob("manifest.yaml"))
    with pytest.raises(MissingFileError, match=r"only an unfinished cache .*; run: make it"):
        find_cache(tmp_path / "sd_2.1" / "star", {"steps": None}, 5, lambda _: "run: make it")

    with monkeypatch.context() as patch:
        patch.setattr(build, "encode_frames", interrupt)  # which is behind
        folder = invert(clip, tmp_path, tiny_model, inversion_prompt=PROMPT, batch_size=2)
    found, expected = read_manifest(folder), read_manifest(cache)
    assert found.files == expected.files
    assert found.image_forwards == expected.image_forwards
    assert not list(tmp_path.rglob(".*"))


def test_an_interrupted_overwrite_leaves_the_old_cache_whole(
    cache, clip, tiny_model, tmp_path, monkeypatch
):
    shutil.copytree(save_dir_of(cache), tmp_path, dirs_exist_ok=True)
    folder = tmp_path / cache.relative_to(save_dir_of(cache))
    monkeypatch.setattr(build, "invert", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        invert(clip, tmp_path, tiny_model, overwrite="")
    assert open_cache(folder).manifest == read_manifest(cache)


def test_a_damaged_cache_is_not_called_made(cache, clip, tiny_model, tmp_path):
    shutil.copytree(save_dir_of(cache), tmp_path, dirs_exist_ok=True)
    folder = tmp_path / cache.relative_to(save_dir_of(cache))
    (folder / "latents" / "noisy_latents_1.safetensors").unlink()
    with pytest.raises(MissingFileError, match=r"noisy_latents_1.* missing; .*--overwrite"):
        invert(clip, tmp_path, tiny_model, inversion_prompt=PROMPT)


# ---------------------------------------------------------------- kinds of clips


def test_a_davis_folder(tiny_model, tmp_path):
    images = make_image_folder(tmp_path / "JPEGImages" / "480p" / "bear", n_frames=3)
    folder = invert(images, tmp_path / "latents", tiny_model, n_frames=3)
    parent = tmp_path / "latents" / "sd_2.1" / "bear" / "steps_10"
    assert folder.parent == parent and folder.name.startswith("nframes_3-")
    assert read_manifest(folder).fps == "24"
    first = np.asarray(Image.open(images / "00000.jpg"))
    assert np.array_equal(load_frames(folder / "frames", 1)[0], first)


def test_a_short_clip_uses_what_there_is(clip, tiny_model, tmp_path, caplog):
    folder = invert(clip.with_suffix(""), tmp_path, tiny_model, n_frames=40, steps=5)
    assert folder.name.startswith("nframes_6-")
    assert "40 frames requested, only 6 available" in caplog.text
    manifest = read_manifest(folder)
    assert (manifest.n_frames, manifest.frames_asked) == (6, 40)


def test_start_stride_and_frame_rate(clip, tiny_model, tmp_path):
    options = {"frame_start": 1, "frame_stride": 2, "n_frames": 2, "steps": 5}
    folder = invert(clip, tmp_path, tiny_model, **options)
    every = read_clip(clip, 6, size=(HEIGHT, WIDTH)).frames
    assert np.array_equal(load_frames(folder / "frames"), every[[1, 3]])
    assert video_facts(folder / "inverted.mp4")[:2] == (2, Fraction(25, 4))

    folder = invert(clip, tmp_path / "slow", tiny_model, **options, fps="30000/1001")
    assert video_facts(folder / "inverted.mp4")[:2] == (2, Fraction(30000, 1001))


# ---------------------------------------------------------------- kinds of models


def noisiest(folder):
    return open_cache(folder).latents(901, 5)


def test_canny_conditions_the_inversion(cache, clip, tiny_model, tmp_path):
    def inverted(scale):
        key = {"sd_version": "ControlNet", "controlnet_key": tiny_model / "controlnet"}
        key |= {"controlnet_scale": scale, "inversion_prompt": PROMPT}
        return invert(clip, tmp_path / str(scale), tiny_model, **key)

    folder = inverted(1.0)
    assert folder.relative_to(tmp_path / "1.0").parts[0] == "sd_ControlNet"
    control = read_manifest(folder).control
    assert (control.kind, control.scale, control.low, control.high) == ("canny", 1.0, 100, 200)
    assert not (folder / "depth.safetensors").exists()
    plain = noisiest(cache)
    assert (noisiest(folder) - plain).abs().max() > 1e-2
    torch.testing.assert_close(noisiest(inverted(0.0)), plain, rtol=1e-3, atol=1e-3)


def test_depth_control_keeps_the_depth(clip, tiny_model, tmp_path):
    folder = invert(
        clip,
        tmp_path,
        tiny_model,
        sd_version="ControlNet",
        control="depth",
        controlnet_key=tiny_model / "controlnet",
        depth_model=tiny_model / "depth_estimator",
    )
    manifest = read_manifest(folder)
    assert manifest.control.kind == "depth"
    assert manifest.depth_model == str(tiny_model / "depth_estimator")
    assert open_cache(folder).depth(3).shape == (3, 1, HEIGHT, WIDTH)


def test_the_depth_model_gets_depth_normalised_over_the_clip(tiny_depth_model, tmp_path):
    frames = make_image_folder(tmp_path / "clip", n_frames=3)
    Image.new("RGB", (WIDTH, HEIGHT)).save(frames / "00001.jpg")  # one of another range
    estimator = tiny_depth_model / "depth_estimator"
    folder = invert(frames, tmp_path / "latents", tiny_depth_model, depth_model=estimator)
    depth = open_cache(folder).depth(3)
    assert depth.shape == (3, 1, HEIGHT, WIDTH)
    assert (depth.min(), depth.max()) == (0, 1)
    spans = depth.amax((1, 2, 3)) - depth.amin((1, 2, 3))
    assert spans.min() < 0.99  # per frame, each would be 1
    assert read_manifest(folder).depth_model == str(estimator)


def test_a_v_prediction_model_inverts(clip, tiny_v_model, tmp_path):
    folder = invert(clip, tmp_path, tiny_v_model)
    manifest = read_manifest(folder)
    assert manifest.vae_psnr - manifest.psnr < build.WARN_GAP_DB
    assert 0.4 < noisiest(folder).std() < 1.6


def test_bfloat16(cache, clip, tiny_model, tmp_path):
    folder = invert(clip, tmp_path, tiny_model, dtype="bfloat16", inversion_prompt=PROMPT)
    assert read_manifest(folder).dtype == "bfloat16"
    difference = (noisiest(folder) - noisiest(cache)).abs().mean()
    assert 1e-4 < difference < 0.2  # of latents of unit variance: near, and not float32


# ---------------------------------------------------------------- bad command lines


@pytest.fixture
def bad(tmp_path, monkeypatch, clip, tiny_model):
    """A folder with things that cannot be edited, and nothing that loads a model."""
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "notes.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    sizes = make_image_folder(tmp_path / "sizes", n_frames=2)
    Image.new("RGB", (WIDTH, WIDTH)).save(sizes / "00002.jpg")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        container.add_stream("aac", rate=8000, layout="mono")
        container.start_encoding()
    make_clip(tmp_path / "fast.mp4", 2, fps=2000)
    half = shutil.copytree(tiny_model, tmp_path / "half_model")
    (half / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    edit_json(tiny_model, tmp_path / "inpainting", "unet/config.json", in_channels=9)
    scheduler = "scheduler/scheduler_config.json"
    edit_json(tiny_model, tmp_path / "sampler", scheduler, prediction_type="sample")
    zero_snr = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    edit_json(tiny_model, tmp_path / "zero_snr", scheduler, **zero_snr)
    monkeypatch.chdir(tmp_path)
    return {"data_path": clip, "model_key": tiny_model, "device": "cpu", "save_dir": "latents"}


def edit_json(model, folder, name, **values):
    """Copy a checkpoint with some values of one of its JSON files changed."""
    path = shutil.copytree(model, folder) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


CONTROL = {"sd_version": "ControlNet"}

BAD_OPTIONS = [
    ({"data_path": None}, "--data_path"),
    ({"data_path": "nowhere/clip.mp4"}, r"nowhere/clip\.mp4: no such video"),
    ({"data_path": "notes.mp4"}, r"notes\.mp4: not a video"),
    ({"data_path": "sound.mp4"}, r"sound\.mp4: (has no|not a) video"),
    ({"data_path": "empty"}, "empty: holds no images"),
    ({"data_path": "sizes"}, r"images of different sizes: .*80x48.* and .*80x80"),
    ({"data_path": "fast.mp4"}, r"fast\.mp4: 2000 frames per second, at most 1000 .* --fps 30"),
    ({"n_frames": 0}, "--n_frames: 0, expected at least 1 and at most 1000000"),
    ({"frame_start": 6}, r"star\.mp4: start 6 is beyond the end: the clip has 6 frames"),
    ({"H": 65, "W": 80}, "--H: 65, expected a multiple of 8"),
    ({"H": 64, "W": 4}, "--W: 4, expected a multiple of 8"),
    ({"H": 64}, "--H and --W: give both or neither"),
    ({"fit": "pad"}, "--fit.*'pad'.*stretch.*crop"),
    ({"fps": 0}, "--fps: '0', expected"),
    ({"steps": 2000, "save_steps": 5}, "2000 steps are more than the model's 1000"),
    ({"steps": 500, "save_steps": 3}, "--save_steps: 3 does not divide --steps 500"),
    ({"steps": 300, "save_steps": 50}, "--save_steps: 50: its timesteps are not among"),
    ({"recon_steps": 7}, "--recon_steps: 7 does not divide --steps 500"),
    ({"inversion_tol": -0.1}, "--inversion_tol: -0.1, expected at least 0 and less than 1"),
    ({"fast": "", "steps": 100}, "--fast and --steps 100: --fast sets --steps 50"),
    ({"batch_size": "all"}, "--batch_size: 'all', expected auto or a whole number"),
    ({"model_key": "nowhere"}, "nowhere: no such folder.*--model_key"),
    ({"model_key": "no/such/folder"}, "no/such/folder: no such folder, and not a hub id"),
    ({"model_key": "half_model"}, r"half_model: .*vae/diffusion_pytorch_model\.safetensors"),
    ({"model_key": "inpainting"}, "inpainting: .* 9 channels"),
    ({"model_key": "sampler"}, "prediction_type sample"),
    ({"model_key": "zero_snr"}, "--steps: 500 reaches timestep 999.*pure noise"),
    ({"device": "cuda"}, r"device: cuda was asked for.* 0 CUDA.*--device cpu"),
    ({"device": "cuda:99"}, "device: cuda:99 was asked for.*--device cpu"),
    ({"device": "toaster"}, "device: toaster is unknown, expected auto, cpu, cuda"),
    ({"device": "meta"}, "device: meta is unknown, expected auto, cpu, cuda"),
    ({**CONTROL, "controlnet_key": "nowhere"}, "nowhere: no such folder"),
    ({**CONTROL, "controlnet_key": "empty"}, r"empty: .*config\.json is missing"),
    ({**CONTROL, "canny_low": 201}, "canny_low: 201 is above canny_high: 200"),
    ({**CONTROL, "control": "depth", "depth_model": "nowhere"}, "nowhere: no such folder"),
    ({"save_dir": "notes.mp4"}, r"--save_dir: .*notes\.mp4"),
    ({"n_frame": 3}, "--n_frame"),  # no abbreviations
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=[" ".join(arguments(o)) for o, _ in BAD_OPTIONS]
)
def test_a_bad_command_line_is_one_line_and_writes_nothing(
    bad, tmp_path, tiny_model, options, message
):
    if "controlnet_key" not in options and options.get("sd_version") == "ControlNet":
        options = {"controlnet_key": tiny_model / "controlnet", **options}
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        preprocess.main(arguments({**bad, **options}))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------- the features of edits


def features_of(folder):
    return find_features(open_cache(folder))


def test_features_are_cached_by_default(tiny_model, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4")
    folder = invert(clip, tmp_path / "latents", tiny_model, cache_features="", keyframe_interval=2)
    settings = features_of(folder).settings
    assert settings.model_dump() == {
        "n_frames": 5,
        "keyframe_interval": 2,
        "keyframe_seed": 1,
        "n_timesteps": 5,
        "attention_steps": 2,
        "feature_steps": 4,
        "dtype": "float32",
        "save_tokens": "keyframes",
        "correspondence": "nn",
    }
    args = ["--data_path", str(clip)]
    assert preprocess.parse_args(args).cache_features
    assert not preprocess.parse_args([*args, "--no_cache_features"]).cache_features
    record = load_yaml(folder / "features" / "manifest.yaml")
    assert record["image_forwards"] == 5 * (5 + 3)  # steps x (frames + keyframes)
    assert record["seconds"] > 0


def test_features_are_added_to_a_cache_that_is_there_and_made_once(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO")
    clip = make_clip(tmp_path / "clip.mp4")
    folder = invert(clip, tmp_path / "latents", tiny_model)
    assert features_of(folder) is None
    manifest = (folder / "manifest.yaml").read_bytes()
    invert(clip, tmp_path / "latents", tiny_model, cache_features="")
    assert features_of(folder) is not None
    assert (folder / "manifest.yaml").read_bytes() == manifest  # the inversion was not made again
    assert "source features: " in caplog.text  # their size, beforehand

    before = contents(folder)
    invert(clip, tmp_path / "latents", tiny_model, cache_features="")
    # Fewer injected steps are served by what is there.
    invert(clip, tmp_path / "latents", tiny_model, cache_features="", pnp_attn_t=0.2)
    assert contents(folder) == before
    invert(clip, tmp_path / "latents", tiny_model, cache_features="", pnp_attn_t=1)
    assert "computed again: attention_steps is 2 there, 5 here" in caplog.text
    assert features_of(folder).settings.attention_steps == 5


def test_a_disk_without_room_is_an_error_before_the_work(tiny_model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(build, "load_stable_diffusion", no_model_may_load)
    clip = make_clip(tmp_path / "clip.mp4")
    with pytest.raises(UserError, match=r"needed, 0\.1 MB are free; .*or --no_cache_features"):
        invert(clip, tmp_path / "latents", tiny_model, cache_features="")
