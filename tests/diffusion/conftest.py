"""A random model that the tests of this folder share and do not change."""

from pathlib import Path

import pytest
import torch

from tokenflow.diffusion.models import StableDiffusion, load_stable_diffusion


@pytest.fixture(scope="session")
def models(tiny_model: Path) -> StableDiffusion:
    return load_stable_diffusion(tiny_model, torch.device("cpu"), torch.float32)
