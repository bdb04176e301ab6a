"""Figures and the mathematics of what they show, by hand."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import (
    HEIGHT,
    WIDTH,
    pictures_of,
    randn,
    shapes_frames,
)
from tokenflow.figures import drawing, features
from tokenflow.ops.nearest import nearest_tokens

THE_ONLY = torch.zeros(1, 1, dtype=torch.long)  # keyframe, of the only frame


# ---------------------------------------------------------------- principal components


def plane(n=400):
    """Tokens on a plane in 6 dimensions, and where they lie on it, (n, 2)."""
    mean = torch.tensor([1.0, -2.0, 0.0, 5.0, 0.0, 3.0])
    long = torch.tensor([0.0, -0.8, 0.0, 0.6, 0.0, 0.0])  # its entry of largest magnitude is < 0
    short = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    along = randn(n, 2)
    along = torch.linalg.qr(along - along.mean(0))[0] * n**0.5  # uncorrelated, of variance 1
    along[:, 0] *= 3
    return mean + along[:, :1] * long + along[:, 1:] * short, along


def test_components_of_a_known_plane():
    tokens, along = plane()
    coordinates, explained = features.principal_components(tokens, 2)
    assert coordinates.dtype == torch.float32
    expected = along * torch.tensor([-1.0, 1.0])  # by variance; largest entries positive
    assert torch.allclose(coordinates, expected, atol=1e-4)
    assert torch.allclose(explained, torch.tensor([0.9, 0.1]).double(), atol=1e-5)


def test_components_do_not_depend_on_the_order_or_the_sign_of_tokens():
    tokens, _ = plane()
    found = features.principal_components(tokens, 2)[0]
    assert torch.equal(found, features.principal_components(tokens, 2)[0])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(
        found[order], features.principal_components(tokens[order], 2)[0], atol=1e-5
    )
    assert torch.allclose(-found, features.principal_components(-tokens, 2)[0], atol=1e-5)
    # More tokens than are held in float64 at once.
    many = features.principal_components(tokens.repeat(170, 1), 2)[0]
    assert torch.allclose(many[-400:], found, atol=1e-5)


def test_equal_tokens_have_a_colour_too():
    colours, explained = features.feature_colours([torch.ones(1, 4, 5)], (2, 2), (4, 4))
    assert (colours[0] == colours[0][0, 0, 0]).all()
    assert explained == pytest.approx(0.0)


def test_the_first_component_is_the_brightest_channel():
    ramp = np.zeros((101, 3))
    ramp[:, 0] = np.arange(101)  # of the first component
    colours = features.component_colours(ramp).astype(int)
    assert (np.diff(colours[:, 1]) >= 0).all()
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[-1].tolist() == [0, 255, 0]
    assert features.component_colours(ramp[:, ::-1])[-1].tolist() == [0, 0, 255]
    assert features.component_colours(ramp[:, [1, 0, 2]])[-1].tolist() == [255, 0, 0]
    assert colours[50, 1] == pytest.approx(128, abs=1)


def test_colours_of_all_videos_are_of_one_basis_and_scale():
    """Whichever video a token is in, it has the same colour; two scales or bases would differ."""
    one, other = randn(2, 3, 6, 8)
    other = 5 * other
    other[1, 4] = one[2, 0]
    (a, b), explained = features.feature_colours([one, other], (2, 3), (4, 6))
    assert a.shape == b.shape == (3, 4, 6, 3)
    assert (a[2, 0, 0] == b[1, 2, 2]).all()  # token 4 of a grid of 2 x 3 is in row 1, column 1
    assert a.std() < b.std()
    assert 0.3 < explained < 1


# ---------------------------------------------------------------- grids, pixels, slices


def test_pixels_show_the_cell_that_their_middle_lies_in():
    cells = np.arange(6).reshape(2, 3, 1)
    shown = features.cells_to_pixels(cells, (5, 3))[..., 0]
    assert shown[:, 0].tolist() == [0, 0, 3, 3, 3]  # 0.2, 0.6, 1.0, 1.4, 1.8 cells down
    assert shown[0].tolist() == [0, 1, 2]
    video = np.stack([cells, cells + 6])
    assert (features.cells_to_pixels(video, (5, 3))[1] == shown[..., None] + 6).all()


def test_xt_slices_are_one_row_over_time():
    frames = shapes_frames(4, HEIGHT, WIDTH)
    found = drawing.xt_slice(frames, 7)
    assert found.shape == (160, WIDTH, 3)
    expected = np.stack([frame[7] for frame in frames])
    assert np.array_equal(found[::40], expected)
    assert np.array_equal(found[39::40], expected)


# ---------------------------------------------------------------- correspondences


def test_displacements_by_hand():
    field = features.displacements(np.array([0, 5, 2, 3, 0, 4]), (2, 3), (20, 60))
    expected = np.zeros((2, 3, 2))
    expected[0, 1] = 20, 10  # from column 1, row 0 to column 2, row 1
    expected[1, 1] = -20, -10
    expected[1, 2] = -20, 0
    assert np.array_equal(field, expected)


@pytest.mark.parametrize("grid", [(6, 10), (5, 7), (3, 5), (1, 2)])
def test_a_field_that_stays_rebuilds_the_frame(grid):
    (frame,) = shapes_frames(1, HEIGHT, WIDTH)
    field = features.displacements(np.arange(grid[0] * grid[1]), grid, (HEIGHT, WIDTH))
    assert np.array_equal(features.warp_by_cells(frame, field), frame)
    assert not np.array_equal(features.warp_by_cells(frame, field + 8), frame)


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
    field = features.displacements(match, (6, 10), (HEIGHT, WIDTH))
    inside = np.s_[1:-1, 2:-2]
    assert (field[inside] == (-8 * right, -8 * down)).all()
    rebuilt = features.warp_by_cells(keyframe, field)
    assert np.array_equal(rebuilt, frame)  # what was rolled over the edge is found there


def test_longer_is_darker_in_grey_and_nothing_is_white():
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):
        way = np.array([np.cos(angle), np.sin(angle)])
        field = (np.arange(5)[:, None] * way).reshape(1, 5, 2)
        colours = drawing.field_colours(field, 3.0)
        grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)[0].astype(int)
        assert grey[0] >= 254
        assert (np.diff(grey[:4]) < 0).all()
        assert (colours[0, 3] == colours[0, 4]).all()  # beyond the longest


def test_the_longest_shown_is_twice_the_median_within_what_there_is():
    field = np.zeros((2, 4, 2))
    assert drawing.longest_shown(field, (16, 32)) == 0
    field[..., 0] = 10
    field[0, 0, 0] = 100
    assert drawing.longest_shown(field, (16, 32)) == 20
    field[0, 0, 0] = 12
    assert drawing.longest_shown(field, (16, 32)) == 12
    field[..., 0] = 1
    field[0, 0, 0] = 100
    assert drawing.longest_shown(field, (16, 32)) == 8  # a cell


def an_axis():
    return drawing.picture_grid([[np.zeros((8, 8, 3), np.uint8)]]).axes[0]


def test_a_field_has_colours_and_arrows_in_its_directions():
    field = np.zeros((4, 6, 2))
    field[..., 0], field[2:, :, 1] = 20.0, -10.0
    axis = an_axis()
    drawing.draw_field(axis, field, 40.0, "caption")
    assert axis.get_title() == "caption"
    assert np.array_equal(axis.images[0].get_array(), drawing.field_colours(field, 40.0))
    (arrows,) = axis.collections
    assert len(arrows.U) == 24
    assert np.allclose(arrows.U, 0.5)  # half the longest: half as long as arrows are apart
    assert np.allclose(arrows.V, [0.0] * 12 + [-0.25] * 12)
    drawing.draw_lengths(axis, field, 40.0, "how far")
    shown = axis.images[-1]
    assert np.allclose(shown.get_array(), np.hypot(field[..., 0], field[..., 1]))
    assert shown.get_clim() == (0, 40.0)


def test_the_wheel_shows_the_colours_of_its_directions():
    axis = an_axis()
    drawing.draw_wheel(axis, 101, "rim")
    wheel = axis.images[0].get_array()
    for x, y, way in ((90, 50, (1, 0)), (10, 50, (-1, 0)), (50, 10, (0, -1)), (50, 90, (0, 1))):
        expected = drawing.field_colours(np.array([[way]]) * 0.8, 1.0)[0, 0].astype(int)
        assert np.abs(wheel[y, x].astype(int) - expected).max() < 6
    assert (wheel[0, 0] == 255).all()


# ---------------------------------------------------------------- layout


def test_a_grid_has_its_labels_next_to_and_above_the_pictures():
    panels = np.random.default_rng(0).integers(60, 200, (4, 30, 50, 3), np.uint8)
    figure = drawing.picture_grid(
        [panels[:2], panels[2:]], ["a row", "the other\nrow"], ["one", "two"], "a title"
    )
    assert np.array_equal(pictures_of(figure), panels)
    first, second, third, _ = figure.axes
    assert (first.get_title(), second.get_title()) == ("one", "two")
    assert (first.get_ylabel(), third.get_ylabel()) == ("a row", "the other\nrow")
    assert figure.get_suptitle() == "a title"
    image = Image.open(io.BytesIO(drawing.png(figure)))
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
    figure = drawing.keyframe_figure(chosen, 7, 8, "title")
    (axis,) = figure.axes
    (image,) = axis.images
    assert np.array_equal(image.get_array(), chosen)
    assert tuple(image.get_extent()) == (-0.5, n - 0.5, 7 + steps - 0.5, 6.5)
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("frame", "step", "title")
    lines = [segment[0, 0] for segment in axis.collections[0].get_segments()]
    assert lines == list(np.arange(0, n, 8) - 0.5)
    assert max(Image.open(io.BytesIO(drawing.png(figure))).size) < 1800
