"""Optical flow, occlusion and warping, against motion that is known."""

import urllib.error

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.optical_flow import raft_large

from scripts.shapes.metrics import true_motion
from scripts.shapes.world import random_scene, render_clip
from tests.helpers import randn
from tokenflow.diffusion import optical_flow
from tokenflow.evaluation import motion
from util import MissingFileError, UserError, save_tensors

CPU = torch.device("cpu")


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture, (height, width, 3) uint8."""
    noise = np.random.default_rng(seed).random((height, width, 3), np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.5)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return (255 * smooth).astype(np.uint8)


def panned(n_frames: int, step: tuple[int, int], height: int = 64, width: int = 80) -> np.ndarray:
    """A texture that moves by (right, down) whole pixels a frame, seen through a fixed window."""
    margin = 40
    whole = texture(height + 2 * margin, width + 2 * margin)
    starts = [(margin - i * step[1], margin - i * step[0]) for i in range(n_frames)]
    return np.stack([whole[y : y + height, x : x + width] for y, x in starts])


def uniform(n_pairs: int, dx: float, dy: float, height: int, width: int) -> torch.Tensor:
    return torch.tensor([float(dx), float(dy)])[None, :, None, None].repeat(
        n_pairs, 1, height, width
    )


# ---------------------------------------------------------------- warping


def test_whole_pixels_are_looked_up_exactly_and_the_border_is_repeated() -> None:
    frame = np.arange(12, dtype=np.uint8).reshape(3, 4, 1).repeat(3, axis=-1)
    warped = optical_flow.warp(
        frame, uniform(1, 2, -1, 3, 4)[0]
    )  # from two to the right and one above
    expected = [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]
    assert warped.dtype == np.float32
    assert warped[..., 0].tolist() == expected


def test_between_pixels_it_is_bilinear() -> None:
    ramp = np.fromfunction(lambda y, x: 10 * x + 3 * y, (6, 8), dtype=np.float32)
    frame = ramp[..., None].repeat(3, axis=-1)
    warped = optical_flow.warp(frame, uniform(1, 0.25, 0.5, 6, 8)[0])
    np.testing.assert_allclose(warped[:-1, :-1], frame[:-1, :-1] + 2.5 + 1.5, atol=1e-4)


# ---------------------------------------------------------------- occlusion


@pytest.mark.parametrize(
    ("there", "back", "kept"),
    [
        ((0, 0), (0.7, 0), True),  # 0.49 < 0.01 * 0.49 + 0.5
        ((0, 0), (0.72, 0), False),  # 0.518 > 0.505
        ((10, 0), (-9, 0), True),  # 1 < 0.01 * 181 + 0.5
        ((10, 0), (-8, 0), False),  # 4 > 0.01 * 164 + 0.5
        ((10, 0), (10, 0), False),  # it must come back, not go on
        ((0, -3), (0, 3), True),
    ],
)
def test_the_occlusion_test_is_the_formula(there, back, kept) -> None:
    fields = [uniform(1, *vector, 40, 40)[0] for vector in (there, back)]
    assert bool(optical_flow.consistent(*fields)[20, 20]) is kept


def test_the_way_back_is_looked_up_where_the_way_there_ends() -> None:
    there, back = torch.zeros(2, 20, 20), torch.zeros(2, 20, 20)
    there[0, 5, 5] = 4
    back[0, 5, 9] = -4
    seen = optical_flow.consistent(there, back)
    assert seen[5, 5]
    assert not seen[5, 9]  # it stays, but it was another place before
    assert seen.sum() == 400 - 1


def test_what_comes_from_outside_is_not_visible() -> None:
    there, back = uniform(1, 2.4, -3, 10, 12)[0], uniform(1, -2.4, 3, 10, 12)[0]
    expected = torch.zeros(10, 12, dtype=torch.bool)
    expected[3:, :10] = True  # the right edge is at 11.5, the top one at -0.5
    assert torch.equal(optical_flow.consistent(there, back), expected)


def test_a_moving_square_hides_what_it_uncovers() -> None:
    there, back = torch.zeros(2, 40, 60), torch.zeros(2, 40, 60)
    there[0, 10:30, 26:46] = -6  # the square now, which was 6 to the left
    back[0, 10:30, 20:40] = 6
    expected = torch.ones(40, 60, dtype=torch.bool)
    expected[10:30, 20:26] = False
    assert torch.equal(optical_flow.consistent(there, back), expected)


# ---------------------------------------------------------------- DIS


@pytest.mark.parametrize("step", [(3, -2), (-4, 1)])
def test_estimated_flow_points_to_where_things_were(step) -> None:
    """Things that move right by 3 were 3 to the left: the flow is (-3, ...)."""
    found = motion.motion_by(optical_flow.dis_flow, panned(3, step))
    assert found.flow.shape == (2, 2, 64, 80)
    assert found.visible.dtype == torch.bool
    inner = found.flow[:, :, 12:-12, 12:-12]
    median = inner.flatten(2).median(dim=2).values
    assert (median + torch.tensor(step)).abs().max() < 0.1
    assert found.visible[:, 12:-12, 12:-12].float().mean() > 0.95
    assert not found.visible[:, :, 0 if step[0] > 0 else -1].any()  # came in at that side


def test_estimate_and_truth_of_a_shapes_clip_agree() -> None:
    """Where both see a pixel, DIS was measured 0.38 pixels off in the median, 0.81 in the mean, of
    motion by 5.4; they agreed on what is visible for 0.90 of the pixels. Bounds: 1.5 times that.
    """
    clip = render_clip(random_scene(4, n_objects=1), 6, 128)
    true = true_motion(clip)
    found = motion.motion_by(optical_flow.dis_flow, clip.frames)
    error = (found.flow - true.flow).norm(dim=1)
    flipped = (found.flow + true.flow).norm(dim=1)
    both = found.visible & true.visible
    assert true.flow.norm(dim=1).mean() > 5
    assert error[both].median() < 0.6
    assert error[both].mean() < 1.2
    assert flipped[both].mean() > 8 * error[both].mean()
    assert (found.visible == true.visible).float().mean() > 0.85


def test_the_truth_is_of_as_many_frames_as_asked_for() -> None:
    clip = render_clip(random_scene(3, n_objects=1), 4, 32)
    assert len(true_motion(clip).flow) == 3
    assert torch.equal(true_motion(clip, 3).flow, true_motion(clip).flow[:2])


def test_one_frame_has_no_motion_and_small_ones_no_estimate() -> None:
    found = motion.motion_by(optical_flow.dis_flow, panned(1, (0, 0)))
    assert found.flow.shape == (0, 2, 64, 80)
    assert found.visible.shape == (0, 64, 80)
    with pytest.raises(UserError, match=r"frames of 10x80 \(HxW\); DIS needs 16"):
        motion.motion_by(optical_flow.dis_flow, panned(2, (0, 0), height=10))


# ---------------------------------------------------------------- RAFT


@pytest.fixture(scope="module")
def raft_weights(tmp_path_factory):
    """RAFT-large's architecture with random weights, as --flow_weights takes them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft.safetensors"
    save_tensors(path, raft_large(weights=None).state_dict())
    return path


def test_raft_sees_the_frames_it_is_given(raft_weights, monkeypatch) -> None:
    """Padded to what it takes and cropped again; source first, in [-1, 1]."""
    monkeypatch.setattr(optical_flow, "RAFT_UPDATES", 1)
    model = optical_flow.Raft(raft_weights, CPU)
    seen, made = [], []
    model.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    model.model.register_forward_hook(lambda *call: made.append(call[2][-1]))
    frames = panned(2, (3, -2), height=60, width=133)
    found = model(frames[1], frames[0])
    assert found.shape == (2, 60, 133)
    assert torch.equal(found, made[0][0, :, 34:94, 1:134])
    ((source, target),) = seen
    assert source.shape == target.shape == (1, 3, 128, 136)
    for picture, frame in ((source, frames[1]), (target, frames[0])):
        inside = picture[0, :, 34:94, 1:134].permute(1, 2, 0)  # 68 rows and 3 columns are added
        np.testing.assert_allclose(inside.numpy() * 127.5 + 127.5, frame, atol=1e-3)
        assert torch.equal(picture[..., :34, :], picture[..., 34:35, :].expand(1, 3, 34, 136))


def test_raft_is_torchvisions_with_the_given_weights(raft_weights, monkeypatch) -> None:
    monkeypatch.setattr(optical_flow, "RAFT_UPDATES", 2)
    frames = panned(2, (3, -2), height=128, width=128)
    found = motion.motion_by(optical_flow.Raft(raft_weights, CPU), frames)
    torch.manual_seed(0)
    theirs = raft_large(weights=None).eval()
    now, before = (torch.from_numpy(f).permute(2, 0, 1)[None] / 127.5 - 1 for f in frames[::-1])
    with torch.inference_mode():
        flow = theirs(now, before, num_flow_updates=2)[-1]
    torch.testing.assert_close(found.flow, flow, rtol=1e-4, atol=1e-4)
    assert found.visible.shape == (1, 128, 128)


def test_other_weights_are_refused(tmp_path) -> None:
    path = tmp_path / "raft.pth"
    with pytest.raises(MissingFileError, match=r"--flow_weights: .*raft.pth: no such file"):
        optical_flow.find_raft_weights(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"expected a \.safetensors file, pickles are not loaded"):
        optical_flow.find_raft_weights(path)
    save_tensors(path.with_suffix(".safetensors"), {"a": torch.zeros(1)})
    with pytest.raises(UserError, match=r"raft.safetensors: not weights of torchvision's RAFT-l"):
        optical_flow.Raft(path.with_suffix(".safetensors"), CPU)


def test_missing_weights_name_the_ways_without_them(tmp_path, monkeypatch) -> None:
    def offline(*args: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(MissingFileError) as raised:
        optical_flow.find_raft_weights(None)
    name = "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
    place = str(tmp_path / "hub" / "checkpoints" / name)
    for words in (place, "no network", "--flow dis", "--flow truth", "--flow_weights FILE"):
        assert words in str(raised.value)


def test_the_hubs_file_is_held_to_its_checksum(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / "raft_large_C_T_SKHT_V2-ff5fadd5.pth"
    path.parent.mkdir(parents=True)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="damaged, its checksum does not begin with ff5fadd5"):
        optical_flow.find_raft_weights(None)
    monkeypatch.setattr(optical_flow, "sha256_file", lambda path: "ff5fadd5" + 56 * "0")
    assert optical_flow.find_raft_weights(None) == path


def test_the_hubs_file_can_make_nothing_but_tensors(tmp_path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"a": Evil()}, tmp_path / "hub.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        optical_flow.Raft(tmp_path / "hub.pth", CPU)
    assert not (tmp_path / "ran").exists()


def test_weights_are_called_by_their_name_and_content(raft_weights, tmp_path) -> None:
    copy = tmp_path / raft_weights.name
    copy.write_bytes(raft_weights.read_bytes())
    name = optical_flow.raft_weights_name(raft_weights)
    assert name == optical_flow.raft_weights_name(copy)
    assert name.startswith("raft.safetensors (sha256 ")


# ---------------------------------------------------------------- on disk


def some_motion(height: int = 4, width: int = 6) -> motion.Motion:
    return motion.Motion(randn(2, 2, height, width), randn(2, height, width, seed=1) > 0)


def test_a_saved_motion_is_read_again(tmp_path) -> None:
    saved = some_motion()
    motion.save_motion(tmp_path / "a.flow.safetensors", saved)
    read = motion.load_motion(tmp_path / "a.flow.safetensors")
    assert torch.equal(read.flow, saved.flow)
    assert torch.equal(read.visible, saved.visible)
    assert read.visible.dtype == torch.bool
    assert motion.truth_shape(tmp_path / "a.flow.safetensors") == (2, 4, 6)
    saved.flow[~saved.visible[:, None].expand_as(saved.flow)] = torch.nan  # hidden: may have none
    motion.save_motion(tmp_path / "a.flow.safetensors", saved)
    assert motion.load_motion(tmp_path / "a.flow.safetensors").flow.isfinite().all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"flow": torch.zeros(1, 2, 4, 4)}, "visible missing"),
        ({"flow": torch.zeros(1, 4, 4, 2), "visible": torch.ones(1, 4, 4)}, r"expected \(n-1, 2,"),
        ({"flow": torch.zeros(1, 2, 4, 4), "visible": torch.ones(2, 4, 4)}, r"expected \(n-1, 2,"),
        (
            {"flow": torch.full((1, 2, 4, 4), torch.nan), "visible": torch.ones(1, 4, 4)},
            "not all finite",
        ),
    ],
)
def test_what_is_no_motion_is_refused(tensors, message, tmp_path) -> None:
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=rf"a.safetensors: .*{message}"):
        motion.load_motion(tmp_path / "a.safetensors")


def test_a_header_that_is_none_is_refused(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(MissingFileError, match="no such file of a clip's true motion"):
        motion.truth_shape(path)
    save_tensors(path, {"depth": torch.zeros(1)})
    for _ in range(2):
        with pytest.raises(UserError, match="not a clip's motion"):
            motion.truth_shape(path)
        path.write_bytes(b"nothing")


def test_flow_is_scaled_with_the_frames() -> None:
    """Each axis by its own factor; each pixel takes its nearest one's."""
    old = some_motion()
    new = motion.resize_motion(old, (8, 18))
    assert new.flow.shape == (2, 2, 8, 18)
    assert torch.equal(new.flow[:, 0, ::2, 1::3], 3 * old.flow[:, 0])
    assert torch.equal(new.flow[:, 1, 1::2, 2::3], 2 * old.flow[:, 1])
    assert torch.equal(new.visible[:, ::2, ::3], old.visible)
    assert torch.equal(motion.resize_motion(old, (4, 6)).flow, old.flow)
    half = motion.resize_motion(new, (4, 6))
    torch.testing.assert_close(half.flow, old.flow)


def test_the_truth_lies_next_to_its_clip_or_where_it_is_said_to(tmp_path) -> None:
    video, folder = tmp_path / "star.v2.mp4", tmp_path / "bear.480p"
    video.touch()
    folder.mkdir()
    assert motion.truth_file(video) == tmp_path / "star.v2.flow.safetensors"
    assert motion.truth_file(folder) == tmp_path / "bear.480p.flow.safetensors"
    assert motion.truth_file(tmp_path / "gone.mp4") == tmp_path / "gone.flow.safetensors"
    assert motion.truth_file("data/star.mp4", folder) == folder / "star.flow.safetensors"
    assert motion.truth_file("data/star.mp4", video) == video
