"""A resumable training loop: the weights, their moving average and the optimiser, kept on disk."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from scripts.tiny_model.settings import Recipe, Training
from tokenflow.storage.reports import write_report
from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import UserError, load_tensors, save_tensors

log = logging.getLogger("tokenflow")

SAVE_SECONDS = 120  # between two saves of the state
Loss = Callable[[nn.Module, torch.Generator], Tensor]
Sheet = Callable[[nn.Module, Path], None]


def train(
    training: Training,
    name: str,
    model: nn.Module,
    loss: Loss,
    sheet: Sheet,
    inputs: Mapping[str, str],
) -> nn.Module:
    """Train one part of the small model in its folder of the work folder: `train_in`.

    Args:
        name: of the part, whose recipe is the budget's.
    """
    return train_in(
        training.work / name,
        training.budget.recipes[name],
        model,
        loss,
        sheet,
        inputs,
        seed=training.seed,
        autocast=training.autocast,
        sheet_every=training.sheet_every,
    )


def train_in(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    loss: Loss,
    sheet: Sheet,
    inputs: Mapping[str, str],
    *,
    seed: int,
    autocast: torch.autocast,
    sheet_every: int,
) -> nn.Module:
    """Train a model, or resume an interrupted run.

    Step k draws its batch from a generator seeded with (seed, k), so that a run in several pieces
    sees what a run in one piece sees.

    Args:
        folder: for state.safetensors, recipe.yaml, log.csv and the sheets; its name is the part's.
        model: on its device, in float32; trained in place.
        loss: of one batch that it draws with the generator (on the CPU).
        sheet: draws a picture of what the averaged model can do, and is called every
            `sheet_every` steps and at the end.
        inputs: hashes of what the part learns from; a state made from others is refused.
        autocast: what the loss is computed in.

    Returns:
        The model with the moving average of its weights, in evaluation mode.

    Raises:
        UserError: the folder holds a run of another recipe, seed or inputs, or the loss is not
            finite.
    """
    name = folder.name
    run = _Run(folder, recipe, seed, inputs, model)
    first = run.resume()
    if first >= recipe.steps:
        log.info("%s: %d steps are done already", name, first)
        return run.averaged
    saved = time.monotonic()
    bar = tqdm(range(first, recipe.steps), name, initial=first, total=recipe.steps, unit="step")
    for step in bar:
        value = run.step(step, loss, autocast)
        done, last = step + 1, step + 1 == recipe.steps
        saves = time.monotonic() - saved > SAVE_SECONDS or last
        logs = done % 20 == 0 or last
        if (logs or saves) and not value.isfinite():
            raise UserError(
                f"{name}: the loss is {value.item()} at step {step}; remove {folder} and train "
                "it with a lower learning rate"
            )
        if logs:
            bar.set_postfix(loss=f"{value.item():.4f}")
            run.losses.append([done, value.item(), recipe.learning_rate_at(step), time.time()])
        if saves:
            run.save(done)
            saved = time.monotonic()
        if done % sheet_every == 0 or last:
            sheet(run.averaged, folder / f"sheet_{done:06d}.png")
    return run.averaged


class _Run:
    """The state of a training: weights, their moving average and the optimiser, kept in a folder.

    Attributes:
        known: what state.safetensors depends on: the recipe, the seed and the inputs.
        averaged: the model with the moving average of its weights.
        losses: rows of log.csv: step, loss, learning rate and time.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, seed: int, inputs: Mapping[str, str], model: nn.Module
    ) -> None:
        self.folder, self.recipe, self.seed, self.model = folder, recipe, seed, model
        self.known = {**recipe.model_dump(), "seed": seed, **inputs}
        self.losses: list[list[float]] = []
        self.average = AveragedModel(
            model,
            multi_avg_fn=lambda old, new, n: torch._foreach_lerp_(
                old, new, recipe.share_of_newest(int(n))
            ),
        )
        self.averaged = self.average.module.eval().requires_grad_(False)
        # Matrices and convolutions are decayed, biases and the scales of norms are not.
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            betas=recipe.BETAS,
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    def step(self, step: int, loss: Loss, autocast: torch.autocast) -> Tensor:
        """Takes one step; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(step)
        # A generator on the CPU takes no more than 32 bits of its seed.
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([self.seed, step]).generate_state(1)[0])
        )
        with autocast:
            value = loss(self.model, generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        return value

    def resume(self) -> int:
        """Reads the folder's state if there is one; returns the number of steps done."""
        path, recipe = self.folder / "state.safetensors", self.folder / "recipe.yaml"
        if not path.exists():
            save_yaml(recipe, self.known)
            return 0
        before = load_yaml(recipe)
        changed = [k for k, v in self.known.items() if k != "steps" and v != before.get(k)]
        if changed:
            raise UserError(
                f"{self.folder}: was trained with another {', '.join(changed)}; "
                "remove the folder to start again"
            )
        save_yaml(recipe, self.known | {"steps": max(self.recipe.steps, before["steps"])})
        tensors = load_tensors(path)
        self.losses = tensors["losses"].tolist()
        self.model.load_state_dict(_part(tensors, "model."))
        self.average.load_state_dict(_part(tensors, "average."))
        state = self.optimizer.state_dict()
        state["state"] = {
            number: _part(tensors, f"optimizer.{number}.")
            for number in range(sum(1 for _ in self.model.parameters()))
        }
        self.optimizer.load_state_dict(state)
        for parameter, moments in self.optimizer.state.items():
            for name in moments.keys() - {"step"}:
                # In the layout of the parameter (channels last, say), which files do not keep and
                # the fused optimiser takes for granted.
                moments[name] = torch.empty_like(parameter).copy_(moments[name])
        return int(tensors["step"])

    def save(self, done: int) -> None:
        rows = [f"{s:.0f},{v:.5f},{r:.3g},{t:.0f}\n" for s, v, r, t in self.losses]
        write_report(self.folder / "log.csv", "step,loss,learning_rate,time\n" + "".join(rows))
        losses = torch.tensor(self.losses, dtype=torch.float64)
        tensors = {"step": torch.tensor(done), "losses": losses}
        tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        # Clones: safetensors takes no two tensors in one memory.
        save_tensors(self.folder / "state.safetensors", {k: v.clone() for k, v in tensors.items()})


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
