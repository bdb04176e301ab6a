"""A second TokenFlow to compare with: loops over frames, heads and tokens, in float64.

Written from the paper's equations (and, for `released`, from docs/released.md), sharing no code
with the project. It evaluates the three branches (source, unconditional, conditional) in one
batch and replaces `attn1.forward` itself, where the project evaluates the source on its own and
sets attention processors.
"""

from __future__ import annotations

import copy
import math

import torch
from diffusers import DDIMScheduler

INJECTED_BLOCKS = {1: (1, 2), 2: (0, 1, 2), 3: (0, 1, 2)}


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def paper_neighbours(frame: int, keyframes: list[int], blend: str = "sigmoid"):
    """[(keyframe number, weight), ...] of a frame, Eq. 6-7."""
    before = [j for j, kf in enumerate(keyframes) if kf <= frame]
    after = [j for j, kf in enumerate(keyframes) if kf > frame]
    if not after:
        return [(before[-1], 1.0)]
    if not before:
        return [(after[0], 1.0)]
    d_minus, d_plus = frame - keyframes[before[-1]], keyframes[after[0]] - frame
    weight = d_minus / (d_plus + d_minus)
    if blend == "sigmoid":
        weight = sigmoid(weight)
    return [(before[-1], 1.0 - weight), (after[0], weight)]


def released_neighbours(frame: int, interval: int):
    """[(keyframe number, weight), ...] of a frame, as the published code has it."""
    own = frame // interval
    if own == 0:
        return [(0, 1.0)]
    d_own = abs(frame - (own * interval + interval // 2))
    d_previous = abs(frame - ((own - 1) * interval + interval // 2))
    weight = sigmoid(d_previous / (d_own + d_previous))
    return [(own, weight), (own - 1, 1.0 - weight)]


def nearest(token: torch.Tensor, candidates: torch.Tensor) -> int:
    """The candidate (of L', c) of largest cosine similarity to a token (c): Eq. 5."""
    return int(torch.cosine_similarity(candidates, token[None], dim=-1).argmax())


def propagate(tokens, keyframe_tokens, keyframe_outputs, mix):
    """The output tokens of one frame, token by token: Eq. 6.

    tokens (L, c), keyframe_tokens (k, L, c), keyframe_outputs (branches, k, L, c); returns
    (branches, L, c).
    """
    outputs = torch.zeros(len(keyframe_outputs), *tokens.shape, dtype=tokens.dtype)
    for p in range(len(tokens)):
        for keyframe, weight in mix:
            place = nearest(tokens[p], keyframe_tokens[keyframe])
            outputs[:, p] += weight * keyframe_outputs[:, keyframe, place]
    return outputs


def attention(query, key, value, heads: int):
    """softmax(Q K^T / sqrt(d)) V, head by head; (L, c) and (L', c)."""
    outputs = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        outputs.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


class ReferenceEdit:
    """Edits latents with a float64 copy of a UNet.

    Args:
        unet: a diffusers UNet; not changed.
        scheduler_config: its noise schedule.
        texts: source, unconditional and conditional embeddings, (3, 77, c).
        propagation, blend, interval: as in the project's configuration.
    """

    def __init__(self, unet, scheduler_config, texts, propagation, blend, interval):
        self.unet = copy.deepcopy(unet).double()
        self.alphas = DDIMScheduler.from_config(scheduler_config).alphas_cumprod.double()
        self.texts = texts.double()
        self.propagation, self.blend, self.interval = propagation, blend, interval
        self.inject_attention = self.inject_features = False
        self.on_keyframes, self.mixes, self.kept = True, None, {}
        injected = [
            self.unet.up_blocks[block].attentions[index].transformer_blocks[0].attn1
            for block, indices in INJECTED_BLOCKS.items()
            for index in indices
        ]
        for name, module in self.unet.named_modules():
            if name.endswith("attn1"):
                module.forward = self._self_attention(name, module, module in injected)
        self.unet.up_blocks[1].resnets[1].conv2.register_forward_hook(self._features)

    def _features(self, module, args, output):
        return torch.cat([output.chunk(3)[0]] * 3) if self.inject_features else output

    def _self_attention(self, name, attn, injectable):
        def forward(x, encoder_hidden_states=None, attention_mask=None):
            x = x.unflatten(0, (3, -1))  # (3, f, L, c)
            if self.on_keyframes:
                outputs = self._attend_jointly(attn, x, injectable and self.inject_attention)
                self.kept[name] = x[0], outputs
            else:
                outputs = self._propagate_chunk(attn, x, *self.kept[name])
            return outputs.flatten(0, 1)

        return forward

    def _attend_jointly(self, attn, x, inject):
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if inject:
            query, key = query[:1].expand_as(query), key[:1].expand_as(key)
        outputs = torch.zeros_like(x)
        for f in range(x.shape[1]):
            outputs[0, f] = attention(query[0, f], key[0, f], value[0, f], attn.heads)
            for branch in (1, 2):
                all_keys, all_values = key[branch].flatten(0, 1), value[branch].flatten(0, 1)
                outputs[branch, f] = attention(query[branch, f], all_keys, all_values, attn.heads)
        return attn.to_out[0](outputs)

    def _propagate_chunk(self, attn, x, keyframe_tokens, keyframe_outputs):
        outputs = torch.zeros_like(x)
        for f, mix in enumerate(self.mixes):
            tokens = x[0, f]
            outputs[:, f] = propagate(tokens, keyframe_tokens, keyframe_outputs, mix)
            if self.propagation == "paper":  # the source pass is not propagated
                query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
                outputs[0, f] = attn.to_out[0](attention(query, key, value, attn.heads))
        return outputs

    def _noise(self, source, x, t, frames, guidance):
        batch = torch.cat([source[frames], x[frames], x[frames]])
        text = self.texts.repeat_interleave(len(frames), dim=0)
        _, uncond, cond = self.unet(batch, t, encoder_hidden_states=text).sample.chunk(3)
        return uncond + guidance * (cond - uncond)

    def _mix(self, frame, keyframes):
        if self.propagation == "released":
            return released_neighbours(frame, self.interval)
        return paper_neighbours(frame, keyframes, self.blend)

    @torch.no_grad()
    def sample(self, x, source, timesteps, keyframes, guidance, attention_steps, feature_steps):
        """The edited clean latents; source: {t: latents}, keyframes: a list for each step."""
        x = x.double()
        for step, t in enumerate(timesteps):
            latents = source[t].double()
            self.inject_attention = step < attention_steps
            self.inject_features = step < feature_steps
            self.on_keyframes = True
            self._noise(latents, x, t, keyframes[step], guidance)
            self.on_keyframes = False
            noise = []
            for start in range(0, len(x), self.interval):
                frames = list(range(start, min(start + self.interval, len(x))))
                self.mixes = [self._mix(frame, keyframes[step]) for frame in frames]
                noise.append(self._noise(latents, x, t, frames, guidance))
            noise = torch.cat(noise)
            last = step + 1 == len(timesteps)
            alpha = self.alphas[t]
            alpha_next = self.alphas[0] if last else self.alphas[timesteps[step + 1]]
            clean = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            x = alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise
        return x
