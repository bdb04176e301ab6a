"""Batches: their lists, what runs them, and that no clip, crash or kill costs another its edits."""

import faulthandler
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from scripts.batch import batch
from scripts.batch import jobs as batch_list
from scripts.batch import worker as batch_worker
from scripts.batch.batch import Crew, Ledger, Progress, find_crew, in_turn, run_jobs
from scripts.batch.jobs import INVERSION, Overrides, read_batch, read_image_set, sequences
from scripts.batch.worker import BUSY, FAILED, FOUND, MADE, KeptModels, Outcome
from tests.helpers import HEIGHT, WIDTH, contents, make_clip, make_image_folder
from util import Interrupted, UserError, load_yaml, save_yaml, setup_logging

ROOT = Path(batch.__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test has a folder of its own, and no launcher around it."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def write(model, changes=None, **more):
    """Writes list.yaml: small edits of clips `a` and `b`."""
    small = {"n_frames": 3, "n_inversion_steps": 2, "n_timesteps": 2, "batch_size": 2}
    given = {
        "settings": {"model_key": str(model), "H": HEIGHT, "W": WIDTH, "device": "cpu", **small},
        "prompts": ["a {clip} of marble"],
        "clips": [{"data_path": "a"}, {"data_path": "b"}],
    }
    save_yaml("list.yaml", given | (changes or {}) | more)
    return Path("list.yaml")


def configs(found):
    """By clip and technique, the configurations of a batch's edits."""
    edits = [job for job in found.jobs if job.kind != INVERSION]
    return {(job.clip, job.kind): job.work["config"] for job in edits}


# --------------------------------------------------------------------------------------- the list


def test_settings_come_from_the_most_special_place(tiny_model):
    own = {"n_frames": 2, "sdedit": {"start": 0.5}, "prompts": ["x {clip}"], "pnp": {"seed": 3}}
    found = read_batch(
        write(
            tiny_model,
            techniques=["pnp", "sdedit"],
            sdedit={"start": 0.7, "seed": 5},
            inversion_prompt="a {clip}",
            clips=[{"data_path": "a"}, {"data_path": "b_c-d", **own}],
            output_path="results",
        )
    )
    of = configs(found)
    assert of["a", "sdedit"]["start"] == 0.7
    assert (of["b_c-d", "sdedit"]["start"], of["b_c-d", "sdedit"]["seed"]) == (0.5, 5)
    assert (of["b_c-d", "pnp"]["seed"], of["a", "pnp"]["seed"]) == (3, 1)
    assert (of["a", "pnp"]["n_frames"], of["b_c-d", "pnp"]["n_frames"]) == (3, 2)
    # {clip} is the list's word; a clip's own prompts are what they are.
    assert (of["a", "pnp"]["prompt"], of["b_c-d", "pnp"]["prompt"]) == ("a a of marble", "x {clip}")
    assert of["a", "pnp"]["output_path"] == "results"
    prompts = [j.work["options"]["inversion_prompt"] for j in found.jobs if j.kind == INVERSION]
    assert prompts == ["a a", "a b c d"]


def test_each_cache_is_made_once_before_its_edits_and_those_of_one_model_together(
    tiny_model, tiny_v_model
):
    # The sdedit's is another model, and so another cache of each clip.
    other = {"sdedit": {"model_key": str(tiny_v_model), "sd_version": "1.5"}}
    found = read_batch(write(tiny_model, techniques=["pnp", "sdedit"], **other))
    shape = [(job.clip, job.kind) for job in found.jobs]
    assert shape == [
        ("a", INVERSION), ("a", "pnp"), ("b", INVERSION), ("b", "pnp"),
        ("a", INVERSION), ("a", "sdedit"), ("b", INVERSION), ("b", "sdedit"),
    ]  # fmt: skip
    for job, before in zip(found.jobs[1::2], found.jobs[::2], strict=True):
        assert job.needs == before.key
    assert len({job.key for job in found.jobs}) == 8
    assert [j.key for j in read_batch(Path("list.yaml")).jobs] == [j.key for j in found.jobs]


def test_an_inversion_serves_all_edits_from_it(tiny_model):
    clips = [{"data_path": "a", "pnp": {"pnp_f_t": 0.2, "pnp_attn_t": 0.1, "batch_size": 3}}]
    found = read_batch(
        write(
            tiny_model,
            techniques=["sdedit", "pnp"],
            clips=clips,
            preprocess={"inversion_iters": 2, "no_cache_features": True},
        )
    )
    options = found.jobs[0].work["options"]
    assert (options["pnp_f_t"], options["pnp_attn_t"], options["interval"]) == (0.2, 0.1, 2)
    assert (options["inversion_iters"], options["no_cache_features"]) == (2, "")
    assert (options["verify"], options["allow_pickle"]) == (None, None)
    checked = read_batch(Path("list.yaml"), Overrides(verify=True))
    assert checked.jobs[0].work["options"]["verify"] == ""
    assert checked.jobs[1].work["config"]["verify"] is True


def test_an_inversion_under_a_controlnet_has_the_edit_s(tiny_model):
    control = {"controlnet_key": str(tiny_model / "controlnet"), "canny_low": 50}
    changes = {"techniques": ["pnp", "controlnet"], "controlnet": control}
    path = write(tiny_model, changes, preprocess={"control": "canny"})
    save_yaml(path, load_yaml(path) | {"preprocess": {}})
    settings = load_yaml(path)["settings"] | {"sd_version": "ControlNet"}
    found = read_batch(write(tiny_model, changes, settings=settings))
    assert [job.kind for job in found.jobs] == [INVERSION, "pnp", "controlnet"] * 2
    assert found.jobs[0].work["options"]["canny_low"] == 50


def test_the_command_line_is_in_the_place_of_the_list_s(tiny_model):
    clips = [{"data_path": "a"}, {"data_path": "b", "prompts": ["own"], "techniques": ["pnp"]}]
    path = write(tiny_model, clips=clips)
    found = read_batch(path, Overrides(prompts=["p", "q"], techniques=["sdedit"]))
    edits = [(job.clip, job.kind, job.prompt) for job in found.jobs if job.kind != INVERSION]
    assert edits == [("a", "sdedit", "p"), ("a", "sdedit", "q"), ("b", "pnp", "own")]
    key = found.jobs[2].key
    assert [job.prompt for job in found.only([key]).jobs] == ["", "q"]
    with pytest.raises(UserError, match="--only: 123: this list makes no such job"):
        found.only(["123"])


CLIP = {"data_path": "a"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": []}, "clip: unknown key; did you mean clips"),
        ({"clips": {}}, "clips: expected a list of clips, got {}"),
        ({"clips": []}, "names no clips"),
        ({"clips": ["a"]}, "clips: number 1: expected keys and values"),
        ({"clips": [{}]}, "number 1: data_path: expected text, got None"),
        ({"clips": [{"data_path": "a\0b"}]}, "number 1: data_path: .*NUL"),
        ({"clips": [CLIP, CLIP]}, "number 2: a is in the list already"),
        ({"clips": [CLIP, {"data_path": "x/a"}]}, "a and x/a would both be called a"),
        ({"clips": [{**CLIP, "promts": ["x"]}]}, "a: pnp: promts: unknown key; did you mean"),
        ({"clips": [{**CLIP, "output_path": "x"}]}, "number 1: output_path: is no setting"),
        ({"clips": [{**CLIP, "pnp": 3}]}, "number 1: pnp: expected keys and values"),
        ({"clips": [{**CLIP, "pnp": {"prompt": "x"}}]}, "pnp: prompt: is no setting"),
        ({"prompts": "a bear"}, "prompts: expected a list of texts, got 'a bear'"),
        ({"prompts": []}, "prompts: expected a list of texts"),
        ({"prompts": ["x", 3]}, "prompts: expected text, got 3"),
        ({"prompts": ["x", "x"]}, "prompts: 'x' is given twice"),
        ({"inversion_prompt": 3}, "inversion_prompt: expected text, got 3"),
        ({"techniques": ["pmp"]}, "techniques: pmp: unknown key; did you mean pnp"),
        ({"settings": {"prompt": "x"}}, "settings: prompt: is no setting"),
        ({"settings": {"n_frames": "many"}}, "a: pnp: n_frames: expected a whole number"),
        ({"sdedit": {"start": 3}, "techniques": ["sdedit"]}, "start: expected .*at most 1"),
        ({"latents_path": 3}, "latents_path: expected text"),
        ({"output_path": None}, "output_path: expected text"),
        ({"preprocess": {"stepz": 3}}, "a: preprocess: .*stepz"),
        ({"preprocess": {"steps": 3}}, "preprocess: steps: comes from the edits; say n_inv"),
        ({"preprocess": {"overwrite": True}}, "overwrite: would make the caches anew"),
        ({"preprocess": {"fast": False}}, "fast: expected a value or true, else leave it out"),
        ({"settings": {"model_key": "x/y/z"}}, "a: pnp: x/y/z: no such folder"),
        ({"settings": {"device": "gpu"}}, "a: pnp: device: gpu is unknown"),
        ({"davis": {"roots": "x"}}, "davis: roots: unknown key; did you mean root"),
        ({"davis": {"resolution": "480p"}}, "davis: root: expected text, got None"),
        ({"davis": {"root": "none"}}, "none/JPEGImages/480p: no such folder"),
        ({"davis": {"root": "x", "resolution": ".."}}, "resolution: expected a folder's name"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_refused_before_any_work(tiny_model, changes, message):
    if "model_key" not in changes.get("settings", {}) and "settings" in changes:
        changes = changes | {"settings": {"model_key": str(tiny_model)} | changes["settings"]}
    with pytest.raises(UserError, match=message):
        read_batch(write(tiny_model, changes))


def test_edits_from_one_cache_must_agree_on_it(tiny_model):
    path = write(tiny_model, techniques=["pnp", "sdedit"], sdedit={"n_timesteps": 1})
    with pytest.raises(UserError, match="sdedit: n_timesteps: is 1 here and 2 for other edits"):
        read_batch(path)


# ------------------------------------------------------------------------------------------ DAVIS


def make_davis():
    """A tree of sequences bear and car-turn, and a folder without images."""
    for name in ("car-turn", "bear"):
        make_image_folder(Path("DAVIS/JPEGImages/480p") / name, 1)
    Path("DAVIS/JPEGImages/480p/notes").mkdir()
    Path("DAVIS/ImageSets").mkdir()
    return Path("DAVIS")


def test_a_tree_has_a_clip_in_each_folder_of_images(tiny_model):
    root = make_davis()
    assert [folder.name for folder in sequences({"root": str(root)}, "x")] == ["bear", "car-turn"]
    own = [{"data_path": "./DAVIS/JPEGImages/480p/../480p/bear/", "prompts": ["a polar bear"]}]
    path = write(tiny_model, clips=own, davis={"root": "DAVIS"}, settings={})
    given = load_yaml(path)
    save_yaml(path, given | {"settings": {"model_key": str(tiny_model)}})
    prompts = {clip: config["prompt"] for (clip, _), config in configs(read_batch(path)).items()}
    assert prompts == {"bear": "a polar bear", "car-turn": "a car turn of marble"}
    shutil.rmtree(root / "JPEGImages/480p/bear")
    shutil.rmtree(root / "JPEGImages/480p/car-turn")
    with pytest.raises(UserError, match="holds no folders of images"):
        sequences({"root": "DAVIS"}, "x")


@pytest.mark.parametrize(
    "text",
    [
        "bear\n\ngone\nbear\n",
        "/JPEGImages/480p/bear/00000.jpg /Annotations/480p/bear/00000.png\n"
        "JPEGImages/480p/bear/00001.jpg x\r\n/JPEGImages/480p/gone/00000.jpg x\n",
    ],
)
def test_an_image_set_names_sequences(text):
    root = make_davis()
    (root / "ImageSets/val.txt").write_text(text)
    assert read_image_set(root / "ImageSets/val.txt") == ["bear", "gone"]
    for place in ("ImageSets/val.txt", "DAVIS/ImageSets/val.txt"):  # from the root, or from here
        found = sequences({"root": "DAVIS", "image_set": place}, "x")
        assert found == [root / "JPEGImages/480p" / name for name in ("bear", "gone")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bear\n../../secret\n", "line 2: '../../secret' is not the name of a sequence"),
        ("..\n", "line 1: '..' is not"),
        ("/etc\n", "'/etc' is not"),
        ("/JPEGImages/480p/../00000.jpg x\n", "is not the name"),
        ("a\\b\n", "is not the name"),
        ("a\0b\n", "is not the name"),
        ("\n \n", "names no sequences"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (None, "no such image set"),
    ],
)
def test_an_image_set_that_names_something_else_is_refused(text, message):
    if text is not None:
        Path("set.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=message):
        read_image_set(Path("set.txt"))


def test_the_davis_list_is_right(monkeypatch):
    root = make_davis()
    (root / "ImageSets/val.txt").write_text("car-turn\n")
    monkeypatch.setattr(batch_list, "_check_models", lambda edits: None)
    told = Overrides(davis=str(root), image_set="ImageSets/val.txt")
    found = read_batch(ROOT / "configs/davis.yaml", told)
    assert found.clips == ["breakdance-flare", "blackswan", "car-turn"]
    assert configs(found)["car-turn", "pnp"]["prompt"] == "a car turn, watercolor painting"


# ------------------------------------------------------------------------------------- what runs it


class ForkedProcess:
    """A worker as `start_process` starts one, but a fork, which need not import anything."""

    def __init__(self, messages):
        there, self.stdin = os.pipe()
        self.stdout, here = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.stdin)
            os.close(self.stdout)
            in_child(lambda: serve_in_child(there, here), messages.fileno())
        os.close(there)
        os.close(here)
        self.stdin, self.stdout = os.fdopen(self.stdin, "w"), os.fdopen(self.stdout)
        self.ended = None

    def wait(self, timeout=None):
        if self.ended is None:
            self.ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.ended

    def terminate(self):
        if self.ended is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self):
        if self.ended is None:
            os.kill(self.pid, signal.SIGKILL)


def in_child(body, messages):
    """Runs `body` in a forked process, whose messages go to a file, and ends the process."""
    status = 1
    faulthandler.disable()
    try:
        os.dup2(messages, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        logging.getLogger().handlers.clear()
        setup_logging()
        body()
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve_in_child(jobs, outcomes):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TQDM_DISABLE"] = "1"
    with os.fdopen(jobs) as lines, os.fdopen(outcomes, "w") as answers:
        batch_worker.serve(lines, answers)


@pytest.fixture
def forked(monkeypatch):
    monkeypatch.setattr(batch_worker, "start_process", ForkedProcess)


def run(*argv):
    """Runs the script; returns its exit status."""
    with pytest.raises(SystemExit) as end:
        batch.main(["list.yaml", *map(str, argv)])
    return end.value.code


def loads_to(file, monkeypatch):
    """Has each loading of a model say so in a file."""
    load = batch_worker.load_stable_diffusion

    def load_and_say(*args):
        with open(file, "a") as said:
            said.write("load\n")
        return load(*args)

    monkeypatch.setattr(batch_worker, "load_stable_diffusion", load_and_say)


def kept():
    """All files of caches and results, with the time of their last change."""
    found = contents(Path()).items()
    return {p: at for p, at in found if re.match(r"latents/|tokenflow-results/(?!batch)", p)
            and Path(p).is_file()}  # fmt: skip


def states(summary):
    """By clip, the states of its jobs."""
    return {clip: [job["state"] for job in jobs] for clip, jobs in summary["clips"].items()}


def test_a_broken_clip_costs_no_other_its_edits_and_nothing_is_made_again(
    tiny_model, forked, monkeypatch, capsys
):
    make_clip(Path("a.mp4"), 3)
    make_clip(Path("b.mp4"), 3, seed=1)
    Path("bad.mp4").write_bytes(Path("a.mp4").read_bytes()[:500])
    paths = ("a.mp4", "bad.mp4", "b.mp4", "gone \u2605 <b>")
    write(tiny_model, clips=[{"data_path": p} for p in paths], techniques=["pnp", "sdedit"])
    loads_to("loads", monkeypatch)
    assert run() == 2
    assert Path("loads").read_text() == "load\n"  # once for all
    out = capsys.readouterr().out
    assert re.search(r"^a +1 made, \d+ s +1 made, \d+ s +1 made, \d+ s$", out, re.MULTILINE)
    assert re.search(r"^bad +1 failed +1 failed +1 failed$", out, re.MULTILINE)
    assert "4 made, 4 failed of 8 edits; something failed of 2 of 4 clips:" in out
    assert "  bad: inversion: bad.mp4: not a video that can be read" in out
    assert "    alone: python preprocess.py " in out
    assert "  gone \u2605 <b>: inversion: gone \u2605 <b>: no such video or folder" in out
    summary = load_yaml("tokenflow-results/batch/summary.yaml")
    assert states(summary) == {
        "a": [MADE] * 3, "bad": [FAILED] * 3, "b": [MADE] * 3, "gone \u2605 <b>": [FAILED] * 3,
    }  # fmt: skip
    assert (summary["failed_clips"], summary["status"]) == (["bad", "gone \u2605 <b>"], 2)
    assert summary["clips"]["bad"][1]["reason"] == batch.NOT_TRIED
    logs = {path.name for path in Path("tokenflow-results/batch").glob("*.log")}
    odd = logs - {"a.log", "b.log", "bad.log"}
    assert len(odd) == 1
    assert re.fullmatch(r"gone-b-[0-9a-f]{8}\.log", odd.pop())
    assert "not a video" in Path("tokenflow-results/batch/bad.log").read_text()

    made = kept()
    assert len(list(Path("tokenflow-results").glob("*/*/*/edited.mp4"))) == 4
    assert run() == 2
    assert kept() == made
    assert Path("loads").read_text() == "load\n"
    assert states(load_yaml("tokenflow-results/batch/summary.yaml"))["b"] == [FOUND] * 3
    # What failed can be done alone, and then all is there.
    shutil.copy("a.mp4", "bad.mp4")
    alone = [j["alone"] for j in summary["clips"]["bad"]][1]
    assert run(*alone.split()[4:]) == 0
    found = load_yaml("tokenflow-results/batch/summary.yaml")
    assert states(found) == {"bad": [MADE, MADE]}


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL, perhaps for want of"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed by SIGSEGV$"),
        (lambda: 1 // 0, "ended with status 1: ZeroDivisionError: .*by zero"),
    ],
)
def test_a_job_that_ends_its_process_costs_no_other(tiny_model, forked, monkeypatch, end, reason):
    write(tiny_model, techniques=["pnp", "sdedit"])
    made = []

    def make(job, load):
        if job["title"].startswith("a: pnp"):
            end()
        made.append(job)

    monkeypatch.setattr(batch_worker, "make", make)
    assert run() == 1
    summary = load_yaml("tokenflow-results/batch/summary.yaml")
    assert states(summary) == {"a": [FOUND, FAILED, FOUND], "b": [FOUND] * 3}
    assert re.search(reason, summary["clips"]["a"][1]["reason"])


def test_errors_that_are_foreseen_do_not_end_the_process(monkeypatch):
    job = {"kind": "pnp", "title": "t", "log": "logs/x.log", "wait": False}
    errors = [
        (UserError("x\ny"), FAILED, "x y"),
        (OSError(28, "No space left on device"), FAILED, "No space left"),
        (MemoryError(), FAILED, "the memory does not suffice"),
        (torch.OutOfMemoryError("CUDA\nmuch text"), FAILED, "the GPU's memory does not suffice"),
        (batch_worker.Busy("another"), BUSY, ""),
    ]
    monkeypatch.setattr(batch_worker, "send_messages_to", lambda path: None)
    for error, state, reason in errors:

        def make(job, load, error=error):
            raise error

        monkeypatch.setattr(batch_worker, "make", make)
        outcome = batch_worker.do(job, KeptModels())
        assert outcome.state == state
        assert reason in outcome.reason


def test_a_worker_that_cannot_start_is_no_job_s_failure(tiny_model, monkeypatch, capsys):
    def start(messages):
        messages.write(b"Traceback\nImportError: no such module\n\n")
        messages.flush()
        return subprocess.Popen(
            ["sh", "-c", "exit 3"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    monkeypatch.setattr(batch_worker, "start_process", start)
    write(tiny_model)
    assert run() == batch.WRONG == 255
    told = capsys.readouterr().err
    assert "error: no worker can be started: its process ended with status 3: ImportError" in told


def test_one_asked_to_end_ends_the_batch(tiny_model, forked, monkeypatch):
    monkeypatch.setattr(batch_worker, "make", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    write(tiny_model)
    with pytest.raises(Interrupted) as end:
        batch.main(["list.yaml"])
    assert end.value.number == signal.SIGTERM
    assert not list(Path("tokenflow-results/batch").rglob("*.yaml"))  # no failure, no summary


def fork_batch(*argv, **environment):
    """Runs the script in a fork, as the command line does; returns its process's number."""
    number = os.fork()
    if number == 0:
        os.environ.update(environment)
        messages = os.open(f"messages{environment.get('RANK', '')}", os.O_WRONLY | os.O_CREAT)
        os.dup2(messages, 1)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.argv = ["scripts/batch/batch.py", "list.yaml", *argv]
        in_child(lambda: batch.command_line(batch.main), messages)
    return number


def status_of(number):
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def test_sigterm_reaches_the_worker_and_says_how_to_go_on(tiny_model, forked, monkeypatch):
    heard, said = os.pipe()

    def make(job, load):
        os.write(said, f"{os.getpid()}\n".encode())
        signal.pause()

    monkeypatch.setattr(batch_worker, "make", make)
    write(tiny_model)
    number = fork_batch()
    worker = int(os.read(heard, 20))
    os.kill(number, signal.SIGTERM)
    assert status_of(number) == 143
    told = Path("messages").read_text()
    assert "interrupted; " in told
    assert told.strip().endswith("batch.py list.yaml")
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_two_processes_share_a_batch(tiny_model, forked):
    for i, name in enumerate("ab"):
        make_clip(Path(f"{name}.mp4"), 3, seed=i)
    clips = [{"data_path": f"{name}.mp4"} for name in ("a", "b", "gone")]
    write(tiny_model, clips=clips, prompts=["x", "y"])
    numbers = [fork_batch("--run", "x", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert [status_of(number) for number in numbers] == [1, 0]  # a launcher ends all at a failure
    out = [Path(f"messages{rank}").read_text() for rank in (0, 1)]
    assert "4 made, 2 failed of 6 edits" in out[0]
    assert "of 6 edits" not in out[1]
    summary = load_yaml("tokenflow-results/batch/summary.yaml")
    assert states(summary) == {"a": [MADE] * 3, "b": [MADE] * 3, "gone": [FAILED] * 3}
    # Either has begun at another clip, and each job was made by one of them.
    first = [re.search(r"\[\d/9\] (\w+): inversion", text)[1] for text in out]
    assert first == ["a", "b"]
    made = [line for text in out for line in re.findall(r"(\S+: .*): made in", text)]
    assert len(made) == len(set(made)) == 6
    assert run("--run", "x", "--summary") == 1


class FakeWorker:
    """Answers as a script says: by title, the states in turn, of which the last stays."""

    def __init__(self, script):
        self.script, self.asked = script, []

    def do(self, order):
        self.asked.append((order["title"], order["wait"]))
        left = self.script.get(order["title"], [MADE])
        return Outcome(left.pop(0) if len(left) > 1 else left[0], 2.0)


def told(path, script, crew=None):
    """What a worker is asked in turn, and the ledger at the end."""
    found = read_batch(path)
    worker, ledger = FakeWorker(script), Ledger(Path("ledger"), found.jobs)
    run_jobs(found, worker, ledger, crew or Crew(), Path("logs"))
    return [(title.replace(" of marble", ""), wait) for title, wait in worker.asked], ledger


def test_what_others_work_on_is_left_for_later_and_then_waited_for(tiny_model):
    busy = {"a: inversion": [BUSY, BUSY, MADE], 'b: pnp: "a b of marble"': [BUSY, FOUND]}
    asked, ledger = told(write(tiny_model), busy)
    assert asked == [
        ("a: inversion", False),  # its edit is not asked for: it has to wait
        ("b: inversion", False),
        ('b: pnp: "a b"', False),
        ("a: inversion", False),
        ('b: pnp: "a b"', True),  # all that is left is busy
        ("a: inversion", False),
        ('a: pnp: "a a"', False),
    ]
    assert {outcome.state for outcome in ledger.outcomes.values()} == {MADE, FOUND}


def test_a_job_that_stays_busy_is_waited_for(tiny_model):
    asked, _ = told(write(tiny_model, clips=[CLIP]), {"a: inversion": [BUSY, FOUND]})
    assert asked == [("a: inversion", False), ("a: inversion", True), ('a: pnp: "a a"', False)]


def test_what_another_process_settled_is_not_asked_for(tiny_model):
    path = write(tiny_model)
    jobs = read_batch(path).jobs
    theirs = Ledger(Path("ledger"), jobs)
    theirs.record(jobs[0], Outcome(FAILED, 1.0, "broken"))
    theirs.record(jobs[3], Outcome(MADE, 1.0))
    asked, ledger = told(path, {})
    assert asked == [("b: inversion", False)]
    assert [ledger.state(job) for job in jobs] == [FAILED, FAILED, MADE, MADE]
    ledger.record(jobs[3], Outcome(FOUND))  # the first word counts,
    assert ledger.outcomes[jobs[3].key].state == MADE
    for state in (FOUND, FAILED):  # also when another process says it later
        theirs.record(jobs[2], Outcome(state))
        assert theirs.outcomes[jobs[2].key].state == MADE
    # Who made it may say so after another process found it made, or at the same time.
    found = Ledger(Path("other"), jobs)
    found.record(jobs[0], Outcome(FOUND))
    Ledger(Path("other"), jobs).record(jobs[0], Outcome(MADE, 7.0))
    found.look_at_all()
    assert found.outcomes[jobs[0].key].state == FOUND
    found.look_at_all(again=True)
    assert found.outcomes[jobs[0].key] == Outcome(MADE, 7.0)
    next(Path("ledger").iterdir()).write_text("nonsense")
    fresh = Ledger(Path("ledger"), jobs)
    fresh.look_at_all()
    assert len(fresh.outcomes) == 2


def test_processes_begin_at_different_clips(tiny_model):
    clips = [{"data_path": name} for name in "abcd"]
    jobs = read_batch(write(tiny_model, clips=clips)).jobs
    firsts = [in_turn(jobs, Crew(place, 3))[0].clip for place in range(3)]
    assert firsts == ["a", "b", "c"]
    assert all(len(in_turn(jobs, Crew(place, 9))) == 8 for place in range(9))


def test_the_time_left_is_estimated_from_what_was_made(tiny_model, caplog):
    caplog.set_level(logging.INFO)
    found = read_batch(write(tiny_model, prompts=["p", "q", "r"], clips=[CLIP]))
    progress = Progress(Ledger(Path("ledger"), found.jobs), Crew(size=2))
    outcomes = [(FOUND, 0.01), (FOUND, 0.01), (MADE, 30.0), (FAILED, 0.1)]
    for job, (state, seconds) in zip(found.jobs, outcomes, strict=True):
        outcome = Outcome(state, seconds, "why" * (state == FAILED))
        progress.ledger.record(job, outcome)
        progress.report(job, outcome)
    assert caplog.messages == [
        "[1/4] a: inversion: is there already",
        '[2/4] a: pnp: "p": is there already',
        '[3/4] a: pnp: "q": made in 30 s; about 15 s left',
        '[4/4] a: pnp: "r": failed: why',
    ]
    assert [batch.duration(s) for s in (99, 600, 7200)] == ["99 s", "10 min", "2.0 h"]


def test_the_crew_is_read_from_the_launcher_s_environment(monkeypatch):
    alone = find_crew({}, None)
    assert (alone.place, alone.size, alone.rank, alone.device) == (0, 1, 0, "auto")
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"} for r in (0, 1)]
    crews = [find_crew(environment, None) for environment in ranks]
    assert [(c.place, c.size, c.rank) for c in crews] == [(0, 2, 0), (1, 2, 1)]
    assert crews[0].run == crews[1].run != alone.run
    array = {f"SLURM_ARRAY_TASK_{k}": v for k, v in (("COUNT", "3"), ("ID", "6"), ("MIN", "2"))}
    task = find_crew(ranks[1] | array | {"SLURM_ARRAY_TASK_STEP": "2"}, "A/b")
    assert (task.place, task.size, task.rank, task.run) == (5, 6, 1, "a-b")
    with pytest.raises(UserError, match="--run: is needed with several machines"):
        find_crew(ranks[0] | {"LOCAL_WORLD_SIZE": "1"}, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_crew({"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}, None).device == "cuda:1"


def test_a_rank_s_jobs_go_to_its_device(tiny_model):
    settings = load_yaml(write(tiny_model))["settings"]
    auto = read_batch(write(tiny_model, settings=settings | {"device": "auto"})).jobs
    crew = Crew(device="cuda:1")
    orders = [batch.order_for(job, crew, Path("logs"), False)["work"] for job in auto[:2]]
    assert orders[0]["options"]["device"] == orders[1]["config"]["device"] == "cuda:1"
    said = read_batch(write(tiny_model)).jobs[0]
    assert batch.order_for(said, crew, Path("logs"), False)["work"]["options"]["device"] == "cpu"


def test_models_are_kept_until_others_are_asked_for(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        batch_worker, "load_stable_diffusion", lambda *key: loaded.append(key) or list(key)
    )
    load, cpu = KeptModels(), torch.device("cpu")
    first = load(Path("m"), cpu, torch.float32)
    assert load(Path("./m"), cpu, torch.float32) is first
    assert load(Path("m"), cpu, torch.float16) is not first
    assert load(Path("m"), cpu, torch.float32) is not first
    assert (len(loaded), load.calls) == (3, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--technique", "pmp"], "--technique: pmp: unknown key; did you mean pnp"),
        (["--summary"], "--summary: of which run"),
        (["--prompt", "a\udcffb"], "not valid Unicode"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--davis", "none"], "none/JPEGImages/480p: no such folder"),
    ],
)
def test_wrong_options_are_refused_with_a_status_that_is_no_number_of_clips(
    tiny_model, capsys, words, message
):
    write(tiny_model)
    assert run(*words) == 255
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)


# ------------------------------------------------------------------------------ the real processes


def start_batch():
    """Starts the script as the shell does; returns it when its worker is at the second job."""
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.batch.batch", "list.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stderr.readline()
    assert line.startswith("[1/4] a: inversion: made"), line + process.stderr.read()
    return process


def child_of(process):
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


@pytest.mark.slow
def test_kill_and_sigterm_of_the_real_processes(tiny_model):
    for i, name in enumerate("ab"):
        make_clip(Path(f"{name}.mp4"), 5, seed=i)
    settings = load_yaml(write(tiny_model))["settings"]
    settings |= {"n_frames": 5, "n_inversion_steps": 50, "n_timesteps": 50}
    write(tiny_model, clips=[{"data_path": f"{n}.mp4"} for n in "ab"], settings=settings)
    process = start_batch()
    os.kill(child_of(process), signal.SIGKILL)
    out, _ = process.communicate()
    assert process.returncode == 1
    assert states(load_yaml("tokenflow-results/batch/summary.yaml")) == {
        "a": [MADE, FAILED], "b": [MADE, MADE],
    }  # fmt: skip
    assert "its process was killed by SIGKILL" in out

    shutil.rmtree("latents")
    shutil.rmtree("tokenflow-results")
    process = start_batch()
    worker = child_of(process)
    process.terminate()
    out, told = process.communicate()
    assert process.returncode == 143
    assert "the same command goes on" in told
    assert "Traceback" not in told
    assert not Path(f"/proc/{worker}").exists()
    assert not Path("tokenflow-results/batch/summary.yaml").exists()
    assert run() == 0
    assert states(load_yaml("tokenflow-results/batch/summary.yaml")) == {
        "a": [FOUND, MADE], "b": [MADE, MADE],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_six_clips_two_of_them_broken(tiny_model, processes):
    names = "abcdef"
    for i, name in enumerate(names):
        make_clip(Path(f"{name}.mp4"), 3, seed=i)
    Path("b.mp4").write_bytes(Path("b.mp4").read_bytes()[:700])
    Path("e.mp4").unlink()
    control = {"controlnet_key": str(tiny_model / "controlnet")}
    write(
        tiny_model,
        clips=[{"data_path": f"{name}.mp4"} for name in names],
        prompts=["a {clip} of marble", "../../up", "\N{SNOWMAN} " * 100],
        techniques=["pnp", "sdedit", "controlnet"],
        controlnet=control,
    )
    command = ["sh", str(ROOT / "scripts/run_davis.sh"), "list.yaml"]
    environment = os.environ | {"PYTHON": sys.executable, "PROCESSES": str(processes)}

    def once():
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        return done, load_yaml("tokenflow-results/batch/summary.yaml")

    done, summary = once()
    results = sorted(Path("tokenflow-results").glob("*/*/*/edited.mp4"))
    assert len(results) == 4 * 9
    assert {path.parts[2] for path in results} == set("acdf")
    assert summary["failed_clips"] == ["b", "e"]
    assert "36 made, 18 failed of 54 edits; something failed of 2 of 6 clips" in done.stdout
    assert "Traceback" not in done.stderr
    before = kept()
    again, summary = once()
    assert kept() == before
    assert "36 found, 18 failed of 54 edits" in again.stdout
    print(f"\n{processes} processes\n{done.stdout}\nagain:\n{again.stdout}")
    assert not [path for path in Path().iterdir() if path.name == "up"]
