"""Checkpoints and LoRAs as other programs write them, made from a model in diffusers' format."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenflow.diffusion.models import StableDiffusion

PER_LEVEL = 2  # resnets of a level of the UNet's encoder
# Names within blocks, in order of replacement.
UNET_BLOCK = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.", "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}  # fmt: skip
UNET_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
VAE = {
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample", "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out", "group_norm": "norm", r"to_out\.0": "proj_out",
    r"to_([qkv])\.": r"\1.",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final", r"encoder\.layers": "transformer.resblocks",
    "layer_norm": "ln_", r"mlp\.fc1": "mlp.c_fc", r"mlp\.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def save_single_file(path: Path, models: StableDiffusion, version: int) -> Path:
    """Write a model as Stable Diffusion 1 (CLIP's names) or 2 (OpenCLIP's) was published."""
    text = _text(models, "") if version == 1 else _open_clip(_text(models, ""))
    prefix = "transformer.text_model." if version == 1 else "model."
    parts = {
        "model.diffusion_model.": {_unet(k): v for k, v in models.unet.state_dict().items()},
        "first_stage_model.": _vae(models.vae.state_dict()),
        f"cond_stage_model.{prefix}": text,
    }
    tensors = {p + k: v.contiguous() for p, part in parts.items() for k, v in part.items()}
    save_file(tensors, path)
    return path


def _text(models: StableDiffusion, prefix: str) -> dict[str, Tensor]:
    state = models.text_encoder.state_dict()
    return {prefix + k.removeprefix("text_model."): v for k, v in state.items()}


def _unet(name: str) -> str:
    for new, old in UNET_ENDS.items():
        if name.startswith(f"{new}."):
            name = name.replace(new, old, 1)
    if found := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.", name):
        way, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
        each = PER_LEVEL + 1
        if way == "down":
            place = "input_blocks", each * level + index + 1
        else:
            place = "output_blocks", each * level + index
        inner = {"resnets": "0.", "attentions": "1."}.get(kind)
        if kind == "downsamplers":
            place, inner = ("input_blocks", each * (level + 1)), "0."
        elif kind == "upsamplers":  # after the attention, where the level has any
            place, inner = ("output_blocks", each * level + PER_LEVEL), "1." if not level else "2."
        rest = name[found.end() :]
        rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
        name = f"{place[0]}.{place[1]}.{inner}{rest}"
    if ".transformer_blocks." not in name:
        for new, old in UNET_BLOCK.items():
            name = name.replace(f".{new}", f".{old}")
    return name


def _vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = max(int(n) for k in state for n in re.findall(r"up_blocks\.(\d)", k))
    found = {}
    for name, value in state.items():
        is_attention = "attentions" in name and "group_norm" not in name
        for new, old in VAE.items():
            name = re.sub(new, old, name)
        name = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{levels - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}",
            name,
        )
        convolution = is_attention and name.endswith("weight")  # linear in diffusers
        found[name] = value[:, :, None, None] if convolution else value
    return found


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in text.items():
        if ".q_proj." in name:  # the three in one
            value = torch.cat([text[name.replace("q_proj", f"{p}_proj")] for p in "qkv"])
            name = re.sub(r"q_proj\.", "in_proj_", name)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for new, old in OPEN_CLIP.items():
            name = re.sub(new, old, name)
        found[name] = value
    return found


# The name of a LoRA's matrices in a file, "A" for down and "B" for up, and of its layer.
LORA_NAMES = {
    "kohya": "{plain}.lora_{way}.weight",
    "diffusers": "{part}.{layer}.lora_{matrix}.weight",
    "older diffusers": "{part}.{old}_lora.{way}.weight",
}


def save_lora(path: Path, form: str, layers: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """Write a LoRA as kohya's trainer or diffusers do.

    Args:
        form: of LORA_NAMES.
        layers: down (r, ...) and up (out, r, ...) by "unet.<layer>" and "text_encoder.<layer>".
    """
    tensors = {}
    for name, pair in layers.items():
        part, _, layer = name.partition(".")
        if part == "text_encoder":
            layer = f"text_model.{layer}"
        plain = f"lora_{'unet' if part == 'unet' else 'te'}_{layer.replace('.', '_')}"
        old = re.sub(r"\.(to_\w+)(\.0)?$", r".processor.\1", layer)
        if part == "text_encoder":
            old = re.sub(r"([qkv])_proj$", r"to_\1", layer).replace("out_proj", "to_out")
        for matrix, way, tensor in zip("AB", ("down", "up"), pair, strict=True):
            names = {"plain": plain, "part": part, "layer": layer, "old": old}
            key = LORA_NAMES[form].format(**names, matrix=matrix, way=way)
            tensors[key] = tensor.contiguous()
        if form == "kohya":  # alpha is the rank in the others
            tensors[f"{plain}.alpha"] = torch.tensor(float(len(pair[0])) / 2)
    save_file(tensors, path)
    return path
