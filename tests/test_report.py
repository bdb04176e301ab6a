"""The results page: what it is made of, and how it works in a real Chromium."""

import io
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

import report
from tests.helpers import contents, video_facts
from tokenflow.cache.source_cache import Manifest, SourceCache, read_manifest
from tokenflow.editing.results import RESULT_FILES, Result
from tokenflow.evaluation.score_table import Row, rows_as_json
from tokenflow.figures import report_page
from tokenflow.storage.images import save_frames
from tokenflow.storage.video import save_video
from tokenflow.storage.work_dir import WorkDir
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError, command_line

FPS, N_FRAMES = Fraction(20), 40
HOSTILE = {
    "script": "</script><img src=x onerror=\"window.harm = 'img'\">",
    "comment": "<!-- <script>window.harm = 1</script>",
    "template": "{{script}} {{data}} ${1+1} \\u003c &lt;b&gt;",
    "quotes": "\"quoted\" 'single' `tick` \\ back\\slash",
    "emoji": "a \N{WOLF FACE} by \N{FAMILY}\N{ZERO WIDTH JOINER} \u2028 \u202e desrever",
    "arabic": "\u0630\u0626\u0628 \u0641\u0636\u064a <b>",
    "lines": "one\ntwo\r\n\n\tthree   spaces",
    "long": "wolf" * 2500,
    "lone surrogate": "a \ud800 b",
    "empty": "",
}


def frames_of(n_frames, size=32):
    """Frames whose brightness tells their number: (n, size, size, 3) uint8."""
    levels = 20 + 5 * np.arange(n_frames)
    return np.broadcast_to(
        levels[:, None, None, None].astype(np.uint8), (n_frames, size, size, 3)
    ).copy()


def make_cache(folder, n_frames=4, **changes):
    """A finished cache of a clip, without latents."""
    save_frames(folder / "frames", frames_of(n_frames))
    save_video(folder / "inverted.mp4", frames_of(n_frames), FPS)
    values = {
        "clip": "wall",
        "source_name": "wall.mp4",
        "source_sha256": "0" * 64,
        "frame_start": 0,
        "frame_stride": 1,
        "n_frames": n_frames,
        "frames_asked": n_frames,
        "height": 32,
        "width": 32,
        "fit": "stretch",
        "fps": str(FPS),
        "sd_version": "tiny",
        "model_key": "models/tiny",
        "model_revision": "1",
        "inversion_prompt": "a grey wall",
        "steps": 10,
        "save_steps": 5,
        "inversion_iters": 1,
        "inversion_tol": 0.0,
        "recon_steps": 5,
        "timesteps": [801, 1],
        "dtype": "float32",
        "control": None,
        "depth_model": None,
    }
    values |= {"psnr": 33.416, "vae_psnr": math.nan, "files": WorkDir(folder).record_files()}
    save_yaml(folder / "manifest.yaml", Manifest(**values | changes).model_dump())
    return folder


def make_result(folder, cache, n_frames=4, fps=FPS, technique="pnp", **config):
    """A finished result; `cache` is the folder of one, or None."""
    frames = frames_of(n_frames)
    save_video(folder / "edited.mp4", frames, Fraction(fps))
    save_video(
        folder / "side_by_side.mp4", np.concatenate([frames, 255 - frames], axis=2), Fraction(fps)
    )
    keys = {"data_path": "data/wall.mp4", "prompt": "a wall", "consistency": "tokenflow", "seed": 1}
    run = {
        "technique": technique,
        "cache": str(cache),
        "n_frames": n_frames,
        "seconds": {"load": 100.0, "edit": 6.0, "decode": 1.0, "write": 1.0},
        "peak_memory_bytes": 2_500_000_000,
    }
    if cache and (cache / "manifest.yaml").is_file():
        run["cache_sha256"] = SourceCache(cache, read_manifest(cache)).sha256
    save_yaml(folder / "config.yaml", keys | config)
    save_yaml(folder / "run.yaml", run)
    return folder


def write_rows(path, *rows):
    """What evaluate.py --json writes."""
    needed = {"method": "PnP", "clip": "wall", "prompt": None, "source_prompt": None}
    needed |= {"folder": None, "video": "v", "n_frames": 1, "height": 8, "width": 8, "fps": 1.0}
    rows = [Row(**{**needed, "protocol": {}, **row}) for row in rows]
    path.write_text(rows_as_json(rows), encoding="utf-8")
    return path


def make_report(out, *results, metrics=(), **options):
    """Run the script; returns what the page shows."""
    words = [str(word) for word in (*results, "--out", out)]
    words += ["--metrics", *map(str, metrics)] if metrics else []
    for name, value in options.items():
        words += [f"--{name}", value]
    report.main(words)
    return page_data(out)


def page_data(out):
    text = (out / "report.html").read_text(encoding="utf-8")
    _, _, rest = text.partition('id="report-data">')
    return json.loads(rest.partition("</script>")[0])


# ---------------------------------------------------------------- what is found


def test_finished_results_are_found_once_and_others_counted(tmp_path, caplog):
    out = tmp_path / "results"
    one = make_result(out / "pnp" / "wall" / "a-1", None)
    two = make_result(out / "sdedit" / "wall" / "b-2", None)
    hidden = make_result(out / "pnp" / ".wall" / "a-1", None)  # of a clip .wall.mp4
    shutil.copytree(one, out / "pnp" / "wall" / ".a-1.partial")
    shutil.copytree(one, out / ".hidden" / "wall" / "a-1")
    for missing in RESULT_FILES:
        shutil.copytree(one, out / "pnp" / "wall" / f"no-{missing}")
        (out / "pnp" / "wall" / f"no-{missing}" / missing).unlink()
    damaged = shutil.copytree(one, out / "pnp" / "damaged" / "c")
    (damaged / "edited.mp4").write_bytes(b"no video")
    unreadable = shutil.copytree(one, out / "pnp" / "unreadable" / "c")
    (unreadable / "config.yaml").write_text("a: [")
    (out / "link").symlink_to(out / "pnp")
    shutil.copytree(one, one / "frames" / "copy")
    results = report_page.readable_results([out, out / "pnp", one])
    assert [result.folder for result in results] == [hidden, one, two]
    *warned, (count,) = (record.args for record in caplog.records)
    assert count == 5
    assert [str(error).split(": ")[0] for (error,) in warned] == [
        str(damaged / "edited.mp4"),
        str(unreadable / "config.yaml"),
    ]


def test_results_of_one_source_are_one_group(tmp_path, caplog):
    wall = make_cache(tmp_path / "a")
    again = make_cache(tmp_path / "b", sd_version="1.5")
    other = make_cache(tmp_path / "c", source_sha256="1" * 64)
    folders = {
        name: make_result(tmp_path / "r" / "pnp" / "wall" / name, cache)
        for name, cache in (("1", wall), ("2", again), ("3", other), ("4", tmp_path / "gone"))
    }
    (other / "manifest.yaml").touch()
    groups = report_page.group_results(report_page.readable_results([tmp_path / "r"]))
    members = sorted([result.folder.name for result in group.results] for group in groups)
    assert members == [["1", "2"], ["3"], ["4"]]
    assert {group.name for group in groups} == {"wall"}
    assert "no finished cache" in caplog.text
    run = load_yaml(folders["3"] / "run.yaml")
    save_yaml(folders["3"] / "run.yaml", run | {"cache_sha256": "0"})
    report_page.group_results(report_page.readable_results([folders["3"]]))
    assert "was replaced since" in caplog.text


def test_a_relative_cache_is_found_from_above_the_result(tmp_path):
    make_cache(tmp_path / "latents" / "wall")
    folder = make_result(tmp_path / "out" / "pnp" / "wall" / "x", None)
    run = load_yaml(folder / "run.yaml") | {"cache": "latents/wall"}
    assert Result(folder, {}, run).cache().folder == tmp_path / "latents" / "wall"


def test_settings_differ_only_among_those_that_have_them():
    configs = [
        {"prompt": "a", "data_path": "x", "seed": 1, "fps": None, "start": 0.5, "blend": "linear"},
        {"prompt": "b", "data_path": "y", "seed": 1, "fps": 12, "pnp_f_t": 0.8, "blend": "sigmoid"},
    ]
    assert report_page.differing_settings(configs) == ["fps", "blend"]
    assert report_page.differing_settings(configs[:1]) == []


# ---------------------------------------------------------------- what is shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A report of two clips, moved away from what it was made of, which is gone; and its data."""
    place = tmp_path_factory.mktemp("shown")
    results = place / "results"
    wall = make_cache(place / "wall", N_FRAMES)
    clip = results / "pnp" / "wall"
    one = make_result(clip / "one", wall, N_FRAMES, guidance_scale=7.5)
    two = make_result(clip / "two", wall, N_FRAMES, consistency="none", guidance_scale=7.5)
    slow = make_result(clip / "slow", wall, N_FRAMES, fps=10, guidance_scale=7.5, keyframes="fixed")
    sky = make_result(
        results / "sdedit" / "sky" / "x", None, N_FRAMES, 20, "sdedit", prompt="night"
    )
    rows = write_rows(
        place / "rows.json",
        {"folder": str(one), "method": "PnP, TokenFlow", "warp_error": 10.123, "psnr": 20},
        {"folder": "results/pnp/wall/two", "method": "PnP, per frame", "warp_error": 9.5},
        {"folder": str(sky), "method": "SDEdit", "warp_error": 1e2},
        {"folder": None, "method": "another program", "warp_error": 1.0},
    )
    data = make_report(place / "report", results, metrics=[rows], title="A <b>title</b>")
    inodes = {path.stat().st_ino for path in (one / "edited.mp4", wall / "inverted.mp4")}
    assert inodes <= {path.stat().st_ino for path in (place / "report" / "media").iterdir()}
    for folder in (one, two, slow, sky, wall):
        shutil.rmtree(folder)
    moved = place / "moved here" / "100% #1?"
    moved.parent.mkdir()
    (place / "report").rename(moved)
    return moved, data


def test_a_clip_shows_source_reconstruction_and_edits(shown):
    folder, data = shown
    sky, wall = data["clips"]
    assert [clip["name"] for clip in (sky, wall)] == ["sky", "wall"]
    assert [reference["label"] for reference in wall["references"]] == ["Source", "Reconstruction"]
    assert wall["references"][1]["facts"] == [["PSNR", "33.42 dB"]]  # the VAE's is not known
    labels = [edit["label"] for edit in wall["edits"]]
    assert labels == ["PnP, TokenFlow", "PnP, fixed keyframes", "PnP, per frame"]
    assert wall["prompt"] == "a wall"
    assert wall["source_prompts"] == ["a grey wall"]
    assert wall["edits"][2]["differing"] == [["consistency", "none"]]
    for item in (*wall["references"], *wall["edits"]):
        video = item["video"]
        rate = Fraction(10) if item["label"] == labels[1] else FPS
        assert video_facts(folder / video["src"]) == (N_FRAMES, rate, (32, 32))
        assert (video["frames"], video["fps"]) == (N_FRAMES, float(rate))
        with Image.open(folder / video["poster"]) as poster:
            assert (poster.format, poster.size) == ("JPEG", (32, 32))
            assert np.abs(np.asarray(poster).astype(int) - 20).max() <= 3  # the first frame
    media = {path.name for path in (folder / "media").iterdir()}
    videos = [item["video"] for clip in (sky, wall) for item in clip["references"] + clip["edits"]]
    assert media == {Path(v[key]).name for v in videos for key in ("src", "poster")}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_a_missing_cache_is_made_up_for_by_the_side_by_side_video(shown):
    folder, data = shown
    sky = data["clips"][0]
    (source,) = sky["references"]
    assert source["label"] == "Source"
    assert video_facts(folder / source["video"]["src"]) == (N_FRAMES, FPS, (32, 32))
    assert sky["notes"] == ["The reconstruction is missing: its cache is no longer there."]


def test_a_cache_without_its_latents_still_shows_its_reconstruction(tmp_path, caplog):
    cache = make_cache(tmp_path / "cache")
    manifest = read_manifest(cache)
    files = manifest.files | {"latents/gone.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    manifest = manifest.model_copy(update={"files": files})
    save_yaml(cache / "manifest.yaml", manifest.model_dump())
    make_result(tmp_path / "wall" / "a", cache)
    unknown = make_result(tmp_path / "wall" / "b", cache)
    run = load_yaml(unknown / "run.yaml")
    save_yaml(unknown / "run.yaml", {key: run[key] for key in run if key != "n_frames"})
    (clip,) = make_report(tmp_path / "report", tmp_path / "wall")["clips"]
    assert [each["label"] for each in clip["references"]] == ["Source", "Reconstruction"]
    assert len(clip["edits"]) == 1 and "tells how many frames" in caplog.text


def test_figures_come_from_rows_and_cost_else_from_the_run(shown):
    _, data = shown
    wall = {edit["label"]: edit["metrics"] for edit in data["clips"][1]["edits"]}
    cost = {"seconds_per_frame": 8 / N_FRAMES, "peak_memory_bytes": 2_500_000_000}
    assert wall["PnP, TokenFlow"] == {"warp_error": 10.123, "psnr": 20, **cost}
    assert wall["PnP, fixed keyframes"] == cost
    (sky,) = data["clips"][0]["edits"]
    assert sky["metrics"] == {"warp_error": 100.0, **cost}
    keys = [metric["key"] for metric in data["metrics"]]
    assert keys == ["warp_error", "psnr", "seconds_per_frame", "peak_memory_bytes"]


def test_of_several_rows_the_last_counts_whole(tmp_path):
    folder = make_result(tmp_path / "r" / "x", None)
    first = write_rows(tmp_path / "1.json", {"folder": str(folder), "warp_error": 1, "psnr": 1})
    second = write_rows(tmp_path / "2.json", {"folder": "r/x", "warp_error": 2})
    (found,) = report_page.rows_by_folder([first, second]).items()
    assert (found[0], found[1].warp_error, found[1].psnr) == (str(folder), 2, None)


def test_twins_are_told_apart_by_their_settings():
    def edit(label, **settings):
        return {"label": label, "prompt": "p", "settings": list(settings.items())}

    edits = [edit("a", seed="1", blend="x"), edit("a", seed="2", blend="x"), edit("b", seed="3")]
    report_page.add_hints(edits)
    assert [edit["hint"] for edit in edits] == ["seed 1", "seed 2", ""]


def test_differing_protocols_are_said(tmp_path):
    rows = [
        {"folder": str(make_result(tmp_path / "r" / flow, None)), "protocol": {"flow": flow}}
        for flow in ("raft", "dis")
    ]
    data = make_report(tmp_path / "1", tmp_path / "r", metrics=[write_rows(tmp_path / "a", *rows)])
    assert data["protocols_differ"] is True
    data = make_report(
        tmp_path / "2", tmp_path / "r", metrics=[write_rows(tmp_path / "b", rows[0])]
    )
    assert (data["protocols_differ"], data["protocol"]) == (False, [["flow", "raft"]])


def test_files_near_the_report_are_linked_and_others_named(tmp_path):
    out = tmp_path / "a" / "report"
    near = tmp_path / "r\u00e9sults #1?" / "50% <b>" / "edited.mp4"
    assert report_page.relative_link(near, out) == (
        "../../r%C3%A9sults%20%231%3F/50%25%20%3Cb%3E/edited.mp4"
    )
    deep = tmp_path / "1" / "2" / "3" / "4"
    assert report_page.relative_link(near, deep) is None
    by_the_root = report_page.relative_link(Path("/usr/x"), Path("/home/report"))
    assert by_the_root is None
    assert report_page.relative_link(Path("/home/x"), Path("/home/report")) == "../x"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_ends_the_element_that_holds_it(text):
    page = report_page.render_page({"title": text, "clips": [{text: text}]})
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert page.count("</title>") == 1
    blob = page.partition('id="report-data">')[2].partition("</script>")[0]
    assert "<" not in blob
    assert json.loads(blob) == {"title": text, "clips": [{text: text}]}


def test_no_text_of_users_is_markup(hostile):
    """The script puts texts on the page as text alone, and no file is called what a user wrote."""
    page = (hostile / "report.html").read_text(encoding="utf-8")
    assert json.dumps(page_data(hostile)).count("<img src=x") > 8
    assert "<img" not in page and "window.harm = 1</script>" not in page
    own = report_page.render_page({"title": "", "clips": []})
    for mark in ("<script", "</script", "<!--", "</title"):
        assert page.count(mark) == own.count(mark)
    files = "".join(path.name for path in (hostile / "media").iterdir())
    assert files and set(files) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    script = (report_page.PAGE_PARTS / "page.js").read_text(encoding="utf-8")
    sinks = "innerHTML outerHTML insertAdjacentHTML document.write eval( Function("
    assert not [sink for sink in sinks.split() if sink in script]
    assert "javascript:" not in page and "data:text" not in page


def test_values_are_text():
    values = [None, True, 1, 0.5, float("nan"), "x", [1] * 100, {"a": [[[]]]}]
    shown = ["null", "true", "1", "0.5", "nan", "x"]
    shown += ["[1, 1, 1, 1, 1, 1, ...]", "{'a': [[[]]]}"]
    assert [report_page.plain(value) for value in values] == shown
    assert report_page.flat({"a": {"b": 1}, "c": 2}) == [("a.b", "1"), ("c", "2")]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report in which every text is hostile, next to its results."""
    place = tmp_path_factory.mktemp("hostile")
    for number, text in enumerate(HOSTILE.values()):
        name = f"{number} \u202e%20#?<img src=x onerror=alert(1)>'\" \N{WOLF FACE}"
        folder = make_result(place / "results" / "pnp" / name / name, None, 2)
        text = text.replace("\ud800", "")  # YAML cannot be written with it
        config = {"prompt": text, "data_path": text, text or "key": text, "seed": 1}
        save_yaml(folder / "config.yaml", config)
        make_result(folder.with_name("other"), None, 2, **{text or "key": "another"})
    rows = [
        {"folder": str(path.parent), "method": HOSTILE["script"], "protocol": {"<b>": "<i>"}}
        for path in sorted(place.rglob("config.yaml"))
    ]
    rows = write_rows(place / "rows.json", *rows)
    make_report(place / "report", place / "results", metrics=[rows], title=HOSTILE["script"])
    return place / "report"


# ---------------------------------------------------------------- the output folder


def test_an_older_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    make_result(tmp_path / "r" / "x", None)
    out = tmp_path / "report"
    make_report(out, tmp_path / "r", title="first")
    (out / "media" / "0009-old.mp4").touch()
    for name in ("notes.txt", "media/mine.mp4"):  # the user's
        (out / name).write_text("mine")
    assert make_report(out, tmp_path / "r", title="second")["title"] == "second"
    assert not (out / "media" / "0009-old.mp4").exists()
    assert (out / "notes.txt").read_text() == (out / "media/mine.mp4").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "report"]
    shutil.copytree(tmp_path / "r", out / "r")
    before = contents(out)
    with pytest.raises(UserError, match="holds"):
        make_report(out, out / "r")
    monkeypatch.setattr(report_page, "render_page", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_report(out, tmp_path / "r")
    assert contents(out) == before


def test_videos_are_copied_where_links_are_not_possible(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("another file system")

    folder = make_result(tmp_path / "r" / "x", None)
    monkeypatch.setattr(os, "link", refuse)
    data = make_report(tmp_path / "report", tmp_path / "r")
    copy = tmp_path / "report" / data["clips"][0]["edits"][0]["video"]["src"]
    assert copy.read_bytes() == (folder / "edited.mp4").read_bytes()


@pytest.fixture(scope="module")
def bad_and_good(tmp_path_factory):
    """A folder with one result and its cache, and much that is no use."""
    tmp_path = tmp_path_factory.mktemp("place")
    make_result(tmp_path / "results" / "x", make_cache(tmp_path / "cache"))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "report.html").write_text("my own page")
    (tmp_path / "file").touch()
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "value.json").write_text('[{"warp_error": "3"}]')
    return tmp_path


@pytest.fixture
def place(bad_and_good, monkeypatch):
    """That folder as the current one."""
    monkeypatch.chdir(bad_and_good)
    return bad_and_good


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["file"], "file: a file, not a folder"),
        (["nothing"], "nothing: no finished result; expected a folder with edited.mp4"),
        ([], "the following arguments are required: results"),
        (["results", "--metrics", "no.json"], "no.json: no such file of rows"),
        (["results", "--metrics", "text.json"], "text.json: not valid JSON"),
        (["results", "--metrics", "value.json"], "value.json: row 1: "),
        (["results", "--out", "notes"], "exists and is not a report"),
        (["results", "--out", "file"], "exists and is not a report"),
        (["results", "--out", "file/report"], "is a file, expected a folder"),
        (["results", "--out", "results/x/report"], "lies inside of"),
        (["results", "--out", "cache/report"], "lies inside of"),
        (["results", "--out", "results"], "which the report shows"),
        (["results", "--out", "/"], "expected the name of a folder"),
    ],
)
def test_bad_input_ends_with_one_line_before_anything_is_written(
    place, words, message, monkeypatch, capsys
):
    before = contents(place)
    monkeypatch.setattr(sys, "argv", ["report_page.py", *words])
    with pytest.raises(SystemExit) as left:
        command_line(report.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith("error: ")
    assert message in line
    assert contents(place) == before


def test_an_empty_folder_and_an_unmatched_row_are_no_errors(place, caplog):
    rows = write_rows(place / "rows.json", {"folder": "elsewhere"}, {"folder": "results/x"})
    (place / "empty").mkdir()
    make_report(place / "empty", place / "results", metrics=[rows])
    assert (place / "empty" / "report.html").is_file()
    assert "1 of 2 rows are of other results" in caplog.text


def test_no_model_library_is_imported():
    code = "import sys, tokenflow.figures.report_page\n"
    code += "print({'diffusers', 'transformers'} & set(sys.modules))"
    root = Path(report.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- in a browser

SLOW = 3  # which of the shown clip's videos has half the others' rate: the second edit's
# Each video's place in frames.
POSITIONS = f"""() => [...document.querySelectorAll('.clip-section:last-of-type video')]
    .map((video, i) => video.currentTime * (i === {SLOW} ? 10 : 20))"""
SPREAD = f"(() => {{ const all = ({POSITIONS})(); return Math.max(...all) - Math.min(...all); }})()"
STILL = """() => [...document.querySelectorAll('.clip-section:last-of-type video')]
    .every((video) => video.paused && video.readyState >= 2 && !video.seeking)"""
PLAYING = "[...document.querySelectorAll('video')].filter((video) => !video.paused).length"
LOADED = "document.querySelectorAll('video[src]').length"


@pytest.fixture
def visit(browser):
    """Open a report; when the test is over, nothing must have failed or left the disk."""
    contexts, complaints, addresses = [], [], []

    def complain(kind):
        return lambda what: complaints.append(f"{kind}: {what}")

    def opened(folder, width=900, height=700, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)  # a busy machine plays late
        page.on("console", lambda message: complain(message.type)(message.text))
        page.on("pageerror", complain("error"))
        page.on("dialog", complain("dialog"))
        page.on("request", lambda request: addresses.append(request.url))
        page.on("requestfailed", failed)
        page.goto((folder / "report.html").as_uri())
        return page

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # a video that was scrolled away
            complaints.append(f"{request.url}: {request.failure}")

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []
    assert {address.partition(":")[0] for address in addresses} <= {"file", "data"}


def wait(page, condition):
    """Wait until an expression is true: as a function, for the page forbids eval."""
    page.wait_for_function(f"() => {condition}")


def the_wall(page):
    """The shown report's clip of five videos, all in view."""
    page.get_by_label("Videos").select_option("small")
    section = page.locator(".clip-section").last
    section.locator("h2").evaluate("(heading) => heading.scrollIntoView()")
    return section


def frames_on_screen(page, section):
    """The number of the frame that each video shows, read off its brightness."""
    image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
    boxes = [video.bounding_box() for video in section.locator("video").all()]
    middles = [
        image[int(box["y"] + box["height"] / 2), int(box["x"] + box["width"] / 2)] for box in boxes
    ]
    return [round((int(level) - 20) / 5) for level in middles]


def wait_for_frames(page, section, frame):
    """Wait until all videos stand still and show a frame (it is painted a little later)."""
    page.wait_for_function(STILL)
    deadline = time.monotonic() + 10
    while (seen := frames_on_screen(page, section)) != [frame] * 5 and time.monotonic() < deadline:
        pass
    assert seen == [frame] * 5
    assert section.locator(".frame").inner_text() == f"{frame + 1} / {N_FRAMES}"
    assert section.get_by_label("Frame", exact=True).input_value() == str(frame)


def test_nothing_plays_or_loads_by_itself(shown, visit):
    page = visit(shown[0], reduced_motion="reduce")
    section = the_wall(page)
    wait(page, "document.querySelectorAll('video[poster]').length === 7")
    assert page.evaluate(PLAYING) == 0
    states = page.evaluate("[...document.querySelectorAll('video')].map((v) => v.readyState)")
    assert states == [0] * 7
    assert page.title() == "A <b>title</b>" == page.locator("h1").inner_text()
    assert section.locator("h3").all_inner_texts() == [
        "Source", "Reconstruction", "PnP, TokenFlow", "PnP, fixed keyframes", "PnP, per frame",
    ]  # fmt: skip


def test_videos_advance_together(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    section.get_by_role("button", name="Play").click()
    wait(page, f"Math.min(...({POSITIONS})()) > 3 && {SPREAD} < 1")
    samples = page.evaluate(
        f"""async () => {{
            const spreads = [];
            for (let i = 0; i < 40; i++) {{
                await new Promise(requestAnimationFrame);
                spreads.push({SPREAD});
            }}
            return spreads;
        }}"""
    )
    assert statistics.median(samples) < 1
    section.get_by_role("button", name="Pause").click()
    wait_for_frames(page, section, int(section.get_by_label("Frame", exact=True).input_value()))


def test_a_video_that_is_put_off_finds_back(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    section.get_by_label("Loop").uncheck()  # a new round would mend it too
    section.get_by_label("Speed").select_option("0.25")
    section.get_by_role("button", name="Play").click()
    wait(page, f"{PLAYING} === 5 && Math.min(...({POSITIONS})()) > 1")
    for index, seconds in ((2, 1.5), (SLOW, 0)):  # far ahead, behind
        section.locator("video").nth(index).evaluate(
            "(video, seconds) => { video.currentTime = seconds; }", seconds
        )
        wait(page, f"{PLAYING} === 5 && Math.min(...({POSITIONS})()) > 1 && {SPREAD} < 1")


def test_scrubbing_sets_all_and_a_step_moves_one_frame(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    scrubber = section.get_by_label("Frame", exact=True)
    assert (scrubber.get_attribute("min"), scrubber.get_attribute("max")) == ("0", "39")
    scrubber.fill("17")
    wait_for_frames(page, section, 17)
    for _ in range(3):
        section.get_by_role("button", name="Next frame").click()
    wait_for_frames(page, section, 20)
    section.get_by_role("button", name="Previous frame").click()
    wait_for_frames(page, section, 19)
    scrubber.fill("39")
    section.get_by_role("button", name="Next frame").click()
    wait_for_frames(page, section, 39)
    scrubber.fill("0")
    section.get_by_role("button", name="Previous frame").click()
    wait_for_frames(page, section, 0)


def test_the_end_is_the_beginning_or_a_stop(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    scrubber = section.get_by_label("Frame", exact=True)
    scrubber.fill("34")
    section.get_by_role("button", name="Play").click()
    wait(page, f"Math.max(...({POSITIONS})()) < 20 && {PLAYING} === 5")
    section.get_by_label("Loop").uncheck()
    scrubber.fill("34")
    section.get_by_role("button", name="Play").click()
    wait(page, f"Math.min(...({POSITIONS})()) > 39")
    section.get_by_role("button", name="Play").wait_for()
    wait_for_frames(page, section, 39)


def test_speed_is_that_of_all_videos(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    section.get_by_label("Speed").select_option("0.5")
    section.get_by_role("button", name="Play").click()
    wait(page, f"{PLAYING} === 5")
    rates = f"""[...document.querySelectorAll('.clip-section:last-of-type video')]
        .map((video, i) => video.playbackRate / (i === {SLOW} ? 2 : 1))"""
    wait(page, f"{rates}.every((rate) => rate > 0.2 && rate < 0.8)")


def test_only_one_clip_plays_and_none_out_of_view(shown, visit):
    page = visit(shown[0])
    page.get_by_role("button", name="Play").first.click()
    wait(page, f"{PLAYING} === 2")
    section = the_wall(page)
    section.get_by_role("button", name="Play").click()
    wait(page, f"{PLAYING} === 5")
    assert page.get_by_role("button", name="Pause").count() == 1
    page.evaluate("document.body.style.paddingBottom = '9000px'; scrollTo(0, 9000)")
    wait(page, f"{PLAYING} === 0 && {LOADED} === 0")
    assert page.get_by_role("button", name="Pause").count() == 0


def test_keys_play_step_and_show_where_they_go(shown, visit):
    page = visit(shown[0])
    section = the_wall(page)
    section.locator("video").first.click()  # plays, as the button does
    wait(page, f"{PLAYING} === 5")
    page.keyboard.press("Space")
    wait(page, f"{PLAYING} === 0")
    top = page.evaluate("scrollY")
    page.keyboard.press("Space")
    wait(page, f"{PLAYING} === 5")
    page.keyboard.press("Space")
    assert page.evaluate("scrollY") == top
    section.get_by_role("button", name="Next frame").focus()
    page.keyboard.press("Home")
    wait_for_frames(page, section, 0)
    for key in ("ArrowRight", "Shift+ArrowRight", "ArrowLeft", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    wait_for_frames(page, section, 12)
    page.keyboard.press("End")
    wait_for_frames(page, section, 39)
    page.keyboard.press("Tab")
    focused = "getComputedStyle(document.activeElement)"
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.evaluate(f"[{focused}.outlineStyle, {focused}.outlineWidth]") == ["solid", "2px"]
    page.keyboard.press("ArrowLeft")
    wait_for_frames(page, section, 38)
    page.locator("#filter").focus()
    page.keyboard.type("wall x")  # is text there
    page.keyboard.press("ArrowLeft")
    assert page.locator("#filter").input_value() == "wall x"
    assert section.get_by_label("Frame", exact=True).input_value() == "38"


def test_the_table_is_sorted_by_its_buttons(shown, visit):
    page = visit(shown[0])

    def column(number):
        return page.locator(f"tbody tr > :nth-child({number})").all_inner_texts()

    def order(name):
        return page.get_by_role("columnheader", name=name).get_attribute("aria-sort")

    assert column(2) == ["sky", "wall", "wall", "wall"]
    assert (order("Clip"), order("Warp error")) == ("ascending", "none")
    button = page.locator("thead").get_by_role("button", name="Warp error")
    button.click()
    assert column(4) == ["9.50", "10.12", "100.00", "\u2013"]  # as numbers, missing ones last
    assert (order("Clip"), order("Warp error")) == ("none", "ascending")
    button.focus()
    page.keyboard.press("Enter")
    assert column(4) == ["100.00", "10.12", "9.50", "\u2013"]
    assert order("Warp error") == "descending"
    page.locator("thead").get_by_role("button", name="Method").click()
    methods = ["PnP, fixed keyframes", "PnP, per frame", "PnP, TokenFlow", "SDEdit"]
    assert column(1) == methods


def test_the_filter_hides_rows_and_videos(shown, visit):
    page = visit(shown[0])
    page.locator("#filter").fill("wall NONE")
    assert page.locator("tbody tr:visible").count() == 1
    assert page.locator(".tile:visible h3").all_inner_texts() == [
        "Source", "Reconstruction", "PnP, per frame",
    ]  # fmt: skip
    assert page.get_by_role("status").first.inner_text() == "1 of 4 results"
    page.locator("#filter").fill("nothing like this")
    assert page.locator(".tile:visible").count() == 0
    page.locator("#filter").fill("")
    assert page.locator("tbody tr:visible").count() == 4


def test_hostile_text_is_shown_and_does_nothing(hostile, visit):
    page = visit(hostile)
    for summary in page.locator("summary").all():
        summary.evaluate("(element) => element.click()")
    wait(page, "document.querySelectorAll('details[open] h4').length > 40")
    assert page.evaluate("window.harm") is None
    tags = "[...new Set([...document.body.querySelectorAll('*')].map((e) => e.localName))].sort()"
    assert not {"img", "b", "i", "script"} & set(page.evaluate(tags)) - {"script"}
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator("h1").text_content() == HOSTILE["script"] == page.title()
    texts = page.locator("td.prompt").evaluate_all("(cells) => cells.map((c) => c.textContent)")
    assert {text.replace("\ud800", "") for text in HOSTILE.values()} <= set(texts)
    assert page.locator("tbody th a").first.text_content() == HOSTILE["script"]
    links = page.locator(".files a").evaluate_all("(links) => links.map((link) => link.href)")
    paths = [Path(unquote(link.removeprefix("file://"))) for link in links]
    assert len(paths) == 2 * len(HOSTILE) * 5
    assert all(path.exists() for path in paths)
    assert {path.name for path in paths} > set(RESULT_FILES)


@pytest.mark.parametrize("name", ["shown", "hostile"])
def test_a_narrow_window_needs_no_sideways_scrolling(name, visit, request):
    folder = request.getfixturevalue(name)
    page = visit(folder[0] if name == "shown" else folder, width=320, height=640)
    page.locator("summary").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    widest = "Math.max(...[...document.querySelectorAll('.clip-section *')]"
    assert page.evaluate(f"{widest}.map((e) => e.getBoundingClientRect().right))") <= 320


# Every element's own text: its colour against the nearest background behind it.
CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const found = [];
    for (const element of document.body.querySelectorAll("*")) {
        const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || element.closest("script, noscript, option")) continue;
        let behind = element;
        while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] < 255) {
            behind = behind.parentElement;
        }
        const back = behind ? rgba(getComputedStyle(behind).backgroundColor) : [255, 255, 255];
        const [low, high] = [light(rgba(getComputedStyle(element).color)), light(back)].sort(
            (a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), element.outerHTML.slice(0, 80)]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(shown, visit, scheme):
    page = visit(shown[0], color_scheme=scheme)
    page.locator("summary").first.click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [item for item in found if item[0] < 4.5] == []
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A report of 200 results, 100 of each of two clips."""
    place = tmp_path_factory.mktemp("many")
    first = make_result(place / "first", None, 8)
    for number in range(200):
        folder = place / "results" / "pnp" / f"clip-{number % 2}" / f"{number}"
        folder.mkdir(parents=True)
        os.link(first / "edited.mp4", folder / "edited.mp4")
        os.link(first / "run.yaml", folder / "run.yaml")
        save_yaml(folder / "config.yaml", {"prompt": f"number {number}", "seed": number})
    make_report(place / "report", place / "results")
    return place / "report"


def test_of_many_videos_few_are_loaded(many, visit):
    page = visit(many)
    assert page.locator("video").count() == 200
    wait(page, f"document.querySelectorAll('video[poster]').length > 0 && {LOADED} > 0")
    assert page.evaluate(LOADED) <= 24
    assert page.evaluate("document.querySelectorAll('video[poster]').length") <= 24
    page.get_by_role("button", name="Play").first.click()
    wait(page, f"{PLAYING} > 0 && {PLAYING} === {LOADED}")
    page.locator("video").nth(60).scroll_into_view_if_needed()
    wait(page, "document.querySelectorAll('video')[60].currentTime > 0")  # joined in
    assert page.evaluate(PLAYING) <= 48
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    wait(page, "document.querySelectorAll('video')[199].hasAttribute('src')")
    wait(page, f"{PLAYING} === 0")
    assert page.evaluate(LOADED) <= 48
    page.locator("#filter").fill("number 199")
    assert page.locator("tbody tr:visible").count() == 1
    wait(page, f"{LOADED} === 1")


def test_a_huge_window_has_no_more_videos_than_a_browser_bears(many, visit):
    page = visit(many, height=1200)
    page.add_style_tag(content="figcaption { display: none !important }")
    page.get_by_label("Videos").select_option("small")
    page.locator("h2").last.evaluate("(heading) => heading.scrollIntoView()")
    wait(page, "document.querySelectorAll('video[poster]').length > 60")
    assert page.evaluate(LOADED) == 48
