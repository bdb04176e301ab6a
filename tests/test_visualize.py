"""visualize.py: its commands on the tiny model."""

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

import run_tokenflow_pnp
import run_tokenflow_sdedit
import tokenflow_utils
import visualize
from tests.helpers import (
    HEIGHT,
    WIDTH,
    contents,
    edit,
    invert,
    make_clip,
    no_model_may_load,
    pictures_of,
    video_facts,
)
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion import vae
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.editing import loop
from tokenflow.editing.results import read_result
from tokenflow.figures import drawing, features
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from tokenflow_utils import TokenFlowContext, tokenflow_patch
from util import UserError

N_FRAMES, STEPS, INTERVAL = 5, 5, 3
FPS = Fraction(10)
SOURCE_PROMPT = "a disc on a wall"
THE_ONLY = torch.zeros(1, 1, dtype=torch.long)  # keyframe, of the only frame
KEY = "up_blocks.2.attentions.1.transformer_blocks.0.attn1.processor"


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------- real results


@pytest.fixture(scope="module")
def place(tiny_model, tmp_path_factory):
    """A folder with two clips and their caches."""
    folder = tmp_path_factory.mktemp("place")
    options = {"inversion_prompt": SOURCE_PROMPT, "recon_steps": 1}
    invert(
        make_clip(folder / "star.mp4", N_FRAMES, 0, FPS), folder / "latents", tiny_model, **options
    )
    options = {"n_frames": 1, "steps": 1, "save_steps": 1}
    invert(make_clip(folder / "other.mp4", 1, 1), folder / "latents", tiny_model, **options)
    return folder


def edited(script, place, model, **changes):
    """Makes a result; returns its folder and the keyframes of the steps that it took."""
    keyframes = []
    step = loop.tokenflow_step

    def noted(edit, source, context, x, t, chosen, *arguments):
        keyframes.append(chosen.tolist())
        return step(edit, source, context, x, t, chosen, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "tokenflow_step", noted)
        return edit(script, place / "star.mp4", model, **changes), keyframes


@pytest.fixture(scope="module")
def edits(place, tiny_model):
    """Results and the keyframes that they were made with."""
    pnp, sdedit = (run_tokenflow_pnp, place, tiny_model), (run_tokenflow_sdedit, place, tiny_model)
    return {
        "tokenflow": edited(*pnp),
        "per_frame": edited(*pnp, consistency="none"),
        "fixed": edited(*pnp, keyframes="fixed"),
        "sdedit": edited(*sdedit, start=0.6),
        "released": edited(*sdedit, start=0.6, propagation="released"),
    }


@pytest.fixture(scope="module")
def results(edits):
    return {name: folder for name, (folder, _) in edits.items()}


@pytest.fixture
def cache(results):
    return open_cache(read_result(results["tokenflow"]).cache().folder)


def view_of(cache, **options):
    """What features are taken with."""
    return features.View(features.ViewOptions(device="cpu", **options), cache)


@pytest.fixture
def seen(monkeypatch):
    """The models that are loaded, each with the state of its UNet at that time."""
    loaded = []
    load = features.load_stable_diffusion

    def keep(*args):
        models = load(*args)
        loaded.append((models.unet, unet_state(models.unet)))
        return models

    monkeypatch.setattr(features, "load_stable_diffusion", keep)
    return loaded


def unet_state(unet):
    """All that a patch or a hook would change."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in unet.named_modules()
    ]
    return hooks, {name: id(processor) for name, processor in unet.attn_processors.items()}


def assert_unpatched(seen):
    ((unet, before),) = seen
    assert unet_state(unet) == before


# ---------------------------------------------------------------- features


def test_tokens_are_what_tokenflow_matches_and_propagates(cache):
    """Input tokens are phi of a source pass, outputs are what it would propagate."""
    view = view_of(cache)
    assert (view.layer, view.grid) == (KEY, (3, 5))
    denoiser = view.source_denoiser([0, 3])
    noisy = cache.latents(view.timestep, N_FRAMES)[[0, 3]]
    context = TokenFlowContext(propagate_source=True)
    with torch.inference_mode(), tokenflow_patch(view.models.unet, context):
        denoiser(noisy, view.timestep, torch.arange(2))
    given = view.source_tokens([0, 3])
    assert relative_error(given, context.tokens[KEY]) < 1e-5
    returned = view_of(cache, what="output").source_tokens([0, 3])
    assert relative_error(returned, context.source_base[KEY][0]) < 1e-5
    assert relative_error(returned, given) > 0.1
    one_by_one = view_of(cache, batch_size=1).source_tokens([0, 3])
    assert relative_error(one_by_one, given) < 1e-5


def test_an_edit_that_is_the_source_has_the_source_s_tokens(cache):
    """Encoding, inversion and prompt are the same for both, at cached timesteps and others."""
    timesteps = [cache.manifest.timesteps[-2], view_of(cache).inversion[1]]
    assert timesteps[1] not in cache.manifest.timesteps
    for timestep in timesteps:
        view = view_of(cache, timestep=timestep)
        source = view.source_tokens(range(N_FRAMES))
        frames = cache.frames(N_FRAMES)
        same = view.edit_tokens(frames, SOURCE_PROMPT)
        assert relative_error(same, source) < 1e-4
        assert relative_error(view.edit_tokens(frames, "a wolf"), source) > 1e-3


@pytest.mark.parametrize("saved", [True, False])
def test_the_source_s_cached_latents_are_used_where_there_are_any(
    results, cache, tmp_path, monkeypatch, saved
):
    inverted_prompts = []
    monkeypatch.setattr(
        features, "invert", lambda *args: inverted_prompts.append(args) or [(timestep, args[1])]
    )
    timestep = cache.manifest.timesteps[1] if saved else view_of(cache).inversion[1]
    visualize.main([
        "features", "--result", str(results["tokenflow"]), "--out", str(tmp_path),
        "--device", "cpu", "--timestep", str(timestep),
    ])  # fmt: skip
    assert len(inverted_prompts) == (1 if saved else 2)
    for args in inverted_prompts:
        assert args[2] == sorted(args[2])
        assert args[2][-1] == timestep


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a command saves, by file name."""
    figures, save = {}, drawing.save_figure

    def keep(path, figure):
        figures[path.name] = figure
        return save(path, figure)

    monkeypatch.setattr(drawing, "save_figure", keep)
    return figures


def test_figure_2(results, cache, place, tmp_path, seen, drawn, capsys):
    before = contents(place)
    out = tmp_path / "new" / "folder"
    words = ["features", "--result", str(results["tokenflow"]), "--per_frame"]
    words += [str(results["per_frame"]), "--columns", "3", "--row", "20", "--device", "cpu"]
    written = visualize.main([*words, "--out", str(out)])
    assert_unpatched(seen)
    assert contents(place) == before  # results and caches are only read
    assert [path.name for path in written] == ["features.png", "features_xt.png", "features.mp4"]
    assert {path.name for path in out.iterdir()} == {path.name for path in written}
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"wrote {path}" for path in written]

    view = view_of(cache)
    videos = [cache.frames(N_FRAMES)]
    tokens = [view.source_tokens(range(N_FRAMES))]
    for name in ("per_frame", "tokenflow"):
        videos.append(load_frames(results[name] / "frames", N_FRAMES))
        tokens.append(view.edit_tokens(videos[-1], "a green star"))
    colours, _ = features.feature_colours(tokens, (3, 5), (HEIGHT, WIDTH))
    rows = [shown for pair in zip(videos, colours, strict=True) for shown in pair]

    assert np.array_equal(
        pictures_of(drawn["features.png"]), [row[i] for row in rows for i in (0, 2, 4)]
    )
    labels = [axis.get_ylabel() for axis in drawn["features.png"].axes[::3]]
    assert labels[:3] == ["source", "source\nfeatures", "PnP\nper frame"]
    shown = pictures_of(drawn["features_xt.png"])
    assert np.array_equal(shown, [drawing.xt_slice(row, 20) for row in rows])
    for name in ("features.png", "features_xt.png"):
        assert Image.open(out / name).width > 2 * 256

    with_all = video_facts(out / "features.mp4")
    assert with_all[:2] == (N_FRAMES, FPS)
    assert with_all[2][0] > 2 * HEIGHT
    assert with_all[2][1] > 3 * WIDTH


def test_two_results_of_one_kind_are_two_rows(results, tmp_path, drawn):
    words = ["features", "--out", str(tmp_path), "--device", "cpu", "--n_frames", "1"]
    other = shutil.copytree(results["tokenflow"], tmp_path / "other")
    shutil.copy(results["sdedit"] / "frames" / "00000.png", other / "frames")
    visualize.main([*words, "--result", str(results["tokenflow"]), "--per_frame", str(other)])
    _, _, second, _, third, _ = pictures_of(drawn["features.png"])
    for picture, folder in ((second, other), (third, results["tokenflow"])):
        assert np.array_equal(picture, load_frames(folder / "frames", 1)[0])


def test_the_unet_is_unpatched_after_an_error(results, tmp_path, seen, monkeypatch):
    def fail(*args):
        unet = seen[0][0]
        failed.append(unet_state(unet) != seen[0][1])
        raise ZeroDivisionError

    common = ["--result", str(results["tokenflow"]), "--out", str(tmp_path), "--device", "cpu"]
    for command, target, name in (
        (["features"], Denoiser, "__call__"),
        (["features", "--what", "output"], Denoiser, "__call__"),
        (["correspondence", "--frame", "0", "--keyframe", "1"], features, "ddim_step"),
    ):
        seen.clear()
        failed = []
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fail)
            with pytest.raises(ZeroDivisionError):
                visualize.main([*command, *common])
        assert failed == [True]  # it was patched at that time
        assert_unpatched(seen)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- correspondence


def test_a_frame_rebuilt_from_itself_is_its_own_reconstruction(cache, monkeypatch):
    view = view_of(cache)
    calls = []
    attend = tokenflow_utils.extended_attention
    monkeypatch.setattr(
        tokenflow_utils, "extended_attention", lambda *args: calls.append(args) or attend(*args)
    )

    def rebuild(*chosen):
        denoiser = view.source_denoiser(chosen)
        start = cache.latents(view.sampling[0], N_FRAMES)[list(chosen)]
        own = reconstruct(denoiser, start, view.sampling, batch_size=1)[:1]
        return features.rebuilt_from_keyframe(denoiser, start, view.sampling), own

    same, own = rebuild(3, 3)
    assert relative_error(same, own) < 1e-5
    # Attention is computed for the keyframe alone, at all layers and steps.
    assert len(calls) == STEPS * len(tokenflow_utils.self_attention_layers(view.models.unet))
    other, own_too = rebuild(3, 0)
    assert torch.equal(own, own_too)
    assert relative_error(other, own) > 1e-3


@pytest.mark.parametrize("kind", ["depth", "canny"])
def test_the_inversion_s_conditions_hold(tiny_model, tiny_depth_model, tmp_path, kind):
    """Depth maps and a ControlNet's pictures are of the frames that are looked at."""
    options = {
        "depth": {"sd_version": "depth", "depth_model": tiny_model / "depth_estimator"},
        "canny": {"sd_version": "ControlNet", "controlnet_key": tiny_model / "controlnet"},
    }[kind]
    model = tiny_depth_model if kind == "depth" else tiny_model
    clip = make_clip(tmp_path / "clip.mp4", 4)
    options |= {"n_frames": 4, "steps": 4, "save_steps": 2, "inversion_prompt": SOURCE_PROMPT}
    cache = open_cache(invert(clip, tmp_path / "latents", model, **options))
    view = view_of(cache)
    together = view.source_tokens(range(4))
    assert relative_error(view.source_tokens([3, 1]), together[[3, 1]]) < 1e-5
    same = view.edit_tokens(cache.frames(4), SOURCE_PROMPT)
    assert relative_error(same, together) < 1e-4
    denoiser = view.source_denoiser([3, 3])
    start = cache.latents(view.sampling[0], 4)[[3, 3]]
    own = reconstruct(denoiser, start, view.sampling, batch_size=1)[:1]
    assert (
        relative_error(features.rebuilt_from_keyframe(denoiser, start, view.sampling), own) < 1e-5
    )


@pytest.mark.parametrize("by", ["result", "cache"])
def test_figure_3(results, cache, place, tmp_path, seen, drawn, capsys, by):
    before = contents(place)
    folder = results["tokenflow"] if by == "result" else cache.folder
    words = ["correspondence", f"--{by}", str(folder), "--frame", "4", "--keyframe", "1"]
    (path,) = visualize.main([*words, "--out", str(tmp_path), "--device", "cpu"])
    assert_unpatched(seen)
    assert contents(place) == before
    assert path == tmp_path / "correspondence.png"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "PSNR to frame 4:"
    assert shown[-1] == f"wrote {path}"
    assert len(shown) == 6

    view = view_of(cache)
    tokens = view.source_tokens([4, 1])
    match = nearest_tokens(tokens[:1], tokens[1:], THE_ONLY)[0, 0].numpy()
    field = features.displacements(match, (3, 5), (HEIGHT, WIDTH))
    frames = cache.frames(N_FRAMES)
    figure = drawn["correspondence.png"]
    shown_pictures = pictures_of(figure)
    moved = features.warp_by_cells(frames[1], field)
    for number, expected in ((0, frames[4]), (1, frames[1]), (4, moved)):
        assert np.array_equal(shown_pictures[number], expected)
    warped = vae.psnr(features.warp_by_cells(frames[1], field), frames[4])
    (line,) = (line for line in shown if "(a)" in line)
    assert line.endswith(f" {warped:.2f} dB")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[4] == f"(a) keyframe's pixels\nPSNR: {warped:.2f} dB"
    assert titles[5].startswith("(b) where cells of frame 4")


def test_a_frame_from_itself_on_the_command_line(results, tmp_path, capsys):
    words = ["correspondence", "--result", str(results["tokenflow"]), "--frame", "2"]
    visualize.main([*words, "--keyframe", "2", "--out", str(tmp_path), "--device", "cpu"])
    scores = dict(
        line.strip().rsplit("  ", 1) for line in capsys.readouterr().out.splitlines()[1:5]
    )
    scores = {name.strip(): score.strip() for name, score in scores.items()}
    assert scores["keyframe 2"] == scores["(a) keyframe's pixels"] == "identical"
    assert scores["own reconstruction"] == scores["(c) keyframe's tokens"]


# ---------------------------------------------------------------- keyframes


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("tokenflow", 1),
        ("fixed", 1),
        ("sdedit", 3),  # 0.6 of 5 steps: the last 3
        ("released", 4),  # timesteps[int(1 - 0.6 * 5) :]: the last 2
    ],
)
def test_keyframes_are_those_that_the_edit_used(
    edits, tmp_path, monkeypatch, drawn, capsys, name, first
):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    folder, used = edits[name]
    (path,) = visualize.main(["keyframes", "--result", str(folder), "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {path}\n"
    expected = np.zeros((len(used), N_FRAMES), bool)
    for row, frames in zip(expected, used, strict=True):
        row[frames] = True
    (image,) = drawn[path.name].axes[0].images
    assert np.array_equal(image.get_array(), expected)
    assert tuple(image.get_extent())[2:] == (STEPS + 0.5, first - 0.5)
    assert len(used) == STEPS + 1 - first
    assert (expected.sum(axis=1) == 2).all()
    assert (len({tuple(frames) for frames in used}) > 1) == (name != "fixed")
    kind = "fixed" if name == "fixed" else "random"
    schedule = tokenflow_utils.keyframe_schedule(N_FRAMES, INTERVAL, STEPS, 1, kind)
    # The published code draws from the first step that it takes.
    drawn = schedule[: len(used)] if name == "released" else schedule[-len(used) :]
    assert drawn.tolist() == used


# ---------------------------------------------------------------- bad input

BAD_OPTIONS = [
    (
        "features --layer up_blocks.9",
        "--layer: up_blocks.9 is unknown, .*up_blocks.2.attentions.1",
    ),
    (f"features --layer {KEY.replace('attn1', 'attn2')}", "--layer: .*attn2.* is unknown"),
    ("features --timestep 7", "--timestep: 7 is none of the 10 .* nearest is 1;"),
    (f"features --row {HEIGHT}", "--row: 48, expected 0 to 47"),
    ("features --row -1", "--row: -1, expected 0 to 47"),
    ("features --columns 0", "--columns: 0, expected"),
    ("features --n_frames 0", "--n_frames: 0, expected"),
    ("features --n_frames 6", "--n_frames: 6, but there are only 5"),
    ("features --batch_size 0", "--batch_size: 0, expected"),
    ("features --device tpu", "device: tpu is unknown"),
    ("features --what query", "--what"),
    ("features --model_key /nowhere", "/nowhere"),
    ("features --model_key {other_model}", "not the model that"),
    ("features --out {file}", "--out: .* is a file"),
    ("features --result {file}", "has no config.yaml; expected the folder of a finished result"),
    ("correspondence --frame 5 --keyframe 1", "--frame: 5, expected 0 to 4"),
    ("correspondence --frame 0 --keyframe -1", "--keyframe: -1, expected 0 to 4"),
    ("correspondence --frame 0", "--keyframe"),
    ("correspondence --frame 0 --keyframe 1 --cache x", "--cache and --result: give one of them"),
    ("correspondence --frame 0 --keyframe 1 --result {file}", "has no config.yaml"),
    ("keyframes --layer x", "unrecognized"),
    ("keyframes --out {file}", "--out: .* is a file"),
    ("keyframes --result {file}", "has no config.yaml"),
    ("keyframes --result {per_frame}", "consistency: none, which has no keyframes"),
]


@pytest.mark.parametrize(("words", "message"), BAD_OPTIONS)
def test_a_bad_option_is_named(results, tiny_depth_model, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    file = tmp_path / "file"
    file.touch()
    places = {"file": file, "other_model": tiny_depth_model, "per_frame": results["per_frame"]}
    words = words.format(**places).split()
    words += [] if "--out" in words else ["--out", str(tmp_path / "out")]
    words += [] if "--result" in words else ["--result", str(results["tokenflow"])]
    with pytest.raises(UserError, match=message):
        visualize.main(words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_short_names_and_keys_name_the_same_layer(cache):
    for name in (KEY, KEY.removesuffix(".transformer_blocks.0.attn1.processor")):
        assert view_of(cache, layer=name).layer == KEY


def changed(result, folder, **values):
    """A copy of a result with other values in run.yaml."""
    copy = shutil.copytree(result, folder)
    save_yaml(copy / "run.yaml", {**load_yaml(copy / "run.yaml"), **values})
    return copy


def test_an_unfinished_cache_is_refused(tmp_path):
    words = f"correspondence --cache {tmp_path} --frame 0 --keyframe 1 --out {tmp_path / 'out'}"
    with pytest.raises(UserError, match=r"manifest.yaml: no such file"):
        visualize.main(words.split())


def test_results_that_do_not_go_together_are_refused(results, place, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)

    def refused(per_frame, message):
        words = ["features", "--result", str(results["tokenflow"]), "--per_frame", str(per_frame)]
        with pytest.raises(UserError, match=message):
            visualize.main([*words, "--out", str(tmp_path / "out")])

    other = open_cache(next(place.glob("latents/*/other/*/*")))
    sha256 = other.sha256
    values = {"cache": str(other.folder), "cache_sha256": sha256}
    foreign = changed(results["per_frame"], tmp_path / "foreign", **values)
    refused(foreign, "a result of another clip .*source_sha256")
    short = changed(results["per_frame"], tmp_path / "short", n_frames=3)
    refused(short, "choose a common part: --n_frames 3")
    incomplete = shutil.copytree(results["per_frame"], tmp_path / "incomplete")
    (incomplete / "frames" / "00004.png").unlink()
    refused(incomplete, "00004.png: no such frame")


def test_results_without_keyframes_are_refused(results, tmp_path):
    baseline = changed(results["tokenflow"], tmp_path / "b", technique="reconstruction")
    with pytest.raises(UserError, match="a result of reconstruction, which has no keyframes"):
        visualize.main(["keyframes", "--result", str(baseline), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("command", [[], ["features"], ["correspondence"], ["keyframes"]])
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as left:
        visualize.main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: " in capsys.readouterr().out
