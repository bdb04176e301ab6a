"""Random SD-shaped checkpoints, made once per test session."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from scripts.tiny_model import temporal_decoder
from scripts.tiny_model.make_random import make_depth_model, make_model
from scripts.tiny_model.model_files import save_weights
from tests.helpers import TEMPORAL_WIDTHS
from tokenflow.diffusion.models import StableDiffusion, load_stable_diffusion

# The tests' tensors are too small to share between threads: waiting for them costs more than it
# saves, above all on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start
# Some tests fork: OpenCV's threads would not be there in the child, and be waited for.
cv2.setNumThreads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts eps, with controlnet/ and depth_estimator/ in its folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(folder, controlnet=True)
    make_depth_model(folder / "depth_estimator")
    return folder


@pytest.fixture(scope="session")
def models(tiny_model: Path) -> StableDiffusion:
    """Its models, which tests share and do not change."""
    return load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def tiny_temporal_decoder(
    models: StableDiffusion, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A temporal decoder for the tiny model, whose layers over time do something."""
    folder = tmp_path_factory.mktemp("decoder") / "vae"
    torch.manual_seed(0)
    model = temporal_decoder.make_temporal_vae(models.vae, TEMPORAL_WIDTHS)
    for name, parameter in model.named_parameters():
        if name.endswith("temporal_res_block.conv2.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_weights(folder, model, torch.float32)
    return folder


@pytest.fixture(scope="session")
def tiny_depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a depth map as its fifth latent channel."""
    folder = tmp_path_factory.mktemp("models") / "tiny-depth"
    make_model(folder, kind="depth")
    return folder


@pytest.fixture(scope="session")
def tiny_v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that predicts v."""
    folder = tmp_path_factory.mktemp("models") / "tiny-v"
    make_model(folder, kind="v_prediction")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; none is ever downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()
