"""The method's functions against a loop-written float64 reference, and the UNet patch."""

import sys

import pytest
import torch
from diffusers import TextToVideoZeroPipeline, UNet2DConditionModel

from tests import reference
from tests.helpers import forward, randn
from tokenflow.diffusion.models import compile_unet
from tokenflow.ops import nearest
from tokenflow_utils import (
    ATTENTION_LAYERS,
    FEATURE_LAYER,
    Pass,
    TokenFlowContext,
    attend,
    attend_alone,
    blend,
    extended_attention,
    fixed_keyframes,
    keyframe_schedule,
    nearest_tokens,
    neighbours,
    propagate,
    released_neighbours,
    sample_keyframes,
    self_attention_layers,
    tokenflow_patch,
)


@pytest.fixture
def unet(tiny_model):
    return UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()


# ---------------------------------------------------------------- keyframes


@pytest.mark.parametrize(("n_frames", "interval"), [(40, 8), (10, 4), (3, 8), (5, 1), (1, 1)])
def test_one_keyframe_in_each_interval(n_frames, interval):
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        keyframes = sample_keyframes(n_frames, interval, generator)
        assert torch.equal(keyframes // interval, torch.arange(-(-n_frames // interval)))
        assert keyframes.max() < n_frames
        seen |= set(keyframes.tolist())
    assert seen == set(range(n_frames))  # every frame is drawn sooner or later, the last too


def test_whole_intervals_draw_as_the_released_code_does():
    ours = sample_keyframes(40, 8, torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    assert torch.equal(ours, torch.randint(8, (5,)) + torch.arange(0, 40, 8))


def test_fixed_keyframes_are_interval_middles():
    assert fixed_keyframes(19, 8).tolist() == [4, 12, 17]


def test_keyframe_schedule_is_a_function_of_its_arguments():
    schedule = keyframe_schedule(20, 8, 50, seed=3)
    assert schedule.shape == (50, 3)
    assert torch.equal(schedule, keyframe_schedule(20, 8, 50, seed=3))
    assert not torch.equal(schedule, keyframe_schedule(20, 8, 50, seed=4))
    assert len(schedule.unique(dim=0)) > 1  # drawn again at each step
    assert len(keyframe_schedule(20, 8, 50, 3, "fixed").unique(dim=0)) == 1


# ---------------------------------------------------------------- neighbours and weights


def weights_by_keyframe(near, i):
    """{keyframe: weight} of frame i, however the two are ordered."""
    weight = float(near.weight[i])
    previous, next_ = near.which[i].tolist()
    found = {previous: 1.0 - weight}
    found[next_] = found.get(next_, 0.0) + weight
    return {keyframe: w for keyframe, w in found.items() if w != 0.0}


def test_weights_of_a_worked_example():
    # Keyframes 2 and 6; frame 3 is 1 after the one and 3 before the other: sigmoid(1/4).
    near = neighbours(torch.arange(8), torch.tensor([2, 6]))
    assert weights_by_keyframe(near, 0) == {0: 1.0}
    assert weights_by_keyframe(near, 2) == {0: 0.5, 1: 0.5}
    assert weights_by_keyframe(near, 3)[1] == pytest.approx(0.5621765, abs=1e-6)
    assert weights_by_keyframe(near, 7) == {1: 1.0}


@pytest.mark.parametrize("kind", ["sigmoid", "linear"])
@pytest.mark.parametrize("keyframes", [[0], [7], [3, 9], [0, 8, 18], [7, 8, 16]])
def test_neighbours_match_the_reference(kind, keyframes):
    frames = torch.arange(5, 19)
    near = neighbours(frames, torch.tensor(keyframes), kind)
    for i, frame in enumerate(frames.tolist()):
        expected = dict(reference.paper_neighbours(frame, keyframes, kind))
        expected = {keyframe: w for keyframe, w in expected.items() if w != 0.0}
        assert weights_by_keyframe(near, i) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("interval", [1, 4, 5, 8])
def test_released_neighbours_match_the_reference(interval):
    frames = torch.arange(19)
    near = released_neighbours(frames, interval)
    for i, frame in enumerate(frames.tolist()):
        expected = dict(reference.released_neighbours(frame, interval))
        assert weights_by_keyframe(near, i) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- correspondences and propagation


def test_blend_weighs_the_next_keyframe():
    previous, next_ = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    mixed = blend(previous, next_, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed, torch.tensor([0.0, 0.25, 1.0])[:, None, None].expand(2, 3, 4, 5))


@pytest.mark.parametrize("mode", ["paper", "released"])
def test_propagation_matches_the_reference(mode):
    branches, n_frames, n_tokens, channels, interval = 2, 11, 12, 6, 4
    frames = torch.arange(n_frames)
    keyframes = [1, 7, 9]
    source = randn(n_frames, n_tokens, channels, seed=1)
    source_keyframes = randn(3, n_tokens, channels, seed=2)
    base = randn(branches, 3, n_tokens, channels, seed=3)
    if mode == "paper":
        near = neighbours(frames, torch.tensor(keyframes))
        mixes = [reference.paper_neighbours(i, keyframes) for i in range(n_frames)]
    else:
        near = released_neighbours(frames, interval)
        mixes = [reference.released_neighbours(i, interval) for i in range(n_frames)]
    found = propagate(base, nearest_tokens(source, source_keyframes, near.which), near)
    for i, mix in enumerate(mixes):
        expected = reference.propagate(
            source[i].double(), source_keyframes.double(), base.double(), mix
        )
        assert torch.allclose(found[:, i].double(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 12, 6), (2, 150, 5), (1, 1, 1)])
def test_the_tiled_search_finds_what_the_definition_does(shape):
    m, length, channels = shape
    tokens, keys = randn(m, length, channels, seed=1), randn(4, length + 3, channels, seed=2)
    which = torch.randint(4, (m, 2), generator=torch.Generator().manual_seed(3))
    expected = nearest_tokens(tokens, keys, which)
    assert torch.equal(nearest.nearest_tokens(tokens, keys, which), expected)


# ---------------------------------------------------------------- attention


def test_extended_attention_matches_the_reference():
    branches, frames, n_tokens, heads, dim = 2, 3, 5, 2, 4
    query, key, value = (randn(branches, frames, n_tokens, heads, dim, seed=s) for s in (1, 2, 3))
    found = extended_attention(query, key, value).flatten(-2).double()
    for b in range(branches):
        keys, values = (x[b].flatten(0, 1).flatten(-2).double() for x in (key, value))
        for f in range(frames):
            expected = reference.attention(query[b, f].flatten(-2).double(), keys, values, heads)
            assert torch.allclose(found[b, f], expected, atol=1e-6)


def test_one_frame_alone_attends_as_the_unpatched_layer_does(unet):
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    tokens = randn(4, 9, layer.to_q.in_features)
    found = attend_alone(layer, tokens[None], tokens[None])[0]
    assert torch.allclose(found, layer(tokens), atol=1e-6)


def test_queries_and_keys_of_one_branch_serve_both(unet):
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    source, edit = (randn(b, 3, 9, layer.to_q.in_features, seed=b) for b in (1, 2))
    for attention in (attend_alone, lambda attn, qk, v: attend(attn, qk, qk, v)):
        found = attention(layer, source, edit)
        expected = attention(layer, source.repeat(2, 1, 1, 1), edit)
        assert torch.allclose(found, expected, atol=1e-6)


# ---------------------------------------------------------------- the patch


def state_of(unet):
    hooks = {name: len(m._forward_hooks) for name, m in unet.named_modules()}
    forwards = [name for name, m in unet.named_modules() if "forward" in vars(m)]
    return dict(unet.attn_processors), hooks, forwards


def test_a_source_pass_predicts_what_the_unpatched_unet_does(unet):
    plain = forward(unet)
    context = TokenFlowContext()
    with tokenflow_patch(unet, context):
        assert torch.allclose(forward(unet), plain, atol=1e-5)
    assert set(context.tokens) == set(self_attention_layers(unet))
    assert len(context.tokens) == 16


def test_leaving_the_patch_restores_the_unet_bit_for_bit(unet):
    before, plain = state_of(unet), forward(unet)
    with pytest.raises(ZeroDivisionError), tokenflow_patch(unet, TokenFlowContext()):
        forward(unet)
        assert state_of(unet) != before
        raise ZeroDivisionError  # an error leaves it too
    assert state_of(unet) == before
    assert torch.equal(forward(unet), plain)


@pytest.mark.parametrize("backend", ["native", "no_such_backend"])
def test_a_failure_while_patching_restores_the_unet(unet, monkeypatch, backend):
    before = state_of(unet)

    def fail(hook):
        raise RuntimeError

    monkeypatch.setattr(unet.get_submodule(FEATURE_LAYER), "register_forward_hook", fail)
    failed = pytest.raises((RuntimeError, ValueError))
    with failed, tokenflow_patch(unet, TokenFlowContext(), backend):
        pytest.fail("was patched")
    assert state_of(unet) == before


def test_patching_twice_is_refused_and_leaves_the_first_patch(unet):
    before, refused = state_of(unet), pytest.raises(RuntimeError, match="already patched")
    with tokenflow_patch(unet, TokenFlowContext()):
        patched = state_of(unet)
        with refused, tokenflow_patch(unet, TokenFlowContext()):
            pass
        assert state_of(unet) == patched
    assert state_of(unet) == before


def test_injection_layers_are_the_paper_s(unet):
    decoder = [layer for layer in self_attention_layers(unet) if layer.startswith("up_blocks")]
    assert list(ATTENTION_LAYERS) == decoder[1:]  # all but the first of the decoder's nine


def test_features_and_attention_of_the_source_replace_both_branches(unet):
    context = TokenFlowContext(branches=2, inject_features=True, inject_attention=True)
    conv, outputs = unet.get_submodule(FEATURE_LAYER), []
    with tokenflow_patch(unet, context):
        conv.register_forward_hook(lambda module, args, output: outputs.append(output))
        forward(unet, frames=2)
        source, source_tokens = context.features, dict(context.tokens)
        context.mode = Pass.PER_FRAME
        forward(unet, frames=4, seed=9)
    assert torch.equal(outputs[1], source.repeat(2, 1, 1, 1))
    assert all(context.tokens[layer] is source_tokens[layer] for layer in source_tokens)
    conv._forward_hooks.clear()


def test_first_frame_is_text2video_zero_s_attention(unet):
    # Diffusers has moved the module that it is in, and will again.
    module = sys.modules[TextToVideoZeroPipeline.__module__]
    processor = module.CrossFrameAttnProcessor2_0(batch_size=1)
    context = TokenFlowContext(mode=Pass.FIRST_FRAME)
    with tokenflow_patch(unet, context):
        found = forward(unet, frames=3)
    original = unet.attn_processors
    unet.set_attn_processor(processor)
    expected = forward(unet, frames=3)
    unet.set_attn_processor(original)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found[1:], forward(unet, frames=3)[1:], atol=1e-3)


# ---------------------------------------------------------------- compiled


@pytest.fixture
def small_unet():
    """Two levels, a layer each: enough for every kind of layer, and quick to trace."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


def every_pass(unet, context):
    """The predictions of the passes of an edit at two timesteps, one after another."""
    outputs = []
    keyframes, chunk = torch.tensor([1, 4]), torch.arange(3)

    def run(mode, images, t, seed):
        context.mode = mode
        text = randn(images, 5, 8, seed=seed)
        x = randn(images, 4, 6, 10, seed=seed + t)
        outputs.append(unet(x, torch.tensor(t), text, return_dict=False)[0])

    with torch.inference_mode(), tokenflow_patch(unet, context):
        for t in (900, 100):
            context.inject_attention = context.inject_features = True
            run(Pass.SOURCE, 2, t, 1)
            run(Pass.EXTENDED, 4, t, 2)
            context.neighbours = neighbours(chunk, keyframes)
            run(Pass.MATCH, 3, t, 3)
            run(Pass.PROPAGATE, 6, t, 4)
    return outputs


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "recompile_limit"), reason="torch 2.6 cannot trace diffusers"
)
def test_the_compiled_unet_has_no_graph_break_and_predicts_the_same(small_unet):
    context = TokenFlowContext(branches=2)
    plain = every_pass(small_unet, context)
    compile_unet(small_unet, backend="eager")  # what is traced, without a compiler; whole or error
    compiled = small_unet.forward
    compile_unet(small_unet, backend="eager")
    assert small_unet.forward is compiled
    torch._dynamo.utils.counters.clear()
    for found, expected in zip(every_pass(small_unet, context), plain, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    traced = dict(torch._dynamo.utils.counters["stats"])
    assert traced["unique_graphs"] == 4
    every_pass(small_unet, context)  # nothing is traced again
    assert dict(torch._dynamo.utils.counters["stats"]) == traced
