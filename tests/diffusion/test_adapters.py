"""LoRAs and textual-inversion embeddings, in the formats that kohya and diffusers write."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import run_tokenflow_pnp
from tests.helpers import edit, invert, make_clip, randn
from tests.original_layout import LORA_NAMES, save_lora
from tokenflow.cache.source_cache import identity, read_manifest
from tokenflow.diffusion.adapters import check_adapters_fit, find_adapters
from tokenflow.diffusion.denoiser import encode_prompts
from tokenflow.diffusion.models import load_stable_diffusion
from tokenflow.storage.yaml_files import load_yaml
from util import MissingFileError, UserError, load_tensors

CPU = torch.device("cpu")
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RANK = 2


def named(lora=None, lora_scale=None, embeddings=None):
    texts = [None if keys is None else list(map(str, keys)) for keys in (lora, embeddings)]
    return SimpleNamespace(lora=texts[0], lora_scale=lora_scale, embeddings=texts[1])


@pytest.fixture
def layers(models):
    """A LoRA for a few layers, convolutions and linear ones."""
    names = [
        f"unet.{ATTENTION}.to_q",
        f"unet.{ATTENTION}.to_out.0",
        *(f"text_encoder.encoder.layers.0.self_attn.{name}_proj" for name in ("q", "out")),
    ]
    return {name: pair(models, name, seed) for seed, name in enumerate(names)}


def pair(models, name, seed):
    """Random matrices for a layer; of a convolution, down has its kernel."""
    weight = weight_of(models, name)
    down = randn(RANK, *weight.shape[1:], seed=seed)
    return down, randn(len(weight), RANK, *(1,) * (weight.ndim - 2), seed=seed + 100)


def weight_of(models, name):
    part, _, layer = name.partition(".")
    network = getattr(models, part)
    inner = getattr(network, "text_model", network)  # transformers 4 has one
    return inner.get_submodule(layer).weight


def loaded(model, adapters):
    return load_stable_diffusion(model, CPU, torch.float32, False, adapters)


@pytest.mark.parametrize("form", LORA_NAMES)
def test_a_lora_is_added_to_the_weights(models, tiny_model, layers, tmp_path, form):
    if form == "kohya":
        name = "unet.down_blocks.0.resnets.0.conv1"
        layers[name] = pair(models, name, seed=9)
    one = save_lora(tmp_path / "one.safetensors", form, layers)
    first = dict([next(iter(layers.items()))])
    two = save_lora(tmp_path / "two.safetensors", form, first)
    adapters = find_adapters(named([one, two], [0.5, -2]))
    check_adapters_fit(adapters, tiny_model)
    found = loaded(tiny_model, adapters)
    share = 0.5 if form == "kohya" else 1.0  # alpha / r
    for name, (down, up) in layers.items():
        scale = share * (0.5 - 2 * (name in first))
        change = scale * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        expected = weight_of(models, name) + change.view_as(weight_of(models, name))
        torch.testing.assert_close(weight_of(found, name), expected)
    changed = sum(
        not torch.equal(a, b)
        for part in ("unet", "text_encoder")
        for a, b in zip(
            getattr(found, part).parameters(), getattr(models, part).parameters(), strict=True
        )
    )
    assert changed == len(layers)


def test_peft_s_alpha_counts(models, tiny_model, layers, tmp_path):
    path = save_lora(tmp_path / "one.safetensors", "diffusers", layers)
    settings = {"unet.lora_alpha": 6, "unet.r": RANK}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    found = loaded(tiny_model, find_adapters(named([path])))
    name, (down, up) = next(iter(layers.items()))
    torch.testing.assert_close(weight_of(found, name), weight_of(models, name) + 3 * up @ down)
    settings["unet.use_dora"] = True
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(UserError, match="has use_dora, which is not read"):
        check_adapters_fit(find_adapters(named([path])), tiny_model)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_x.hada_w1_a": randn(2, 2)}, "not of a LoRA"),
        ({"a": randn(2, 2)}, "not of a LoRA"),
        ({}, "holds no LoRA"),
        ({"unet.no_layer.lora_A.weight": randn(2, 2)}, "no_layer: .*has no such layer"),
        ({f"unet.{ATTENTION}.to_q.lora_A.weight": randn(2, 32)}, "half of it is missing"),
        (
            {
                f"unet.{ATTENTION}.to_q.lora_A.weight": randn(2, 16),
                f"unet.{ATTENTION}.to_q.lora_B.weight": randn(32, 2),
            },
            r"\(32, 2\) and \(2, 16\) do not fit .*use one made for this model",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(tiny_model, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "lora.safetensors")
    adapters = find_adapters(named([tmp_path / "lora.safetensors"]))
    with pytest.raises(UserError, match=rf"lora: .*lora\.safetensors: .*{message}"):
        check_adapters_fit(adapters, tiny_model)


def test_files_that_are_missing_pickled_or_damaged_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "x.pt").write_bytes(b"")
    (tmp_path / "x.safetensors").write_bytes(b"not read")
    for key, message in (
        (tmp_path / "x.pt", "expected a .safetensors file"),
        (tmp_path / "x.safetensors", "damaged"),
        (tmp_path / "y.safetensors", "no such file"),
        (tmp_path, "pytorch_lora_weights.safetensors: no such file"),
        ("loras/y.safetensors", "no such file"),
        ("owner/name/y.safetensors", "the Hugging Face hub does not give it"),
    ):
        with pytest.raises((UserError, MissingFileError), match=message):
            find_adapters(named([key]))
    with pytest.raises(UserError, match="lora_scale: 2 numbers for 1 LoRAs"):
        find_adapters(named([tmp_path], [1.0, 2.0]))
    with pytest.raises(UserError, match="lora_scale: goes with lora"):
        find_adapters(named(None, [0.5]))


def test_the_digest_is_of_contents(layers, tmp_path):
    one = save_lora(tmp_path / "one.safetensors", "kohya", layers)
    two = save_lora(tmp_path / "two.safetensors", "kohya", layers)
    digest = find_adapters(named([one])).digest
    assert find_adapters(named([two], [1.0])).digest == digest
    assert find_adapters(named([two], [0.9])).digest != digest
    assert find_adapters(named([one, two])).digest != digest
    assert find_adapters(named()).digest == find_adapters(named([], None, [])).digest == ""


@pytest.mark.parametrize("key", ["<toy>", "Toy", "emb_params"])
def test_a_token_stands_for_the_vectors_of_an_embedding(models, tiny_model, tmp_path, key):
    """Of words' own vectors: the prompt is encoded as with those words."""
    ids = models.tokenizer("red wolf", add_special_tokens=False).input_ids
    vectors = models.text_encoder.get_input_embeddings().weight[ids].detach().clone()
    for rows, words in ((vectors, "red wolf"), (vectors[1], "wolf")):
        save_file({key: rows}, tmp_path / "MyToy.safetensors")
        adapters = find_adapters(named(embeddings=[tmp_path / "MyToy.safetensors"]))
        check_adapters_fit(adapters, tiny_model)
        token = "MyToy" if key == "emb_params" else key
        assert [each.token for each in adapters.embeddings] == [token]
        found = loaded(tiny_model, adapters)
        prompts = [f"a {token}, running", "a cat"]
        expected = encode_prompts(models, [f"a {words}, running", "a cat"])
        torch.testing.assert_close(encode_prompts(found, prompts), expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"<toy>": randn(1, 7)}, "vectors of 7, but the text encoder .* has 32"),
        ({"wolf</w>": randn(1, 32)}, "is a token already"),
        ({"clip_g": randn(1, 32), "other": randn(1, 32)}, "2 tensors, expected one"),
    ],
)
def test_an_embedding_that_does_not_fit_is_refused(tiny_model, tmp_path, tensors, message):
    save_file(tensors, tmp_path / "toy.safetensors")
    with pytest.raises(UserError, match=rf"embeddings: .*toy\.safetensors: .*{message}"):
        check_adapters_fit(
            find_adapters(named(embeddings=[tmp_path / "toy.safetensors"])), tiny_model
        )


def test_two_embeddings_of_one_token_are_refused(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({"<toy>": randn(1, 32)}, path)
    with pytest.raises(UserError, match=r"embeddings: .*a\.safetensors: <toy> is another file's"):
        find_adapters(named(embeddings=paths))


def edited(result):
    return load_tensors(result / "edited_latents.safetensors")["latents"]


def test_edits_with_loras(tiny_model, layers, tmp_path):
    """A cache has its LoRA, which its edits take; or only the edit has one, cached or live."""
    lora = str(save_lora(tmp_path / "lora.safetensors", "kohya", layers))
    clip = make_clip(tmp_path / "clip.mp4")
    features = {"cache_features": "", "keyframe_interval": 3}
    plain = invert(clip, tmp_path / "latents", tiny_model, **features)
    with_lora = invert(clip, tmp_path / "latents", tiny_model, lora=[lora], lora_scale=[0.2])
    assert plain != with_lora
    keys = identity(read_manifest(with_lora)).keys()
    assert identity(read_manifest(plain)).keys() == keys - {"adapters"}  # as before there were any

    def run(**keys):
        return edit(run_tokenflow_pnp, clip, tiny_model, **keys)

    without, both = run(lora=[]), run(lora=lora, lora_scale=0.2)
    assert not torch.equal(edited(without), edited(both))
    record = load_yaml(both / "run.yaml")
    assert (record["cache"], record["loras"][0]["path"]) == (str(with_lora), lora)
    cached = run(lora=lora, lora_for="edit")
    live = run(lora=lora, lora_for="edit", source_features="live", output_path=str(tmp_path / "b"))
    assert load_yaml(cached / "run.yaml")["source_features"] == "cached"
    torch.testing.assert_close(edited(live), edited(cached), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(edited(cached), edited(without), atol=1e-2)
    with pytest.raises(UserError, match=r"several caches fit.*lora \(lora: \[\] is none\)"):
        run()
    with pytest.raises(MissingFileError, match=r"preprocess\.py .*--lora .*--lora_scale 0\.3"):
        run(lora=lora, lora_scale=0.3)
