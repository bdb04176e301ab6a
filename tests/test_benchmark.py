"""benchmark.py on the tiny random model: what it counts and compares, never how long it takes."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import benchmark
from tests.helpers import make_clip, shapes_frames
from tokenflow.benchmarks import modes, three_branch
from tokenflow.benchmarks.meters import TOTAL, Meter
from tokenflow.benchmarks.options import EDIT_SETTINGS, read_setting
from tokenflow.benchmarks.runs import Bench, clip_of, time_edit
from tokenflow.editing.techniques import load_technique
from tokenflow.storage.schema import load_config
from tokenflow.storage.video import read_clip
from util import UserError

FRAMES, STEPS, INTERVAL = 5, 4, 2
KEYFRAMES = 3  # of 5 frames in intervals of 2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words(tiny_model, tmp_path_factory):
    """The options that all runs here share."""
    work = tmp_path_factory.mktemp("benchmark")
    clip = make_clip(work / "clip.mp4", FRAMES)
    words = ["--model", str(tiny_model), "--data_path", str(clip), "--work", str(work / "work")]
    words += ["--frames", str(FRAMES), "--size", "48x64", "--steps", str(STEPS), "--device", "cpu"]
    words += ["--inversion", f"plain{STEPS}"]
    return [*words, "--repeats", "1", "--warm_up", "1", "--set", f"keyframe_interval={INTERVAL}"]


@pytest.fixture(scope="module")
def bench(words):
    return open_bench(words)


@pytest.fixture(scope="module")
def models(bench):
    models = bench.load()
    bench.ensure_cache(models)
    return models


def open_bench(words):
    options, args = benchmark.parse_args(words)
    return Bench(options, args.set, args.preprocess_options)


# ---------------------------------------------------------------- the table of stages


@pytest.fixture(scope="module")
def stages(words, tmp_path_factory):
    """What the script returns for all stages, and the same read back from its JSON."""
    file = tmp_path_factory.mktemp("json") / "stages.json"
    found = benchmark.main([*words, "--json", str(file)])
    return found, json.loads(file.read_text(encoding="utf-8"))


def test_stages_are_all_there(stages):
    found, written = stages
    parts = {
        "models": "load",
        "preprocess": "read load vae inversion reconstruction features rest total",
        "edit": "load edit decode write rest total",
    }
    assert [(row["part"], row["stage"]) for row in written["stages"]] == [
        (part, stage) for part, names in parts.items() for stage in names.split()
    ]
    assert written["stages"] == found["stages"]
    assert "--size 48x64" in written["command"]
    assert {"versions", "device_name", "dtype", "frames", "matrix_flops_per_second"} <= set(written)
    assert written["keyframes"] == KEYFRAMES
    lines = modes.table(found["stages"]).splitlines()
    assert len(lines) == 1 + len(found["stages"])
    assert lines[0].split()[:3] == ["part", "stage", "seconds"]
    assert any(line.startswith("edit        decode") for line in lines)


def test_stages_count_image_forwards_and_flops(stages):
    rows = {(row["part"], row["stage"]): row for row in stages[0]["stages"]}
    for stage in ("inversion", "reconstruction"):
        assert rows["preprocess", stage]["image_forwards"] == FRAMES * STEPS
    assert rows["preprocess", "features"]["image_forwards"] == (FRAMES + KEYFRAMES) * STEPS
    assert rows["edit", "edit"]["image_forwards"] == 2 * (FRAMES + KEYFRAMES) * STEPS
    assert rows["edit", "total"]["image_forwards"] == 2 * (FRAMES + KEYFRAMES) * STEPS
    for key in (("preprocess", "inversion"), ("preprocess", "vae"), ("edit", "decode")):
        row = rows[key]
        assert row["TFLOP"] > 0
        rate = stages[0]["matrix_flops_per_second"] / 1e12
        assert row["TFLOP/s"] == pytest.approx(row["TFLOP"] / row["seconds"])
        assert row["utilisation"] == pytest.approx(row["TFLOP/s"] / rate)
        assert row["peak MiB"] > 0
    assert rows["edit", "write"]["TFLOP"] is None
    assert rows["preprocess", "read"]["seconds"] > 0
    assert rows["preprocess", "rest"]["seconds"] >= 0


def test_only_a_part_is_timed_where_asked(words):
    found = benchmark.main([*words, "--only", "edit", "--warm_up", "0"])
    assert {row["part"] for row in found["stages"]} == {"models", "edit"}
    assert all(row["TFLOP"] is None for row in found["stages"])  # counted in warm-up runs only


def test_row_is_the_median_of_the_runs():
    runs = []
    for seconds, peak in ((4.0, 10), (1.0, 30), (2.0, 20)):
        meter = Meter(CPU)
        meter.seconds["edit"], meter.peak["edit"], meter.images["edit"] = seconds, peak, 6
        meter.add_total()
        runs.append(meter)
    row, total = modes.stage_rows("edit", runs, {"edit": 1e12, "total": 1e12}, rate=2e12)
    assert (row["seconds"], row["lowest"], row["highest"]) == (2.0, 1.0, 4.0)
    assert (row["peak MiB"] * modes.MIB, row["image_forwards"]) == (30, 6)
    assert (row["TFLOP/s"], row["utilisation"]) == (0.5, 0.25)
    assert total == {**row, "stage": "total"}


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("live", 3 * (FRAMES + KEYFRAMES) * STEPS),
        ("cached", 2 * (FRAMES + KEYFRAMES) * STEPS),
        ("tokenflow", 2 * (FRAMES + KEYFRAMES) * STEPS),
        ("three_branch", 3 * (FRAMES + KEYFRAMES) * STEPS),
        ("per_frame", 3 * FRAMES * 3 + 2 * FRAMES * 1),  # the source in the 3 injected steps of 4
        ("per_frame+pnp_f_t=0+pnp_attn_t=0", 2 * FRAMES * STEPS),
        ("tokenflow+keyframe_interval=5", 3 * (FRAMES + 1) * STEPS),
    ],
)
def test_image_forwards_are_what_arithmetic_says(bench, models, setting, expected):
    meter, _ = time_edit(setting, *bench.prepare_edit(setting, models))
    assert meter.images[TOTAL] == expected


def test_a_meter_adds_up_each_stage(models):
    a, b = torch.zeros(10, 4), torch.zeros(4, 3)
    meter = Meter(CPU, count_flops=True)
    with meter.watching(models.unet), torch.inference_mode():
        for stage in ("product", "unet", "product", "unet", "sum"):
            with meter(stage):
                if stage == "unet":
                    models.unet(torch.zeros(3, 4, 8, 8), 5, torch.zeros(3, 77, 32))
                else:
                    a @ b if stage == "product" else a + 1
    assert not models.unet._forward_pre_hooks
    assert meter.images == {"unet": 6}
    assert (meter.flops["product"], meter.flops["sum"]) == (2 * 2 * 10 * 4 * 3, 0)
    stages = {"product", "unet", "sum"}
    assert set(meter.seconds) == set(meter.peak) == stages


# ---------------------------------------------------------------- comparisons


def test_compare_gives_a_ratio_and_the_difference(words, tmp_path, capsys):
    file = tmp_path / "ratio.json"
    compared = ["--compare", "live", "three_branch"]
    benchmark.main([*words, *compared, "--repeats", "2", "--json", str(file)])
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert len(found["pairs"]) == 2
    assert found["image_forwards_a"] == found["image_forwards_b"]
    assert found["difference"] < 1e-4
    assert capsys.readouterr().out.startswith("live / three_branch: ")


def test_compare_of_inversions_gives_their_psnr(words):
    found = benchmark.main([*words, "--compare", "iters3", "plain8", "--warm_up", "0"])
    assert found["image_forwards_a"] == FRAMES * (3 * STEPS + STEPS)
    assert found["image_forwards_b"] == FRAMES * (8 + 8)  # reconstructed in as many steps
    assert found["psnr_a"] > found["psnr_b"] > 10


def test_ratio_is_the_median_of_the_pairs():
    found = modes.ratio_figures([(1.0, 2.0), (3.0, 3.0), (8.0, 2.0)])
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (1.0, 0.5, 4.0)
    assert (found["seconds_a"], found["seconds_b"]) == (3.0, 2.0)


def test_a_setting_is_made_of_parts():
    kind, overrides = read_setting("live+attention:_native_math+chunk_size=2")
    assert kind == "edit"
    assert overrides == ["source_features=live", "attention_backend=_native_math", "chunk_size=2"]
    assert read_setting("plain500")[0] == read_setting("fast")[0] == "preprocess"


def test_settings_of_an_edit_are_keys_of_its_config(tmp_path):
    """A setting whose key the config lacks could not be run."""
    path = tmp_path / "config.yaml"
    path.write_text("{data_path: a.mp4, prompt: b}", encoding="utf-8")
    for name in EDIT_SETTINGS:
        load_config(load_technique("pnp").config, path, read_setting(name)[1])


def test_preprocess_settings_become_options(bench):
    args = bench.preprocess_options("plain20")
    assert (args.steps, args.recon_steps, args.save_steps) == (20, 20, STEPS)
    args = bench.preprocess_options("iters4")
    assert (args.steps, args.inversion_iters, args.recon_steps) == (STEPS, 4, STEPS)
    other = bench.preprocess_options("iters3")
    assert args.save_dir != other.save_dir  # no cache takes another's place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "tokenflow", "plain50"], "expected two of one kind"),
        (["--compare", "tokenflow", "per_frane"], "per_frane: unknown setting"),
        (["--compare", "tokenflow+fast", "live"], "fast: unknown setting; of an edit"),
        (["--compare", "three_branch+consistency=none", "tokenflow"], "consistency: none"),
        (["--compare", "cached+keyframe_seed=7", "live"], "cached.*: the edit was computed live"),
        (["--profile", "plain50"], "expected a setting of an edit"),
        (["--inversion", "tokenflow"], "expected one of preprocess"),
        (["--inversion", "plain6"], "does not divide"),
        (["--only", "edit", "--profile", "tokenflow"], "not allowed with argument"),
        (["--scaling", "0"], "--scaling: expected"),
        (["--frames", "2", "3"], "--frames: several numbers go with --simulate"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--size", "big"], "--H: .*big"),
        (["--size", "50"], "--H: 50, expected a multiple of 8"),
        (["--model", "sd3-random"], "sd3-random: no such folder"),
        (["--set", "keyframe_intervall=2"], "did you mean keyframe_interval"),
    ],
)
def test_a_bad_command_line_is_refused(words, options, message):
    with pytest.raises(UserError, match=message):
        benchmark.main([*words, *options])


# ---------------------------------------------------------------- the three-branch loop


@pytest.mark.parametrize("technique", ["pnp", "sdedit"])
def test_three_branch_loop_gives_the_edit(words, models, technique):
    bench = open_bench([*words, "--technique", technique])
    ours, plan = bench.prepare_edit("tokenflow", models)
    theirs, _ = bench.prepare_edit("three_branch", models)
    if technique == "pnp":  # steps with both injections, with one and with none
        assert (plan.attention_steps, plan.feature_steps) == (2, 3)
    found, expected = (session.edit_latents(plan) for session in (ours, theirs))
    assert found.shape == (FRAMES, 4, 6, 8)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert float((plan.start - expected).norm() / expected.norm()) > 0.1


def test_three_branch_loop_leaves_the_unet_as_it_was(bench, models, monkeypatch):
    before = dict(models.unet.attn_processors)

    def fail(*args):
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(three_branch, "most_similar", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        time_edit("three_branch", *bench.prepare_edit("three_branch", models))
    assert models.unet.attn_processors == before
    assert not models.unet.get_submodule(three_branch.FEATURE_LAYER)._forward_hooks


def test_explicit_attention_is_attention():
    query, key, value = torch.randn(3, 2, 6, 8).unbind()
    heads = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    found = three_branch.explicit_attention(query, key, value, heads=2)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- clips


def test_short_clip_is_played_back_and_forth(tmp_path):
    source = make_clip(tmp_path / "clip.mp4", 3)
    assert clip_of(source, 3, tmp_path) == source
    longer = clip_of(source, 7, tmp_path)
    frames = read_clip(longer, 7, size=(48, 80)).frames.astype(float)
    original = shapes_frames(3, 48, 80).astype(float)
    for i, j in enumerate([0, 1, 2, 1, 0, 1, 2]):
        errors = [np.abs(frames[i] - other).mean() for other in original]
        assert math.isclose(min(errors), errors[j])
    assert clip_of(source, 7, tmp_path) == longer  # made once


# ---------------------------------------------------------------- scaling and profile


@pytest.mark.slow
def test_a_part_is_timed_in_a_process_of_its_own(words):
    options, args = benchmark.parse_args([*words, "--frames", "2"])
    found = modes.in_fresh_process(options, args, "edit")
    assert (found["frames"], found["keyframes"]) == (2, 1)
    assert [row["stage"] for row in found["stages"] if row["part"] == "edit"][-1] == "total"
    with pytest.raises(UserError, match="nowhere: no such folder"):
        modes.in_fresh_process(options.model_copy(update={"model": "nowhere"}), args, "edit")


def test_scaling_has_a_row_for_each_number_of_frames(words, monkeypatch):
    # In this process, which is quicker.
    def submit(function, *args):
        return SimpleNamespace(result=lambda: function(*args))

    here = nullcontext(SimpleNamespace(submit=submit))
    monkeypatch.setattr(modes, "ProcessPoolExecutor", lambda *_, **__: here)
    options = ["--preprocess_options", "--batch_size 3", "--inversion", "plain8"]
    found = benchmark.main([*words, *options, "--scaling", "2", "5"])
    stages = {(row["frames"], row["stage"]): row for row in found["stages"]}
    assert stages[5, "inversion"]["image_forwards"] == 5 * 8
    assert [(row["frames"], row["keyframes"]) for row in found["rows"]] == [(2, 1), (5, 3)]
    for row in found["rows"]:
        for part in modes.PARTS:
            assert row[f"{part} s"] > 0
            assert row[f"{part} MiB"] > row["load MiB"] / 2
    assert found["edit_ratio"] > 0.5


def test_memory_is_simulated(words, tiny_model, tmp_path):
    """Stages hold all weights; a ControlNet's come with its edit, live features with theirs."""
    options = ["--simulate", "--dtype", "float16", "--work", str(tmp_path)]
    [row] = benchmark.main([*words, *options, "--preprocess_options", "--batch_size 2"])["rows"]
    parts = ("unet", "vae", "text_encoder")
    files = [path for part in parts for path in (tiny_model / part).glob("*.safetensors")]
    weights = sum(path.stat().st_size for path in files) / 2 / (1 << 30)  # they are float32
    assert row.pop("frames") == FRAMES and weights < min(row.values()) < 2 * weights
    assert row["pnp, cached"] < row["pnp, live"] < row["controlnet"]
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("setting", ["tokenflow", "three_branch"])
def test_profile_names_operators(words, capsys, setting):
    benchmark.main([*words, "--profile", setting])
    text = capsys.readouterr().out
    assert "aten::" in text and "Self CPU" in text
