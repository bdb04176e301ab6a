"""Ray for the tests of batches, started once: it takes seconds."""

import contextlib

import pytest

from scripts.batch import engine


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test has a folder of its own, and no cluster around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="session")
def local_ray():
    """Ray on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with engine.ray_cluster() as ray:
            yield ray


@pytest.fixture(scope="module")
def shared_ray(local_ray):
    """Has the batches of a test file run on that Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "ray_cluster", lambda: contextlib.nullcontext(local_ray))
        yield
