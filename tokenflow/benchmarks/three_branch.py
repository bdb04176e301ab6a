"""The loop that edits are timed against: three branches in one batch, attention spelled out.

As in the published code, each UNet forward holds the source, the unconditional and the conditional
branch of its frames, attention is an explicit softmax(Q K^T) V, one head after the other, and
correspondences are the arg-max of a whole matrix of cosine similarities, all in the model's dtype.
It computes the edit of `consistency: tokenflow`, `propagation: paper`, so that its latents can be
compared with the project's. Only benchmark.py runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from tqdm import tqdm

from tokenflow.diffusion.ddim import CLEAN, ddim_step
from tokenflow.diffusion.denoiser import encode_prompts
from tokenflow.diffusion.models import Loader
from tokenflow.editing.inputs import EditInputs
from tokenflow.editing.loop import EditSession, plan_steps
from tokenflow.editing.techniques import EditPlan
from tokenflow_utils import (
    ATTENTION_LAYERS,
    FEATURE_LAYER,
    neighbours,
    propagate,
    self_attention_layers,
)
from util import UserError

BRANCHES = 3  # source, unconditional, conditional
SERVED = {
    "consistency": "tokenflow",
    "propagation": "paper",
    "correspondence": "nn",
    "max_keyframes": None,
    "control": None,
    "takes_depth": False,
}


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, head by head; (b, L, c), (b, L', c) and (b, L', c)."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (b, L, L')
        outputs.append(scores.softmax(dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


def most_similar(tokens: Tensor, others: Tensor) -> Tensor:
    """The place in others, (m, L', c), that is most like each of tokens, (m, L, c): (m, L)."""
    unit, others = (x / x.norm(dim=-1, keepdim=True) for x in (tokens, others))
    return (unit @ others.transpose(-1, -2)).argmax(dim=-1)


class ThreeBranchSession(EditSession):
    """An edit whose denoising loop is the one above.

    Attributes:
        step: the current one; it says what is injected.
        near: neighbours of a chunk's frames; None on keyframes.
        kept: each layer's source tokens and edited outputs of the keyframes.

    Raises:
        UserError: naming a setting that it does not serve.
    """

    def __init__(self, inputs: EditInputs, load: Loader) -> None:
        super().__init__(inputs, load=load)
        found = self.config.model_dump()
        found |= {"control": self.cache.manifest.control, "takes_depth": self.models.takes_depth}
        for key, value in SERVED.items():
            if found[key] != value:
                raise UserError(f"three_branch: {key}: {found[key]}, expected {value}")

    @torch.inference_mode()
    def edit_latents(self, plan: EditPlan) -> Tensor:
        """From the plan's start to clean edited latents, (n, 4, h, w)."""
        config, models, n_frames = self.config, self.models, len(self.frames)
        texts = [self.cache.manifest.inversion_prompt, config.negative_prompt, config.prompt]
        with self.watch("edit"):
            texts = encode_prompts(models, texts)

        def predict(x: Tensor, source: Tensor, t: int, frames: Tensor) -> Tensor:
            """The guided noise of some frames, (m, 4, h, w) float32 on the models' device."""
            edited = x[frames].to(models.device)
            batch = torch.cat([source[frames].to(models.device), edited, edited]).to(models.dtype)
            text = texts.repeat_interleave(len(frames), dim=0)
            found = models.unet(batch, t, encoder_hidden_states=text, return_dict=False)[0].float()
            _, uncond, cond = found.chunk(BRANCHES)
            guided = uncond + config.guidance_scale * (cond - uncond)
            if models.schedule.prediction_type == "v_prediction":
                alpha, sigma = models.schedule.alpha_sigma(t)
                guided = alpha * guided + sigma * edited
            return guided

        x, eps, self.kept = plan.start, torch.empty_like(plan.start), {}
        following = iter([*plan.timesteps[1:], CLEAN])
        with self._patched(models.unet):
            for step in tqdm(plan_steps(config, plan, n_frames), desc="edit", unit="step"):
                with self.watch("edit"):
                    source = self.latents(step.t)
                    self.step, self.near = step, None
                    predict(x, source, step.t, step.keyframes)
                    for chunk in torch.arange(n_frames).split(self.chunk_size):
                        near = neighbours(chunk, step.keyframes, config.blend)
                        self.near = near.to(models.device)
                        eps[chunk] = predict(x, source, step.t, chunk).cpu()
                    x = ddim_step(x, eps, models.schedule, step.t, next(following))
        return x

    def _attend(
        self, layer: str, attn: Attention, hidden_states: Tensor, *_: object, **__: object
    ) -> Tensor:
        """The processor of a self-attention layer: the output for its tokens, (3 * m, L, c)."""
        tokens = hidden_states.unflatten(0, (BRANCHES, -1))  # (3, m, L, c)
        source, near = tokens[0], self.near
        if near is None:
            query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
            if self.step.attention and layer in ATTENTION_LAYERS:
                query, key = query[:1].expand_as(query), key[:1].expand_as(key)
            # The edited branches: all keyframes as one long sequence, (2, k * L, c).
            joint = (x[1:].flatten(1, 2) for x in (query, key, value))
            edited = explicit_attention(*joint, attn.heads).unflatten(1, tokens.shape[1:3])
            edited = attn.to_out[0](edited)
            self.kept[layer] = source, edited
            alone = query[0], key[0], value[0]
        else:
            keyframe_tokens, base = self.kept[layer]
            keyframes = near.which.unbind(dim=1)
            where = [most_similar(source, keyframe_tokens[k]) for k in keyframes]
            where = torch.stack(where, dim=1)  # (m, 2, L)
            edited = propagate(base, where, near)
            alone = attn.to_q(source), attn.to_k(source), attn.to_v(source)
        alone = attn.to_out[0](explicit_attention(*alone, attn.heads))  # a frame by itself
        return torch.cat([alone[None], edited]).flatten(0, 1)

    @contextmanager
    def _patched(self, unet: UNet2DConditionModel) -> Iterator[None]:
        original = unet.attn_processors
        ours = {layer: partial(self._attend, layer) for layer in self_attention_layers(unet)}

        def inject(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            injected = output.chunk(BRANCHES)[0].repeat(BRANCHES, 1, 1, 1)
            return injected if self.step.features else None

        with unet.get_submodule(FEATURE_LAYER).register_forward_hook(inject):
            try:
                unet.set_attn_processor({**original, **ours})
                yield
            finally:
                unet.set_attn_processor(dict(original))
