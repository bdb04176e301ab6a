"""Folders of results: how a result is named."""

from pathlib import Path

import pytest

from tokenflow.editing.results import Result


@pytest.mark.parametrize(
    ("technique", "config", "name"),
    [
        ("pnp", {}, "PnP, TokenFlow"),
        ("pnp", {"consistency": "tokenflow", "keyframes": "random"}, "PnP, TokenFlow"),
        ("pnp", {"keyframes": "fixed"}, "PnP, fixed keyframes"),
        ("pnp", {"consistency": "extended_attention"}, "PnP, extended attention"),
        ("pnp", {"consistency": "none", "keyframes": "fixed"}, "PnP, per frame"),
        ("controlnet", {"consistency": "first_frame"}, "ControlNet, first frame"),
        ("pnp", {"propagation": "released"}, "PnP, TokenFlow (released)"),
        ("pnp", {"max_keyframes": 4}, "PnP, TokenFlow (4 keyframes at once)"),
        ("sdedit", {"blend": "linear"}, "SDEdit, TokenFlow (linear blend)"),
        ("pnp", {"correspondence": "flow"}, "PnP, TokenFlow (optical flow)"),
        (
            "pnp",
            {"propagation": "released", "correspondence": "flow"},
            "PnP, TokenFlow (released, optical flow)",
        ),
        ("sdedit", {"sampler": "dpmpp_2m"}, "SDEdit, TokenFlow (DPM-Solver++)"),
        ("sdedit", {"decoder": "temporal"}, "SDEdit, TokenFlow (temporal decoder)"),
        (
            "pnp",
            {"consistency": "none", "sampler": "dpmpp_2m", "blend": "linear", "deflicker": True},
            "PnP, per frame (DPM-Solver++, deflickered)",
        ),
        ("pnp", {"mask": "masks", "consistency": "none"}, "PnP, per frame (masked)"),
        ("reconstruction", {"keyframes": "fixed"}, "VAE reconstruction"),
        ("rgb_propagation", {}, "RGB propagation"),
        ("dreamix", {}, "dreamix, TokenFlow"),
    ],
)
def test_a_method_is_named_by_what_it_is(technique, config, name):
    assert Result(Path(), config, {"technique": technique}).method == name
