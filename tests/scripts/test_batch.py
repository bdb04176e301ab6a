"""Batches: what runs them, and that no clip, crash or kill costs another clip its edits."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts.batch import batch, engine
from scripts.batch.clip_list import VARIANTS, Job, Variant
from scripts.batch.engine import FAILED, FOUND, MADE, Outcome
from tests.helpers import contents, make_clip, write_list
from tokenflow.diffusion import models
from tokenflow.storage.yaml_files import load_yaml
from util import Interrupted, UserError

SUMMARY = "tokenflow-results/batch/summary.yaml"


pytestmark = pytest.mark.usefixtures("here")


def make_clips(names, n_frames=3):
    """Writes a video for each name; returns the list's entries."""
    paths = [f"{name}.mp4" for name in names]
    for i, path in enumerate(paths):
        make_clip(Path(path), n_frames, seed=i)
    return [{"data_path": path} for path in paths]


def run(*argv):
    """Runs the script; returns its exit status."""
    with pytest.raises(SystemExit) as end:
        batch.main(["list.yaml", *map(str, argv)])
    return end.value.code


def kept():
    """All files of caches and results, with the time of their last change."""
    ours = re.compile(r"latents/|tokenflow-results/(?!batch)")
    return {p: at for p, at in contents(Path()).items() if ours.match(p) and Path(p).is_file()}


def states():
    """By clip, the states of its jobs in the last summary."""
    clips = load_yaml(SUMMARY)["clips"]
    return {clip: [job["state"] for job in jobs] for clip, jobs in clips.items()}


# ---------------------------------------------------------------------------------------- batches


def test_a_broken_clip_costs_no_other_its_edits_and_finished_work_is_kept(
    tiny_model, shared_ray, capsys
):
    gone = "gone \u2605 <b>"
    clips = [*make_clips(["a", "bad", "b"]), {"data_path": gone}]
    Path("bad.mp4").write_bytes(Path("a.mp4").read_bytes()[:500])
    write_list(tiny_model, clips=clips, techniques=["pnp", "sdedit"])
    assert run() == 2
    out = capsys.readouterr().out
    assert re.search(r"^a +1 made, \d+ s +1 made, \d+ s +1 made, \d+ s$", out, re.MULTILINE)
    assert re.search(r"^bad +1 failed +1 failed +1 failed$", out, re.MULTILINE)
    assert "4 made, 4 failed of 8 edits; something failed of 2 of 4 clips:" in out
    assert "  bad: inversion: bad.mp4: not a video that can be read" in out
    assert "    alone: python -m scripts.batch.batch list.yaml --only " in out
    assert out.endswith("all on a page: python report.py tokenflow-results\n")
    assert f"  {gone}: inversion: {gone}: no such video or folder" in out
    ends = {"a": MADE, "bad": FAILED, "b": MADE, gone: FAILED}
    assert states() == {clip: [state] * 3 for clip, state in ends.items()}
    summary = load_yaml(SUMMARY)
    assert (summary["failed_clips"], summary["status"]) == (["bad", gone], 2)
    assert summary["clips"]["bad"][1]["reason"] == engine.NOT_TRIED
    logs = sorted(path.name for path in Path("tokenflow-results/batch").glob("*.log"))
    assert logs[:3] == ["a.log", "b.log", "bad.log"]
    assert re.fullmatch(r"gone-b-[0-9a-f]{8}\.log", *logs[3:])
    log = Path("tokenflow-results/batch/bad.log").read_text()
    assert re.match(r"--- .*, bad: inversion\nerror: bad.mp4: not a video", log)

    assert run("--summary") == 2
    assert capsys.readouterr().out == out
    made = kept()
    assert len(list(Path("tokenflow-results").glob("*/*/*/edited.mp4"))) == 4
    # A failed job can be repeated by itself, and then all of it is finished.
    shutil.copy("a.mp4", "bad.mp4")
    words = summary["clips"]["bad"][1]["alone"].split()
    assert words[:4] == ["python", "-m", "scripts.batch.batch", "list.yaml"]
    assert run(*words[4:]) == 0
    assert states() == {"bad": [MADE, MADE]}
    capsys.readouterr()
    assert run("--quiet") == 1
    assert not capsys.readouterr().out
    assert states()["b"] == [FOUND] * 3
    assert made.items() <= kept().items()


def failing(name, action):
    """A job of a clip of its own whose edit does this in the place of an edit."""

    def make(config, load):
        action()
        return Path("result")

    variant = Variant("pnp", "pnp", SimpleNamespace, make)
    return Job(name, variant, {"device": "cpu", "compile": False, "prompt": name})


def raises(error):
    def action():
        raise error

    return action


ENDS = {
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed, perhaps because memory"),
    "bug": (lambda: 1 // 0, "^ZeroDivisionError: .*by zero$"),
    "refused": (raises(UserError("x\ny")), "^x y$"),
    "disk": (raises(OSError(28, "No space left on device")), "No space left"),
    "memory": (raises(MemoryError()), "^out of memory"),
    "gpu": (raises(torch.OutOfMemoryError("CUDA\nmuch text")), "^out of GPU memory"),
    "fine": (lambda: None, "^$"),
    "exit": (lambda: sys.exit(3), "its process ended with status 3$"),
    "segfault": (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed: Segmentation fault$"),
}


@pytest.mark.slow
def test_a_job_that_fails_or_ends_its_process_fails_alone(shared_ray):
    jobs = [failing(name, action) for name, (action, _) in ENDS.items()]
    outcomes = engine.run_jobs(jobs, Path("logs"), 2)
    for job in jobs:
        outcome = outcomes[job.key]
        assert re.search(ENDS[job.clip][1], outcome.reason), job.clip
        # The fine one is found: it loaded no model.
        assert outcome.state == (FOUND if job.clip == "fine" else FAILED)
    assert outcomes[jobs[6].key].folder == "result"
    assert "1 // 0" in Path("logs/bug.log").read_text()


def test_a_signal_to_the_command_ends_it_amid_a_job(shared_ray):
    def interrupt(number, frame):
        raise Interrupted(number)

    command = os.getpid()
    jobs = [failing("long", lambda: (os.kill(command, signal.SIGTERM), signal.pause()))]
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(Interrupted) as end:
            engine.run_jobs(jobs, Path("logs"))
    finally:
        signal.signal(signal.SIGTERM, old)
    assert end.value.args == (signal.SIGTERM,)


def test_a_process_that_does_not_start_fails_no_job(tiny_model, shared_ray, monkeypatch, capsys):
    class Broken:
        def __init__(self, folder):
            raise ImportError("no such module")

        def ready(self):
            pass

    monkeypatch.setattr(engine, "Worker", Broken)
    write_list(tiny_model)
    assert run() == batch.WRONG == 255
    assert re.search("^error: no process can be started: .*no such mod", capsys.readouterr().err)
    assert not Path(SUMMARY).exists()


@pytest.mark.parametrize(
    ("n_gpus", "device", "asked", "processes", "share"),
    [
        (4, "auto", None, 4, 1),
        (2, "cuda", 3, 3, 0.5),  # of one GPU: three thirds of two would not fit
        (0, "auto", None, 2, 0),  # one on each machine
        (4, "cuda:1", None, 2, 0),  # whoever names a GPU gets that one
        (2, "auto", 99, 6, 1 / 3),  # no more than there are jobs
    ],
)
def test_processes_share_the_gpus(n_gpus, device, asked, processes, share):
    jobs = [Job("c", None, {"device": device, "n": i}) for i in range(6)]
    given = {}
    ray = SimpleNamespace(  # two machines
        nodes=lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}],
        cluster_resources=lambda: {"CPU": 8.0, "GPU": float(n_gpus)} if n_gpus else {"CPU": 8.0},
        remote=lambda worker: SimpleNamespace(options=lambda **options: given.update(options)),
    )
    _, found = engine._starter(ray, jobs, asked)
    assert (found, given["num_gpus"]) == (processes, share)


def test_the_time_left_is_estimated_from_what_was_made(caplog):
    caplog.set_level(logging.INFO)
    inversion = Job("a", None, {})
    edits = [Job("a", VARIANTS["pnp"], {"prompt": p}, inversion.key) for p in "pqr"]
    jobs, outcomes = [inversion, *edits], {}
    ends = [(FOUND, 0.01), (FOUND, 0.01), (MADE, 30.0), (FAILED, 0.1)]
    for job, (state, seconds) in zip(jobs, ends, strict=True):
        engine.report(jobs, outcomes, job, Outcome(state, seconds, "why" * (state == FAILED)), 2)
    assert caplog.messages == [
        "[1/4] a: inversion: found finished",
        '[2/4] a: pnp: "p": found finished',
        '[3/4] a: pnp: "q": made in 30 s; about 15 s left',
        '[4/4] a: pnp: "r": failed: why',
    ]
    engine.report(jobs, {}, inversion, Outcome(FAILED, reason="why"), 2)  # which settles its edits
    assert caplog.messages[-1] == "[4/4] a: inversion: failed: why"


def test_models_are_kept_until_others_are_asked_for(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        models, "load_stable_diffusion", lambda *key: loaded.append(key) or list(key)
    )
    load, cpu = models.KeptModels(), torch.device("cpu")
    first = load(Path("m"), cpu, torch.float32)
    assert load(Path("./m"), cpu, torch.float32) is first
    assert load(Path("m"), cpu, torch.float16) is not first
    assert load(Path("m"), cpu, torch.float32) is not first
    assert (len(loaded), load.calls) == (3, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--technique", "pmp"], "--technique: invalid choice: 'pmp'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--summary"], "summary.yaml: no such file"),
        (["--only", "123"], "--only: 123: this list has no such job"),
        (["--prompt", "a\udcffb"], "not valid Unicode"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--davis", "none"], "none/JPEGImages/480p: no such folder"),
    ],
)
def test_wrong_options_are_refused_with_a_status_that_is_no_number_of_clips(
    tiny_model, capsys, words, message
):
    write_list(tiny_model)
    assert run(*words) == 255
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (3, False), (143, True)])
def test_a_slurm_job_starts_one_cluster_and_is_requeued_when_interrupted(
    tmp_path, status, requeued
):
    commands = {
        "srun": f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $*"; exit {status}',
        "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; else echo "$*"; fi',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    job["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    script = str(engine.ROOT / "scripts/slurm_davis.sh")
    done = subprocess.run(
        ["sh", script, "list.yaml", "--verify"],
        env=os.environ | job, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout.splitlines() == [
        "token 32 ray symmetric-run --address n1:23456 --min-nodes 2 --disable-usage-stats -- "
        "env RAY_ADDRESS=n1:23456 sh scripts/run_davis.sh list.yaml --verify",
        *["requeue 123456"] * requeued,
    ]


# ------------------------------------------------------------------------------ the real processes


def processes_of(parent):
    """The Ray processes that the command started, and what they started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    table = [line.split(None, 2) for line in listed.stdout.splitlines()]
    found, names = {str(parent)}, {}
    for _ in range(4):
        for pid, ppid, name in table:
            if ppid in found:
                found.add(pid)
                names[int(pid)] = name
    return names


def is_alive(pid):
    file = Path(f"/proc/{pid}/stat")
    return file.is_file() and file.read_text().rpartition(")")[2].split()[0] != "Z"


def start_batch():
    """Starts the script as a user does; returns it and its worker's number, amid the second job."""
    script = str(engine.ROOT / "scripts/run_davis.sh")
    process = subprocess.Popen(
        ["sh", script, "list.yaml"], env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stderr.readline()
    assert line.startswith("[1/4] a: inversion: made"), line + process.stderr.read()
    (worker,) = [pid for pid, name in processes_of(process.pid).items() if "ray::Worker" in name]
    return process, worker


@pytest.mark.slow
def test_kill_and_sigterm_of_the_real_processes(tiny_model, shared_ray):
    settings = load_yaml(write_list(tiny_model))["settings"]
    settings |= {"n_frames": 5, "n_inversion_steps": 50, "n_timesteps": 50}
    write_list(tiny_model, clips=make_clips("ab", 5), settings=settings)
    process, worker = start_batch()
    os.kill(worker, signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert states() == {"a": [MADE, FAILED], "b": [MADE, MADE]}
    assert "its process was killed, perhaps because memory ran out" in out
    assert "raylet" not in out

    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        shutil.rmtree("latents")
        shutil.rmtree("tokenflow-results")
        process, worker = start_batch()
        names = processes_of(process.pid)
        children = [p for p, name in names.items() if re.search("raylet/raylet|ray::W", name)]
        process.send_signal(number)
        _, told = process.communicate()
        assert process.returncode == status
        if number == signal.SIGTERM:
            assert told.strip().endswith("python -m scripts.batch.batch list.yaml")
            assert "Traceback" not in told
        deadline = time.monotonic() + 60
        while any(is_alive(pid) for pid in children):  # nothing is left behind
            assert time.monotonic() < deadline, children
            time.sleep(0.1)
        assert not Path(SUMMARY).exists()
        assert run() == 0
        assert states() == {"a": [FOUND, MADE], "b": [MADE, MADE]}


# Ray knows one cluster a process, and the test's own is another one.
TWO_NODES = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
try:
    cluster.add_node(**node)
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    subprocess.run(["sh", os.environ["RUN_DAVIS"], "list.yaml"], env=environment, check=True)
    subprocess.run([sys.executable, "-c", os.environ["ON_EACH"]], env=environment, check=True)
finally:
    cluster.shutdown()
"""
ON_EACH = """
from pathlib import Path
from ray import get_runtime_context
from scripts.batch import engine
from tests.scripts.test_batch import failing
jobs = [failing(name, lambda: print(get_runtime_context().get_node_id())) for name in "xy"]
engine.run_jobs(jobs, Path("logs"))
"""


@pytest.mark.slow
def test_a_batch_runs_on_two_nodes(tiny_model):
    write_list(tiny_model, clips=make_clips("abc"))
    environment = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef", "PYTHON": sys.executable,
        "PYTHONPATH": str(engine.ROOT), "ON_EACH": ON_EACH,
        "RUN_DAVIS": str(engine.ROOT / "scripts/run_davis.sh"),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", TWO_NODES], env=os.environ | environment, check=True)
    assert states() == {name: [MADE] * 2 for name in "abc"}
    nodes = [Path(f"logs/{name}.log").read_text().split()[-1] for name in "xy"]
    assert nodes[0] != nodes[1]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_six_clips_two_of_them_broken(tiny_model, processes):
    clips = make_clips("abcdef")
    Path("b.mp4").write_bytes(Path("b.mp4").read_bytes()[:700])
    Path("e.mp4").unlink()
    write_list(
        tiny_model,
        clips=clips,
        prompts=["a {clip} of marble", "../../up", "\N{SNOWMAN} " * 100],
        techniques=["pnp", "sdedit", "controlnet"],
        controlnet={"controlnet_key": str(tiny_model / "controlnet")},
    )
    command = ["sh", str(engine.ROOT / "scripts/run_davis.sh"), "list.yaml"]
    environment = os.environ | {"PYTHON": sys.executable, "PROCESSES": str(processes)}
    before = {}
    for how in ("made", "found"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert f"36 {how}, 18 failed of 54 edits; something failed of 2 of 6 clips" in done.stdout
        assert "Traceback" not in done.stderr
        assert load_yaml(SUMMARY)["failed_clips"] == ["b", "e"]
        results = list(Path("tokenflow-results").glob("*/*/*/edited.mp4"))
        assert len(results) == 4 * 9
        assert {path.parts[2] for path in results} == set("acdf")
        assert before in ({}, kept())
        before = kept()
    assert not Path("up").exists()
