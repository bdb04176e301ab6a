"""A page to work on: choose or upload a clip, invert it, edit it, watch the results in step.

python app.py                   # then open the address that it prints

It runs what the command lines run, in the same folders, and shows these command lines. It listens
on this machine only and sends nothing anywhere.
"""

from __future__ import annotations

import html
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import util
from scripts.app_form import RESULTS, UPLOADS, Form, command_lines, describe, edit, invert
from tokenflow.cache.options import PreprocessOptions
from tokenflow.editing.config import ROOT
from tokenflow.editing.results import TECHNIQUES
from tokenflow.ops.progress import listen
from tokenflow.storage.schema import choices_of
from tokenflow.storage.video import VIDEO_SUFFIXES
from util import UserError

if TYPE_CHECKING:  # slow to import, and not needed to read a command line
    from fastapi import FastAPI, Request
    from gradio import Blocks

HOST = "127.0.0.1"
FROM_HERE = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'"
STAR = ROOT / "data" / "star.mp4"
stopping = threading.Event()  # set: what runs ends at its next step


def handler(work: Callable[[Form], Any], fields: Sequence[Any]) -> Callable:
    """What Gradio calls for a function of the form: with its progress and errors on the page."""
    import gradio as gr

    def handle(given: dict, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        def tell(stage: str, share: float) -> None:
            if stopping.is_set():
                raise UserError("stopped; the same button resumes it")
            progress(share, desc=stage)

        try:
            with listen(tell):
                return work(Form(*((given[field] or "").strip() for field in fields)))
        except (UserError, OSError, RuntimeError) as error:
            if (known := util.as_user_error(error)) is None:
                raise
            raise gr.Error(html.escape(str(known)), None, print_exception=False) from error

    return handle


def build_page() -> Blocks:
    """The page: its fields, and which function each button calls."""
    import gradio as gr

    def option(name: str) -> dict[str, Any]:
        field = PreprocessOptions.model_fields[name]
        choices = {"choices": choices_of(field.annotation), "value": field.default}
        return choices | {"label": name, "info": field.description}

    with gr.Blocks(title="TokenFlow", analytics_enabled=False) as page:
        gr.Markdown("# TokenFlow\nEdit a video by a text prompt.")
        with gr.Row():
            with gr.Column():
                clips = (p for p in (ROOT / "data").iterdir() if p.suffix in VIDEO_SUFFIXES)
                names, star = sorted(map(os.path.relpath, clips)), os.path.relpath(STAR)
                text = "a bundled one, or the path of a video or a folder of images"
                bundled = gr.Dropdown(names, value=star, label="Clip", info=text,
                                      allow_custom_value=True)  # fmt: skip
                upload = gr.File(label="or upload one", file_types=sorted(VIDEO_SUFFIXES))
                chosen = gr.Textbox(label="Chosen", interactive=False)
                shows = gr.Textbox(label="What the clip shows", placeholder="a woman running")
            with gr.Column():
                prompts = gr.Textbox(label="Prompts, one a line", lines=4)
                names = [(label, name) for name, label in TECHNIQUES.items()]
                technique = gr.Radio(names, value=names[0][1], label="Technique")
                preset = gr.Radio(**option("preset") | {"value": "best"})
                version = gr.Dropdown(**option("sd_version"))
        with gr.Accordion("More", open=False):
            model = gr.Textbox(label="model_key", info=option("model_key")["info"])
            options = gr.Textbox(label="Options of preprocess.py", placeholder="--n_frames 80")
            text = "Keys of the edits, one a line"
            keys = gr.Textbox(label=text, placeholder="guidance_scale=10", lines=2)
        with gr.Row():
            invert_button = gr.Button("Invert")
            edit_button = gr.Button("Edit", variant="primary")
            stop_button = gr.Button("Stop", variant="stop")
        status = gr.Textbox(label="Progress", interactive=False)
        results = gr.HTML(elem_id="results")
        shell = gr.Code(label="The same on the command line", language="shell", wrap_lines=True)

        fields = [bundled, upload, shows, prompts, technique, preset, version, model, options, keys]
        given, work = set(fields), {"concurrency_id": "work", "show_progress_on": status}
        buttons = (invert_button, invert, status), (edit_button, edit, [status, results])
        for button, does, shown in buttons:
            started = button.click(stopping.clear, queue=False)
            started.then(handler(does, fields), given, shown, **work)
        stop_button.click(stopping.set, queue=False)
        quiet = {"show_progress": "hidden", "trigger_mode": "multiple"}
        changes = [page.load, bundled.change, upload.change]
        gr.on(changes, handler(describe, fields), given, chosen, **quiet)
        gr.on(None, handler(command_lines, fields), given, shell, **quiet)
    return page


def build_server(own: str) -> FastAPI:
    """Serves the page at an address, to itself alone; it asks no other address either."""
    import fastapi
    import gradio

    server = fastapi.FastAPI(openapi_url=None)

    @server.middleware("http")
    async def guard(request: Request, answer: Callable) -> fastapi.Response:
        given = request.headers.get
        from_elsewhere = given("sec-fetch-site", "none") not in ("none", "same-origin")
        if from_elsewhere or f"http://{given('host')}" != own or given("origin", own) != own:
            return fastapi.Response(f"open {own}", 403)
        response = await answer(request)
        response.headers["Content-Security-Policy"] = FROM_HERE
        response.headers["Cache-Control"] = "no-cache"  # results are replaced under their names
        return response

    layout = "#results iframe { width: 100%; height: 85vh; border: 0 }"
    layout += "body:not(.dark) { --block-info-text-color: var(--neutral-500) }"  # Gradio's is faint
    options = {"css": layout, "footer_links": [], "run_history": False}
    return gradio.mount_gradio_app(
        server, build_page(), "/", allowed_paths=[os.path.abspath(RESULTS)], **options
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    parser = util.ArgumentParser(description=__doc__.splitlines()[0])
    text = "of the page; 0: a free one (default: 7860)"
    parser.add_argument("--port", type=util.at_least(0, 65535), default=7860, help=text)
    port = parser.parse_args(argv).port
    util.setup_logging()
    for folder in (UPLOADS, RESULTS):
        util.check_writable(folder, "the current folder")
    uploads = os.path.abspath(UPLOADS)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
    try:
        import uvicorn  # comes with gradio

        listening = socket.create_server((HOST, port))
        own = f"http://{HOST}:{listening.getsockname()[1]}"
        config = uvicorn.Config(build_server(own), log_level="warning", timeout_graceful_shutdown=1)
    except ModuleNotFoundError as error:
        remedy = "python -m pip install -r requirements-app.txt"
        raise UserError(f"{error}; install what app.py needs: {remedy}") from error
    except OSError as error:
        raise UserError(f"--port: {port}: {error.strerror}; choose another one") from error
    print(f"page: {own}", flush=True)
    service = uvicorn.Server(config)
    # At its end it would call a page that is still open an error.
    logging.getLogger("uvicorn.error").addFilter(lambda record: not service.should_exit)
    try:
        service.run([listening])
    finally:
        stopping.set()


if __name__ == "__main__":
    util.command_line(main)
