"""Reading and writing clips."""

import ctypes
import io
import itertools
import logging
import os
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import util
from tokenflow.cache.options import parse_args
from tokenflow.storage import images, video
from util import MissingFileError, UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
ROOT = Path(__file__).resolve().parents[2]
WOLF = ROOT / "../shared/data/wolf.mp4"


def quadrants(height: int = 64, width: int = 96) -> np.ndarray:
    """Draw red | green over blue | white: no turn or flip of it equals it."""
    image = np.empty((height, width, 3), np.uint8)
    h, w = height // 2, width // 2
    image[:h, :w], image[:h, w:], image[h:, :w], image[h:, w:] = RED, GREEN, BLUE, WHITE
    return image


def corners(image: np.ndarray) -> np.ndarray:
    """Take the colours in the middle of the four quadrants, (2, 2, 3)."""
    height, width = image.shape[:2]
    rows, columns = [height // 4, height * 3 // 4], [width // 4, width * 3 // 4]
    return image[np.ix_(rows, columns)].astype(int)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: int = 6) -> None:
    difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    assert difference.max() <= tolerance, f"{found}\n{expected}"


def greys(n: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Make flat frames whose brightness tells their index (see `indices`)."""
    return [np.full((height, width, 3), 20 + 8 * i, np.uint8) for i in range(n)]


def indices(frames: np.ndarray) -> list[int]:
    return [round((float(frame.mean()) - 20) / 8) for frame in frames]


def encode(
    path: Path,
    frames: list[np.ndarray],
    fps: Fraction | int = 10,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    matrix: str = "ITU601",
    color_range: str = "MPEG",
    times: list[int] | None = None,
    audio: bool = False,
) -> Path:
    """Write a video with PyAV alone; `times` are presentation times in hundredths of a second."""
    # The index first, so that a truncated file can be opened.
    muxing = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "8", **(options or {})})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        sound = container.add_stream("aac", rate=8000, layout="mono") if audio else None
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range=color_range
            )
            frame.time_base = Fraction(1, 100) if times else 1 / Fraction(fps)
            frame.pts = times[index] if times else index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            mux_silence(container, sound)
    return path


def mux_silence(
    container: av.container.OutputContainer, stream: av.audio.stream.AudioStream
) -> None:
    for index in range(8):
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate, frame.pts = 8000, index * 1024
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def intra_only(path: Path, n: int) -> list[tuple[int, int]]:
    """Write n frames that need no others; returns each one's (offset, size) in the file."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(n)]
    encode(path, frames, options={"g": "1", "bf": "0"})
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def write_images(folder: Path, names: list[str], **kwargs: int) -> Path:
    """Save `greys` under these names, in this order."""
    folder.mkdir(exist_ok=True)
    for name, array in zip(names, greys(len(names), **kwargs), strict=True):
        Image.fromarray(array).save(folder / name)
    return folder


def numbered(tmp_path: Path, kind: str, n: int, fps: int = 10) -> Path:
    """Write `greys` as a "video" or a "folder"."""
    if kind == "video":
        return encode(tmp_path / "a.mp4", greys(n), fps)
    return write_images(tmp_path / "a", [f"{i}.png" for i in range(n)])


# ---------------------------------------------------------------- reading video


@pytest.mark.parametrize("audio", [False, True])
def test_reads_h264(tmp_path, audio):
    path = encode(tmp_path / "a.mp4", [quadrants()] * 4, Fraction(30000, 1001), audio=audio)
    clip = video.read_clip(path, 4, size=(64, 96))
    assert clip.frames.shape == (4, 64, 96, 3) and clip.frames.dtype == np.uint8
    assert clip.fps == Fraction(30000, 1001)
    assert clip.native_size == (64, 96)
    for frame in clip.frames:
        assert_close(corners(frame), corners(quadrants()))


MATRICES = [
    (a, b, c, d)
    for a, b, c, d in itertools.product((-1, 0, 1), repeat=4)
    if sorted(map(abs, (a, b, c, d))) == [0, 0, 1, 1] and a * d != b * c
]


def set_display_matrix(path: Path, matrix: tuple[float, ...]) -> None:
    """Write a, b, c, d of a track header's matrix (ISO 14496-12, 8.3.2) into a file."""
    data = bytearray(path.read_bytes())
    a, b, c, d = (round(value * 65536) for value in matrix)
    at = data.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", data, at) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def displayed_corners(matrix: tuple[int, ...]) -> np.ndarray:
    """Move each quadrant as the standard says: (x, y) goes to (ax + cy, bx + dy), y down."""
    a, b, c, d = matrix
    moved = np.empty((2, 2, 3), int)
    source = corners(quadrants())
    for row, y in enumerate((-1, 1)):
        for column, x in enumerate((-1, 1)):
            moved[(b * x + d * y + 1) // 2, (a * x + c * y + 1) // 2] = source[row, column]
    return moved


@pytest.mark.parametrize("matrix", MATRICES)
def test_turns_frames_as_the_display_matrix_says(tmp_path, matrix):
    """A phone held upright stores the scene turned left and (0, 1, -1, 0), which turns it back."""
    path = encode(tmp_path / "phone.mov", [quadrants()] * 2)
    set_display_matrix(path, matrix)
    sideways = matrix[0] == 0
    clip = video.read_clip(path, 2)
    assert clip.native_size == ((96, 64) if sideways else (64, 96))
    assert clip.frames.shape == (2, *((672, 384) if sideways else (384, 672)), 3)
    assert_close(corners(clip.frames[1]), displayed_corners(matrix))


def test_refuses_a_skewed_display(tmp_path):
    path = encode(tmp_path / "skew.mov", [quadrants()])
    set_display_matrix(path, (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(UserError, match=r"skew\.mov: is rotated by something other"):
        video.read_clip(path, 1)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "size"),
    [
        ("libx264", "yuv420p10le", (64, 96)),
        ("libx264", "yuv444p", (63, 95)),
        ("libvpx-vp9", "yuv420p", (53, 75)),
    ],
)
def test_reads_other_codecs_pixel_formats_and_odd_sizes(tmp_path, codec, pix_fmt, size):
    vp9 = {"deadline": "realtime", "cpu-used": "8", "b": "2M"}
    options = vp9 if codec == "libvpx-vp9" else {}
    frames = [quadrants(*size)] * 3
    path = encode(tmp_path / "a.mkv", frames, codec=codec, pix_fmt=pix_fmt, options=options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pix_fmt
    clip = video.read_clip(path, 3, size=size)
    assert clip.frames.shape == (3, *size, 3) and clip.native_size == size
    assert_close(corners(clip.frames[2]), corners(quadrants(*size)), 12)


@pytest.mark.parametrize("color_range", ["MPEG", "JPEG"])
@pytest.mark.parametrize(("matrix", "tag"), [("ITU709", "bt709"), ("ITU601", "smpte170m")])
def test_honours_colour_tags(tmp_path, matrix, tag, color_range):
    """Decoding with the other matrix would be off by 20 levels and more."""
    options = {"colorspace": tag, "color_range": {"MPEG": "tv", "JPEG": "pc"}[color_range]}
    path = encode(
        tmp_path / "a.mp4",
        [quadrants()],
        options=options,
        matrix=matrix,
        color_range=color_range,
    )
    assert_close(corners(video.read_clip(path, 1, size=(64, 96)).frames[0]), corners(quadrants()))


def test_reads_gif_with_transparency_over_white(tmp_path):
    path = tmp_path / "a.gif"
    images = [Image.new("RGBA", (40, 30), (*colour, 255)) for colour in (RED, GREEN, BLUE)]
    for image in images:
        image.paste((0, 0, 0, 0), (20, 0, 40, 30))
    images[0].save(path, save_all=True, append_images=images[1:], duration=50, loop=0, disposal=2)
    clip = video.read_clip(path, 3, size=(30, 40))
    assert clip.fps == 20
    assert_close(clip.frames[:, 15, 5], [RED, GREEN, BLUE], 1)
    assert_close(clip.frames[:, 15, 30], [WHITE] * 3, 1)


def test_variable_frame_rate_keeps_every_frame_once(tmp_path):
    path = encode(
        tmp_path / "a.mp4", greys(6), 100, times=[0, 5, 10, 60, 65, 70], options={"bf": "0"}
    )
    clip = video.read_clip(path, 6, size=(32, 48))
    assert indices(clip.frames) == [0, 1, 2, 3, 4, 5]
    assert 7 <= clip.fps <= 9  # 6 frames in about 0.75 seconds; the nominal rate is 100
    assert video.read_clip(path, 2, fps=Fraction(24000, 1001)).fps == Fraction(24000, 1001)


@pytest.mark.skipif(not WOLF.is_file(), reason="the sample clip is not here")
def test_reads_a_real_clip():
    clip = video.read_clip(WOLF, 50)
    assert clip.frames.shape == (40, 512, 512, 3)
    assert clip.fps == 20 and clip.native_size == (512, 512)
    assert clip.frames.std(axis=0).max() > 5  # it moves


@pytest.mark.parametrize("kind", ["video", "folder"])
@pytest.mark.parametrize(
    ("start", "stride", "n_frames", "expected"),
    [(0, 1, 3, [0, 1, 2]), (4, 1, 2, [4, 5]), (1, 3, 3, [1, 4, 7]), (9, 5, 1, [9])],
)
def test_start_stride_and_count(tmp_path, caplog, kind, start, stride, n_frames, expected):
    path = numbered(tmp_path, kind, 10, 12)
    clip = video.read_clip(path, n_frames, start=start, stride=stride, size=(32, 48))
    assert indices(clip.frames) == expected
    assert clip.fps == Fraction(12 if kind == "video" else 24) / stride
    assert not caplog.records


@pytest.mark.parametrize("kind", ["video", "folder"])
def test_a_short_clip_is_used_with_a_warning(tmp_path, caplog, kind):
    path = numbered(tmp_path, kind, 5)
    assert indices(video.read_clip(path, 9, start=1, stride=2).frames) == [1, 3]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "9 frames requested, only 2 available" in record.getMessage()
    with pytest.raises(UserError, match="start 5 is beyond the end: the clip has 5 frames"):
        video.read_clip(path, 1, start=5)


def test_decodes_and_converts_no_more_than_needed(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    packets = intra_only(path, 30)
    data = bytearray(path.read_bytes())
    for offset, size in packets[20:]:
        data[offset : offset + size] = b"\xff" * size
    path.write_bytes(data)
    converted = []
    displayed = video._displayed
    monkeypatch.setattr(video, "_displayed", lambda *args: converted.append(1) or displayed(*args))
    assert len(video.read_clip(path, 4, start=1, stride=6).frames) == 4  # 1, 7, 13, 19
    assert len(converted) == 4
    # The damage is real: one frame more does not read.
    with pytest.raises(UserError, match=r"a\.mp4: frame 20 cannot be decoded"):
        video.read_clip(path, 21)


def test_reads_no_more_images_than_needed(tmp_path):
    folder = write_images(tmp_path / "a", ["0.png", "1.png", "2.png"])
    (folder / "2.png").write_bytes(b"broken")
    assert len(video.read_clip(folder, 2).frames) == 2
    with pytest.raises(UserError, match=r"2\.png: an image that cannot be read"):
        video.read_clip(folder, 3)


def test_concealed_damage_is_refused(tmp_path):
    """The decoder goes on after such damage and only flags the frame."""
    path = tmp_path / "a.mp4"
    offset, size = intra_only(path, 10)[6]
    data = bytearray(path.read_bytes())
    data[offset + size // 2 : offset + size - 1] = bytes(size - 1 - size // 2)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10
    with pytest.raises(UserError, match="frame 6 cannot be decoded"):
        video.read_clip(path, 10)
    assert len(video.read_clip(path, 3, start=7).frames) == 3


@pytest.mark.parametrize(
    ("native", "expected"),
    [((64, 64), (512, 512)), ((48, 64), (384, 672)), ((64, 48), (672, 384))],
)
def test_default_size(tmp_path, native, expected):
    assert images.default_size(*native) == expected
    clip = video.read_clip(encode(tmp_path / "a.mp4", greys(1, *native)), 1)
    assert clip.frames.shape == (1, *expected, 3)


def test_fit_stretches_or_crops():
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, :20], stripes[:, 20:40], stripes[:, 40:] = RED, GREEN, BLUE
    image = Image.fromarray(stripes)
    stretched = np.asarray(images.fit_frame(image, (40, 40), "stretch"))
    assert_close(stretched[20, [4, 20, 36]], [RED, GREEN, BLUE], 1)
    cropped = np.asarray(images.fit_frame(image, (40, 40), "crop"))
    assert cropped.shape == (40, 40, 3)
    assert_close(cropped[20, [12, 20, 28]], [GREEN] * 3, 1)


def test_read_clip_passes_fit_on(tmp_path):
    path = encode(tmp_path / "a.mp4", [quadrants(64, 192)])
    cropped = video.read_clip(path, 1, size=(64, 64), fit="crop").frames[0]
    native = video.read_clip(path, 1, size=(64, 192)).frames[0]
    assert_close(cropped, native[:, 64:128], 1)


def test_names_a_missing_path(tmp_path):
    with pytest.raises(MissingFileError, match=r"gone\.mp4: no such video or folder"):
        video.read_clip(tmp_path / "gone.mp4", 1)


def test_refuses_a_single_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: not a video that can be read"):
        video.read_clip(tmp_path / "a.png", 1)


def test_refuses_sound_alone(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        mux_silence(container, container.add_stream("aac", rate=8000, layout="mono"))
    with pytest.raises(UserError, match=r"a\.mp4: has no video stream"):
        video.read_clip(tmp_path / "a.mp4", 1)


def test_a_cover_picture_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        cover = container.add_stream("mjpeg", rate=1)
        cover.disposition = av.stream.Disposition.attached_pic
        cover.height, cover.width, cover.pix_fmt = 32, 48, "yuvj420p"
        mux_silence(container, sound)
        container.mux(cover.encode(av.VideoFrame.from_ndarray(greys(1)[0], format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(UserError, match=r"song\.mp4: has no video stream, but sound with a cover"):
        video.read_clip(tmp_path / "song.mp4", 1)


def test_refuses_a_size_that_changes_midway(tmp_path):
    parts = [encode(tmp_path / f"{h}.ts", greys(3, height=h)) for h in (32, 64)]
    path = tmp_path / "a.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(UserError, match=r"frame 3 is 48x64, those before it 48x32; a smaller n_f"):
        video.read_clip(path, 6)
    assert indices(video.read_clip(path, 3, own_size=True).frames) == [0, 1, 2]


def test_refuses_an_unknown_codec(tmp_path):
    path = encode(tmp_path / "a.mp4", greys(2))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    with pytest.raises(UserError, match=r"a\.mp4: there is no decoder for its video codec"):
        video.read_clip(path, 1)


def test_refuses_a_video_without_frames(tmp_path):
    path = tmp_path / "a.mp4"
    first, _ = intra_only(path, 2)[0]
    path.write_bytes(path.read_bytes()[:first])
    with pytest.raises(UserError, match=r"a\.mp4: has no frame that can be decoded"):
        video.read_clip(path, 1)


def test_metadata_need_not_be_utf8(tmp_path):
    path = encode(tmp_path / "a.mkv", greys(1))
    data = path.read_bytes()
    assert b"Lavf" in data
    path.write_bytes(data.replace(b"Lavf", b"L\xe9vf"))
    assert len(video.read_clip(path, 1).frames) == 1


def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video.save_video("a:b.mp4", greys(2), Fraction(10))
    assert len(video.read_clip("a:b.mp4", 2).frames) == 2


# ---------------------------------------------------------------- reading folders


def test_folder_is_read_in_natural_order(tmp_path):
    folder = write_images(tmp_path / "a", ["1.png", "2.png", "9.jpg", "10.png", "010b.PNG"])
    (folder / ".0.png").write_bytes(b"hidden")
    (folder / "Thumbs.db").write_bytes(b"not an image")
    (folder / "0.png").mkdir()
    clip = video.read_clip(folder, 5, size=(32, 48))
    assert indices(clip.frames) == [0, 1, 2, 3, 4]
    assert clip.fps == 24


def test_exif_orientation_is_honoured(tmp_path):
    scene = quadrants(96, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn clockwise to show"
    Image.fromarray(np.ascontiguousarray(np.rot90(scene))).save(
        tmp_path / "a.jpg", exif=exif, quality=95
    )
    clip = video.read_clip(tmp_path, 1, size=(96, 64))
    assert clip.native_size == (96, 64)
    assert_close(corners(clip.frames[0]), corners(scene))


def sixteen_bits() -> Image.Image:
    """Make half 0x8080 (128 of 255), half white."""
    values = np.full((8, 8), 0x8080, np.uint16)
    values[:, 4:] = 65535
    return Image.fromarray(values)


def see_through() -> Image.Image:
    """Make half opaque (10, 20, 30), half fully transparent red."""
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.paste((255, 0, 0, 0), (4, 0, 8, 8))
    return image


def palette(**info: int) -> Image.Image:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30, 0, 255, 0])
    image.paste(1, (4, 0, 8, 8))
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    ("make", "left", "right"),
    [
        (sixteen_bits, (128, 128, 128), WHITE),
        (lambda: sixteen_bits().convert("I"), (128, 128, 128), WHITE),
        (see_through, (10, 20, 30), WHITE),
        (lambda: see_through().convert("LA"), (18, 18, 18), WHITE),
        (palette, (10, 20, 30), GREEN),
        (lambda: palette(transparency=1), (10, 20, 30), WHITE),
        (lambda: Image.new("L", (8, 8), 77), (77, 77, 77), (77, 77, 77)),
        (lambda: Image.new("1", (8, 8), 1), WHITE, WHITE),
    ],
    ids=["16-bit", "32-bit of 16", "RGBA", "LA", "palette", "clear palette", "grey", "1-bit"],
)
def test_every_image_mode_becomes_rgb(tmp_path, make, left, right):
    image = make()
    image.save(tmp_path / ("a.tif" if image.mode == "I" else "a.png"))
    frame = video.read_clip(tmp_path, 1, size=(8, 8)).frames[0]
    assert frame.shape == (8, 8, 3)
    assert_close(frame[4, 0], left, 1)
    assert_close(frame[4, 7], right, 1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 4), np.float32), "floating-point pixels"),
        (np.full((4, 4), 70000, np.int32), "more than 16 bits"),
    ],
)
def test_refuses_pixels_with_no_known_range(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a\.tif: an image that cannot be read.*{message}"):
        video.read_clip(tmp_path, 1)


def test_refuses_images_of_different_sizes(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "1.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "2.png")
    Image.new("RGB", (10, 6)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"1\.png \(8x6\) and 3\.png \(10x6\)"):
        video.read_clip(tmp_path, 3)


def test_refuses_a_truncated_image(tmp_path):
    write_images(tmp_path, ["0.png"])
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"1\.png: an image that cannot be read"):
        video.read_clip(tmp_path, 2)


def test_refuses_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images \(.*\.jpg.*\.png"):
        video.read_clip(tmp_path, 1)


def test_refuses_links_that_lead_out_of_the_folder(tmp_path):
    outside = write_images(tmp_path / "outside", ["secret.png"])
    folder = write_images(tmp_path / "a", ["0.png"])
    (folder / "1.png").symlink_to(folder / "0.png")
    assert len(video.read_clip(folder, 2).frames) == 2
    (folder / "2.png").symlink_to(outside / "secret.png")
    for read in (lambda: video.read_clip(folder, 1), lambda: video.source_sha256(folder)):
        with pytest.raises(UserError, match=r"2\.png: is a link that points outside"):
            read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_and_devices_are_never_opened(tmp_path):
    """Opening a pipe waits for a writer; /dev/zero never ends."""
    folder = write_images(tmp_path / "a", ["0.png"])
    os.mkfifo(tmp_path / "pipe.mp4")
    os.mkfifo(folder / "hidden pipe")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(tmp_path / "socket.mp4"))
    for path in (tmp_path / "pipe.mp4", tmp_path / "zero.mp4", tmp_path / "socket.mp4"):
        for read in (lambda p: video.read_clip(p, 1), video.source_sha256, video.resolve_clip):
            with pytest.raises(UserError, match="neither a file nor a folder, but a pipe"):
                read(path)
    entry = folder / "1.png"
    os.mkfifo(entry)
    for kind in ("a pipe, a socket or a device", "a link to no file"):
        for read in (lambda: video.read_clip(folder, 1), lambda: video.source_sha256(folder)):
            with pytest.raises(UserError, match=rf"1\.png: is no image, but {kind}; remove it"):
                read()
        entry.unlink()
        entry.symlink_to("hidden pipe")
    for target in ("1.png", "gone.png", "../a"):  # a loop, nothing, a folder
        entry.unlink()
        entry.symlink_to(target)
        with pytest.raises(UserError, match=r"1\.png: is no image, but a link to no file"):
            video.read_clip(folder, 1)
    entry.unlink()
    entry.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"1\.png: is a link that points outside"):
        video.read_clip(folder, 1)
    entry.unlink()
    assert len(video.read_clip(folder, 1).frames) == 1


def hostile_files() -> dict[str, bytes]:
    """Make files that are neither videos nor images, and that some program would open others of."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("0.png", b"x")
    tape = io.BytesIO()
    with tarfile.open(fileobj=tape, mode="w") as file:
        file.addfile(tarfile.TarInfo("../../0.png"))
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(gone) deletefile\n%%EOF\n"
    return {
        "zip": archive.getvalue(),
        "tar": tape.getvalue(),
        "eps": page,
        "pdf": b"%PDF-1.4\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>",
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "text": b"a\n" * 1000,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", hostile_files())
def test_refuses_other_files_under_a_clip_s_name(tmp_path, kind):
    for name in ("a.mp4", "a.gif", "a.txt", "a.m3u8", "frames/0.png", "frames/0.jpg"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(hostile_files()[kind])
        message = "not a video that can be read|an image that cannot be read .it is none of PNG"
        with pytest.raises(UserError, match=message):
            video.read_clip(path.parent if path.parent != tmp_path else path, 1)
        path.unlink()


def test_no_image_is_handed_to_another_program(tmp_path, monkeypatch):
    """Pillow runs Ghostscript for EPS, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("ran a program"))
    (tmp_path / "0.png").write_bytes(hostile_files()["eps"])
    Image.open(tmp_path / "0.png").close()  # Pillow alone would take it
    with pytest.raises(UserError, match=r"0\.png: an image that cannot be read .it is none of PNG"):
        video.read_clip(tmp_path, 1)


def with_external_data(path: Path, target: bytes) -> None:
    """Have a QuickTime file of one track say that its frames lie in another file."""
    path_tag = struct.pack(">hh", 2, len(target)) + target + b"\0" * (len(target) % 2)
    alias = bytes(2 + 4) + struct.pack(">hh", 150, 2) + b"\4disk".ljust(28, b"\0")
    alias += bytes(12) + b"\5b.mp4".ljust(64, b"\0") + bytes(16) + struct.pack(">hh", 1, 1)
    alias += bytes(16) + path_tag + struct.pack(">hh", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    data = bytearray(path.read_bytes())
    at = data.index(b"url \0\0\0\1") - 4
    data[at : at + 12] = entry
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = data.rindex(name, 0, at) - 4
        size = struct.unpack_from(">I", data, place)[0]
        struct.pack_into(">I", data, place, size + len(entry) - 12)
    path.write_bytes(data)


def test_frames_in_another_file_are_not_fetched(tmp_path):
    other = encode(tmp_path / "b.mp4", greys(2))
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as container:  # the index last: it can grow
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for array in greys(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    assert len(video.read_clip(path, 2).frames) == 2
    with_external_data(path, os.fsencode(other))
    with av.open(str(path), options={"enable_drefs": "1"}) as container:
        assert next(container.demux(video=0)).size  # so it would be, were it asked for
    with pytest.raises(UserError, match=r"a\.mov: has no frame that can be decoded"):
        video.read_clip(path, 2)


# ---------------------------------------------------------------- sizes


def huge(kind: str, folder: Path) -> Path:
    """Write a small file whose header declares a frame of thousands of megapixels."""
    folder.mkdir(parents=True)
    array = np.random.default_rng(0).integers(0, 255, (64, 256, 3), np.uint8)
    path = folder / f"huge.{kind}"
    if kind in ("mp4", "mkv"):
        codec, pix_fmt = ("mjpeg", "yuvj420p") if kind == "mp4" else ("ffv1", "yuv420p")
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height, stream.width, stream.pix_fmt = 64, 256, pix_fmt
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pix_fmt)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        Image.fromarray(array).save(path)
    data = bytearray(path.read_bytes())
    if kind == "gif":
        struct.pack_into("<HH", data, 6, 65535, 65535)
    elif kind == "png":
        struct.pack_into(">II", data, 16, 65535, 65535)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    elif kind == "mkv":
        for tag in (b"\xb0\x82\x01\x00", b"\xba\x81\x40"):
            at = data.index(tag)
            data[at + 2 : at + len(tag)] = b"\xff" * (len(tag) - 2)
    else:  # a JPEG frame's own header
        struct.pack_into(">HH", data, data.index(b"\xff\xc0\x00\x11\x08") + 5, 65535, 65535)
    path.write_bytes(data)
    return path


HUGE = """
import resource, sys
from tokenflow.storage import video
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before = peak()
    try:
        video.read_clip(path, 1)
        print("read", path)
    except video.UserError as error:
        print("refused", peak() - before, error)
"""


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path):
    kinds = ["gif", "png", "jpg", "mp4", "mkv"]
    paths = [huge(kind, tmp_path / kind) for kind in kinds]
    wanted = [p if p.suffix in video.VIDEO_SUFFIXES else p.parent for p in paths]
    words = [sys.executable, "-c", HUGE, *map(str, wanted)]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    lines = [line for line in run.stdout.splitlines() if line]
    assert len(lines) == len(kinds), run.stdout
    for kind, line in zip(kinds, lines, strict=True):
        assert line.startswith("refused"), f"{kind}: {line}"
        assert int(line.split()[1]) < 60, f"{kind}: {line}"  # megabytes


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif", ".webm", ".png", ".webp"])
def test_no_frame_above_the_bound_is_decoded(tmp_path, monkeypatch, suffix):
    """The bound of the decoder is the same: a frame may be larger than its container says."""
    if suffix in (".png", ".webp", ".gif"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(quadrants()).save(path)
        path = path if suffix == ".gif" else tmp_path
    else:
        codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
        path = encode(tmp_path / f"a{suffix}", [quadrants()] * 2, codec=codec)
    assert video.read_clip(path, 1).native_size == (64, 96)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 96 - 1)
    monkeypatch.setattr(video, "_displayed", lambda *args: pytest.fail("was converted"))
    monkeypatch.setattr(images, "to_rgb", lambda *args: pytest.fail("was converted"))
    with pytest.raises(UserError, match="96x64 pixels are too many"):
        video.read_clip(path, 1, size=(8, 8))


@pytest.mark.parametrize("size", [(8, 16392), (16392, 8), (16384, 16384), (10**12, 8)])
def test_absurd_working_sizes_are_refused(tmp_path, size):
    path, (height, width) = encode(tmp_path / "a.mp4", greys(1)), size
    message = f"H and .*W: {width}x{height} pixels are too many; at most 16384 a side and 64 mega"
    with pytest.raises(UserError, match=message):
        video.read_clip(path, 1, size=size)
    with pytest.raises(UserError, match=message):
        parse_args(["--data_path", str(path), "--H", str(height), "--W", str(width)])


@pytest.mark.parametrize("kind", ["video", "folder"])
def test_more_frames_than_memory_holds_are_refused_before_the_first(tmp_path, monkeypatch, kind):
    path = numbered(tmp_path, kind, 6)
    sizes = {"SC_PHYS_PAGES": 6 * 2 * 64 * 64 * 3 - 1, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    message = r"6 frames of 64x64 need 0\.0 GB of memory, and this machine has .*--n_frames"
    with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
        patch.setattr(video, "fit_frame", lambda *args: pytest.fail("kept a frame"))
        video.read_clip(path, 10**12, size=(64, 64))
    assert len(video.read_clip(path, 5, size=(64, 64)).frames) == 5
    assert len(video.read_clip(path, 10**12, stride=2, size=(64, 64)).frames) == 3


def test_a_header_that_is_silent_on_its_frames_does_not_fill_memory(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", greys(6))  # Matroska tells no number of frames
    sizes = {"SC_PHYS_PAGES": 4 * 2 * 64 * 64 * 3, "SC_PAGE_SIZE": 1}
    monkeypatch.setattr(os, "sysconf", sizes.get)
    with pytest.raises(UserError, match="5 frames of 64x64 need"):
        video.read_clip(path, 6, size=(64, 64))


def test_frame_rates():
    rates = {"20": 20, "29.97": Fraction(2997, 100), "30000/1001": Fraction(30000, 1001), ".5": 0.5}
    assert {text: video.frame_rate(text) for text in rates} == rates
    for text in ("1e999999999", "9" * 10_000, "1/0", "0", "-5", "", ".", "nan", "1001", "1/", "x"):
        with pytest.raises(UserError, match="expected a number or a fraction above 0 and at most"):
            video.frame_rate(text)


# ---------------------------------------------------------------- names and hashes


def test_clip_name(tmp_path, monkeypatch):
    (tmp_path / "dir.v2").mkdir()
    (tmp_path / "odd.bin").write_bytes(b"")
    (tmp_path / "..mp4").write_bytes(b"")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "odd.bin")
    monkeypatch.chdir(tmp_path / "dir.v2")
    expected = {
        "data/wolf": "wolf",
        "data/wolf.mp4": "wolf",
        "data/v1.5": "v1.5",
        "data/wolf/": "wolf",
        ".": "dir.v2",
        "..": tmp_path.name,
        "../dir.v2": "dir.v2",
        "../odd.bin": "odd",
        "../link.mp4": "link",
        "../..mp4": "..mp4",
    }
    assert {path: video.clip_name(path) for path in expected} == expected
    with pytest.raises(UserError, match="has no name"):
        video.clip_name("/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\nb", r"the clip's name 'a\\nb' holds control characters .*; rename it"),
        ("a\x1b[31m.mp4", "holds control characters"),
        ("a\x85b", "holds control characters"),
        ("a\0b", "holds a NUL character"),
        (os.fsdecode(b"caf\xe9"), "is not valid Unicode text"),
        ("x" * 201, "the clip's name 'xxx.*' holds .* more than 200 bytes"),
        ("\N{WOLF FACE}" * 51 + ".mp4", "more than 200 bytes"),
        ("x" * 10_000, "more than 200 bytes"),
    ],
    ids=range(8),
)
def test_refuses_names_that_can_be_no_folder_s(name, message):
    with pytest.raises(UserError, match=message):
        video.clip_name(f"data/{name}")


def test_other_alphabets_emoji_and_spaces_name_a_clip():
    couple = "\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}"
    for name in ("\u72fc \u0630\u0626\u0628", couple, " ", "x" * 200, "-rf", "~"):
        assert video.clip_name(f"data/{name}.mp4") == video.clip_name(f"data/{name}") == name


def test_resolve_clip(tmp_path):
    for name in ("wolf.MP4", "wolf.txt", "fox.mp4", "fox.webm", "v1.5.mov"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "frames").mkdir()
    assert video.resolve_clip(tmp_path / "wolf.txt") == tmp_path / "wolf.txt"
    assert video.resolve_clip(tmp_path / "frames") == tmp_path / "frames"
    assert video.resolve_clip(tmp_path / "wolf") == tmp_path / "wolf.MP4"
    assert video.resolve_clip(str(tmp_path / "v1.5")) == tmp_path / "v1.5.mov"
    with pytest.raises(UserError, match=r"fox: could be any of fox\.mp4, fox\.webm"):
        video.resolve_clip(tmp_path / "fox")
    for missing in ("bear", "wolf.avi", "no/such/folder", "nul\0", "x" * 5000):
        with pytest.raises(MissingFileError, match="no such video or folder"):
            video.resolve_clip(tmp_path / missing)


def test_source_hash_follows_names_and_bytes(tmp_path):
    folder = write_images(tmp_path / "a", ["1.png", "2.png"])
    before = video.source_sha256(folder)
    (folder / "notes.txt").write_text("no image")
    assert video.source_sha256(folder) == before
    (folder / "2.png").rename(folder / "3.png")
    renamed = video.source_sha256(folder)
    (folder / "3.png").write_bytes((folder / "1.png").read_bytes())
    assert len({before, renamed, video.source_sha256(folder)}) == 3
    assert video.source_sha256(folder / "1.png") == util.sha256_file(folder / "1.png")


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("fps", [Fraction(24), Fraction(30000, 1001), Fraction(25, 3)])
def test_saved_video_has_every_frame_at_the_exact_rate(tmp_path, fps):
    path = tmp_path / "new folder" / "a.mp4"
    video.save_video(path, (frame for frame in greys(13)), fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.average_rate == fps
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        steps = {b.pts - a.pts for a, b in itertools.pairwise(frames)}
        assert steps == {1 / fps / stream.time_base}  # constant
        assert frames[0].pts == 0
    clip = video.read_clip(path, 13, size=(32, 48))
    assert indices(clip.frames) == list(range(13))
    assert clip.fps == fps
    assert os.listdir(path.parent) == ["a.mp4"]


def test_saved_video_has_the_colours_its_tags_say(tmp_path):
    """Luma is checked against BT.709's definition, so a matrix wrong both ways cannot pass."""
    video.save_video(tmp_path / "a.mp4", [quadrants()] * 3, Fraction(10))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        luma = frame.to_ndarray(format="yuv420p")[:64].astype(int)
    assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
    assert (context.color_primaries, context.color_trc) == (1, 1)
    expected = [16 + 219 * y for y in (0.2126, 0.7152, 0.0722, 1)]
    assert_close(luma[[16, 16, 48, 48], [24, 72, 24, 72]], np.rint(expected), 2)
    clip = video.read_clip(tmp_path / "a.mp4", 1, size=(64, 96))
    assert_close(corners(clip.frames[0]), corners(quadrants()))


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 10, "at least one frame"),
        (greys(1), 0, "fps above 0"),
        (greys(1, 31, 48), 10, "even sizes, got 48x31"),
        (greys(1) + greys(1, 32, 32), 10, r"frame 1 is uint8 \(32, 32, 3\)"),
        ([np.zeros((32, 48, 3))], 10, "frame 0 is float64"),
        ([np.zeros((32, 48), np.uint8)], 10, "frame 0 is uint8"),
    ],
)
def test_save_video_refuses_other_frames(tmp_path, frames, fps, message):
    with pytest.raises(ValueError, match=message):
        video.save_video(tmp_path / "a.mp4", frames, Fraction(fps))
    assert os.listdir(tmp_path) == []


def test_a_failing_generator_leaves_the_old_video(tmp_path):
    def frames():
        yield greys(1)[0]
        raise RuntimeError("the model failed")

    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="the model failed"):
        video.save_video(path, frames(), Fraction(10))
    assert os.listdir(tmp_path) == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_frames_survive_saving(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 6, 10, 3), np.uint8)
    images.save_frames(tmp_path / "frames", frames)
    assert sorted(os.listdir(tmp_path / "frames")) == [f"0000{i}.png" for i in range(4)]
    assert np.array_equal(images.load_frames(tmp_path / "frames"), frames)
    assert np.array_equal(images.load_frames(tmp_path / "frames", 2), frames[:2])


def test_load_frames_names_what_is_missing(tmp_path):
    with pytest.raises(MissingFileError, match=r"00000\.png: no such frame"):
        images.load_frames(tmp_path)
    images.save_frames(tmp_path, greys(3))
    with pytest.raises(MissingFileError, match=r"00003\.png: no such frame"):
        images.load_frames(tmp_path, 4)
    (tmp_path / "00001.png").unlink()
    with pytest.raises(MissingFileError, match=r"00001\.png: no such frame"):
        images.load_frames(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "00001.png")
    with pytest.raises(UserError, match=r"00001\.png: differs in size"):
        images.load_frames(tmp_path)


def test_a_video_s_bytes_depend_on_its_frames_alone(tmp_path):
    """Not on what lay in memory before, which mallopt(3) fills here."""
    perturb = -6
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        pytest.skip("this system's malloc cannot be told to fill what it gives")
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    made = set()
    try:
        for value in (40, 80, 120, 200):
            mallopt(perturb, value)
            video.save_video(tmp_path / "a.mp4", noise.repeat(8, 1).repeat(8, 2), Fraction(10))
            made.add((tmp_path / "a.mp4").read_bytes())
    finally:
        mallopt(perturb, 0)
    assert len(made) == 1
