"""The temporal decoder: chunks, cross-fading, loading, and its start as an image decoder."""

import copy
import itertools

import numpy as np
import pytest
import torch

from run_tokenflow_pnp import PnPConfig
from scripts.shapes.pictures import to_pixels
from scripts.shapes.world import random_scene, render_clip
from scripts.tiny_model import temporal_decoder as training
from scripts.tiny_model.model_files import save_weights
from tests.helpers import TEMPORAL_WIDTHS, edit_keys, invert, make_clip, randn
from tokenflow.diffusion.temporal_decoder import (
    check_decoder_fits,
    cross_fade,
    decode_temporally,
    load_temporal_decoder,
    overlapping_chunks,
)
from tokenflow.diffusion.vae import decode_latents, to_frames
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.ops.distributed import ProcessGroup, Shard
from util import UserError


@pytest.mark.parametrize("most", [18, 20])
def test_chunks_are_few_and_overlap(most):
    for n in range(1, 150):
        starts, length = overlapping_chunks(n, most, overlap=6)
        assert starts[0] == 0
        assert starts[-1] + length == n
        assert length <= most
        assert len(starts) == 1 or (len(starts) - 1) * (most - 6) + 6 < n  # one less: too few
        assert all(b - a <= length - 6 for a, b in itertools.pairwise(starts))
        assert all(c - a >= length for a, c in zip(starts, starts[2:], strict=False))


@pytest.mark.parametrize("n", [1, 20, 21, 33, 50])
def test_overlapping_frames_are_faded_linearly(n):
    starts, length = overlapping_chunks(n)
    chunks = randn(len(starts), length, 3, 2)
    found = cross_fade(chunks, starts)
    for frame in range(n):
        of = [c for c, start in enumerate(starts) if start <= frame < start + length]
        expected = chunks[of[0], frame - starts[of[0]]]
        if len(of) == 2:
            shared = starts[of[0]] + length - starts[of[1]]
            share = (frame - starts[of[1]] + 1) / (shared + 1)
            expected = (1 - share) * expected + share * chunks[of[1], frame - starts[of[1]]]
        assert torch.allclose(found[frame], expected, atol=1e-6)
    assert len(found) == n


def test_a_clip_is_decoded_in_overlapping_chunks(models, tiny_temporal_decoder, monkeypatch):
    decoder = load_temporal_decoder(models, str(tiny_temporal_decoder))
    latents = 0.5 * randn(23, 4, 3, 5)
    scaled = latents / models.vae.config.scaling_factor
    with torch.inference_mode():
        few = decoder.decode(scaled[:20], num_frames=20).sample
        parts = [decoder.decode(z, num_frames=15).sample for z in (scaled[:15], scaled[8:])]
        alone = decoder.decode(scaled[:1], num_frames=1).sample
    assert np.array_equal(decode_temporally(models, decoder, latents[:20]), to_frames(few))
    assert np.array_equal(decode_temporally(models, decoder, latents[:1]), to_frames(alone))
    assert (few[0] - alone[0]).abs().max() > 0.01  # it sees the neighbours
    found = decode_temporally(models, decoder, latents)
    assert found.shape == (23, 24, 40, 3)
    assert np.array_equal(found, to_frames(cross_fade(torch.stack(parts), [0, 8])))
    # Of two processes, each decodes a chunk.
    own = []
    with monkeypatch.context() as patch:
        patch.setattr(Shard, "gather", lambda self, x: own.append(x) or torch.cat([x, x]))
        for rank in (0, 1):
            decode_temporally(models, decoder, latents, ProcessGroup(rank, 2))
    assert torch.equal(torch.cat(own), torch.stack(parts))


def test_an_edit_is_decoded_by_the_decoder_that_its_config_names(
    tiny_model, tiny_temporal_decoder, tmp_path
):
    clip = make_clip(tmp_path / "clip.mp4")
    invert(clip, tmp_path / "latents", tiny_model)
    keys = edit_keys(tmp_path, tiny_model, decoder="temporal")
    with pytest.raises(UserError, match=r"maxin-cn/Latte-1: no such folder"):
        open_edit_inputs(PnPConfig(**keys))
    session = EditSession(
        open_edit_inputs(PnPConfig(**keys, decoder_key=str(tiny_temporal_decoder)))
    )
    latents = session.latents("clean")
    decoder = load_temporal_decoder(session.models, str(tiny_temporal_decoder))
    expected = decode_temporally(session.models, decoder, latents)
    assert np.array_equal(session.decode(latents), expected)
    assert not np.array_equal(decode_latents(session.models, latents), expected)


def test_a_decoder_of_another_vae_is_refused(tiny_model, models, tiny_temporal_decoder, tmp_path):
    check_decoder_fits(tiny_model, str(tiny_temporal_decoder))
    model = copy.deepcopy(load_temporal_decoder(models, str(tiny_temporal_decoder)))
    model.register_to_config(scaling_factor=0.5)
    save_weights(tmp_path / "other", model, torch.float32)
    with pytest.raises(UserError, match=r"other: this temporal decoder .* scaling_factor is 0\.5"):
        check_decoder_fits(tiny_model, str(tmp_path / "other"))
    with pytest.raises(UserError, match="holds a model of the kind UNet2DConditionModel, expected"):
        check_decoder_fits(tiny_model, str(tiny_model / "unet"))
    with pytest.raises(UserError, match=r"no such folder.*with decoder_key"):
        check_decoder_fits(tiny_model, "nobody/nothing/vae_temporal_decoder")


def test_it_begins_as_the_image_decoder(models, monkeypatch):
    """But for the middle's second block and attention, and a bias at the border."""
    monkeypatch.setattr(training, "BREAK_SYMMETRY", 0.0)
    vae = copy.deepcopy(models.vae)
    encoder, decoder = vae.encoder.mid_block, vae.decoder.mid_block
    silent = [decoder.resnets[1].conv2, *(m.attentions[0].to_out[0] for m in (encoder, decoder))]
    for parameter in (*(layer.weight for layer in silent), vae.post_quant_conv.bias):
        torch.nn.init.zeros_(parameter)
    for layer in silent:
        torch.nn.init.zeros_(layer.bias)
    model, latents = training.make_temporal_vae(vae, TEMPORAL_WIDTHS).eval(), randn(3, 4, 5, 3)
    frames = randn(2, 3, 16, 24)
    with torch.inference_mode():
        temporal, image = model.decode(latents, num_frames=3).sample, vae.decode(latents).sample
        assert torch.allclose(temporal, image, atol=1e-4 * float(image.abs().max()))
        a, b = (x.encode(frames).latent_dist.mean for x in (model, vae))
    assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


def test_training_follows_points_from_a_frame_to_the_one_before():
    clip = render_clip(random_scene(3), 6, 64)
    pixels = to_pixels(clip.frames)
    flow, seen = (
        torch.from_numpy(np.stack(x))
        for x in zip(*(clip.flow(i, i - 1) for i in range(1, 6)), strict=True)
    )
    errors = []
    for sign in (1, -1):
        before, inside = training.look_up(pixels[:-1], sign * flow.permute(0, 3, 1, 2))
        counted = (seen & inside)[:, None].expand_as(before)
        errors.append(float((before - pixels[1:]).abs()[counted].mean()))
    assert errors[0] < 0.3 * errors[1]
    assert counted.float().mean() > 0.7
