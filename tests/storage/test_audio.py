"""Sound: decoded again, it is in step with the picture; whole edits on the tiny model."""

from fractions import Fraction

import av
import numpy as np
import pytest

import run_tokenflow_pnp
from tests.helpers import HEIGHT, WIDTH, edit, invert
from tokenflow.cache.source_cache import AUDIO_FILE
from tokenflow.storage.audio import cut_audio
from tokenflow.storage.video import read_clip, save_video
from util import sha256_file

FPS, N_FRAMES, EVENT = Fraction(12), 24, 9  # from frame EVENT on: white, and a tone


def pictures(n_frames=N_FRAMES):
    frames = np.zeros((n_frames, HEIGHT, WIDTH, 3), np.uint8)
    frames[EVENT:] = 255
    return frames


def make_sounding_clip(path, codec="aac", rate=44100, channels=2, video="libx264"):
    """A clip whose picture turns white when a tone begins."""
    samples = np.zeros((channels, int(N_FRAMES / FPS * rate)), np.float32)
    begin = int(EVENT / FPS * rate)
    samples[:, begin:] = np.sin(np.arange(samples.shape[1] - begin) * 2 * np.pi * 1000 / rate) / 2
    with av.open(str(path), "w") as container:
        picture = container.add_stream(video, rate=FPS)
        picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        sound = container.add_stream(codec, rate=rate, options={"strict": "experimental"})
        sound.layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        for index, array in enumerate(pictures()):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = index, 1 / FPS
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        for first in range(0, samples.shape[1], 1000):
            part = np.ascontiguousarray(samples[:, first : first + 1000])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=sound.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = rate, first, Fraction(1, rate)
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


def events(path):
    """When a video's left half turns white and when its tone begins, and how long both last."""
    with av.open(str(path)) as container:
        frames = [(f.time, f.to_ndarray(format="gray")[:, :40]) for f in container.decode(video=0)]
    resampler, begin, end = av.AudioResampler("fltp", "mono", 48000), None, 0.0
    with av.open(str(path)) as container:
        for decoded in container.decode(audio=0):
            for frame in resampler.resample(decoded):
                loud = np.abs(frame.to_ndarray()[0]) > 0.1
                if begin is None and loud.any():
                    begin = frame.time + loud.argmax() / 48000
                end = frame.time + frame.samples / 48000
    white = next(time for time, grey in frames if grey.mean() > 128)
    return white, begin, len(frames) / float(FPS), end


def codec_of(path):
    with av.open(str(path)) as container:
        return container.streams.best("audio") and container.streams.audio[0].codec_context.name


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("a.mp4", {}, "aac"),
        ("a.ts", {"rate": 48000, "channels": 6}, "aac"),  # begins at 1.4 s
        ("a.webm", {"codec": "libopus", "rate": 48000, "video": "libvpx"}, "opus"),
        ("a.avi", {"codec": "libmp3lame"}, "mp3float"),
        ("a.mkv", {"codec": "flac", "channels": 1}, "flac"),
        ("a.mkv", {"codec": "vorbis"}, "aac"),
        ("a.mov", {"codec": "pcm_s16le", "channels": 6}, "aac"),
        ("a.mkv", {"codec": "pcm_f32le", "rate": 37000, "channels": 1}, "aac"),
    ],
)
def test_sound_is_in_step_with_the_picture(tmp_path, name, options, expected, start):
    source = make_sounding_clip(tmp_path / name, **options)
    clip = read_clip(source, 16, start=start, own_size=True)
    cut = tmp_path / "cut" / AUDIO_FILE
    assert cut_audio(source, cut, clip)
    save_video(tmp_path / "a_copy.mp4", clip.frames[:14], clip.fps, cut)
    white, tone, shown, heard = events(tmp_path / "a_copy.mp4")
    assert white == pytest.approx((EVENT - start) / FPS)
    assert tone == pytest.approx(white, abs=0.03)  # an AVI file does not tell MP3's delay
    assert heard == pytest.approx(shown, abs=float(1 / FPS))
    assert codec_of(cut) == expected == codec_of(tmp_path / "a_copy.mp4")
    save_video(tmp_path / "silent.mp4", clip.frames[:14], clip.fps)
    pair = [read_clip(tmp_path / p, None, own_size=True) for p in ("a_copy.mp4", "silent.mp4")]
    assert np.array_equal(pair[0].frames, pair[1].frames) and pair[0].fps == pair[1].fps


def test_sound_that_cannot_be_kept_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    source = make_sounding_clip(tmp_path / "a.mp4")
    silent, cut = tmp_path / "silent.mp4", tmp_path / AUDIO_FILE
    save_video(silent, pictures(), FPS)
    for path, options, said in (
        (silent, {}, ""),
        (source, {"fps": Fraction(24)}, "24 frames last 2 s in the clip, 1 s at the result's 24"),
    ):
        caplog.clear()
        assert not cut_audio(path, cut, read_clip(path, N_FRAMES, own_size=True, **options))
        assert said in caplog.text and bool(said) == bool(caplog.text) and not cut.exists()
    assert cut_audio(source, cut, read_clip(source, 12, stride=2, own_size=True))  # as long


def test_results_have_the_clips_sound(tiny_model, tmp_path):
    source = make_sounding_clip(tmp_path / "clip.mp4")
    part = {"frame_start": 4, "n_frames": 8}
    cache = invert(source, tmp_path / "latents", tiny_model, **part)
    (tmp_path / "clip.mp4").rename(tmp_path / "away.mp4")  # edits take it from the cache
    keys = {"n_frames": 7}
    result = edit(run_tokenflow_pnp, source, tiny_model, **keys)
    for path in (cache / "inverted.mp4", result / "edited.mp4", result / "side_by_side.mp4"):
        _, tone, shown, heard = events(path)
        assert tone == pytest.approx((EVENT - 4) / FPS, abs=0.02)
        assert heard == pytest.approx(shown, abs=0.03)
    assert events(result / "side_by_side.mp4")[0] == pytest.approx((EVENT - 4) / FPS)

    silent = edit(run_tokenflow_pnp, source, tiny_model, audio=False, **keys)
    fast = edit(run_tokenflow_pnp, source, tiny_model, fps=24.0, **keys)
    for folder in (silent, fast):
        assert folder != result and codec_of(folder / "edited.mp4") is None
        assert sha256_file(folder / "frames/00003.png") == sha256_file(result / "frames/00003.png")
    (tmp_path / "away.mp4").rename(source)
    without = invert(source, tmp_path / "without", tiny_model, no_audio="", **part)
    assert codec_of(without / "inverted.mp4") is None and not (without / AUDIO_FILE).exists()
    again = edit(
        run_tokenflow_pnp, source, tiny_model, latents_path=str(tmp_path / "without"),
        output_path=str(tmp_path / "others"), **keys,
    )  # fmt: skip
    assert again.name == result.name and codec_of(again / "edited.mp4") is None
    assert sha256_file(again / "edited.mp4") == sha256_file(silent / "edited.mp4")
