"""Hostile configurations, command lines, videos, images and folders, as hypothesis makes them up.

Whatever the input: a result or one line that says what is wrong, soon, and no file outside of the
output folder. The quick form tries the same few hundred inputs every time; the long one
(`pytest -m slow tests/robustness/test_fuzz.py -s`) thousands of new ones, and prints how many.
"""

import faulthandler
import io
import os
import re
import resource
import shutil
import struct
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

import preprocess
from tests.helpers import HEIGHT, WIDTH, invert, make_clip
from tokenflow.cache import build
from tokenflow.cache.options import PreprocessOptions
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.results import TECHNIQUES, result_folder
from tokenflow.editing.techniques import load_technique
from tokenflow.storage import video
from tokenflow.storage.schema import choices_of, load_config, plain_type
from util import UserError

CONFIGS = {name: load_technique(name).config for name in TECHNIQUES}
KEYS = sorted({key for cls in CONFIGS.values() for key in cls.model_fields})
HANG = 120  # seconds for one input, after which the process is ended with a traceback
SLOW = timedelta(seconds=20)  # for one input, on a busy machine
MEMORY = 1 << 30  # bytes that all inputs together may take beyond what was taken before


class ModelLoads(BaseException):
    """Raised in place of loading a model: the input was accepted."""


# ---------------------------------------------------------------- running


@contextmanager
def no_hang():
    """End the process with a traceback if the body hangs, in C code as well."""
    faulthandler.dump_traceback_later(HANG, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def campaign(name, n_inputs, check, *strategies):
    """Give `check` inputs, which returns how each ended; prints the figures."""
    outcomes = Counter()
    began, memory = time.monotonic(), peak_memory()

    @settings(
        max_examples=n_inputs,
        deadline=SLOW,
        derandomize=n_inputs <= 200,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def run(values):
        with no_hang():
            outcomes[check(*values)] += 1

    run()
    ended = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    taken = time.monotonic() - began
    print(f"\nfuzz: {name}: {outcomes.total()} inputs in {taken:.0f} s: {ended}")
    assert peak_memory() - memory < MEMORY
    return outcomes


def state(folder):
    """All that lies in a folder, files with their last change: equal if nothing was written.

    A folder's own time changes with the lock that a reader of a cache has for a moment.
    """
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        last_change = (0, 0) if path.is_dir() else (about.st_mtime_ns, about.st_size)
        found[str(path.relative_to(folder))] = last_change
    return found


def outcome_of(call, *args):
    """What a call ends with: "accepted", or "refused" with a fit error; else its exception."""
    try:
        call(*args)
    except UserError as error:
        text = str(error)
        assert text and not re.search("[\x00-\x1f\x7f-\x9f]", text), text
        assert len(text) < 30_000
        return "refused"
    except ModelLoads:
        pass
    return "accepted"


# ---------------------------------------------------------------- configurations

SIGNS = st.text(alphabet=" \n\t-:?[]{}&*!|>'\"#%@`,~<=.\\\0ax01", max_size=80)
TEXTS = st.one_of(st.text(max_size=40), SIGNS, st.text(st.characters(codec=None), max_size=10))
NUMBERS = st.one_of(
    st.integers(),
    st.integers(-2, 40),
    st.sampled_from((2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 10**400)),
    st.floats(),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=20), st.dates())
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(TEXTS, NUMBERS), inner, max_size=4)
    ),
    max_leaves=12,
)
HOSTILE_TEXTS = (
    "", " ", ".", "..", "../x", "../../../../x", "a/../../b", "clip", "clip.mp4/", "./clip.mp4",
    "//clip.mp4", "~", "~nobody-at-all/x", "a\0b", "a\nb", "\x1b[31m", "\x85", "x" * 300,
    "x" * 10_000, "x/" * 2_500, "\N{WOLF FACE} \u72fc", "\U0001f468\u200d\U0001f469", "\u202e",
    "\ud800", os.fsdecode(b"\xff.mp4"), "CON", "a*b**[c]?", "**", "%s%n", "{0}", "$(touch x)",
    "file:///etc/passwd", "http://127.0.0.1/x", "concat:clip.mp4|clip.mp4", "null", "-", "--",
    "-1", "0", "1", "2", "5", "8", "16392", "1e999", "nan", ".inf", "1:30:00", "true", "no",
    "0x" + "f" * 900, "9" * 900, "9" * 5_000, "1e999999999", "!!python/name:os.system",
    "!!timestamp x", "!!bool x", "!!int ''", "&a [*a]", "[" * 3_000, "{a: " * 500, "pipe",
    "loop.mp4", "gone.mp4", "zero", "empty", "text.mp4", "latents", "out", "cuda", "cuda:-1",
    "cuda:99999999999", "cpu:7", "mps", "meta", "tiny", "depth", "owner/name", "a/b/c", "model",
    "model/unet", "model/controlnet", "float16", "flow", "released", "none", "canny",
)  # fmt: skip
HOSTILE = st.sampled_from(HOSTILE_TEXTS)


@pytest.fixture(scope="module", autouse=True)
def its_own_folder(tmp_path_factory):
    """Where hypothesis keeps its tables: not in the folders that are watched."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))
    yield
    set_hypothesis_home_dir(None)


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    """A folder with a clip and its cache."""
    folder = tmp_path_factory.mktemp("made")
    invert(make_clip(folder / "clip.mp4"), folder / "latents", tiny_model)
    return folder


@pytest.fixture
def place(made, tiny_model, tmp_path, monkeypatch):
    """A working folder with a clip, its cache, a model and odd files; no model can be loaded."""
    work = shutil.copytree(made, tmp_path / "work")
    (work / "model").symlink_to(tiny_model)
    os.mkfifo(work / "pipe")
    (work / "loop.mp4").symlink_to("loop.mp4")
    (work / "gone.mp4").symlink_to("nothing")
    (work / "zero").symlink_to("/dev/zero")
    (work / "empty").mkdir()
    (work / "text.mp4").write_text("text")
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def load(*args, **kwargs):
        raise ModelLoads

    monkeypatch.setattr("tokenflow.diffusion.models.CLIPTextModel.from_pretrained", load)
    return tmp_path


GOOD = {
    "data_path": "clip.mp4",
    "prompt": "a green star",
    "model_key": "model",
    "n_inversion_steps": 10,
    "n_timesteps": 5,
    "n_frames": 5,
    "keyframe_interval": 3,
    "device": "cpu",
}


def check_config(place, technique, content, overrides=()):
    """Run a script with a configuration file and overrides; returns how it ended."""
    path = place.parent / f"{place.name}.yaml"
    path.write_bytes(content)
    words = [word for override in overrides for word in ("--set", override)]

    def folder():
        config = load_config(CONFIGS[technique], path, overrides)
        return config.output_path, result_folder(open_edit_inputs(config), technique)

    main = load_technique(technique).main
    outcome, parts = check_run(place, main, ["--config", str(path), *words], folder)
    assert not parts or parts[:2] == (technique, "clip")
    assert not parts or re.fullmatch("[a-z0-9-]{1,80}", parts[2])
    return outcome


def check_run(place, main, argv, folder):
    """Run a script: no file may change outside of its output folder, or at all if it is refused.

    Args:
        folder: gives the output folder and the folder in it, if the input is accepted.

    Returns:
        how it ended, and the parts of the path of the folder in the output folder.
    """
    before, allowed, parts = state(place), None, ()
    outcome = outcome_of(main, argv)
    if outcome == "accepted" and not {"-h", "--help"} & set(argv):
        allowed, found = map(os.path.abspath, folder())
        parts = Path(found).relative_to(allowed).parts
    for name in dict(state(place).items() ^ before.items()):
        inside = allowed is not None and (place / name).is_relative_to(allowed)
        above = allowed is not None and Path(allowed).is_relative_to(place / name)
        assert inside or above, f"{name} was changed"
    return outcome, parts


def structured(keys):
    """YAML text of a mapping with some of a config's keys."""
    return yaml.safe_dump(keys, allow_unicode=True).encode("utf-8", "surrogatepass")


MAPPINGS = st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), VALUES, max_size=6)
TECHNIQUE = st.sampled_from(sorted(CONFIGS))
CONFIG_BYTES = st.one_of(
    st.binary(max_size=400),
    SIGNS.map(str.encode),
    TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass")),
    VALUES.map(structured),
    MAPPINGS.map(structured),
    MAPPINGS.map(lambda keys: structured(GOOD | keys)),
)


def plausible(technique):
    """Overrides of the right kind, most of them within bounds."""

    def value(field):
        choices = choices_of(field.annotation)
        if choices:
            return st.sampled_from(choices)
        kinds = {
            int: st.integers(0, 50).map(str),
            float: st.floats(0, 1).map(str),
            bool: st.sampled_from(("true", "false")),
            str: st.one_of(HOSTILE, st.text(max_size=200)),
        }
        return kinds.get(plain_type(field.annotation), kinds[str])  # of lists and chunk_size

    fields = CONFIGS[technique].model_fields.items()
    pairs = [st.tuples(st.just(name), value(field)).map("=".join) for name, field in fields]
    return st.tuples(st.just(technique), st.lists(st.one_of(pairs), min_size=1, max_size=2))


OVERRIDES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), st.one_of(HOSTILE, TEXTS, NUMBERS.map(str))).map("=".join),
        TEXTS,
    ),
    max_size=3,
)


def try_configs(place, n):
    def check(technique, content=None, overrides=()):
        return check_config(
            place, technique, structured(GOOD) if content is None else content, overrides
        )

    def check_mutated(technique, change):
        return check(technique, change(structured(GOOD)))

    total = campaign("configuration files", n, check, TECHNIQUE, CONFIG_BYTES)
    total += campaign("mutated configurations", n, check_mutated, TECHNIQUE, MUTATIONS)
    total += campaign("overrides", n, lambda t, o: check(t, None, o), TECHNIQUE, OVERRIDES)
    plausible_pairs = TECHNIQUE.flatmap(plausible)
    total += campaign("plausible overrides", n, lambda p: check(p[0], None, p[1]), plausible_pairs)
    return total


def try_every_key(place):
    """Every hostile text for every key of one technique, and for every option of preprocess.py."""
    outcomes, began = Counter(), time.monotonic()
    for key in CONFIGS["controlnet"].model_fields:
        for text in HOSTILE_TEXTS:
            with no_hang():
                override = f"{key}={text}"
                outcomes[check_config(place, "controlnet", structured(GOOD), [override])] += 1
    for option in (*OPTIONS, "--save_dir"):
        for text in HOSTILE_TEXTS:
            with no_hang():
                outcomes[check_preprocess(place, [[option, text]])] += 1
    taken = time.monotonic() - began
    print(f"\nfuzz: each hostile text for each key: {outcomes.total()} inputs in {taken:.0f} s")
    return outcomes


# ---------------------------------------------------------------- the command line of preprocess

OPTIONS = set(PreprocessOptions.model_fields) - {"save_dir", "cache_features", "overwrite"}
OPTIONS = [f"--{name}" for name in sorted(OPTIONS)]
WORDS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(OPTIONS), st.one_of(HOSTILE, TEXTS, NUMBERS.map(str))
        ).map(list),
        st.tuples(st.sampled_from((*OPTIONS, "--fast", "--allow_pickle"))).map(list),
        st.tuples(st.just("--save_dir"), HOSTILE.filter(lambda text: text != "/")).map(list),
        st.tuples(TEXTS).map(list),
    ),
    max_size=4,
)  # fmt: skip


def check_preprocess(place, words):
    """Run preprocess.py; nothing may be written before the model is loaded, nor outside after."""
    good = f"--data_path clip.mp4 --model_key model --save_dir new --device cpu --H {HEIGHT}"
    good += f" --W {WIDTH} --n_frames 2 --steps 10 --save_steps 5 --no_cache_features"
    argv = [*good.split(), *(word for pair in words for word in pair)]

    def folder():
        args = preprocess.parse_args(argv)
        return args.save_dir, build.open_preprocess_inputs(args).folder

    outcome, parts = check_run(place, preprocess.main, argv, folder)
    assert len(parts) in (0, 4)
    return outcome


def try_command_lines(place, n):
    return campaign(
        "command lines of preprocess.py", n, lambda words: check_preprocess(place, words), WORDS
    )


# ---------------------------------------------------------------- videos and images


def mutate(data, kind, at, length, value):
    """One change of some bytes; `at` is a share of the length, or counts bytes of the header."""
    data = bytearray(data)
    start = at if isinstance(at, int) else int(at * len(data))
    start = min(start, len(data))
    if kind == "flip" and start < len(data):
        data[start] ^= value % 255 + 1
    elif kind == "cut":
        del data[start : start + length]
    elif kind == "truncate":
        del data[start:]
    elif kind == "insert":
        data[start:start] = bytes([value % 256]) * length
    elif kind == "repeat":
        data[start:start] = data[start : start + length] * 3
    elif kind == "number":
        for form in ("<I", ">I", "<H", ">H")[value % 4 :][:1]:
            number = NUMBERS_32[value % len(NUMBERS_32)] & (2 ** (8 * struct.calcsize(form)) - 1)
            data[start : start + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(data)


NUMBERS_32 = (0, 1, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 5000)
CHANGES = st.tuples(
    st.sampled_from(("flip", "flip", "cut", "truncate", "insert", "repeat", "number", "number")),
    st.one_of(st.integers(0, 200), st.floats(0, 1)),
    st.integers(1, 300),
    st.integers(0, 10_000),
)


def _apply(changes):
    def change(data):
        for one in changes:
            data = mutate(data, *one)
        return data

    return change


MUTATIONS = st.lists(CHANGES, min_size=1, max_size=4).map(_apply)


def encoded(suffix, codec, pix_fmt="yuv420p"):
    """A small video's bytes."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    buffer.name = f"a{suffix}"
    with av.open(
        buffer, "w", format={".ts": "mpegts", ".mkv": "matroska"}.get(suffix)
    ) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, pix_fmt
        for _ in range(3):
            picture = rng.integers(0, 255, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def pictured(kind, mode="RGB", **options):
    """A small image's bytes."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def animated(kind):
    images = [Image.new("RGBA", (48, 32), (80 * i, 9, 9, 100 + 50 * i)) for i in range(3)]
    buffer = io.BytesIO()
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=50)
    return buffer.getvalue()


def with_png_checksums(data):
    """Make the checksums of a PNG's chunks right again, so that its fields are believed."""
    fixed, at = bytearray(data), 8
    while at + 12 <= len(fixed):
        length = struct.unpack_from(">I", fixed, at)[0]
        end = at + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


@pytest.fixture(scope="module")
def samples():
    """Small good files by suffix."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    videos = [
        (".mp4", encoded(".mp4", "libx264")),
        (".mov", encoded(".mov", "mjpeg", "yuvj420p")),
        (".mkv", encoded(".mkv", "libx264")),
        (".mkv", encoded(".mkv", "ffv1")),
        (".avi", encoded(".avi", "mpeg4")),
        (".avi", encoded(".avi", "ffv1")),
        (".webm", encoded(".webm", "libvpx-vp9")),
        (".ts", encoded(".ts", "mpeg2video")),
        (".flv", encoded(".flv", "flv")),
        (".gif", animated("GIF")),
    ]
    images = [
        (".png", pictured("PNG")),
        (".png", pictured("PNG", "P")),
        (".png", pictured("PNG", "LA")),
        (".jpg", pictured("JPEG", exif=orientation)),
        (".jpg", pictured("JPEG", "CMYK", progressive=True)),
        (".tif", pictured("TIFF", exif=orientation)),
        (".tif", pictured("TIFF", compression="tiff_lzw")),
        (".tif", pictured("TIFF", compression="jpeg")),
        (".tif", pictured("TIFF", "I;16")),
        (".webp", pictured("WEBP", lossless=True)),
        (".webp", animated("WEBP")),
        (".bmp", pictured("BMP")),
        (".bmp", pictured("BMP", "P")),
    ]
    return {"video": videos, "image": images}


def check_clip(path, n_frames=3, size=(16, 24)):
    """Read a clip; returns how that ended."""

    def read():
        clip = video.read_clip(path, n_frames, size=size)
        n, *shape = clip.frames.shape
        assert 1 <= n <= n_frames and clip.frames.dtype == np.uint8
        assert size is None or tuple(shape) == (*size, 3)
        assert clip.fps > 0 and min(clip.native_size) > 0

    outcome = outcome_of(read)
    assert outcome_of(video.source_sha256, path) in ("accepted", "refused")
    return outcome


def try_files(tmp_path, samples, n):
    total = Counter()

    def check_video(number, change):
        suffix, data = samples["video"][number]
        path = tmp_path / f"a{suffix}"
        path.write_bytes(change(data))
        return check_clip(path)

    videos = st.integers(0, len(samples["video"]) - 1)
    total += campaign("mutated videos", 2 * n, check_video, videos, MUTATIONS)

    def check_image(number, change, fix):
        suffix, data = samples["image"][number]
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        data = change(data)
        path = folder / f"0{suffix}"
        path.write_bytes(with_png_checksums(data) if fix and suffix == ".png" else data)
        try:
            return check_clip(folder)
        finally:
            path.unlink()

    images = st.integers(0, len(samples["image"]) - 1)
    total += campaign("mutated images", 2 * n, check_image, images, MUTATIONS, st.booleans())

    def check_bytes(suffix, data):
        path = tmp_path / f"b{suffix}"
        path.write_bytes(data)
        return check_clip(path)

    suffixes = st.sampled_from(sorted(video.VIDEO_SUFFIXES))
    heads = st.sampled_from([data[:64] for kind in samples.values() for _, data in kind])
    bodies = st.one_of(st.binary(max_size=300), st.builds(bytes.__add__, heads, st.binary()))
    total += campaign("made-up files", n, check_bytes, suffixes, bodies)
    return total


def try_folders(tmp_path, samples, n):
    """Folders of good and broken images, links of all kinds, pipes, odd names."""
    (tmp_path / "outside.png").write_bytes(samples["image"][0][1])
    names = st.one_of(
        st.sampled_from(("0.png", "1.jpg", "2.webp", "\ud800.png".encode("utf-8", "surrogatepass"),
                         b"\xff.png", "a\nb.png", "..png", "9" * 200 + ".png", "\u0663.png")),
        st.integers(0, 20).map("{}.png".format),
    )  # fmt: skip
    kinds = st.sampled_from(
        ("image", "image", "image", "broken", "out", "in", "loop", "gone", "pipe", "folder", "zero")
    )
    entries = st.dictionaries(names.map(os.fsencode), st.tuples(kinds, MUTATIONS), max_size=5)

    def check(entries):
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, (kind, change) in entries.items():
            make_entry(os.fsencode(folder) + b"/" + name, kind, change, samples["image"][0][1])
        return check_clip(folder)

    return campaign("folders", n, check, entries)


def make_entry(path, kind, change, image):
    links = {"out": b"../outside.png", "in": b"0.png", "gone": b"nothing", "zero": b"/dev/zero"}
    if kind in ("image", "broken"):
        with open(path, "wb") as file:
            file.write(image if kind == "image" else change(image))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    else:
        os.symlink(links.get(kind, os.path.basename(path)), path)


# ---------------------------------------------------------------- the tests


def test_hostile_configurations_end_well(place):
    outcomes = try_configs(place, 40)
    assert outcomes["accepted"] and outcomes["refused"]


def test_hostile_command_lines_end_well(place):
    outcomes = try_command_lines(place, 40)
    assert outcomes["accepted"] and outcomes["refused"]


def test_hostile_files_end_well(tmp_path, samples):
    for kind in samples.values():
        for suffix, data in kind:  # what is mutated below is good
            folder = tmp_path / "good"
            folder.mkdir()
            (folder / f"a{suffix}").write_bytes(data)
            path = folder / f"a{suffix}" if suffix in video.VIDEO_SUFFIXES else folder
            assert check_clip(path) == "accepted", suffix
            shutil.rmtree(folder)
    outcomes = try_files(tmp_path, samples, 50)
    assert outcomes["accepted"] and outcomes["refused"]


def test_hostile_folders_end_well(tmp_path, samples):
    outcomes = try_folders(tmp_path, samples, 40)
    assert outcomes["accepted"] and outcomes["refused"]


@pytest.mark.parametrize("key", ["data_path", "latents_path", "output_path", "model_key"])
def test_paths_that_are_too_long_are_refused(place, key):
    for text in ("x" * 300, "x" * 10_000, "x/" * 2_500):
        assert check_config(place, "pnp", structured(GOOD | {key: text})) == "refused"


@pytest.mark.slow
def test_thousands_of_hostile_inputs_end_well(place, samples):
    """The long form of all the above."""
    began = time.monotonic()
    total = try_configs(place, 700) + try_command_lines(place, 700)
    total += try_files(place, samples, 700) + try_folders(place, samples, 700)
    total += try_every_key(place)
    print(f"\nfuzz: {total.total()} inputs in {time.monotonic() - began:.0f} s: {dict(total)}")
    assert total.total() >= 5000
