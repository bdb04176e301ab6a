"""The page to work on: the functions behind its buttons, and all of it in a real Chromium."""

import importlib
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import app
from scripts.app_form import Form, command_lines, describe, edit, invert
from tests.helpers import HEIGHT, WIDTH, contents, make_clip
from tokenflow.ops.progress import listen
from util import UserError

SMALL = f"--n_frames 3 --H {HEIGHT} --W {WIDTH} --device cpu --reconstruction none"
SMALL += " --no_cache_features"
OPTIONS = f"--steps 4 --save_steps 2 {SMALL}"
KEYS = "device=cpu\nkeyframe_interval=2\nflow_model=dis"


@pytest.fixture
def form(tiny_model, tmp_path, monkeypatch):
    """A form for a clip in the current folder and the tiny model."""
    monkeypatch.chdir(tmp_path)
    make_clip(Path("clip.mp4"), 4)
    return Form(
        bundled="clip.mp4",
        upload="",
        shows="a star",
        prompts="a dog\n\n 'a' cat",
        technique="pnp",
        preset="paper",
        sd_version="2.1",
        model_key=str(tiny_model),
        options=OPTIONS,
        keys=KEYS,
    )


# ---------------------------------------------------------------- the functions behind its buttons


@pytest.mark.parametrize("technique", ["pnp", "sdedit", "controlnet"])
def test_buttons_do_what_the_shown_command_lines_do(form, technique):
    changes = {"technique": technique}
    if technique == "controlnet":
        changes["keys"] = f"{KEYS}\ncontrolnet_key={form.model_key}/controlnet"
    form = form._replace(**changes)
    heard = []
    with listen(lambda stage, share: heard.append((stage, share))):
        cache = invert(form).removeprefix("inverted: ")
        made, frame = edit(form)
    assert [stage for stage, share in heard if share == 1] == ["invert", "edit", "edit"]
    results = made.removeprefix("edited: ").split(", ")
    parents = {Path(each).parent for each in results}
    assert (len(results), parents) == (2, {Path("tokenflow-results", technique, "clip")})
    page = Path(re.search(r'gradio_api/file=([^"?]*)\?', frame)[1])
    assert page == Path("tokenflow-results/report/report.html").absolute()
    assert page.read_text().count('"prompt": "a dog"') == 1
    before = contents(Path("latents")) | contents(Path("tokenflow-results", technique))
    for line in command_lines(form).splitlines():
        program, script, *words = shlex.split(line)
        assert program == "python"
        importlib.import_module(script.removesuffix(".py")).main(words)
    assert contents(Path("latents")) | contents(Path("tokenflow-results", technique)) == before
    assert Path(cache).is_dir()


def test_an_upload_wins_and_results_stay_where_the_page_may_read_them(form):
    Path("up").mkdir()
    upload = str(make_clip(Path("up/other.mp4"), 2))
    form = form._replace(upload=upload, options=f"--save_dir far {SMALL}", keys="output_path=/far")
    assert describe(form) == f"other: 2 frames of {WIDTH}x{HEIGHT} at 10 fps"
    first, second, third = command_lines(form).splitlines()
    assert f"--data_path {upload}" in first and "--save_dir far" in first
    assert f"data_path={upload} " in second and "latents_path=far" in second
    assert "output_path=tokenflow-results " in second and "/far" not in second
    assert third == "python report.py tokenflow-results/pnp/other --out tokenflow-results/report"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": " \n"}, "prompts: expected one at least"),
        ({"options": "--n_frames 'a"}, "options of preprocess.py: No closing quotation"),
        ({"options": "--n_frames 0"}, "--n_frames: 0, expected at least 1"),
        ({"keys": "seed"}, "keys of the edits: seed: expected KEY=VALUE"),
        ({"keys": "sed=1"}, "--set sed: unknown key; did you mean seed?"),
        ({"upload": __file__}, "test_app.py: not a video that can be read"),
        ({"bundled": ""}, "clip: choose or upload one"),
    ],
)
def test_a_wrong_field_is_told_before_anything_is_made(form, changes, message):
    before = contents(Path())
    with pytest.raises(UserError, match=re.escape(message)):
        edit(form._replace(**changes))
    assert contents(Path()) == before


def test_without_gradio_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # and restored
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-app\.txt"):
        app.main([])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where app.py serves its page, which works in a folder of its own; a signal ends it."""
    pytest.importorskip("gradio")
    words = [sys.executable, app.__file__, "--port", "0"]
    folder = tmp_path_factory.mktemp("app")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=folder, **pipes) as process:
        line = process.stdout.readline()
        yield re.fullmatch(r"page: (http://127\.0\.0\.1:[0-9]+)\n", line)[1]
        process.terminate()  # a shell may have its background jobs ignore SIGINT
        _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in log and "stopped;" not in log


@pytest.fixture
def page(browser, address):
    """The page; when the test is over, nothing must have failed or been asked for elsewhere."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page, errors, asked = context.new_page(), [], []
    page.set_default_timeout(60_000)  # a busy machine
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))] == []


def test_from_an_upload_to_results_that_play_in_step(page, tiny_model, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=60_000)  # a busy machine
    page.get_by_role("button", name="More").click()
    page.get_by_label("Prompts, one a line").fill("a green star\na blue <b>star</b>")
    page.get_by_role("radio", name="paper").check()
    page.get_by_label("model_key").fill(str(tiny_model))
    page.get_by_label("Options of preprocess.py").fill(f"--steps 200 --save_steps 10 {SMALL}")
    page.get_by_label("Keys of the edits").fill(KEYS)

    (tmp_path / "bad<i>.mp4").write_text("no video")
    upload = page.locator("input[type=file]")
    upload.set_input_files(tmp_path / "bad<i>.mp4")
    chosen = page.get_by_label("Chosen")
    expect(chosen).to_have_value(re.compile("/badi.mp4: not a video that can be read"))
    page.get_by_label("Clear").first.click()
    expect(chosen).to_have_value(re.compile("^star: 16 frames"))
    upload.set_input_files(make_clip(tmp_path / "clip.mp4", 4))
    facts = f"clip: 4 frames of {WIDTH}x{HEIGHT} at 10 fps"
    expect(chosen).to_have_value(facts)
    expect(page.locator(".cm-content")).to_contain_text("--set 'prompt=a blue <b>star</b>'")

    page.get_by_role("button", name="Edit").click()
    expect(page.locator(".progress-level-inner")).to_contain_text("invert")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_test_id("toast-body")).to_contain_text("stopped; the same button resumes it")
    page.get_by_role("button", name="Edit").click()
    results = page.frame_locator("iframe[title=Results]")
    results.get_by_role("button", name="Play").click()
    (frame,) = page.frames[1:]
    videos = "[...document.querySelectorAll('video')]"
    frame.wait_for_function(f"() => {videos}.every((video) => video.currentTime > 0)")
    assert results.locator("h3").all_inner_texts() == ["Source", *["PnP, TokenFlow"] * 2]
    prompts = results.locator("td.prompt").all_text_contents()
    assert sorted(prompts) == ["a blue <b>star</b>", "a green star"]

    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 320, "height": 640})
    page.wait_for_function("() => document.querySelector('.dark')")
    for part in page.frames:
        wide, seen, back = part.evaluate(
            """[document.documentElement.scrollWidth, innerWidth,
                getComputedStyle(document.body).backgroundColor]"""
        )
        assert wide <= seen
        assert max(map(int, re.findall("[0-9]+", back))) < 50


@pytest.mark.browser  # with the server of the test above
def test_other_sites_and_other_files_get_no_answer(address):
    def status(path, **headers):
        request = Request(f"{address}/{path}", headers=headers)
        try:
            return urlopen(request).status
        except HTTPError as error:
            return error.code

    assert status("") == status("", Origin=address) == 200
    for headers in (
        {"Origin": "http://a.example"},
        {"Host": "a.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert status("", **headers) == 403
    for path in ("/etc/hostname", app.__file__):
        assert status(f"gradio_api/file={path}") == 403
