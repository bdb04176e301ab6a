"""A campaign of faults: nothing that was computed is lost, nothing broken looks finished.

Kills at random and at exact moments, damaged files, signals, full disks, two processes at once, on
preprocess.py and the edits, with the tiny model. The quick forms run with all tests; `make faults`
runs the long ones, which take about 45 minutes on a busy core, and prints what was tried.
FAULTS_SEED chooses the random moments and damages.
"""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

import preprocess
from scripts.tiny_model.model_files import save_weights
from scripts.tiny_model.temporal_decoder import make_temporal_vae
from tests.helpers import (
    HEIGHT,
    WIDTH,
    arguments,
    make_image_folder,
    save_masks,
    shapes_frames,
)
from tests.robustness.faults import Child, hidden, saved_figures, snapshot, visible
from tests.storage.test_audio import make_sounding_clip
from tokenflow.cache import build
from tokenflow.cache import inputs as preprocess_inputs
from tokenflow.cache.options import parse_args
from tokenflow.cache.source_cache import FEATURES, MANIFEST, open_cache
from tokenflow.cache.source_features import find_features
from tokenflow.diffusion import checkpoints
from tokenflow.diffusion.adapters import NO_ADAPTERS
from tokenflow.diffusion.models import StableDiffusion, load_stable_diffusion
from tokenflow.diffusion.temporal_decoder import load_temporal_decoder
from tokenflow.editing import results
from tokenflow.editing.config import EditConfig
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.techniques import load_technique
from tokenflow.storage import video
from tokenflow.storage import work_dir as folders
from tokenflow.storage.work_dir import is_locked
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, command_line

ROOT = Path(__file__).resolve().parents[2]
N_FRAMES = 4
SEED = int(os.environ.get("FAULTS_SEED", "6"))

long = pytest.mark.slow


def at_length(*values: object) -> object:
    """Parameters of a test that only the long campaign tries."""
    return pytest.param(*values, marks=long)


# ---------------------------------------------------------------------------------------------
# The work that faults befall


@dataclass(frozen=True)
class Job:
    """Work that makes a folder.

    Attributes:
        run: the work, in the folder where it is called.
        folder: that it makes there.
        before: what lies there at the beginning.
        overwrites: whether it makes again what is finished (--overwrite).
    """

    name: str
    run: Callable[[], object]
    folder: Path
    before: Path | None = None
    overwrites: bool = False

    def place(self, folder: Path) -> Path:
        """A new folder to run in."""
        if self.before is None:
            folder.mkdir()
        else:
            shutil.copytree(self.before, folder)
        return folder


@dataclass(frozen=True)
class Whole:
    """What a run without faults leaves: (cache or result, features); and what it took."""

    place: Path
    made: tuple[dict, dict]
    evaluated: int
    evaluated_for_features: int
    calls: int
    seconds: float


class World:
    """A clip, the models, and what all jobs make of them without a fault."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.clip, self.other_clip = folder / "star.mp4", folder / "other" / "star.mp4"
        sound = make_sounding_clip(folder / "tone.mp4")
        for seed, path in enumerate((self.clip, self.other_clip)):
            frames = shapes_frames(N_FRAMES, HEIGHT, WIDTH, 3 * seed)
            video.save_video(path, frames, Fraction(10), sound)
        self.cache = self._cache_folder(self.clip)
        self.other_cache = self._cache_folder(self.other_clip)
        self._models = load_stable_diffusion(model, torch.device("cpu"), torch.float32)
        self._wholes: dict[str, Whole] = {}

    def _cache_folder(self, clip: Path) -> Path:
        """Where a clip's cache lies, in the folder of a job."""
        return build.open_preprocess_inputs(parse_args(self.preprocess_argv(data_path=clip))).folder

    @cached_property
    def _options(self) -> dict[str, str]:
        """The keys that name a mask and a temporal decoder, which forks share."""
        masks, decoder = self.folder / "masks", str(self.folder / "decoder")
        save_masks(masks, np.stack([np.eye(HEIGHT, WIDTH, i, np.uint8) for i in range(N_FRAMES)]))
        model = make_temporal_vae(self._models.vae, [32] * 4)
        save_weights(Path(decoder), model, torch.float32)
        load_temporal_decoder(self._models, decoder)
        return {"mask": str(masks), "decoder_key": decoder}

    def load(self, *key: object) -> StableDiffusion:
        """A loader whose models are loaded already; forks share them."""
        expected = self.model, self._models.device, self._models.dtype, False, NO_ADAPTERS
        assert key == expected
        return self._models

    def preprocess(self, **options: object) -> Path:
        return self.preprocess_by(self.preprocess_argv(**options))

    def preprocess_by(self, argv: list[str]) -> Path:
        return preprocess.preprocess(parse_args(argv), self.load)

    def preprocess_argv(self, **options: object) -> list[str]:
        small = {
            "data_path": self.clip, "save_dir": "latents", "model_key": self.model,
            "n_frames": N_FRAMES, "H": HEIGHT, "W": WIDTH, "steps": 10, "save_steps": 5,
            "recon_steps": 5, "batch_size": 4, "keyframe_interval": 3, "device": "cpu",
            "inversion_prompt": "a star", "inversion_iters": 2,
        }  # fmt: skip
        return arguments(small | options)

    def keys(self, technique: str, **keys: object) -> dict:
        """Of the configuration of an edit, in the place of a cache."""
        small = {
            "data_path": str(self.clip), "output_path": "out", "latents_path": "latents",
            "prompt": "a golden star", "model_key": str(self.model), "n_inversion_steps": 10,
            "n_timesteps": 5, "n_frames": N_FRAMES, "keyframe_interval": 3, "device": "cpu",
            "checkpoint_every": 1,
        }  # fmt: skip
        if technique == "controlnet":
            small["controlnet_key"] = str(self.model / "controlnet")
        if keys.get("decoder") == "temporal":
            small |= self._options
        return small | keys

    def config(self, technique: str = "pnp", **keys: object) -> EditConfig:
        return load_technique(technique).config(**self.keys(technique, **keys))

    def edit(self, technique: str = "pnp", overwrite: bool = False, **keys: object) -> Path:
        config = self.config(technique, **keys)
        return load_technique(technique).edit(config, overwrite, self.load)

    def job(self, name: str) -> Job:
        """The job of a name."""
        if name in EDITS:
            return self._edit_job(name)
        before, options = PREPROCESSING[name]
        if name == "other":
            options = options | {"data_path": self.other_clip}
        place = self.whole(before).place if before else None
        overwrites = "overwrite" in options
        folder = self.other_cache if name == "other" else self.cache
        return Job(name, lambda: self.preprocess(**options), folder, place, overwrites)

    def _edit_job(self, name: str) -> Job:
        technique, earlier, keys = EDITS[name]
        before, overwrites = self.whole(earlier).place, earlier in EDITS
        config = self.config(technique, **keys, latents_path=str(before / "latents"))
        folder = results.result_folder(open_edit_inputs(config), technique)
        return Job(
            name, lambda: self.edit(technique, overwrites, **keys), folder, before, overwrites
        )

    def whole(self, name: str) -> Whole:
        """What a job makes without a fault; made once."""
        if name not in self._wholes:
            job = self.job(name)
            place = job.place(self.folder / f"whole {name}")
            begun = time.monotonic()
            child = Child(job.run, place)
            assert child.end() == 0, child.output
            seconds = time.monotonic() - begun
            assert hidden(place) == []
            features = place / job.folder / FEATURES / MANIFEST
            self._wholes[name] = Whole(
                place,
                lying_in(place / job.folder),
                child.report["evaluated"],
                load_yaml(features)["image_forwards"] if features.is_file() else 0,
                child.report["calls"],
                seconds,
            )
        return self._wholes[name]


# What lies there before, and preprocess.py's options.
PREPROCESSING: dict[str, tuple[str | None, dict[str, object]]] = {
    "inversion": (None, {"no_cache_features": ""}),
    "features": ("inversion", {}),
    "cache": (None, {"inversion_tol": 0.05, "save_tokens": "all"}),
    "other": (None, {"inversion_prompt": "a wolf", "save_tokens": "all"}),
    "prompt": (None, {"inversion_prompt": "a wolf", "save_tokens": "all"}),
    "overwrite": ("prompt", {"overwrite": "", "inversion_tol": 0.05}),
}
# Technique, what lies there before (a result: --overwrite), keys of the configuration.
EDITS: dict[str, tuple[str, str, dict[str, object]]] = {
    "pnp": ("pnp", "cache", {}),
    "live": ("pnp", "cache", {"source_features": "live", "checkpoint_every": 2}),
    "sdedit": ("sdedit", "cache", {}),
    "controlnet": ("controlnet", "cache", {"checkpoint_every": 2}),
    "edit again": ("pnp", "pnp", {}),
    "options": (
        "pnp",
        "inversion",
        {
            "decoder": "temporal", "sampler": "dpmpp_2m", "correspondence": "hybrid",
            "flow_model": "dis", "smooth_steps": 0.5, "deflicker": True, "source_features": "save",
        },
    ),
    "no features": ("pnp", "inversion", {}),
    "save features": ("pnp", "inversion", {"source_features": "save"}),
}  # fmt: skip
# The others are what a test compares with.
OTHERS = ("other", "prompt", "no features", "save features")
JOBS = [name for name in (*PREPROCESSING, *EDITS) if name not in OTHERS]


def lying_in(folder: Path) -> tuple[dict, dict]:
    """A cache without its features, or a result; and the features."""
    return snapshot(folder, without=FEATURES), snapshot(folder / FEATURES)


def differing(one: dict, other: dict) -> list[str]:
    """The files in which two folders differ; of a manifest, the keys."""
    names = []
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            names += [f"{name}: {key}" for key in {*a, *b} if a.get(key) != b.get(key)]
        elif a != b:
            names.append(name)
    return names


@dataclass
class Tally:
    """How many faults of each kind were tried, and survived."""

    tried: Counter[str]
    survived: Counter[str]

    @contextmanager
    def fault(self, kind: str, number: int = 1) -> Iterator[None]:
        """Counts faults whose consequences are checked in the body."""
        self.tried[kind] += number
        yield
        self.survived[kind] += number


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SAVE_EVERY", 2)  # of five steps
        skeleton = checkpoints.load_unet_skeleton(tiny_model)  # which takes a third of the time
        for module in (preprocess_inputs, checkpoints):
            patch.setattr(module, "load_unet_skeleton", lambda checkpoint: skeleton)
        yield World(tmp_path_factory.mktemp("world"), tiny_model)


@pytest.fixture(scope="module")
def tally():
    tally = Tally(Counter(), Counter())
    yield tally
    print(f"\n\nfaults (seed {SEED})          tried  survived  lost")
    for kind, tried in tally.tried.items():
        print(f"{kind:28} {tried:6} {tally.survived[kind]:9} {tried - tally.survived[kind]:5}")
    tried, survived = tally.tried.total(), tally.survived.total()
    print(f"{'all':28} {tried:6} {survived:9} {tried - survived:5}")


@pytest.fixture
def rng(request):
    """Random numbers of a test's own, the same in each run with the same FAULTS_SEED."""
    return random.Random(f"{SEED} {request.node.name}")


# ---------------------------------------------------------------------------------------------
# What holds after a fault


def check_nothing_broken(world: World, job: Job, place: Path) -> None:
    """What looks whole after a fault is whole, old or new; no lock is held."""
    folder = place / job.folder
    assert not is_locked(folder)
    if folder.exists():
        whole, features = world.whole(job.name).made
        allowed = [(whole, {}), (whole, features)]
        if job.before is not None:
            allowed.append(lying_in(job.before / job.folder))
        assert lying_in(folder) in allowed
    cache = place / (job.folder if job.name in PREPROCESSING else world.cache)
    if cache.exists():
        found = find_features(open_cache(cache, verify=True))
        if found is not None:
            found.verify()


def saved_evaluations(world: World, job: Job, place: Path) -> int:
    """How many evaluations the next run is spared, since they were saved."""
    whole, folder = world.whole(job.name), place / job.folder
    if job.name in EDITS:
        finished = folder.exists() and not job.overwrites
        return whole.evaluated if finished else saved_figures(folder).get("image_forwards", 0)
    finished = folder.exists() and lying_in(folder)[0] == whole.made[0]
    if job.overwrites:
        finished = finished and not (folder / FEATURES).exists()
    if not finished:
        return sum(saved_figures(folder).get("image_forwards", {}).values())
    left = 0
    if not (folder / FEATURES).exists():
        saved = saved_figures(folder / FEATURES).get("image_forwards", 0)
        left = whole.evaluated_for_features - saved
    return whole.evaluated - left


def finish(world: World, job: Job, place: Path) -> None:
    """Runs a job to its end, which must equal that of a run without faults, at no more cost."""
    saved = saved_evaluations(world, job, place)
    child = Child(job.run, place)
    assert child.end() == 0, child.output
    check_whole(world, job, place, child, saved)


def check_whole(world: World, job: Job, place: Path, child: Child, saved: int) -> None:
    whole = world.whole(job.name)
    assert "damaged" not in child.output
    assert differing(snapshot(place), snapshot(whole.place)) == []
    assert hidden(place) == []
    assert child.report["evaluated"] == whole.evaluated - saved


def cleared(place: Path) -> Path:
    """A folder's name, free for the next trial."""
    shutil.rmtree(place, ignore_errors=True)
    return place


# ---------------------------------------------------------------------------------------------
# Kills


def kill(world: World, job: Job, place: Path, moment: int | float, saved: int) -> bool:
    """Kills a run, at a moment in seconds or before a call; False: it came to its end first."""
    by_call = isinstance(moment, int)
    child = Child(job.run, place, die_at=moment if by_call else None)
    if child.end(None if by_call else moment) is None:
        child.send(signal.SIGKILL)
    if child.end() != -signal.SIGKILL:
        assert child.end() == 0, child.output
        check_whole(world, job, place, child, saved)
        return False
    assert "damaged" not in child.output
    check_nothing_broken(world, job, place)
    return True


@pytest.mark.parametrize(
    ("name", "kills"),
    [("cache", 1), ("pnp", 1)] + [at_length(name, 15) for name in JOBS],
)
def test_kills_at_random_moments(world, tally, rng, tmp_path, name, kills):
    """Up to three in a row, until the work is whole."""
    job, seconds, done = world.job(name), world.whole(name).seconds, 0
    while done < kills:
        place = job.place(cleared(tmp_path / "place"))
        for _ in range(rng.randint(1, 3)):
            with tally.fault("kills at random moments", 0):
                saved = saved_evaluations(world, job, place)
                if not kill(world, job, place, rng.uniform(0, seconds), saved):
                    break
            with tally.fault("kills at random moments"):
                done += 1
        else:
            finish(world, job, place)


@pytest.mark.parametrize(
    ("name", "most"),
    [("cache", 2), ("pnp", 2)] + [at_length(name, 10**6) for name in JOBS],
)
def test_kills_before_each_change_on_the_disk(world, tally, rng, tmp_path, name, most):
    """Before each call that makes, syncs, renames or removes something."""
    job, calls = world.job(name), world.whole(name).calls
    for call in sorted(rng.sample(range(calls), min(most, calls))):
        place = job.place(cleared(tmp_path / "place"))
        with tally.fault("kills before a change"):
            assert kill(world, job, place, call, 0)
            finish(world, job, place)


@long
@pytest.mark.parametrize("name", ["no features", "save features"])
def test_features_that_another_edit_left_unfinished(world, tally, rng, tmp_path, name):
    """An edit ignores or completes them; what it makes is right to the bit."""
    job, other, whole = world.job("options"), world.job(name), world.whole("options")
    for call in rng.sample(range(whole.calls), 15):
        place = job.place(cleared(tmp_path / "place"))
        assert kill(world, job, place, call, 0)
        if (place / world.cache / FEATURES).exists():
            continue  # from which an edit differs by rounding
        with tally.fault("kills, then another edit"):
            child = Child(other.run, place)
            assert child.end() == 0, child.output
            found = snapshot(place / other.folder)
            assert differing(found, world.whole(name).made[0]) == []
            shutil.rmtree(place / other.folder)
            if name == "no features":
                finish(world, job, place)
            cache = snapshot(place / world.cache), snapshot(whole.place / world.cache)
            assert differing(*cache) == []


# ---------------------------------------------------------------------------------------------
# Damage


def damages(rng: random.Random, data: bytes, others: bytes) -> Iterator[tuple[str, bytes | None]]:
    """Ways in which a file is damaged, and what it is then; None: it is gone."""
    yield "files cut short", data[: rng.randrange(len(data) // 2 if is_yaml(data) else len(data))]
    for _ in range(0 if is_yaml(data) else 2):  # YAML has no checksum of its own
        place = rng.randrange(len(data))
        flipped = bytes([data[place] ^ 1 << rng.randrange(8)])
        yield "bits flipped", data[:place] + flipped + data[place + 1 :]
    yield "files gone", None
    if others != data:
        yield "files of another clip", others


def is_yaml(data: bytes) -> bool:
    """Whether these are the bytes of a manifest or a run record."""
    return b"\nfiles:\n" in b"\n" + data


def put(path: Path, content: bytes | None) -> None:
    """Replaces a file's content; None: removes it."""
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@contextmanager
def damaged(path: Path, content: bytes | None) -> Iterator[None]:
    """A file with another content, or gone, for a while."""
    data = path.read_bytes()
    put(path, content)
    try:
        yield
    finally:
        path.write_bytes(data)


def harms(rng: random.Random, folder: Path, other: Path) -> list[tuple[Path, str, bytes | None]]:
    """All ways to damage each file of a folder; `other` is one of another clip."""
    return [
        (path, kind, content)
        for path in visible(folder)
        for kind, content in damages(
            rng, path.read_bytes(), (other / path.relative_to(folder)).read_bytes()
        )
    ]


def verified(world: World, place: Path) -> str:
    """What an edit with --verify says of a cache; "" if nothing."""
    config = world.config(latents_path=str(place / "latents"), verify=True)
    try:
        open_edit_inputs(config)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def advised(error: str) -> list[list[str]]:
    """The commands that an error advises, before others that work around it."""
    commands = error.partition("run: ")[2].partition("; or edit without")[0]
    return [shlex.split(command) for command in commands.split(" and then ")]


def obey(world: World, place: Path, error: str) -> None:
    """Runs the commands that an error advises."""
    for command in advised(error):
        if command[0] == "rm":
            subprocess.run(command, check=True, cwd=place)
            continue
        assert command[:2] == ["python", "preprocess.py"]
        by = partial(world.preprocess_by, command[2:])
        child = Child(by, place)
        assert child.end() == 0, child.output


def the_line(child: Child) -> str:
    """The error of a script that ended with status 2: its last line, after no traceback."""
    assert child.end() == 2, child.output
    assert "Traceback" not in child.output
    line = child.output.strip().splitlines()[-1]
    assert line.startswith("error: "), child.output
    return line


def test_a_whole_cache_is_verified(world, tmp_path):
    assert verified(world, world.whole("cache").place) == ""


@pytest.mark.parametrize("edits", [1, at_length(None)])
def test_damage_in_a_cache(world, tally, rng, tmp_path, edits):
    """--verify finds all of it and says what to do; no edit makes anything else of it.

    Args:
        edits: so many damages are tried by an edit without --verify too, and 20 times as many
            with it; None: all.
    """
    job = world.job("pnp")
    place = job.place(tmp_path / "place")
    cache, other = place / world.cache, world.whole("other").place / world.other_cache
    todo = harms(rng, cache, other)
    if edits is not None:
        todo = rng.sample(todo, 20 * edits)
    tried = range(len(todo)) if edits is None else rng.sample(range(len(todo)), edits)
    for number, (path, kind, content) in enumerate(todo):
        with damaged(path, content), tally.fault(f"{kind}, cache"):
            said = verified(world, place)
            assert "run: " in said, (path, kind)
            if path == cache / MANIFEST and content is None:
                assert f"lacks its manifest ({cache.name})" in said, said
            elif path.name != MANIFEST or kind != "files of another clip":
                assert said.startswith(f"{path}: "), said  # another's manifest belies the others
            if number in tried:
                edit_of_damaged(world, job, place)
            assert advised(said)[-1][:2] == ["python", "preprocess.py"]


def edit_of_damaged(world: World, job: Job, place: Path) -> None:
    """An edit without --verify: refused with the file and the remedy, or right to the bit."""
    child = Child(as_script(job.run), place)
    if child.end() == 0:
        assert lying_in(place / job.folder) == world.whole(job.name).made
        shutil.rmtree(place / job.folder)
    else:
        line = the_line(child)
        assert str(world.cache.parent) in line and world.cache.name in line and "run: " in line, (
            line
        )
        assert not (place / job.folder).exists()


@pytest.mark.parametrize("files", [1, at_length(6)])
@pytest.mark.parametrize("part", [at_length("cache"), FEATURES])
def test_the_advised_command_mends_damage(world, tally, rng, tmp_path, part, files):
    job = world.job("pnp")
    paths = [path.relative_to(job.before) for path in visible(job.before / world.cache)]
    paths = [path for path in paths if (FEATURES in path.parts) == (part == FEATURES)]
    for path in rng.sample(paths, files):
        place = job.place(cleared(tmp_path / "place"))
        data = (place / path).read_bytes()
        content = rng.choice([content for _, content in damages(rng, data, data)])
        with tally.fault("damage mended as advised"):
            put(place / path, content)
            said = verified(world, place)
            obey(world, place, said)
            assert verified(world, place) == ""
            assert hidden(place) == []
            child = Child(job.run, place)
            assert child.end() == 0, child.output


def test_foreign_files_in_a_cache(world, tally, tmp_path):
    place = world.job("pnp").place(tmp_path / "place")
    for folder in ("", "latents", "frames", FEATURES, "new"):
        with tally.fault("foreign files"):
            path = place / world.cache / folder / "my notes.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("foreign")
            said = verified(world, place)
            assert said.startswith(f"{path}: does not belong there; run: rm ")
            obey(world, place, said)
            assert verified(world, place) == ""


@pytest.mark.parametrize("most", [2, at_length(10**6)])
def test_damage_in_a_result(world, tally, rng, tmp_path, most):
    """It is made again: what is gone or cut is seen by any run, the rest with --verify."""
    job = world.job("pnp")
    place = shutil.copytree(world.whole("pnp").place, tmp_path / "place")
    others = world.whole("pnp").place / job.folder
    if most > 2:
        others = world.whole("sdedit").place / world.job("sdedit").folder
    todo = harms(rng, place / job.folder, others)
    for path, kind, content in rng.sample(todo, min(most, len(todo))):
        fast = content is None or kind == "files cut short"
        assert (place / job.folder).exists()
        with tally.fault(f"{kind}, result"):
            put(path, content)
            child = Child(partial(world.edit, verify=not fast), place)
            assert child.end() == 0, child.output
            if path.name != "run.yaml":  # without it there is no result, or another one
                assert f"{path.relative_to(place)}: " in child.output
            assert "source features: read from" in child.output
            found, whole = lying_in(place / job.folder)[0], world.whole("pnp").made[0]
            assert set(differing(found, whole)) <= {"config.yaml", "run.yaml: files"}
            assert hidden(place) == []


def test_foreign_files_in_a_result(world, tally, tmp_path):
    """Are the user's: refused with --verify, never removed."""
    place = shutil.copytree(world.whole("pnp").place, tmp_path / "place")
    path = place / world.job("pnp").folder / "frames" / "notes.txt"
    path.write_text("mine")
    with tally.fault("foreign files"):
        child = Child(as_script(partial(world.edit, verify=True)), place)
        assert f"{path.relative_to(place)}: does not belong there" in the_line(child)
        assert path.read_text() == "mine"


# ---------------------------------------------------------------------------------------------
# Signals


class Meeting:
    """Where a forked child says that it has come so far, and waits to be told to go on."""

    def __init__(self) -> None:
        self._here, self._there = multiprocessing.Pipe()

    def say(self) -> None:
        """The child is there."""
        self._there.send_bytes(b"!")

    def reach(self) -> None:
        """The child is there, and waits."""
        self.say()
        self._there.recv_bytes()

    def await_child(self, child: Child) -> None:
        assert multiprocessing.connection.wait([self._here], 120), child.output
        self._here.recv_bytes()

    def let_go(self) -> None:
        self._here.send_bytes(b"!")


def as_script(run: Callable[[], object]) -> Callable[[], None]:
    """Work as a script's main runs it: one line and an exit status for an error."""
    return lambda: command_line(lambda _: run())


def meeting_at_first_save(run: Callable[[], object], meeting: Meeting) -> Callable[[], object]:
    """Work that waits at the meeting when it has saved for the first time."""

    def run_and_meet() -> None:
        save, saves = folders.WorkDir.save, []

        def save_and_meet(self: folders.WorkDir, *args: object, **figures: object) -> None:
            save(self, *args, **figures)
            saves.append(args)
            if len(saves) == 1:
                meeting.reach()

        folders.WorkDir.save = save_and_meet
        run()

    return run_and_meet


def stopped_at_first_save(job: Job, place: Path) -> tuple[Child, Meeting]:
    """A script that waits, at a meeting, where it has saved for the first time."""
    meeting = Meeting()
    child = Child(as_script(meeting_at_first_save(job.run, meeting)), place)
    meeting.await_child(child)
    return child, meeting


ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def check_interrupted(world: World, job: Job, place: Path, output: str) -> None:
    assert "Traceback" not in output and "Exception ignored" not in output
    last = output.strip().splitlines()[-1]
    assert re.fullmatch(r"interrupted; run the same command again to resume: python .*", last), (
        output
    )
    check_nothing_broken(world, job, place)


@pytest.mark.parametrize(
    ("name", "number"),
    [("pnp", number) for number in ENDS]
    + [("cache", signal.SIGTERM)]
    + [at_length(name, number) for name in ("cache", "overwrite", "live") for number in ENDS],
)
def test_a_signal_ends_with_how_to_go_on(world, tally, tmp_path, name, number):
    job = world.job(name)
    place = job.place(tmp_path / "place")
    child, _ = stopped_at_first_save(job, place)
    with tally.fault("signals"):
        child.send(number)
        assert child.end() == ENDS[number]
        check_interrupted(world, job, place, child.output)
        assert saved_evaluations(world, job, place) > 0 or name in PREPROCESSING
        finish(world, job, place)


@long
@pytest.mark.parametrize("name", ["cache", "overwrite", "pnp", "live"])
def test_signals_at_random_moments(world, tally, rng, tmp_path, name):
    job, seconds = world.job(name), world.whole(name).seconds
    for number in [*ENDS] * 4:
        meeting = Meeting()
        place = job.place(cleared(tmp_path / "place"))

        def begin(meeting: Meeting = meeting) -> None:
            meeting.say()
            job.run()

        child = Child(as_script(begin), place)
        meeting.await_child(child)
        if child.end(rng.uniform(0, seconds)) is not None:
            continue
        with tally.fault("signals"):
            child.send(number)
            if child.end() == 0:  # it was about to end
                continue
            assert child.end() == ENDS[number], child.output
            check_interrupted(world, job, place, child.output)
            finish(world, job, place)


@long
@pytest.mark.parametrize(
    ("name", "number", "seen"),
    [
        ("cache", signal.SIGTERM, b"reconstruction PSNR"),
        ("pnp", signal.SIGINT, b"source features: read"),
    ],
)
def test_a_signal_to_the_script_itself(world, tally, tmp_path, name, number, seen):
    """As the shell runs it; then its very last line, run again."""
    job = world.job(name)
    place = job.place(tmp_path / "place")
    if name == "pnp":
        keys = world.keys("pnp")
        (place / "config.yaml").write_text(yaml.safe_dump(keys))
        argv = [str(ROOT / "run_tokenflow_pnp.py"), "--config", "config.yaml"]
    else:
        argv = world.preprocess_argv(**PREPROCESSING[name][1])
        argv = [str(ROOT / "preprocess.py"), *argv]
    with tally.fault("signals"):
        process = subprocess.Popen(
            [sys.executable, *argv], cwd=place, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        output = b""
        while seen not in output:
            part = process.stderr.read1()
            assert part, output
            output += part
        process.send_signal(number)
        output += process.stderr.read()
        assert process.wait() == ENDS[number]
        check_interrupted(world, job, place, output.decode())
        again = shlex.split(output.decode().strip().splitlines()[-1].rpartition(": ")[2])
        assert again == ["python", *argv]
        subprocess.run([sys.executable, *again[1:]], cwd=place, check=True)
        found = lying_in(place / job.folder)
        # The script has its own SAVE_EVERY, which no byte of the cache depends on.
        assert [differing(*p) for p in zip(found, world.whole(name).made, strict=True)] == [[], []]


# ---------------------------------------------------------------------------------------------
# Disks


def unchecked(run: Callable[[], object]) -> Callable[[], None]:
    """A script on a disk whose room nobody checks beforehand."""

    def run_unchecked() -> None:
        build.check_disk = lambda *args: None
        as_script(run)()

    return run_unchecked


def check_refused(world: World, job: Job, place: Path, child: Child, reason: str) -> None:
    line = the_line(child)
    assert reason in line and "run the same command again" in line, line
    check_nothing_broken(world, job, place)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk in memory that holds so many bytes; `resize` makes it larger."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def bytes_in(folder: Path) -> int:
    """What a folder takes up in memory, in pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in visible(folder))


@pytest.mark.parametrize(
    ("name", "times"),
    [("pnp", 1)] + [at_length(name, 6) for name in JOBS],
)
def test_a_disk_that_runs_full(world, tally, rng, tmp_path, name, times):
    """At a random size, so that each writer meets it; with more room the work goes on."""
    job = world.job(name)
    place = world.whole(name).place
    there = bytes_in(job.before) if job.before else 0
    room = bytes_in(place) - there
    if job.overwrites:  # beside what is there, but for features, which follow when that is gone
        room = bytes_in(place / job.folder) - bytes_in(place / job.folder / FEATURES)
    for number in range(times):
        size = there + rng.randrange(1, room // 4096) * 4096
        with small_disk(tmp_path / f"disk{number}", size) as disk:
            place = job.place(disk / "place")
            with tally.fault("full disks"):
                child = Child(unchecked(job.run), place)
                child.end()
                check_refused(world, job, place, child, "No space left on device")
                remount(disk, "size=100m")
                finish(world, job, place)


@pytest.mark.parametrize(
    ("name", "size"),
    [("cache", 3000)] + [at_length(name, size) for name in JOBS for size in (100, 4500)],
)
def test_files_that_cannot_be_written(world, tally, tmp_path, name, size):
    """Without a disk of its own: no file may be larger than so many bytes."""
    job = world.job(name)
    place = job.place(tmp_path / "place")

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        unchecked(job.run)()

    with tally.fault("full disks"):
        child = Child(run, place)
        child.end()
        check_refused(world, job, place, child, "File too large")
        finish(world, job, place)


@pytest.mark.parametrize(
    ("name", "times"),
    [("pnp", 1)] + [at_length(name, 8) for name in JOBS],
)
def test_disks_that_fail_from_a_moment_on(world, tally, rng, tmp_path, name, times):
    job, calls = world.job(name), world.whole(name).calls
    for _ in range(times):
        place = job.place(cleared(tmp_path / "place"))
        number = rng.choice([errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
        with tally.fault("disks that fail"):
            child = Child(unchecked(job.run), place, rng.randrange(calls // 2), number)
            child.end()
            check_refused(world, job, place, child, os.strerror(number))
            finish(world, job, place)


@long
def test_room_is_checked_beforehand(world, tally, tmp_path):
    """With what an interrupted run left counted as room."""
    job = world.job("cache")
    needed = bytes_in(world.whole("cache").place)
    with small_disk(tmp_path / "disk", needed // 2) as disk, tally.fault("full disks"):
        place = job.place(disk / "place")
        child = Child(as_script(job.run), place)
        child.end()
        assert re.search(r"are needed, .* are free; make room", the_line(child))
        assert not (place / job.folder).exists()
        child = Child(unchecked(job.run), place)
        child.end()
        check_refused(world, job, place, child, "No space left on device")
        remount(disk, f"size={needed + 40 * 4096}")
        finish(world, job, place)


def test_a_read_only_disk(world, tally, tmp_path):
    """An edit may read its cache there; what would write is refused before it begins."""
    with small_disk(tmp_path / "disk", 10**7) as disk, tally.fault("read-only folders", 3):
        job = world.job("pnp")
        shutil.copytree(job.before, disk / "cache")
        place = tmp_path / "place"
        place.mkdir()
        remount(disk, "ro")
        latents = str(disk / "cache" / "latents")
        child = Child(lambda: world.edit(latents_path=latents), place)
        assert child.end() == 0, child.output
        found, whole = lying_in(place / job.folder)[0], world.whole("pnp").made[0]
        assert set(differing(found, whole)) == {"config.yaml", "run.yaml: cache", "run.yaml: files"}
        for run in (
            lambda: world.edit(latents_path=latents, output_path=str(disk / "out")),
            lambda: world.preprocess(save_dir=latents, overwrite=""),
        ):
            child = Child(as_script(run), place)
            child.end()
            assert "cannot be written to" in the_line(child)


# ---------------------------------------------------------------------------------------------
# What vanishes


@pytest.mark.parametrize(
    ("kind", "moment", "harm", "reason"),
    [
        ("video", "resolve_clip", os.remove, ": no such"),
        ("video", "read_clip", os.remove, ": no such"),
        ("folder", "resolve_clip", shutil.rmtree, ""),
        ("folder", "folder_images", lambda clip: os.remove(clip / "00000.jpg"), "/00000.jpg"),
        ("folder", "read_clip", lambda clip: os.remove(clip / "00001.jpg"), ": changed while"),
        ("folder", "read_clip", lambda clip: shutil.copy(*sorted(clip.iterdir())[:2]), ": changed"),
    ],
)
def test_a_clip_that_vanishes_or_changes(world, tally, tmp_path, kind, moment, harm, reason):
    """After a function has found or read it: its frames would be kept under the name of others."""
    place = tmp_path / "place"
    place.mkdir()
    is_video = kind == "video"
    clip = shutil.copy(world.clip, place) if is_video else make_image_folder(place / "a", N_FRAMES)
    module = preprocess_inputs if hasattr(preprocess_inputs, moment) else video

    def run() -> None:
        call = getattr(module, moment)

        def call_and_harm(path: Path, *args: object, **options: object) -> object:
            found = call(path, *args, **options)
            harm(path)
            return found

        setattr(module, moment, call_and_harm)
        world.preprocess(data_path=clip)

    with tally.fault("sources that vanish"):
        child = Child(as_script(run), place)
        child.end()
        assert the_line(child).startswith(f"error: {clip}{reason}")
        assert not (place / "latents").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("pnp", FEATURES),
        at_length("pnp", "."),
        *(at_length("live", part) for part in (".", "latents", FEATURES)),
    ],
)
def test_a_cache_that_vanishes_under_an_edit(world, tally, tmp_path, name, part):
    """The edit says so, or had read what it needs; nothing is left that looks whole."""
    job = world.job(name)
    place = job.place(tmp_path / "place")
    child, meeting = stopped_at_first_save(job, place)
    with tally.fault("caches that vanish"):
        shutil.move(place / world.cache / part, tmp_path / "away")
        meeting.let_go()
        if child.end() == 0:
            assert lying_in(place / job.folder) == world.whole(name).made
        else:
            line = the_line(child)
            assert str(world.cache) in line and "preprocess.py" in line, line
            assert not (place / job.folder).exists()
            shutil.rmtree(place / world.cache / part, ignore_errors=True)
            shutil.move(tmp_path / "away", place / world.cache / part)
            finish(world, job, place)


@long
def test_work_that_vanishes_under_its_maker(world, tally, tmp_path):
    job = world.job("cache")
    place = job.place(tmp_path / "place")
    child, meeting = stopped_at_first_save(job, place)
    with tally.fault("caches that vanish"):
        shutil.rmtree(place / world.cache.with_name(f".{world.cache.name}.work"))
        meeting.let_go()
        child.end()
        assert "vanished while it was in use; run the same command again" in the_line(child)
        assert not (place / job.folder).exists()
        finish(world, job, place)


# ---------------------------------------------------------------------------------------------
# Two processes


def meeting_when_waiting(run: Callable[[], object], meeting: Meeting) -> Callable[[], object]:
    """Work that says when it is about to wait for a lock."""

    def run_and_say() -> None:
        acquire = FileLock.acquire

        def say_and_acquire(lock: FileLock, timeout: float | None = None) -> object:
            if timeout != 0:
                meeting.say()
            return acquire(lock, timeout)

        FileLock.acquire = say_and_acquire
        run()

    return run_and_say


@pytest.mark.parametrize("name", [at_length("cache"), "pnp"])
def test_two_at_once(world, tally, tmp_path, name):
    """The second waits and finds made what the first made."""
    job, first, second = world.job(name), Meeting(), Meeting()
    place = job.place(tmp_path / "place")
    (tmp_path / "second").symlink_to(place)
    with tally.fault("two processes at once", 2):
        at_work = Child(meeting_at_first_save(job.run, first), place)
        first.await_child(at_work)
        waits = Child(meeting_when_waiting(job.run, second), tmp_path / "second")
        second.await_child(waits)
        first.let_go()
        assert at_work.end() == waits.end() == 0, waits.output
        assert "waiting for another process that works on it" in waits.output
        assert re.search("already|is finished", waits.output)
        assert (waits.report["evaluated"], hidden(place)) == (0, [])
        assert lying_in(place / job.folder) == world.whole(name).made


@long
def test_a_cache_overwritten_under_an_edit(world, tally, tmp_path):
    """The edit is refused at its end, since it read from two caches."""
    job = world.job("live")
    place = job.place(tmp_path / "place")
    with tally.fault("two processes at once"):
        edit, reads = stopped_at_first_save(job, place)
        options = {"inversion_prompt": "a wolf", "overwrite": ""}
        overwrite = Child(partial(world.preprocess, **options), place)
        assert overwrite.end() == 0, overwrite.output
        reads.let_go()
        assert "was replaced meanwhile; run the same command again" in the_line(edit)
        assert not (place / job.folder).exists()


def test_an_edit_of_a_cache_in_the_making(world, tally, tmp_path):
    """Says so from the first moment of the making on."""
    job, meeting = world.job("inversion"), Meeting()
    place = job.place(tmp_path / "place")
    with tally.fault("two processes at once"):

        def load_and_meet(*key: object) -> StableDiffusion:
            meeting.reach()
            return world.load(*key)

        argv = world.preprocess_argv(no_cache_features="")
        child = Child(lambda: preprocess.preprocess(parse_args(argv), load_and_meet), place)
        meeting.await_child(child)
        config = world.config(latents_path=str(place / "latents"))
        with pytest.raises(UserError, match="another process is building the cache"):
            open_edit_inputs(config)
        meeting.let_go()
        assert child.end() == 0, child.output
        open_edit_inputs(config)
