"""Sound: cuts out of a clip's audio what goes with its frames."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av

from tokenflow.storage.video import READING, Clip
from util import atomic_file

logger = logging.getLogger(__name__)

# Decoders of the codecs that players expect in mp4; others are encoded as AAC.
COPIED = frozenset(("aac", "mp3", "mp3float", "opus", "flac", "alac", "ac3", "eac3"))
# Seconds kept before the first frame: decoders need packets before the first one that is heard. An
# edit list has players skip them.
_PRE_ROLL = Fraction(1, 10)


def cut_audio(source: Path, path: Path, clip: Clip) -> bool:
    """Write the sound of a clip's frames as mp4; its time 0 is that of the first frame.

    Packets are copied, or encoded as AAC where mp4 does not take the codec. Sound that would not be
    in step with the frames (`in_step`), or that cannot be decoded, is left out; the log says so.

    Args:
        source: the video, GIF or folder that the clip was read from.
        path: the file, .m4a.

    Returns:
        whether there is sound that could be written.
    """
    if source.is_dir():
        return False
    with av.open(os.path.abspath(source), **READING) as container:
        stream = container.streams.best("audio")
        if stream is None or not in_step(source, len(clip.frames), clip.fps, *clip.times):
            return False
        if stream.codec_context is None:
            logger.warning("%s: its sound is left out: there is no decoder for its codec", source)
            return False
        try:
            is_copied = stream.codec_context.name in COPIED
            items = container.demux(stream) if is_copied else container.decode(stream)
            items = _between(items, *clip.times)
            first = next(items, None)
            if first is not None:
                with (
                    atomic_file(path) as temporary,
                    av.open(os.path.abspath(temporary), "w", format="mp4") as output,
                ):
                    write = _copy if is_copied else _encode
                    write(itertools.chain([first], items), stream, output)
        except (ValueError, av.error.PatchWelcomeError) as error:  # ValueError: av's own too
            logger.warning("%s: its sound cannot be read and is left out (%s)", source, error)
            return False
    return first is not None


def in_step(name: object, n_frames: int, fps: Fraction, begin: Fraction, end: Fraction) -> bool:
    """Whether frames shown from `begin` to `end`, in seconds, last as long at another frame rate.

    To less than a frame; else sound would not be in step with them, and the log says so.
    """
    seconds = end - begin
    if abs(n_frames / fps - seconds) < 1 / fps:
        return True
    logger.info(
        "%s: the sound is left out, it would not be in step: %d frames last %.3g s in the clip, "
        "%.3g s at the result's %.4g frames per second; a frame rate of %.4g keeps it",
        name,
        n_frames,
        float(seconds),
        float(n_frames / fps),
        float(fps),
        float(n_frames / seconds),
    )
    return False


def _between(
    items: Iterable[av.Packet | av.AudioFrame], begin: Fraction, end: Fraction
) -> Iterator[av.Packet | av.AudioFrame]:
    """The packets or frames from `begin` (less _PRE_ROLL) to `end`, whose time 0 is `begin`."""
    for item in items:
        if item.pts is None:  # the last packet is empty
            continue
        time = item.pts * item.time_base
        if time >= end:
            return
        if isinstance(item, av.Packet):
            seconds = (item.duration or 0) * item.time_base
        else:
            seconds = Fraction(item.samples, item.sample_rate)
        if time + seconds > begin - _PRE_ROLL:
            item.pts = item.dts = item.pts - round(begin / item.time_base)
            yield item


def _copy(
    packets: Iterable[av.Packet], stream: av.AudioStream, output: av.container.OutputContainer
) -> None:
    copy = output.add_stream_from_template(stream)
    for packet in packets:
        packet.stream = copy
        output.mux(packet)


def _encode(
    frames: Iterable[av.AudioFrame], stream: av.AudioStream, output: av.container.OutputContainer
) -> None:
    known = av.Codec("aac", "w").audio_rates or ()
    encoder = output.add_stream("aac", rate=stream.rate if stream.rate in known else 48000)
    encoder.layout = "mono" if stream.channels == 1 else "stereo"
    for frame in frames:
        output.mux(encoder.encode(frame))
    output.mux(encoder.encode())
