"""What an edit reads of the source: the same as it computes, found only where it belongs."""

import shlex
import shutil
import threading
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import preprocess
import run_tokenflow_pnp
from run_tokenflow_pnp import PnPConfig
from tests.editing.test_loop import N_FRAMES, STEPS, make_cache, pnp, relative_error, sdedit
from tests.helpers import no_model_may_load
from tokenflow.cache import source_features
from tokenflow.cache.source_features import (
    READER,
    CachedSource,
    FeatureSettings,
    Step,
    feature_bytes,
    find_features,
)
from tokenflow.cache.source_pass import build_features, feature_keyframes
from tokenflow.diffusion.denoiser import make_denoiser
from tokenflow.editing.inputs import open_edit_inputs
from tokenflow.editing.loop import EditSession, plan_steps
from tokenflow.editing.techniques import load_technique
from tokenflow.figures import features
from tokenflow.storage.work_dir import locked, resumable_dir
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from tokenflow_utils import ATTENTION_LAYERS, TokenFlowContext
from util import UserError, load_tensors

# A keyframe's injected features come from its chunk's pass where they are cached, and from the
# keyframes' where they are live: rounding depends on the batch.
ROUNDING = 1e-4

SETTINGS = FeatureSettings(
    n_frames=N_FRAMES,
    keyframe_interval=3,
    keyframe_seed=1,
    n_timesteps=STEPS,
    attention_steps=2,
    feature_steps=4,
    dtype="float32",
)


@pytest.fixture(scope="module")
def keys(tiny_model, tmp_path_factory):
    """What a config needs to find a cache with features, made in chunks of 3 frames."""
    keys = make_cache(tmp_path_factory.mktemp("cache"), tiny_model)
    write(keys, SETTINGS, chunk_size=3)
    return keys


def write(keys, settings, chunk_size):
    session = EditSession(open_edit_inputs(PnPConfig(**keys)))
    prompt = session.cache.manifest.inversion_prompt
    denoiser = make_denoiser(session.models, session.frames, prompt, None, None)
    timesteps = session.inputs.timesteps
    build_features(session.cache, denoiser, timesteps, settings, chunk_size, session.watch)


def session_of(keys, **changes):
    return EditSession(open_edit_inputs(PnPConfig(**{**keys, **changes})))


def folder_of(keys):
    return open_edit_inputs(PnPConfig(**keys)).cache.folder / source_features.FEATURES


# ---------------------------------------------------------------- cached edits are live edits


def test_an_edit_with_cached_features_is_the_live_one_to_rounding(keys):
    session = session_of(keys)
    cached = session.edit_latents(run_tokenflow_pnp.plan(session))
    assert session.source_features == "cached"
    session_live = session_of(keys, source_features="live")
    live = session_live.edit_latents(run_tokenflow_pnp.plan(session_live))
    assert session_live.source_features == "live"
    assert relative_error(cached, live.double()) < ROUNDING
    # Three branches of the frames and the three keyframes of each step, or two.
    assert session_live.image_forwards == STEPS * 3 * (N_FRAMES + 3)
    assert session.image_forwards == STEPS * 2 * (N_FRAMES + 3)


def test_features_that_another_edit_replaced_are_not_read(tiny_model, tmp_path):
    keys = make_cache(tmp_path, tiny_model)
    write(keys, SETTINGS, chunk_size=3)
    session = session_of(keys)
    features, t = find_features(session.cache), session.inputs.timesteps[0]
    steps = [Step(t, feature_keyframes(SETTINGS)[0], attention=False, features=False)]
    with closing(
        CachedSource(TokenFlowContext(), session.inputs.device, features, steps)
    ) as source:
        source.load_keyframes(t, steps[0].keyframes)
        folder = folder_of(keys)
        shutil.copytree(folder, folder.with_name("other"))
        folder.rename(folder.with_name("old"))
        folder.with_name("other").rename(folder)
        with pytest.raises(UserError, match="was replaced meanwhile; run the same command again"):
            source.load_chunk(t, torch.arange(2))


def test_features_of_another_step_or_frames_are_never_given(keys):
    session = session_of(keys)
    features = find_features(session.cache)
    first, second = plan_steps(session.config, run_tokenflow_pnp.plan(session), N_FRAMES)[:2]
    context = TokenFlowContext(inject_attention=True)
    with closing(CachedSource(context, torch.device("cpu"), features, [first])) as source:
        source.load_keyframes(first.t, first.keyframes)
        assert context.tokens
        for t, keyframes in (
            (first.t, second.keyframes),
            (first.t, first.keyframes - 1),
            (second.t, second.keyframes),
        ):
            with pytest.raises(LookupError, match=f"timestep {t}"):
                source.load_keyframes(t, keyframes)


def test_a_live_source_reads_the_latents_once_a_timestep(keys, monkeypatch):
    session = session_of(keys, source_features="live", chunk_size=1)
    plan, read = run_tokenflow_pnp.plan(session), []
    latents = EditSession.latents
    monkeypatch.setattr(EditSession, "latents", lambda s, t: read.append(t) or latents(s, t))
    session.edit_latents(plan)
    assert read == plan.timesteps


@pytest.mark.parametrize("chunk_size", [1, 2, 4, N_FRAMES])
def test_chunks_of_the_edit_need_not_be_those_of_the_features(keys, chunk_size):
    cached = pnp(keys, chunk_size=chunk_size)
    live = pnp(keys, chunk_size=chunk_size, source_features="live")
    assert relative_error(cached, live.double()) < 1e-3  # as much as the chunk size itself does


@pytest.mark.parametrize(
    ("technique", "changes"),
    [
        ("sdedit", {}),
        ("sdedit", {"start": 0.5}),
        ("pnp", {"prompt": "a disc", "blend": "linear", "guidance_scale": 1.0}),
        ("pnp", {"pnp_attn_t": 0.0, "pnp_f_t": 0.2}),
        ("pnp", {"correspondence": "flow", "smooth_steps": 0.5}),
        ("pnp", {"correspondence": "hybrid"}),
    ],
)
def test_they_serve_other_techniques_prompts_blends_and_fewer_steps(keys, technique, changes):
    script, latents = load_technique(technique), []
    for source in ({}, {"source_features": "live"}):
        session = EditSession(open_edit_inputs(script.config(**keys | changes | source)))
        latents.append(session.edit_latents(script.plan(session)))
        assert session.source_features == ("live" if source else "cached")
    assert relative_error(latents[0], latents[1].double()) < ROUNDING


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keyframe_interval": 4}, "keyframe_interval is 3 there, 4 here"),
        ({"keyframe_seed": 2}, "keyframe_seed is 1 there, 2 here"),
        ({"n_frames": 6}, "n_frames is 7 there, 6 here"),
        ({"n_timesteps": 1}, "n_timesteps is 5 there, 1 here"),
        ({"dtype": "bfloat16"}, "dtype is float32 there, bfloat16 here"),
        ({"pnp_attn_t": 0.6}, "attention_steps is 2 there, 3 here"),
        ({"pnp_f_t": 1.0}, "feature_steps is 4 there, 5 here"),
        ({"propagation": "released"}, "propagation: released"),
        ({"keyframes": "fixed"}, "keyframes: fixed"),
        ({"source_features": "live"}, "source_features: live"),
    ],
)
def test_other_settings_are_computed_live_and_said(keys, changes, said, caplog):
    caplog.set_level("INFO")
    session = session_of(keys, **changes)
    session.edit_latents(run_tokenflow_pnp.plan(session))
    assert session.source_features == "live"
    assert said in caplog.text


def test_the_advised_command_adds_features_that_serve(tiny_model, tmp_path, caplog):
    caplog.set_level("INFO")
    keys = make_cache(tmp_path, tiny_model)
    changes = {"keyframe_interval": 4, "pnp_f_t": 1.0}
    for said in (
        "holds none; for some, run: ",
        "keyframe_interval is 4 there, 2 here; for others, run: ",
    ):
        caplog.clear()
        pnp(keys, **changes)
        command = caplog.text.partition(said)[2].partition(")\n")[0]
        words = shlex.split(command)
        assert words[:2] == ["python", "preprocess.py"]
        preprocess.preprocess(preprocess.parse_args([*words[2:], "--device", "cpu"]))
        session = session_of(keys, **changes)
        session.edit_latents(run_tokenflow_pnp.plan(session))
        assert session.source_features == "cached"
        changes["keyframe_interval"] = 2


def test_no_command_is_advised_where_none_of_the_same_cache_serves(keys, caplog):
    caplog.set_level("INFO")
    pnp(keys, n_timesteps=1)
    assert "n_timesteps is 5 there, 1 here" in caplog.text
    assert "preprocess.py" not in caplog.text


# ---------------------------------------------------------------- saved by an edit


def tensors_of(keys):
    return {path.name: load_tensors(path) for path in folder_of(keys).glob("*.safetensors")}


@pytest.mark.parametrize(
    ("technique", "changes", "settings"),
    [
        ("pnp", {}, {}),
        ("pnp", {"pnp_attn_t": 0.2, "pnp_f_t": 1.0}, {"attention_steps": 1, "feature_steps": 5}),
        ("pnp", {"correspondence": "flow"}, {"correspondence": "flow"}),
        ("pnp", {"correspondence": "hybrid"}, {}),
        ("sdedit", {"start": 1.0}, {"attention_steps": 0, "feature_steps": 0}),
    ],
)
def test_an_edit_saves_the_features_that_it_computed(
    technique, changes, settings, tiny_model, tmp_path
):
    keys, script = make_cache(tmp_path, tiny_model), load_technique(technique)

    def run(**how):
        session = EditSession(open_edit_inputs(script.config(**keys | changes | how)))
        return session, session.edit_latents(script.plan(session))

    live, expected = run(source_features="live")
    first, latents = run(source_features="save")
    assert torch.equal(latents, expected)  # and what it costs
    assert (first.source_features, first.image_forwards) == ("live", live.image_forwards)
    second, latents = run(source_features="save")
    assert second.source_features == "cached" and second.image_forwards < live.image_forwards
    assert relative_error(latents, expected.double()) < ROUNDING
    found, recorded = find_features(first.cache), tensors_of(keys)
    assert found.settings == SETTINGS.model_copy(update=settings)
    found.verify()
    shutil.rmtree(found.folder)
    write(keys, found.settings, chunk_size=3)
    built = tensors_of(keys)
    assert {t: set(x) for t, x in recorded.items()} == {t: set(x) for t, x in built.items()}
    pairs = [(recorded[t][name], x) for t in built for name, x in built[t].items()]
    assert pairs and all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("before", ["save", "auto"])
def test_saving_resumes_with_the_edit(before, tiny_model, tmp_path, monkeypatch):
    """From step 2 of 4, which saved features or none, and where the result is all that is left."""
    keys = make_cache(tmp_path, tiny_model) | {"checkpoint_every": 2}
    expected, checkpoint = pnp(keys, source_features="live"), EditSession._checkpoint
    numbers, ended = count(1), []

    def stop(*args):
        if next(numbers) == 2:
            raise KeyboardInterrupt
        checkpoint(*args)

    def run(source_features):
        session = session_of(keys, source_features=source_features)
        result = resumable_dir(tmp_path / "result", {})
        with pytest.raises(KeyboardInterrupt), result as session.work:
            ended.append((session, session.edit_latents(run_tokenflow_pnp.plan(session))))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "_checkpoint", stop)
        run(before)
    assert not ended and not folder_of(keys).exists()
    run("save")
    left = folder_of(keys).with_name(".features.work")
    left.mkdir()  # by a kill after the features had come into their place
    run("save")
    assert not left.exists()
    (session, latents), (last, same) = ended
    assert torch.equal(latents, expected) and torch.equal(same, expected)
    assert last.source_features == session.source_features == "live"
    features = load_yaml(folder_of(keys) / "manifest.yaml")
    assert features["image_forwards"] == STEPS * (N_FRAMES + 3)
    again = 0 if before == "save" else 2 * (N_FRAMES + 3)
    assert session.image_forwards == STEPS * 3 * (N_FRAMES + 3) + again
    assert relative_error(pnp(keys), expected.double()) < ROUNDING


def test_nothing_is_saved_of_a_part_of_the_steps_or_next_to_another_process(
    tiny_model, tmp_path, caplog
):
    caplog.set_level("INFO")
    keys = make_cache(tmp_path, tiny_model) | {"source_features": "save"}
    sdedit(keys, start=0.5)
    assert "source_features: save: nothing is saved" in caplog.text
    with locked(session_of(keys).cache.folder):
        pnp(keys)
    assert "another process works on it; no features are saved" in caplog.text
    assert not folder_of(keys).exists()
    pnp(keys, keyframe_interval=2)
    pnp(keys)  # others are replaced
    assert find_features(session_of(keys).cache).settings == SETTINGS


# ---------------------------------------------------------------- the files


def test_the_size_is_known_beforehand(keys, tiny_model):
    session = session_of(keys)
    grid = session.cache.latents("clean", 1).shape[-2:]
    expected = feature_bytes(session.models.unet, grid, SETTINGS)
    found = find_features(session.cache)
    stored = 0
    for name in found.files:
        with safe_open(found.folder / name, framework="pt") as file:
            stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert stored == expected
    assert sum(record["bytes"] for record in found.files.values()) < expected * 1.5 + 100_000


def test_features_for_optical_flow_hold_no_nearest_tokens(keys, tiny_model, tmp_path, caplog):
    caplog.set_level("INFO")
    other = make_cache(tmp_path, tiny_model)
    settings = SETTINGS.model_copy(update={"correspondence": "flow"})
    write(other, settings, chunk_size=3)
    session = session_of(other)
    found = find_features(session.cache)
    # Two steps take both passes, two that of the frames alone, the last none.
    manifest = load_yaml(found.folder / "manifest.yaml")
    assert manifest["image_forwards"] == 2 * 3 + 4 * N_FRAMES
    stored = 0
    for step, t in enumerate(session.inputs.timesteps):
        with found.open(t) as file:
            names = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118
            stored += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
        assert names == {name for name, n in (("tokens", 2), ("features", 4)) if step < n}
    grid = session.cache.latents("clean", 1).shape[-2:]
    assert stored == feature_bytes(session.models.unet, grid, settings)
    flow = pnp(other, correspondence="flow")
    assert relative_error(flow, pnp(keys, correspondence="flow").double()) < ROUNDING
    live = pnp(other, correspondence="flow", source_features="live")
    assert relative_error(flow, live.double()) < ROUNDING
    for correspondence in ("nn", "hybrid"):
        pnp(other, correspondence=correspondence)
        assert "correspondence is flow there, nn here; for others, run" in caplog.text
        caplog.clear()


def test_files_hold_what_the_docstring_says(keys):
    found = find_features(session_of(keys).cache)
    assert len(found.files) == STEPS
    for step, t in enumerate(session_of(keys).inputs.timesteps):
        with safe_open(found.folder / f"step_{t}.safetensors", framework="pt") as file:
            names = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118
            expected = {"previous", "next"} | ({"tokens"} if step < 2 else set())
            assert names == expected | ({"features"} if step < 4 else set())
            assert file.get_tensor(f"next/{ATTENTION_LAYERS[0]}").dtype == torch.int16


def test_tokens_of_all_frames_can_be_saved(keys, tiny_model, tmp_path, monkeypatch):
    other = make_cache(tmp_path, tiny_model)
    write(other, SETTINGS.model_copy(update={"save_tokens": "all"}), chunk_size=3)
    session = session_of(other)
    found = find_features(session.cache)
    t, kf = session.inputs.timesteps[0], feature_keyframes(SETTINGS)[0]
    for layer in ATTENTION_LAYERS:
        everyone = found.tokens(t, layer)
        assert len(everyone) == N_FRAMES
        with found.open(t) as file:
            injected = file.get_tensor(f"tokens/{layer}")
        assert torch.allclose(everyone[kf], injected, atol=1e-4)
    # visualize.py takes them from there.
    monkeypatch.setattr(features, "load_stable_diffusion", no_model_may_load)
    options = {"timestep": t, "layer": layer, "device": "cpu"}
    view = features.View(features.ViewOptions(**options), session.cache)
    assert torch.equal(view.source_tokens([1, 4]), everyone[[1, 4]])
    for changes in ({"what": "output"}, {"timestep": 901}, {"dtype": "bfloat16"}):
        view = features.View(features.ViewOptions(**options | changes), session.cache)
        with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
            view.source_tokens([1, 4])
    grid = session.cache.latents("clean", 1).shape[-2:]
    everything = SETTINGS.model_copy(update={"save_tokens": "all"})
    sizes = [sum(p.stat().st_size for p in folder_of(k).glob("*.s*")) for k in (keys, other)]
    added = feature_bytes(session.models.unet, grid, everything)
    added -= feature_bytes(session.models.unet, grid, SETTINGS)
    assert sizes[1] - sizes[0] == pytest.approx(added, rel=0.05)
    live = pnp(other, source_features="live")
    assert relative_error(pnp(other), live.double()) < ROUNDING


# ---------------------------------------------------------------- damage


def damaged_cache(keys, tiny_model, tmp_path):
    other = make_cache(tmp_path, tiny_model)
    write(other, SETTINGS, chunk_size=3)
    return other, sorted(folder_of(other).glob("step_*"))[1]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["a step", "the manifest"])
@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_named_before_it_is_used(keys, tiny_model, tmp_path, harm, part):
    other, path = damaged_cache(keys, tiny_model, tmp_path)
    path = path if part == "a step" else folder_of(other) / "manifest.yaml"
    harm(path)
    with pytest.raises(UserError, match=rf"{path.name}: .*; run: rm -r .*preprocess.py"):
        pnp(other)
    assert torch.isfinite(pnp(other, source_features="live")).all()
    assert not [t for t in threading.enumerate() if t.name.startswith(READER)]  # it has ended


def test_features_of_another_cache_are_refused(keys, tiny_model, tmp_path):
    other = make_cache(tmp_path, tiny_model, inversion_iters=2)
    shutil.copytree(folder_of(keys), folder_of(other))
    with pytest.raises(UserError, match="features: belongs to another cache; run: rm -r"):
        find_features(session_of(other).cache)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 1}, "not a manifest of format 2"),
        ({"settings": None}, "settings: expected keys and values, got nothing"),
        ({"settings": {"a": 1}}, "settings: a: unknown key"),
        ({"files": {"a": {"bytes": 1}}}, "files: a: sha256: is missing"),
    ],
)
def test_a_manifest_of_another_format_is_refused(keys, tiny_model, tmp_path, changes, said):
    other, _ = damaged_cache(keys, tiny_model, tmp_path)
    path = folder_of(other) / "manifest.yaml"
    save_yaml(path, {**load_yaml(path), **changes})
    with pytest.raises(UserError, match=f"manifest.yaml: {said}.*; run: rm -r"):
        pnp(other)
