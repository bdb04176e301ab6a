"""Results of the clip's own size: written, scored, drawn and refused."""

import numpy as np
import pytest
from PIL import Image

import evaluate
import report
import run_tokenflow_pnp
import visualize
from scripts.table1 import baselines
from tests.helpers import HEIGHT, WIDTH, edit, edit_keys, invert, shapes_frames, video_facts
from tokenflow.cache.source_cache import MANIFEST
from tokenflow.storage.images import load_frames
from tokenflow.storage.schema import parse
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError

NATIVE, WRITTEN = (71, 95), (70, 94)  # H.264 takes even sizes


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A folder with a clip of images, its cache, and results of both output sizes."""
    place = tmp_path_factory.mktemp("sizes")
    clip = place / "clip"
    clip.mkdir()
    for i, frame in enumerate(shapes_frames(5, *NATIVE)):
        Image.fromarray(frame).save(clip / f"{i:05d}.png")
    cache = invert(clip, place / "latents", tiny_model)
    results = [
        edit(run_tokenflow_pnp, clip, tiny_model, consistency="none", output_size=size)
        for size in ("model", "source")
    ]
    return clip, cache, *results


def test_frames_and_videos_have_the_clips_size(made):
    _, cache, plain, resized = made
    frames, found = load_frames(plain / "frames"), load_frames(resized / "frames")
    assert frames.shape[1:3] == (HEIGHT, WIDTH) and found.shape[1:3] == WRITTEN
    lanczos = [Image.fromarray(f).resize(WRITTEN[::-1], Image.Resampling.LANCZOS) for f in frames]
    assert np.array_equal(found, np.stack([np.asarray(image) for image in lanczos]))
    height, width = WRITTEN
    assert video_facts(resized / "edited.mp4")[2] == (height, width)
    assert video_facts(resized / "side_by_side.mp4")[2] == (height, 2 * width)
    latents = [(p / "edited_latents.safetensors").read_bytes() for p in (plain, resized)]
    assert latents[0] == latents[1] and plain.name != resized.name
    assert load_yaml(cache / MANIFEST)["native_size"] == list(NATIVE)


def test_such_results_are_scored_and_drawn(made, tmp_path, tiny_model):
    clip, _, plain, resized = made
    rows = evaluate.main(
        [str(plain), str(resized), "--flow", "dis", "--clip_model", "none", "--device", "cpu",
         "--json", str(tmp_path / "rows.json")]
    )  # fmt: skip
    one, other = (next(r for r in rows if r.folder == str(path)) for path in (plain, resized))
    assert (other.height, other.width) == (one.height, one.width) == (HEIGHT, WIDTH)
    assert one.protocol["resolution"] == "48x80"
    assert other.protocol["resolution"] == "48x80 (edit resized from 70x94)"
    assert other.psnr == pytest.approx(one.psnr, abs=0.3) and other.psnr != one.psnr
    report.main([str(plain.parent), "--metrics", str(tmp_path / "rows.json"),
                 "--out", str(tmp_path / "report")])  # fmt: skip
    page = (tmp_path / "report/report.html").read_text().replace(" ", "")
    assert '"width":94,"height":70' in page and '"width":80,"height":48' in page
    visualize.main(["features", "--result", str(resized), "--per_frame", str(plain),
                    "--device", "cpu", "--out", str(tmp_path / "figures")])  # fmt: skip
    keys = edit_keys(clip.parent, tiny_model, data_path=str(clip), output_size="source")
    config = parse(run_tokenflow_pnp.PnPConfig, keys, "")
    warped = baselines.rgb_propagation(config)
    assert load_frames(warped / "frames").shape[1:3] == WRITTEN


def test_a_size_that_is_not_known_or_cropped_is_refused(made, tiny_model, tmp_path):
    clip, cache, _, resized = made
    manifest = load_yaml(cache / MANIFEST)
    older = {key: value for key, value in manifest.items() if key != "native_size"}
    save_yaml(cache / MANIFEST, older)
    keys = {"consistency": "none", "output_size": "source"}
    assert edit(run_tokenflow_pnp, clip, tiny_model, **keys) == resized  # the clip tells it
    clip.rename(clip.with_name("away"))
    with pytest.raises(UserError, match=r"does not tell the clip.s size.*put it there"):
        edit(run_tokenflow_pnp, clip, tiny_model, **keys)
    clip.with_name("away").rename(clip)
    save_yaml(cache / MANIFEST, manifest)
    invert(clip, tmp_path / "cropped", tiny_model, fit="crop")
    with pytest.raises(UserError, match=r"output_size: source, but .*fit: crop"):
        edit(run_tokenflow_pnp, clip, tiny_model, latents_path=str(tmp_path / "cropped"), **keys)
