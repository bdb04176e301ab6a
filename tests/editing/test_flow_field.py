"""Correspondences by optical flow."""

import torch

from tokenflow.editing.flow_field import flow_tokens


def test_flow_moves_tokens_right_and_down():
    h, w = 3, 5
    flow = torch.zeros(1, 2, 24, 40)
    flow[:, 0], flow[:, 1] = 8.0, 16.0  # one cell right, two down
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    expected = ((y + 2).clamp(max=h - 1) * w + (x + 1).clamp(max=w - 1)).flatten()
    assert torch.equal(flow_tokens(flow, (h, w))[0], expected)
    assert torch.equal(flow_tokens(flow * 0, (h, w))[0], torch.arange(h * w))
