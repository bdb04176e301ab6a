"""Estimates of memory and disk, against the whole program on a simulated GPU."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

import preprocess
import run_tokenflow_controlnet
import run_tokenflow_pnp
from tests.helpers import edit, edit_keys, invert, make_clip, no_model_may_load, preprocess_words
from tokenflow.editing import simulation
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import EditInputs, open_edit_inputs
from tokenflow.editing.results import read_result
from tokenflow.editing.simulation import fitted, simulated_edit
from tokenflow.ops.simulated_gpu import simulated_gpu
from tokenflow.storage.schema import parse
from tokenflow.storage.yaml_files import save_yaml
from util import UserError

GIB = 1 << 30
N_FRAMES = 5
KEYS = {"n_inversion_steps": 2, "n_timesteps": 2, "n_frames": N_FRAMES, "dtype": "float16"}


@pytest.fixture(scope="module")
def clip(tiny_model, tmp_path_factory):
    clip = make_clip(tmp_path_factory.mktemp("estimate") / "clip.mp4", N_FRAMES)
    options = {
        "n_frames": N_FRAMES,
        "H": 128,
        "W": 192,
        "dtype": "float16",
        "steps": 2,
        "save_steps": 2,
    }
    options |= {"cache_features": "", "keyframe_interval": 3, "batch_size": 4, "device": "cuda"}
    options["reconstruction"] = "none"
    with simulated_gpu(GIB):
        invert(clip, clip.parent / "latents", tiny_model, **options)
    return clip


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (run_tokenflow_pnp, {"correspondence": "hybrid", "source_features": "live"}),
        pytest.param(
            run_tokenflow_controlnet,
            {"chunk_size": 1, "guidance_scale": 1},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_edit_needs_what_was_estimated(clip, tiny_model, script, changes):
    """Within 10 %; an estimate takes few of the chunks, and one step of each kind."""
    changes = {**KEYS, "device": "cuda", "flow_model": "dis", **changes}
    if script is run_tokenflow_controlnet:
        changes["controlnet_key"] = str(tiny_model / "controlnet")
    config = edit_keys(clip.parent, tiny_model, data_path=str(clip), estimate=True, **changes)
    inputs = open_edit_inputs(parse(script.TECHNIQUE.config, config, "test"))
    found = simulated_edit(script.TECHNIQUE, inputs)
    with simulated_gpu(GIB):
        run = read_result(edit(script, clip, tiny_model, **changes)).run
    assert max(found.values()) == pytest.approx(run["peak_memory_bytes"], rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_estimates_load_no_model(clip, tiny_model, tmp_path, capsys, monkeypatch, device):
    """Also for a GPU that is not there; `from_pretrained` is what reads weights."""
    for cls in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        monkeypatch.setattr(cls, "from_pretrained", no_model_may_load)
    keys = {**KEYS, "data_path": str(clip), "device": device, "estimate": True}
    save_yaml(tmp_path / "config.yaml", edit_keys(clip.parent, tiny_model, **keys))
    assert run_tokenflow_pnp.main(["--config", str(tmp_path / "config.yaml")]) is None
    options = {"n_frames": N_FRAMES, "device": device, "estimate": ""}
    words = preprocess_words(clip, tmp_path / "caches", tiny_model, **options)
    assert preprocess.main(words) is None
    memory, disk, *of_preprocess = capsys.readouterr().out.splitlines()
    assert "edit" in memory and "decode" in memory and "MB in" in disk
    assert "inversion" in of_preprocess[0] and str(tmp_path) in of_preprocess[1]
    there = "there is no GPU here" if device == "cuda" else "are free"
    assert memory.endswith(there) and of_preprocess[0].endswith(there)
    assert not (tmp_path / "caches").exists()


def test_the_depth_estimator_is_in_the_estimate(
    clip, tiny_model, tiny_depth_model, tmp_path, capsys
):
    options = {"n_frames": N_FRAMES, "device": "cuda", "estimate": "", "sd_version": "depth"}
    options["depth_model"] = tiny_model / "depth_estimator"
    assert preprocess.main(preprocess_words(clip, tmp_path, tiny_depth_model, **options)) is None
    assert "(depth " in capsys.readouterr().out


@pytest.mark.parametrize(("free", "expected"), [(10**9, 8), (130, 8), (110, 4), (55, 2), (1, 1)])
def test_a_chunk_size_is_chosen_by_the_free_memory(monkeypatch, caplog, free, expected):
    """A chunk of m frames needs 10 + 10 m bytes; 80 % may be taken; there are 5 frames."""

    caplog.set_level("INFO")

    def needs(technique, inputs):
        return {"edit": 10 + 10 * inputs.config.chunk_size, "decode": 5}

    monkeypatch.setattr(simulation, "simulated_edit", needs)
    monkeypatch.setattr(simulation, "free_memory", lambda device: free)
    monkeypatch.setattr(simulation, "memory_text", lambda peaks, device: f"{peaks}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("cuda", "auto") == expected
    assert f"{10 + 10 * expected}" in caplog.text
    assert chosen("cuda", 5) == 5
    monkeypatch.setattr(simulation, "simulated_edit", no_model_may_load)
    assert chosen("cpu", "auto") == 8
    assert chosen("cuda", 5, estimate=False) == 5


def chosen(device, chunk_size, **changes):
    config = EditConfig(data_path="clip.mp4", prompt="a star", chunk_size=chunk_size, **changes)
    open_inputs = dict.fromkeys(("cache", "checkpoint", "adapters", "timesteps", "dtype"))
    inputs = EditInputs(
        config=config, n_frames=N_FRAMES, device=torch.device(device), **open_inputs
    )
    return fitted(run_tokenflow_pnp.TECHNIQUE, inputs).config.chunk_size


@pytest.mark.parametrize("value", [0, "many", True, 1.5])
def test_other_chunk_sizes_are_refused(value):
    keys = {"data_path": "clip.mp4", "prompt": "a star", "chunk_size": value}
    with pytest.raises(UserError, match="chunk_size: expected auto, a whole number from 1 or null"):
        parse(EditConfig, keys, "test")
