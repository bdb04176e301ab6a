"""Extended attention of very many keyframes: which sees which, and who computes it."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import randn
from tokenflow.editing.keyframe_windows import WindowedAttention, keyframe_windows
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup
from tokenflow_utils import attend


@pytest.mark.parametrize("at_once", [None, 1, 3])
@pytest.mark.parametrize(("k", "most"), [(5, 5), (25, 8), (25, 2), (125, 12), (9, 3), (7, 100)])
def test_every_keyframe_is_a_query_once_and_sees_itself_and_the_anchors(k, most, at_once):
    windows = keyframe_windows(k, most, at_once)
    queries = [i for window in windows for i in range(k)[window.queries]]
    assert queries == list(range(k))
    if most >= k:
        assert all(window.seen == slice(0, k) for window in windows)
        return
    seen = [set(window.seen.tolist()) for window in windows]
    for window, those in zip(windows, seen, strict=True):
        assert set(range(k)[window.queries]) <= those
        assert len(those) <= most
    assert len(set.intersection(*seen)) >= max(1, most // 4)  # the anchors
    if most > 3:  # neighbouring windows share more than these
        for a, b in itertools.pairwise(seen):
            assert len(a & b) > max(1, most // 4)


def test_how_many_queries_at_once_changes_no_window():
    whole = {i: w.seen.tolist() for w in keyframe_windows(25, 8) for i in range(25)[w.queries]}
    parts = keyframe_windows(25, 8, at_once=1)
    assert whole == {i: w.seen.tolist() for w in parts for i in range(25)[w.queries]}


def test_windows_bound_what_attention_sees(tiny_model):
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet").eval()
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    tokens = randn(2, 9, 5, layer.to_q.in_features)
    everyone = attend(layer, tokens, tokens, tokens)

    def windowed(windows):
        shard = SINGLE_PROCESS.shard(9, joint=True)
        return WindowedAttention(windows, tokens.device, shard)(layer, tokens, tokens, tokens)

    in_parts = windowed(keyframe_windows(9, None, at_once=2))
    assert torch.allclose(in_parts, everyone, atol=1e-6)
    windows = keyframe_windows(9, 4)
    bounded = windowed(windows)
    for window in windows:
        seen = tokens[:, window.seen]
        expected = attend(layer, tokens[:, window.queries], seen, seen)
        assert torch.allclose(bounded[:, window.queries], expected, atol=1e-6)
    assert not torch.allclose(bounded, everyone, atol=1e-3)


@pytest.mark.parametrize(("k", "bound", "at_once"), [(7, None, None), (7, None, 2), (9, 4, 1)])
def test_the_processes_share_the_queries_of_all_windows(k, bound, at_once):
    whole = keyframe_windows(k, bound, at_once)
    seen = {}
    for rank in range(3):
        shard = ProcessGroup(rank, 3, rank).shard(k)
        for window in WindowedAttention(whole, torch.device("cpu"), shard).windows:
            for query in range(k)[window.queries]:
                assert query not in seen
                seen[query] = window.seen
    assert list(seen) == list(range(k))
    for window in whole:
        for query in range(k)[window.queries]:
            assert seen[query] is window.seen
