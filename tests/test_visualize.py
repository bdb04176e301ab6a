"""The paper's figures: their mathematics by hand, and the commands on the tiny model."""

import io
import shutil
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import run_tokenflow_pnp
import run_tokenflow_sdedit
import tokenflow_utils
import visualize
from run_tokenflow_pnp import PnPConfig
from run_tokenflow_sdedit import SDEditConfig
from tests.helpers import (
    HEIGHT,
    WIDTH,
    contents,
    invert,
    make_clip,
    no_model_may_load,
    shapes_frames,
    video_facts,
)
from tokenflow.cache.source_cache import open_cache
from tokenflow.diffusion import vae
from tokenflow.diffusion.denoiser import Denoiser
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.editing import loop
from tokenflow.editing.results import read_result
from tokenflow.figures import features, paper_figures
from tokenflow.figures.drawing import (
    draw_field,
    draw_lengths,
    draw_wheel,
    field_colours,
    keyframe_figure,
    longest_shown,
    picture_grid,
    png,
    xt_slice,
)
from tokenflow.figures.features import (
    ViewOptions,
    cells_to_pixels,
    component_colours,
    displacements,
    feature_colours,
    principal_components,
    rebuilt_from_keyframe,
    recorded_tokens,
    source_denoiser,
    token_grid,
    warp_by_cells,
)
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.storage.images import load_frames
from tokenflow.storage.schema import load_config
from tokenflow_utils import TokenFlowContext, tokenflow_patch
from util import UserError, command_line, load_yaml, save_yaml

N_FRAMES, STEPS, INTERVAL = 5, 5, 3
FPS = Fraction(10)
SOURCE_PROMPT = "a disc on a wall"
THE_ONLY = torch.zeros(1, 1, dtype=torch.long)  # keyframe, of the only frame
KEY = "up_blocks.2.attentions.1.transformer_blocks.0.attn1.processor"


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------- principal components


def plane(seed=0, n=400):
    """Tokens on a plane in 6 dimensions: (tokens, mean, the plane's two directions)."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.tensor([1.0, -2.0, 0.0, 5.0, 0.0, 3.0])
    long = torch.tensor([0.0, -0.8, 0.0, 0.6, 0.0, 0.0])  # its entry of largest magnitude is < 0
    short = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    along = torch.randn(n, 2, generator=generator)
    along = torch.linalg.qr(along - along.mean(0))[0] * n**0.5  # uncorrelated, of variance 1
    return mean + 3.0 * along[:, :1] * long + along[:, 1:] * short, mean, long, short


def test_components_of_a_known_plane():
    tokens, mean, long, short = plane()
    found = principal_components(tokens, 2)
    assert torch.allclose(found.mean, mean.double(), atol=1e-5)
    expected = torch.stack([-long, short], dim=1).double()  # by variance; largest entries positive
    assert torch.allclose(found.basis, expected, atol=1e-5)
    assert torch.allclose(found.explained, torch.tensor([0.9, 0.1]).double(), atol=1e-5)
    coordinates = found.project(tokens[None])
    assert coordinates.shape == (1, 400, 2)
    assert coordinates.dtype == torch.float32
    again = found.mean + coordinates[0].double() @ found.basis.T
    assert torch.allclose(again, tokens.double(), atol=1e-5)


def test_components_do_not_depend_on_the_order_or_the_sign_of_tokens():
    tokens, *_ = plane()
    found = principal_components(tokens, 2).basis
    assert torch.equal(found, principal_components(tokens, 2).basis)
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))]
    assert torch.allclose(found, principal_components(shuffled, 2).basis, atol=1e-9)
    assert torch.allclose(found, principal_components(-tokens, 2).basis, atol=1e-9)


def test_components_of_more_tokens_than_are_held_in_float64_at_once():
    tokens = plane(n=1000)[0].repeat(70, 1)
    found, few = principal_components(tokens, 2), principal_components(tokens[:1000], 2)
    assert torch.allclose(found.basis, few.basis, atol=1e-9)
    assert torch.allclose(found.project(tokens)[-1000:], few.project(tokens[:1000]), atol=1e-5)


def test_equal_tokens_have_a_colour_too():
    colours, explained = feature_colours([torch.ones(1, 4, 5)], (2, 2), (4, 4))
    assert (colours[0] == colours[0][0, 0, 0]).all()
    assert explained == pytest.approx(0.0)


def test_the_first_component_is_the_brightest_channel():
    ramp = np.zeros((101, 3))
    ramp[:, 0] = np.arange(101)  # of the first component
    colours = component_colours(ramp).astype(int)
    assert (np.diff(colours[:, 1]) >= 0).all()
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[-1].tolist() == [0, 255, 0]
    assert component_colours(ramp[:, ::-1])[-1].tolist() == [0, 0, 255]
    assert component_colours(ramp[:, [1, 0, 2]])[-1].tolist() == [255, 0, 0]
    assert colours[50, 1] == pytest.approx(128, abs=1)


def test_colours_of_all_videos_are_of_one_basis_and_scale():
    """Whichever video a token is in, it has the same colour; two scales or bases would differ."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3, 6, 8, generator=generator)
    other = 5 * other
    other[1, 4] = one[2, 0]
    (a, b), explained = feature_colours([one, other], (2, 3), (4, 6))
    assert a.shape == b.shape == (3, 4, 6, 3)
    assert (a[2, 0, 0] == b[1, 2, 2]).all()  # token 4 of a grid of 2 x 3 is in row 1, column 1
    assert a.std() < b.std()
    assert 0.3 < explained < 1


# ---------------------------------------------------------------- grids, pixels, slices


def test_pixels_show_the_cell_that_their_middle_lies_in():
    cells = np.arange(6).reshape(2, 3, 1)
    shown = cells_to_pixels(cells, (5, 3))[..., 0]
    assert shown[:, 0].tolist() == [0, 0, 3, 3, 3]  # 0.2, 0.6, 1.0, 1.4, 1.8 cells down
    assert shown[0].tolist() == [0, 1, 2]
    video = np.stack([cells, cells + 6])
    assert (cells_to_pixels(video, (5, 3))[1] == shown[..., None] + 6).all()


@pytest.mark.parametrize(
    ("n_tokens", "grid"), [(48 * 84, (48, 84)), (12 * 21, (12, 21)), (6 * 11, (6, 11))]
)
def test_the_grid_of_a_layer_s_tokens(n_tokens, grid):
    assert token_grid((48, 84), n_tokens) == grid
    with pytest.raises(ValueError, match="fit no grid"):
        token_grid((48, 84), n_tokens + 1)


def test_xt_slices_are_one_row_over_time():
    frames = shapes_frames(4, HEIGHT, WIDTH)
    found = xt_slice(frames, 7)
    assert found.shape == (160, WIDTH, 3)
    expected = np.stack([frame[7] for frame in frames])
    assert np.array_equal(found[::40], expected)
    assert np.array_equal(found[39::40], expected)


# ---------------------------------------------------------------- correspondences


def test_displacements_by_hand():
    field = displacements(np.array([0, 5, 2, 3, 0, 4]), (2, 3), (20, 60))
    expected = np.zeros((2, 3, 2))
    expected[0, 1] = 20, 10  # from column 1, row 0 to column 2, row 1
    expected[1, 1] = -20, -10
    expected[1, 2] = -20, 0
    assert np.array_equal(field, expected)


@pytest.mark.parametrize("grid", [(6, 10), (5, 7), (3, 5), (1, 2)])
def test_a_field_that_stays_rebuilds_the_frame(grid):
    (frame,) = shapes_frames(1, HEIGHT, WIDTH)
    field = displacements(np.arange(grid[0] * grid[1]), grid, (HEIGHT, WIDTH))
    assert np.array_equal(warp_by_cells(frame, field), frame)
    assert not np.array_equal(warp_by_cells(frame, field + 8), frame)


def tokens_of_blocks(frame, side=8):
    """Each block of pixels as a token, (1, L, side * side * 3)."""
    h, w = frame.shape[0] // side, frame.shape[1] // side
    blocks = frame.reshape(h, side, w, side, 3).swapaxes(1, 2).reshape(1, h * w, -1)
    return torch.from_numpy(blocks.astype(np.float32) - 128)


@pytest.mark.parametrize(("right", "down"), [(2, 0), (-2, 0), (0, 1), (0, -1)])
def test_a_known_shift_is_found(right, down):
    """The frame is the keyframe moved right or down, so that its cells lie left or up in it."""
    keyframe = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    frame = np.roll(keyframe, (8 * down, 8 * right), axis=(0, 1))
    match = nearest_tokens(tokens_of_blocks(frame), tokens_of_blocks(keyframe), THE_ONLY)
    match = match[0, 0].numpy()
    field = displacements(match, (6, 10), (HEIGHT, WIDTH))
    inside = np.s_[1:-1, 2:-2]
    assert (field[inside] == (-8 * right, -8 * down)).all()
    rebuilt = warp_by_cells(keyframe, field)
    assert np.array_equal(rebuilt, frame)  # what was rolled over the edge is found there


def test_longer_is_darker_in_grey_and_nothing_is_white():
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):
        way = np.array([np.cos(angle), np.sin(angle)])
        field = (np.arange(5)[:, None] * way).reshape(1, 5, 2)
        colours = field_colours(field, 3.0)
        grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[0].astype(int)
        assert grey[0] >= 254
        assert (np.diff(grey[:4]) < 0).all()
        assert (colours[0, 3] == colours[0, 4]).all()  # beyond the longest


def test_the_longest_shown_is_twice_the_median_within_what_there_is():
    field = np.zeros((2, 4, 2))
    assert longest_shown(field, (16, 32)) == 0
    field[..., 0] = 10
    field[0, 0, 0] = 100
    assert longest_shown(field, (16, 32)) == 20
    field[0, 0, 0] = 12
    assert longest_shown(field, (16, 32)) == 12
    field[..., 0] = 1
    field[0, 0, 0] = 100
    assert longest_shown(field, (16, 32)) == 8  # a cell


def an_axis():
    return picture_grid([[np.zeros((8, 8, 3), np.uint8)]]).axes[0]


def test_a_field_has_colours_and_arrows_in_its_directions():
    field = np.zeros((4, 6, 2))
    field[..., 0], field[2:, :, 1] = 20.0, -10.0
    axis = an_axis()
    draw_field(axis, field, 40.0, "caption")
    assert axis.get_title() == "caption"
    assert np.array_equal(axis.images[0].get_array(), field_colours(field, 40.0))
    (arrows,) = axis.collections
    assert len(arrows.U) == 24
    assert np.allclose(arrows.U, 0.5)  # half the longest: half as long as arrows are apart
    assert np.allclose(arrows.V, [0.0] * 12 + [-0.25] * 12)
    draw_lengths(axis, field, 40.0, "how far")
    shown = axis.images[-1]
    assert np.allclose(shown.get_array(), np.hypot(field[..., 0], field[..., 1]))
    assert shown.get_clim() == (0, 40.0)


def test_the_wheel_shows_the_colours_of_its_directions():
    axis = an_axis()
    draw_wheel(axis, 101, "rim")
    wheel = axis.images[0].get_array()
    for x, y, way in ((90, 50, (1, 0)), (10, 50, (-1, 0)), (50, 10, (0, -1)), (50, 90, (0, 1))):
        expected = field_colours(np.array([[way]]) * 0.8, 1.0)[0, 0].astype(int)
        assert np.abs(wheel[y, x].astype(int) - expected).max() < 6
    assert (wheel[0, 0] == 255).all()


# ---------------------------------------------------------------- layout


def pictures_of(figure):
    """The pictures of a figure, axis by axis."""
    return [np.asarray(axis.images[-1].get_array()) for axis in figure.axes]


def test_a_grid_has_its_labels_next_to_and_above_the_pictures():
    panels = np.random.default_rng(0).integers(60, 200, (4, 30, 50, 3), np.uint8)
    figure = picture_grid(
        [panels[:2], panels[2:]], ["a row", "the other\nrow"], ["one", "two"], "a title"
    )
    assert np.array_equal(pictures_of(figure), panels)
    first, second, third, _ = figure.axes
    assert (first.get_title(), second.get_title()) == ("one", "two")
    assert (first.get_ylabel(), third.get_ylabel()) == ("a row", "the other\nrow")
    assert figure.get_suptitle() == "a title"
    image = Image.open(io.BytesIO(png(figure)))
    assert image.width >= 2 * 256
    boxes = [axis.get_position() for axis in figure.axes]
    assert boxes[0].y0 > boxes[2].y1 and boxes[0].x1 < boxes[1].x0
    whole = figure.get_window_extent()
    for label in (figure.axes[2].yaxis.label, first.title):
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1


@pytest.mark.parametrize(("steps", "n"), [(5, 4), (50, 40), (16, 300)])
def test_keyframes_are_black_and_labelled_by_their_steps(steps, n):
    chosen = np.random.default_rng(0).random((steps, n)) < 0.3
    figure = keyframe_figure(chosen, 7, 8, "title")
    (axis,) = figure.axes
    (image,) = axis.images
    assert np.array_equal(image.get_array(), chosen)
    assert tuple(image.get_extent()) == (-0.5, n - 0.5, 7 + steps - 0.5, 6.5)
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("frame", "step", "title")
    lines = [segment[0, 0] for segment in axis.collections[0].get_segments()]
    assert lines == list(np.arange(0, n, 8) - 0.5)
    assert max(Image.open(io.BytesIO(png(figure))).size) < 1800


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


def edit(script, config_class, place, model, **changes):
    """Makes a result; returns its folder and the keyframes of the steps that it took."""
    settings = {
        "data_path": str(place / "star.mp4"),
        "latents_path": str(place / "latents"),
        "output_path": str(place / "results"),
        "prompt": "a green star",
        "model_key": str(model),
        "n_inversion_steps": 10,
        "n_timesteps": STEPS,
        "n_frames": N_FRAMES,
        "batch_size": INTERVAL,
        "device": "cpu",
        **changes,
    }
    path = place / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    keyframes = []
    predict = loop._Loop.predict

    def noted(self, source, x, step):
        if self.config.consistency == "tokenflow":
            keyframes.append(step.keyframes.tolist())
        return predict(self, source, x, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, "predict", noted)
        return script.main(["--config", str(path)]), keyframes


@pytest.fixture(scope="module")
def edits(place, tiny_model):
    """Results and the keyframes that they were made with."""
    pnp, sdedit = (run_tokenflow_pnp, PnPConfig), (run_tokenflow_sdedit, SDEditConfig)
    return {
        "tokenflow": edit(*pnp, place, tiny_model),
        "per_frame": edit(*pnp, place, tiny_model, consistency="none"),
        "sdedit": edit(*sdedit, place, tiny_model, start=0.6),
        "released": edit(*sdedit, place, tiny_model, start=0.6, propagation="released"),
    }


@pytest.fixture(scope="module")
def results(edits):
    return {name: folder for name, (folder, _) in edits.items()}


@pytest.fixture
def cache(results):
    return open_cache(read_result(results["tokenflow"]).cache().folder)


def view_of(cache, **options):
    """What features are taken with."""
    return features.open_view(ViewOptions(device="cpu", **options), cache)


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
    assert view.layer == KEY
    models = view.load()
    denoiser = source_denoiser(view, models, [0, 3])
    noisy = cache.latents(view.timestep, N_FRAMES)[[0, 3]]
    context = TokenFlowContext(propagate_source=True)
    with torch.inference_mode(), tokenflow_patch(models.unet, context):
        denoiser(noisy, view.timestep, torch.arange(2))
    given = features.source_tokens(view, models, [0, 3])
    assert relative_error(given, context.tokens[KEY]) < 1e-5
    returned = features.source_tokens(view_of(cache, what="output"), models, [0, 3])
    assert relative_error(returned, context.source_base[KEY][0]) < 1e-5
    assert relative_error(returned, given) > 0.1
    one_by_one = features.source_tokens(view_of(cache, batch_size=1), models, [0, 3])
    assert relative_error(one_by_one, given) < 1e-5


def test_an_edit_that_is_the_source_has_the_source_s_tokens(cache):
    """Encoding, inversion and prompt are the same for both, at cached timesteps and others."""
    timesteps = [cache.manifest.timesteps[-2], view_of(cache).inversion[1]]
    assert timesteps[1] not in cache.manifest.timesteps
    for timestep in timesteps:
        view = view_of(cache, timestep=timestep)
        models = view.load()
        source = features.source_tokens(view, models, range(N_FRAMES))
        frames = cache.frames(N_FRAMES)
        same = features.edit_tokens(view, models, frames, SOURCE_PROMPT)
        assert relative_error(same, source) < 1e-4
        assert relative_error(features.edit_tokens(view, models, frames, "a wolf"), source) > 1e-3


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
    figures = {}
    for module in (paper_figures, visualize):
        save = module.save_figure

        def keep(path, figure, save=save):
            figures[path.name] = figure
            return save(path, figure)

        monkeypatch.setattr(module, "save_figure", keep)
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
    models = view.load()
    videos = [cache.frames(N_FRAMES)]
    tokens = [features.source_tokens(view, models, range(N_FRAMES))]
    for name in ("per_frame", "tokenflow"):
        videos.append(load_frames(results[name] / "frames", N_FRAMES))
        tokens.append(features.edit_tokens(view, models, videos[-1], "a green star"))
    colours, _ = feature_colours(tokens, (3, 5), (HEIGHT, WIDTH))
    rows = [shown for pair in zip(videos, colours, strict=True) for shown in pair]

    assert np.array_equal(
        pictures_of(drawn["features.png"]), [row[i] for row in rows for i in (0, 2, 4)]
    )
    labels = [axis.get_ylabel() for axis in drawn["features.png"].axes[::3]]
    assert labels[:3] == ["source", "source\nfeatures", "PnP\nper frame"]
    shown = pictures_of(drawn["features_xt.png"])
    assert np.array_equal(shown, [xt_slice(row, 20) for row in rows])
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
    models = view.load()
    calls = []
    attend = tokenflow_utils.extended_attention
    monkeypatch.setattr(
        tokenflow_utils, "extended_attention", lambda *args: calls.append(args) or attend(*args)
    )

    def rebuild(*chosen):
        denoiser = source_denoiser(view, models, chosen)
        start = cache.latents(view.sampling[0], N_FRAMES)[list(chosen)]
        own = reconstruct(denoiser, start, view.sampling, batch_size=1)[:1]
        return rebuilt_from_keyframe(denoiser, start, view.sampling), own

    same, own = rebuild(3, 3)
    assert relative_error(same, own) < 1e-5
    # Attention is computed for the keyframe alone, at all layers and steps.
    assert len(calls) == STEPS * len(tokenflow_utils.self_attention_layers(models.unet))
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
    models = view.load()
    together = features.source_tokens(view, models, range(4))
    assert relative_error(features.source_tokens(view, models, [3, 1]), together[[3, 1]]) < 1e-5
    same = features.edit_tokens(view, models, cache.frames(4), SOURCE_PROMPT)
    assert relative_error(same, together) < 1e-4
    denoiser = source_denoiser(view, models, [3, 3])
    start = cache.latents(view.sampling[0], 4)[[3, 3]]
    own = reconstruct(denoiser, start, view.sampling, batch_size=1)[:1]
    assert relative_error(rebuilt_from_keyframe(denoiser, start, view.sampling), own) < 1e-5


def test_recorded_tokens_leave_no_hook(cache):
    unet = view_of(cache).load().unet
    before = unet_state(unet)
    for what in ("input", "output"):
        with pytest.raises(ZeroDivisionError), recorded_tokens(unet, KEY, what):
            assert unet_state(unet) != before
            raise ZeroDivisionError
        assert unet_state(unet) == before


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
    models = view.load()
    tokens = features.source_tokens(view, models, [4, 1])
    match = nearest_tokens(tokens[:1], tokens[1:], THE_ONLY)[0, 0].numpy()
    field = displacements(match, (3, 5), (HEIGHT, WIDTH))
    frames = cache.frames(N_FRAMES)
    figure = drawn["correspondence.png"]
    shown_pictures = pictures_of(figure)
    moved = warp_by_cells(frames[1], field)
    for number, expected in ((0, frames[4]), (1, frames[1]), (4, moved)):
        assert np.array_equal(shown_pictures[number], expected)
    warped = vae.psnr(warp_by_cells(frames[1], field), frames[4])
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
    ("name", "config_class", "first"),
    [
        ("tokenflow", PnPConfig, 1),
        ("sdedit", SDEditConfig, 3),  # 0.6 of 5 steps: the last 3
        ("released", SDEditConfig, 4),  # timesteps[int(1 - 0.6 * 5) :]: the last 2
    ],
)
def test_keyframes_are_those_that_the_edit_used(
    edits, tmp_path, monkeypatch, drawn, capsys, name, config_class, first
):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    folder, used = edits[name]
    (path,) = visualize.main(["keyframes", "--result", str(folder), "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"wrote {path}\n"
    expected = np.zeros((len(used), N_FRAMES), bool)
    for row, frames in zip(expected, used, strict=True):
        row[frames] = True
    config = load_config(config_class, folder / "config.yaml")
    chosen, first_step = visualize.chosen_keyframes(config, N_FRAMES)
    assert np.array_equal(chosen, expected)
    assert first_step == first
    assert len(used) == STEPS + 1 - first
    assert np.array_equal(pictures_of(drawn[path.name])[0], expected)
    assert (expected.sum(axis=1) == 2).all()
    assert len({tuple(frames) for frames in used}) > 1
    schedule = tokenflow_utils.keyframe_schedule(N_FRAMES, INTERVAL, STEPS, config.keyframe_seed)
    # The published code draws from the first step that it takes.
    drawn = schedule[: len(used)] if name == "released" else schedule[-len(used) :]
    assert drawn.tolist() == used


def test_fixed_keyframes_are_the_same_at_each_step(results):
    path = results["tokenflow"] / "config.yaml"
    config = load_config(PnPConfig, path, ["keyframes=fixed"])
    chosen, _ = visualize.chosen_keyframes(config, N_FRAMES)
    assert chosen.tolist() == [[False, True, False, False, True]] * STEPS


# ---------------------------------------------------------------- bad input

FRAMES = ["--frame", "0", "--keyframe", "1"]
BAD_OPTIONS = {
    "layer": (
        ["features", "--layer", "up_blocks.9"],
        "--layer: up_blocks.9 is unknown, .*up_blocks.2.attentions.1,",
    ),
    "cross-attention": (
        ["features", "--layer", KEY.replace("attn1", "attn2")],
        "--layer: .*attn2.* is unknown",
    ),
    "timestep": (
        ["features", "--timestep", "7"],
        "--timestep: 7 is none of the 10 .* nearest is 1;",
    ),
    "row": (["features", "--row", str(HEIGHT)], "--row: 48, expected 0 to 47"),
    "row below": (["features", "--row", "-1"], "--row: -1, expected 0 to 47"),
    "columns": (["features", "--columns", "0"], "--columns: 0, expected"),
    "n_frames": (["features", "--n_frames", "0"], "--n_frames: 0, expected"),
    "too many": (["features", "--n_frames", "6"], "--n_frames: 6, but there are only 5"),
    "batch_size": (["features", "--batch_size", "0"], "--batch_size: 0, expected"),
    "device": (["features", "--device", "tpu"], "device: tpu is unknown"),
    "what": (["features", "--what", "query"], "--what"),
    "model": (["features", "--model_key", "/nowhere"], "/nowhere"),
    "frame": (["correspondence", "--frame", "5", "--keyframe", "1"], "--frame: 5, expected 0 to 4"),
    "keyframe": (
        ["correspondence", "--frame", "0", "--keyframe", "-1"],
        "--keyframe: -1, expected 0 to 4",
    ),
    "no keyframe": (["correspondence", "--frame", "0"], "--keyframe"),
    "both": (["correspondence", *FRAMES, "--cache", "x"], "--cache and --result: give one of them"),
    "unknown": (["keyframes", "--layer", "x"], "unrecognized"),
    "out": (["keyframes", "--out", "{file}"], "--out: .* is a file"),
    "features out": (["features", "--out", "{file}"], "--out: .* is a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_a_bad_option_is_named(results, tmp_path, monkeypatch, case):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    words, message = BAD_OPTIONS[case]
    file = tmp_path / "file"
    file.touch()
    words = [word.replace("{file}", str(file)) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=message):
        visualize.main([*words, "--result", str(results["tokenflow"]), *out])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_short_names_and_keys_name_the_same_layer(cache):
    for name in (KEY, KEY.removesuffix(".transformer_blocks.0.attn1.processor")):
        assert view_of(cache, layer=name).layer == KEY


@pytest.mark.parametrize(
    "words", [["features"], ["correspondence", *FRAMES], ["keyframes"]], ids=lambda words: words[0]
)
def test_a_folder_that_is_no_result_is_refused(results, tmp_path, monkeypatch, words):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)

    def refused(folder, message):
        with pytest.raises(UserError, match=message):
            visualize.main([*words, "--result", str(folder), "--out", str(tmp_path / "out")])

    refused(tmp_path / "nowhere", "has no config.yaml; expected the folder of a finished result")
    for name in ("config.yaml", "run.yaml"):
        copy = shutil.copytree(results["tokenflow"], tmp_path / name)
        (copy / name).unlink()
        refused(copy, f"has no {name}")
        save_yaml(copy / name, {"prompt": 3, "technique": 7})
        refused(copy, f"{name}: (prompt|technique): expected text or null, got")
    assert not (tmp_path / "out").exists()


def changed(result, folder, **values):
    """A copy of a result with other values in run.yaml."""
    copy = shutil.copytree(result, folder)
    save_yaml(copy / "run.yaml", {**load_yaml(copy / "run.yaml"), **values})
    return copy


@pytest.mark.parametrize("words", [["features"], ["correspondence", *FRAMES]])
def test_a_cache_that_is_gone_or_another_is_refused(results, tmp_path, monkeypatch, words):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    for name, values, message in (
        ("gone", {"cache": str(tmp_path / "gone")}, "no finished cache .*gone; build it again"),
        ("remade", {"cache_sha256": "0" * 64}, "was replaced since"),
    ):
        folder = changed(results["tokenflow"], tmp_path / f"{name}-result", **values)
        with pytest.raises(UserError, match=message):
            visualize.main([*words, "--result", str(folder), "--out", str(tmp_path / "out")])


def test_an_unfinished_cache_is_refused(tmp_path):
    words = ["correspondence", "--cache", str(tmp_path), *FRAMES, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"manifest.yaml: no such file"):
        visualize.main(words)


def test_another_model_is_refused(results, tiny_depth_model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    words = [
        "features",
        "--result",
        str(results["tokenflow"]),
        "--model_key",
        str(tiny_depth_model),
    ]
    with pytest.raises(UserError, match="not the model that"):
        visualize.main([*words, "--out", str(tmp_path)])


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
    smaller = shutil.copytree(results["per_frame"], tmp_path / "smaller")
    for path in (smaller / "frames").iterdir():
        Image.open(path).resize((40, 24)).save(path)
    refused(smaller, "frames are of 24 x 40, the source's of 48 x 80")
    incomplete = shutil.copytree(results["per_frame"], tmp_path / "incomplete")
    (incomplete / "frames" / "00004.png").unlink()
    refused(incomplete, "00004.png: no such frame")


def test_results_without_keyframes_are_refused(results, tmp_path):
    baseline = changed(results["tokenflow"], tmp_path / "b", technique="reconstruction")
    for folder, message in (
        (results["per_frame"], "consistency: none, which has no keyframes"),
        (baseline, "a result of reconstruction, which has no keyframes"),
    ):
        with pytest.raises(UserError, match=message):
            visualize.main(["keyframes", "--result", str(folder), "--out", str(tmp_path / "out")])


def test_a_bad_input_ends_with_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["visualize.py", "keyframes", "--result", str(tmp_path), "--out", "x"]
    )
    with pytest.raises(SystemExit) as left:
        command_line(visualize.main)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: has no config.yaml")


@pytest.mark.parametrize("command", [[], ["features"], ["correspondence"], ["keyframes"]])
def test_help_is_printed(command, capsys):
    with pytest.raises(SystemExit) as left:
        visualize.main([*command, "--help"])
    assert left.value.code == 0
    assert "usage: " in capsys.readouterr().out
