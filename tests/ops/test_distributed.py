"""Several processes on one clip give what one gives, to rounding; and end together when one fails.

They are forked from this one, which has one thread, so that nothing is imported again.
"""

import functools
import itertools
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import preprocess
import run_tokenflow_pnp
from run_tokenflow_pnp import PnPConfig
from tests.editing.test_loop import relative_error
from tests.helpers import HEIGHT, WIDTH, contents, edit_keys, make_clip, save_masks
from tokenflow.cache import build
from tokenflow.cache.options import arguments
from tokenflow.cache.source_cache import open_cache, read_manifest
from tokenflow.diffusion.models import resolve_device
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession
from tokenflow.editing.techniques import load_technique
from tokenflow.ops.distributed import SINGLE_PROCESS, ProcessGroup, start_process_group
from tokenflow.storage.images import load_frames
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError, load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]
SAME = 1e-5  # relative error, float32
ITERATED = {"inversion_tol": 0.001, "inversion_iters": 3}
FORK = multiprocessing.get_context("fork")
TOO_LONG = 300  # seconds
N_FRAMES, STEPS = 5, 2  # two processes have 3 and 2 frames, three have 2, 2 and 1
slow = pytest.mark.slow


def in_processes(size, work, folder):
    """Runs work(group) in `size` processes; returns their exit statuses and dicts of tensors."""
    folder.mkdir(parents=True)
    processes = [FORK.Process(target=member, args=(i, size, work, folder)) for i in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TOO_LONG)
        process.kill()  # one that hangs
        process.join()
    files = [folder / f"{rank}.safetensors" for rank in range(size)]
    return [p.exitcode for p in processes], [load_tensors(f) for f in files if f.exists()]


def member(rank, size, work, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=size)
    save_tensors(folder / f"{rank}.safetensors", work(ProcessGroup(rank, size, rank)))
    dist.destroy_process_group()


def succeed(size, work, folder):
    """What every process found, when all of them have succeeded."""
    statuses, found = in_processes(size, work, folder)
    assert statuses == [0] * size
    return found


def options(clip, folder, model, **changes):
    return {
        "data_path": clip, "save_dir": folder, "model_key": model, "n_frames": N_FRAMES,
        "H": HEIGHT, "W": WIDTH, "steps": 4 * STEPS, "save_steps": STEPS, "keyframe_interval": 2,
        "device": "cpu", "inversion_prompt": "a disc on a wall", "batch_size": 2, **changes,
    }  # fmt: skip


def build_cache(*args, group=SINGLE_PROCESS, **changes):
    argv = arguments(options(*args, **changes))
    return preprocess.preprocess(preprocess.parse_args(argv), group=group)


def assert_same_latents(folders, name="edited_latents.safetensors"):
    one, other = (load_tensors(folder / name)["latents"] for folder in folders)
    assert relative_error(one, other.double()) < SAME, name


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", N_FRAMES)


@pytest.fixture(scope="module")
def cache(clip, tiny_model):
    return build_cache(clip, clip.parent / "latents", tiny_model)


@pytest.fixture(scope="module")
def keys(clip, cache, tiny_model):
    steps = {"n_inversion_steps": 4 * STEPS, "n_timesteps": STEPS, "n_frames": N_FRAMES}
    # three keyframes
    return edit_keys(clip.parent, tiny_model, **steps, negative_prompt="ugly", keyframe_interval=2)


# ---------------------------------------------------------------- edits

EDITS = {
    "pnp": {},
    "sdedit": {"technique": "sdedit", "use_ddim_noise": False},
    "controlnet": {"technique": "controlnet"},
    "live": {"source_features": "live"},
    "released": {"propagation": "released"},
    "extended attention": {"consistency": "extended_attention"},
    "first frame": {"consistency": "first_frame"},
    "per frame": {"consistency": "none"},
    "flow": {"correspondence": "flow"},
    # fewer things than processes
    "one keyframe": {"keyframe_interval": N_FRAMES},
    "two keyframes": {"keyframe_interval": 3},
    "two frames": {"n_frames": 2},
    "one frame": {"n_frames": 1},
    "one frame by itself": {"n_frames": 1, "consistency": "none"},
    "two frames in extended attention": {"n_frames": 2, "consistency": "extended_attention"},
    # and what changes the passes
    "fixed keyframes": {"keyframes": "fixed"},
    "no guidance": {"guidance_scale": 1.0},
    "small chunks": {"chunk_size": 1},
    "windows": {"keyframe_interval": 1, "max_keyframes": 4, "chunk_size": 2},
    "nothing injected": {"pnp_attn_t": 0.0, "pnp_f_t": 0.0, "source_features": "live"},
}
QUICK = {
    2: list(EDITS)[:9],
    3: ["pnp", "live", "extended attention", "two keyframes", "two frames"],
}


def edit(keys, models, group=SINGLE_PROCESS, technique="pnp", **changes):
    """A session and the latents that it edited; ControlNet's has its small ControlNet."""
    technique = load_technique(technique)
    if technique.name == "controlnet":
        changes["controlnet_key"] = f"{keys['model_key']}/controlnet"
    config = technique.config(**{**keys, **changes})
    session = EditSession(open_edit_inputs(config, group), load=lambda *_: models)
    return session, session.edit_latents(technique.plan(session))


@pytest.fixture(scope="module")
def alone(keys, models):
    """The edits of one process, each made once."""
    return functools.cache(lambda name: edit(keys, models, **EDITS[name]))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if name in QUICK[size] else slow)
        for size in QUICK
        for name in EDITS
    ],
)
def test_an_edit_of_several_processes_is_that_of_one(keys, models, alone, tmp_path, name, size):
    def work(group):
        session, latents = edit(keys, models, group, **EDITS[name])
        return {"latents": latents, "forwards": torch.tensor(session.image_forwards)}

    session, expected = alone(name)
    found = succeed(size, work, tmp_path / "processes")
    assert all(torch.equal(one["latents"], found[0]["latents"]) for one in found)
    assert relative_error(found[0]["latents"], expected.double()) < SAME
    # Of keyframes that are fewer than the processes, some are computed twice.
    k = session.config.n_frames
    if session.config.consistency == "tokenflow":
        k = -(-k // session.config.keyframe_interval)
    joint = session.config.consistency in ("tokenflow", "extended_attention")
    if k >= size or not joint:
        assert found[0]["forwards"] == session.image_forwards
    else:
        assert found[0]["forwards"] > session.image_forwards


def test_a_result_is_written_once_and_then_found(keys, tmp_path):
    save_masks(tmp_path / "masks", np.eye(HEIGHT, WIDTH, dtype=np.uint8)[None])
    keys = {**keys, "mask": str(tmp_path / "masks" / "00000.png")}
    config = PnPConfig(**{**keys, "output_path": str(tmp_path / "several")})

    def work(group):
        folder = run_tokenflow_pnp.edit(config, group=group)
        before = contents(folder)
        assert run_tokenflow_pnp.edit(config, group=group) == folder
        assert contents(folder) == before
        return {}

    succeed(2, work, tmp_path / "processes")
    (folder,) = (tmp_path / "several").glob("pnp/*/*")
    single = run_tokenflow_pnp.edit(PnPConfig(**{**keys, "output_path": str(tmp_path / "one")}))
    assert_same_latents((folder, single))
    frames = [load_frames(f / "frames", N_FRAMES).astype(int) for f in (folder, single)]
    assert np.abs(frames[0] - frames[1]).max() <= 1
    run, run_of_one = (load_yaml(f / "run.yaml") for f in (folder, single))
    assert (run["processes"], run_of_one["processes"]) == (2, 1)
    assert run["image_forwards"] == run_of_one["image_forwards"]


# ---------------------------------------------------------------- preprocess


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (2, {}),
        pytest.param(3, ITERATED | {"reconstruction": "sample"}, marks=slow),
        pytest.param(3, {"n_frames": 2, "sd_version": "ControlNet"}, marks=slow),
    ],
)
def test_a_cache_of_several_processes_is_that_of_one(clip, tiny_model, tmp_path, size, changes):
    if "sd_version" in changes:
        changes = {**changes, "control": "canny", "controlnet_key": tiny_model / "controlnet"}
    args = clip, tmp_path / "several", tiny_model

    def work(group):
        folder = build_cache(*args, **changes, group=group)
        before = contents(folder)
        assert build_cache(*args, **changes, group=group) == folder  # and finds it made
        assert contents(folder) == before
        return {}

    succeed(size, work, tmp_path / "processes")
    single = build_cache(clip, tmp_path / "one", tiny_model, **changes)
    several = tmp_path / "several" / single.relative_to(tmp_path / "one")
    assert set(contents(several)) == set(contents(single))
    names = sorted(single.rglob("*.safetensors"))
    assert len(names) == 1 + len(read_manifest(single).timesteps) + STEPS
    for path in names:
        found, expected = load_tensors(several / path.relative_to(single)), load_tensors(path)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            if x.is_floating_point():
                assert relative_error(found[name], x.double()) < SAME, f"{path}: {name}"
            else:
                assert torch.equal(found[name], x), f"{path}: {name}"
    ours, theirs = read_manifest(several), read_manifest(single)
    assert ours.image_forwards == theirs.image_forwards
    assert ours.psnr == pytest.approx(theirs.psnr, abs=0.01)
    features = [load_yaml(f / "features" / "manifest.yaml") for f in (several, single)]
    assert features[0]["image_forwards"] == features[1]["image_forwards"]
    open_cache(several)  # whose files are those of its manifest


# ---------------------------------------------------------------- interruptions


def dies_at(call, number):
    """A function whose process is gone at its call of this number, counted from 1."""
    calls = itertools.count(1)

    def dying(*args, **options):
        if next(calls) == number:
            os._exit(9)
        return call(*args, **options)

    return dying


def test_a_cache_that_two_processes_began_is_gone_on_with_by_three(clip, tiny_model, tmp_path):
    changes = ITERATED
    args = clip, tmp_path / "several", tiny_model

    def begin(group):
        if group.is_main:  # after the clean latents and those of a timestep
            build.save_tensors = dies_at(build.save_tensors, 3)
        with pytest.raises(UserError, match="another process of this run has ended"):
            build_cache(*args, **changes, group=group)
        return {}

    def go_on(group):
        build.encode_frames = None  # which is behind
        build_cache(*args, **changes, group=group)
        return {}

    assert in_processes(2, begin, tmp_path / "two")[0] == [9, 0]
    succeed(3, go_on, tmp_path / "three")
    single = build_cache(clip, tmp_path / "one", tiny_model, **changes)
    several = tmp_path / "several" / single.relative_to(tmp_path / "one")
    for path in single.rglob("latents/*.safetensors"):
        assert_same_latents((several, single), path.relative_to(single))
    assert read_manifest(several).image_forwards == read_manifest(single).image_forwards


def test_an_edit_that_two_processes_began_is_gone_on_with_by_three(keys, tmp_path):
    settings = {**keys, "checkpoint_every": 1}
    config = PnPConfig(**{**settings, "output_path": str(tmp_path / "several")})

    def begin(group):
        if group.is_main:  # one step is saved
            EditSession._checkpoint = dies_at(EditSession._checkpoint, 2)
        with pytest.raises(UserError, match="another process of this run has ended"):
            run_tokenflow_pnp.edit(config, group=group)
        return {}

    def go_on(group):
        run_tokenflow_pnp.edit(config, group=group)
        return {}

    assert in_processes(2, begin, tmp_path / "two")[0] == [9, 0]
    succeed(3, go_on, tmp_path / "three")
    (folder,) = (tmp_path / "several").glob("pnp/*/*")
    single = run_tokenflow_pnp.edit(PnPConfig(**{**settings, "output_path": str(tmp_path / "one")}))
    assert_same_latents((folder, single))
    runs = [load_yaml(f / "run.yaml") for f in (folder, single)]
    assert runs[0]["image_forwards"] == runs[1]["image_forwards"]


# ---------------------------------------------------------------- failures


def test_what_all_processes_refuse_is_said_by_one(keys, tmp_path, capfd):
    config = PnPConfig(**{**keys, "latents_path": str(tmp_path / "nowhere")})

    def work(group):
        with pytest.raises(UserError, match="no cache for this clip"):
            run_tokenflow_pnp.edit(config, group=group)
        return {}

    # The other one ends with status 0: the launcher waits for the one that says why.
    statuses, found = in_processes(2, work, tmp_path / "processes")
    assert statuses == [0, 0]
    assert len(found) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_what_one_process_refuses_ends_all(keys, tmp_path):
    def work(group):
        with group.raise_together():
            if group.rank == 1:
                raise UserError("only here")
        pytest.fail("went on")

    statuses, found = in_processes(3, work, tmp_path / "processes")
    assert statuses == [0, 1, 0]
    assert not found


def test_a_process_that_is_lost_in_the_middle_ends_the_others(keys, models, tmp_path):
    def work(group):
        session = EditSession(open_edit_inputs(PnPConfig(**keys), group), load=lambda *_: models)
        plan = run_tokenflow_pnp.plan(session)
        if group.rank == 1:
            session.models.unet.mid_block.register_forward_hook(lambda *args: os._exit(9))
        with pytest.raises(UserError, match="another process of this run has ended"):
            session.edit_latents(plan)
        return {}

    statuses, _ = in_processes(2, work, tmp_path / "processes")
    assert statuses == [0, 9]


def test_processes_that_see_different_caches_do_not_start(keys, models, tmp_path):
    def work(group):
        session = EditSession(open_edit_inputs(PnPConfig(**keys), group), load=lambda *_: models)
        if group.rank == 1:
            session.config = session.config.model_copy(update={"source_features": "live"})
        session.edit_latents(run_tokenflow_pnp.plan(session))
        pytest.fail("went on")

    statuses, found = in_processes(2, work, tmp_path / "processes")
    assert statuses == [0, 1]
    assert not found


# ---------------------------------------------------------------- small parts


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 16])
def test_shares_are_even_and_whole(n, size):
    shards = [ProcessGroup(rank, size, rank).shard(n) for rank in range(size)]
    assert torch.cat([shard.local_indices for shard in shards]).tolist() == list(range(n))
    lengths = [len(shard.local_indices) for shard in shards]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == [len(part) for part in torch.arange(n).tensor_split(size)]
    for rank in range(size):
        joint = ProcessGroup(rank, size, rank).shard(max(n, 1), joint=True).local_indices.tolist()
        assert joint == (shards[rank].local_indices.tolist() if n >= size else [rank % max(n, 1)])


def test_what_is_gathered_is_what_was_taken(tmp_path):
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)

    def work(group):
        for n, dtype in itertools.product((0, 1, 2, 5), dtypes):
            whole = torch.arange(2 * n * 3).reshape(2, n, 3).to(dtype)
            shard = group.shard(n)
            assert torch.equal(shard.gather(shard.take(whole, dim=1), dim=1), whole)
        whole = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
        shard = group.shard(2, joint=True)
        assert torch.equal(shard.gather(shard.take(whole)), whole)
        assert group.all_gather(10 * group.rank) == [0, 10, 20]
        assert group.broadcast({"rank": [group.rank], "text": "é"}) == {"rank": [0], "text": "é"}
        return {}

    succeed(3, work, tmp_path / "processes")


def test_one_process_alone_shares_nothing():
    x = torch.randn(3, 2)
    shard = SINGLE_PROCESS.shard(3)
    assert shard.take(x) is x
    assert shard.gather(x) is x
    assert SINGLE_PROCESS.broadcast(x) is x
    assert SINGLE_PROCESS.all_gather(4) == [4]
    with pytest.raises(UserError, match="as it is"), SINGLE_PROCESS.raise_together():
        raise UserError("as it is")


def test_each_process_takes_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    group = ProcessGroup(rank=7, size=8, local_rank=3)  # the last of two machines'
    for name in ("auto", "cuda"):
        assert resolve_device(name, group) == torch.device("cuda:3")
        assert resolve_device(name).index is None
    assert resolve_device("cpu", group) == torch.device("cpu")
    with pytest.raises(UserError, match="cuda:1 cannot be shared by 8 processes"):
        resolve_device("cuda:1", group)
    with pytest.raises(UserError, match="cuda:4 was asked for, but torch sees 4"):
        resolve_device("cuda", ProcessGroup(rank=4, size=8, local_rank=4))


def test_a_compiled_unet_is_refused_before_a_model_loads(keys):
    with pytest.raises(UserError, match="compile: true, but 2 processes"):
        open_edit_inputs(PnPConfig(**keys, compile=True), ProcessGroup(0, 2))


def test_the_launcher_says_who_is_there(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    with start_process_group() as group:
        assert group is SINGLE_PROCESS
    # accelerate launch --cpu --num_processes 2
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(UserError, match="--multi_gpu --num_processes N"), start_process_group():
        pytest.fail("went on")


def test_processes_of_a_launcher_meet(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def join(rank):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with start_process_group() as group:
            (tmp_path / str(rank)).write_text(f"{group} {group.all_gather(group.rank)}")

    processes = [FORK.Process(target=join, args=(rank,)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TOO_LONG)
        process.kill()
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"{ProcessGroup(rank, 2, rank)} [0, 1]"


# ---------------------------------------------------------------- the command line


def launch(processes, script, *words):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    return subprocess.run(
        [*launcher, ROOT / script, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@slow
def test_the_command_line(clip, tiny_model, keys, tmp_path):
    small = arguments(options(clip, tmp_path / "latents", tiny_model))
    done = launch(2, "preprocess.py", *small)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cache: ") == 1
    assert done.stderr.count("reconstruction PSNR") == 1
    config = keys | {"latents_path": str(tmp_path / "latents")}
    config |= {"output_path": str(tmp_path / "results")}
    save_yaml(tmp_path / "config.yaml", config)
    words = ["--config", tmp_path / "config.yaml"]
    done = launch(2, "run_tokenflow_pnp.py", *words)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.removeprefix("result: ").strip())
    assert load_yaml(folder / "run.yaml")["processes"] == 2
    single = run_tokenflow_pnp.edit(PnPConfig(**{**config, "output_path": str(tmp_path / "one")}))
    assert_same_latents((folder, single))
    # The error is printed once.
    done = launch(2, "run_tokenflow_pnp.py", *words, "--set", "n_frames=0")
    assert done.returncode != 0
    assert done.stderr.count("error: --set n_frames: expected at least 1") == 1
