"""The paper's Figures 2 and 3 of results: what each shows, from options to files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from tokenflow.cache.source_cache import SourceCache, open_cache
from tokenflow.diffusion.inversion import reconstruct
from tokenflow.diffusion.vae import decode_latents, psnr
from tokenflow.editing.results import Result, read_result
from tokenflow.figures import drawing, features
from tokenflow.figures.options import CorrespondenceOptions, FeatureOptions
from tokenflow.ops.nearest import nearest_tokens
from tokenflow.storage.images import load_frames
from tokenflow.storage.video import save_video
from util import UserError

# ---------------------------------------------------------------------------------------------
# Figure 2


def draw_features(options: FeatureOptions) -> list[Path]:
    """Figure 2: frames, features and x-t slices of the source and of edits of it.

    Returns the files: features.png, features_xt.png, features.mp4.
    """
    edits = [read_result(Path(name)) for name in (options.per_frame, options.result) if name]
    cache = edits[-1].cache()
    for other in edits[:-1]:
        _check_same_clip(other, cache)
    n_frames = options.n_frames or edits[-1].n_frames
    shortest = min(edit.n_frames for edit in edits)
    if n_frames > shortest:
        raise UserError(
            f"--n_frames: {n_frames}, but there are only {shortest} frames of one edit; choose a "
            f"common part: --n_frames {shortest}"
        )
    height, size = cache.manifest.height, (cache.manifest.height, cache.manifest.width)
    y = height // 2 if options.row is None else options.row
    if not 0 <= y < height:
        raise UserError(f"--row: {y}, expected 0 to {height - 1}: frames are {height} high")
    videos = [cache.frames(n_frames)]
    videos += [load_frames(edit.folder / "frames", n_frames, size) for edit in edits]
    view, out = features.View(options, cache), Path(options.out)

    tokens = [view.source_tokens(range(n_frames))]
    for edit, frames in zip(edits, videos[1:], strict=True):
        tokens.append(view.edit_tokens(frames, edit.prompt or ""))
    colours, explained = features.feature_colours(tokens, view.grid, size)
    labels = ["source", *(edit.method.replace(", ", "\n", 1) for edit in edits)]
    title = (
        f"PCA of {view.title}\n3 components with {explained:.0%} of the variance, one basis for all"
    )
    picks = np.linspace(0, n_frames - 1, min(options.columns, n_frames)).round().astype(int)
    pairs = list(zip(videos, colours, strict=True))
    over_time = drawing.picture_grid(
        [[*shown[picks]] for pair in pairs for shown in pair],
        [text for label in labels for text in (label, f"{label}\nfeatures")],
        [f"frame {i}" for i in picks],
        title,
    )
    slices = drawing.picture_grid(
        [[drawing.xt_slice(shown, y) for shown in pair] for pair in pairs],
        labels,
        ["RGB", "features"],
        f"x-t slices: image row {y} of {height}; time runs down, {n_frames} frames\n{title}",
        width=1.5 * drawing.PANEL,
    )
    save_video(out / "features.mp4", _moments(labels, videos, colours), cache.fps)
    return [
        drawing.save_figure(out / "features.png", over_time),
        drawing.save_figure(out / "features_xt.png", slices),
        out / "features.mp4",
    ]


def _moments(
    labels: Sequence[str], videos: Sequence[np.ndarray], colours: Sequence[np.ndarray]
) -> Iterator[np.ndarray]:
    """The frames of a video with all videos side by side, above their features."""
    figure = drawing.picture_grid(
        [[video[0] for video in row] for row in (videos, colours)],
        ["RGB", "features"],
        [label.replace("\n", " ") for label in labels],
    )

    def show_moment(i: int) -> None:
        for axis, video in zip(figure.axes, [*videos, *colours], strict=True):
            axis.images[0].set_data(video[i])
        figure.suptitle(f"frame {i}", fontsize="medium")

    return drawing.video_frames(figure, show_moment, len(videos[0]))


def _check_same_clip(edit: Result, cache: SourceCache) -> None:
    """Refuses a result of other frames; it may be of another cache of the same ones."""
    manifest = edit.cache().manifest
    for key in ("source_sha256", "frame_start", "frame_stride", "height", "width", "fit"):
        theirs, ours = getattr(manifest, key), getattr(cache.manifest, key)
        if theirs != ours:
            raise UserError(
                f"{edit.folder}: a result of another clip than {cache.folder}: {key} {theirs}, "
                f"not {ours}"
            )


# ---------------------------------------------------------------------------------------------
# Figure 3


def draw_correspondence(options: CorrespondenceOptions) -> list[Path]:
    """Figure 3: a frame rebuilt from another one's pixels, and from its tokens.

    Returns the file: correspondence.png.
    """
    if options.result is not None:
        result = read_result(Path(options.result))
        cache, n_frames = result.cache(), result.n_frames
    else:
        cache = open_cache(Path(options.cache))
        n_frames = cache.manifest.n_frames
    chosen = [options.frame, options.keyframe]
    for name, number in zip(("frame", "keyframe"), chosen, strict=True):
        if not 0 <= number < n_frames:
            raise UserError(f"--{name}: {number}, expected 0 to {n_frames - 1}")
    view, out = features.View(options, cache), Path(options.out)

    frame, keyframe = cache.frames(max(chosen) + 1)[chosen]
    tokens = view.source_tokens(chosen)
    match = nearest_tokens(tokens[:1], tokens[1:], torch.zeros(1, 1, dtype=torch.long))[0, 0]
    field = features.displacements(match.numpy(), view.grid, frame.shape[:2])

    denoiser = view.source_denoiser(chosen)
    start = cache.latents(view.sampling[0], max(chosen) + 1)[chosen]
    latents = torch.cat([
        reconstruct(denoiser, start, view.sampling, batch_size=1)[:1],
        features.rebuilt_from_keyframe(denoiser, start, view.sampling),
    ])  # fmt: skip
    own, swapped = decode_latents(view.models, latents)

    rebuilt = {
        f"keyframe {options.keyframe}": keyframe,
        "own reconstruction": own,
        "(a) keyframe's pixels": features.warp_by_cells(keyframe, field),
        "(c) keyframe's tokens": swapped,
    }
    scores = {}
    for name, picture in rebuilt.items():
        score = psnr(picture, frame)
        scores[name] = "identical" if score > 100 else f"{score:.2f} dB"
    print(f"PSNR to frame {options.frame}:")
    print("\n".join(f"    {name:24}{score:>9}" for name, score in scores.items()))
    captions = [f"{name}\nPSNR: {score}" for name, score in scores.items()]
    title = (
        f"Frame {options.frame} rebuilt from keyframe {options.keyframe}\n"
        f"(a), (b): by {view.title}; (c): all layers, all {len(view.sampling)} steps"
    )
    pictures = [frame, *rebuilt.values()]
    captions.insert(0, f"frame {options.frame},\nto be rebuilt")
    figure = _correspondence(pictures, captions, field, chosen, title)
    return [drawing.save_figure(out / "correspondence.png", figure)]


def _correspondence(
    pictures: Sequence[np.ndarray],
    captions: Sequence[str],
    field: np.ndarray,
    numbers: Sequence[int],
    title: str,
) -> Figure:
    """The frame and what it was rebuilt as, and the field by which pixels were moved."""
    frame, keyframe, own, moved, swapped = pictures
    figure = drawing.picture_grid(
        [[frame, keyframe, own, swapped], [moved] * 4],
        title=title,
        width=max(drawing.PANEL, frame.shape[1] / drawing.DPI),
        caption_lines=2,
    )
    for axis, number in zip(figure.axes, (0, 1, 2, 4, 3), strict=False):
        axis.set_title(captions[number], fontsize="medium")
    longest = drawing.longest_shown(field, frame.shape[:2])
    limit = f"{longest:.0f} px or more"
    colours, lengths, wheel = figure.axes[5:]
    where = f"(b) where cells of frame {numbers[0]}\nlie in keyframe {numbers[1]}"
    drawing.draw_field(colours, field, longest, where)
    drawing.draw_lengths(lengths, field, longest, f"(b) how far: white 0,\nblack {limit}")
    drawing.draw_wheel(wheel, min(frame.shape[:2]), f"(b) colours of directions,\nrim: {limit}")
    return figure
