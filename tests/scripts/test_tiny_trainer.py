"""The training loop: it learns, resumes, and refuses states that it cannot resume from."""

import csv
import dataclasses
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scripts.tiny_model import trainer as training
from scripts.tiny_model.trainer import Loss, Recipe, Sheet, train
from tests.helpers import contents
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, load_tensors

RECIPE = Recipe(steps=30, batch_size=16, learning_rate=0.02, warmup=5)
SLOPES = torch.tensor([1.0, -2.0, 0.5])

INPUTS = {"vae": "0123456789ab"}


def a_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def regression(model: nn.Module, generator: torch.Generator) -> Tensor:
    """The squared error of a fit to a plane."""
    inputs = torch.randn(RECIPE.batch_size, 3, generator=generator)
    return (model(inputs)[:, 0] - (inputs @ SLOPES + 0.3)).square().mean()


def run(
    folder: Path,
    loss: Loss = regression,
    recipe: Recipe = RECIPE,
    *,
    model: nn.Module | None = None,
    seed: int = 0,
    inputs: dict[str, str] = INPUTS,
    dtype: torch.dtype = torch.float32,
    sheet: Sheet = lambda model, path: None,
    sheet_every: int = 1000,
) -> nn.Module:
    return train(
        "tiny",
        a_model() if model is None else model,
        loss,
        recipe,
        folder,
        seed=seed,
        inputs=inputs,
        dtype=dtype,
        sheet=sheet,
        sheet_every=sheet_every,
    )


def interrupted_at(step: int, loss: Loss = regression) -> Loss:
    """A loss during whose call number `step` (from 0) somebody presses Ctrl-C."""
    calls = iter(range(step))

    def interrupted(model: nn.Module, generator: torch.Generator) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return loss(model, generator)

    return interrupted


def unreachable(model: nn.Module, generator: torch.Generator) -> Tensor:
    pytest.fail("a step was trained")


def draws(seen: list[float], loss: Loss = regression) -> Loss:
    """A loss that writes down the first number that each call draws."""

    def drawing(model: nn.Module, generator: torch.Generator) -> Tensor:
        seen.append(torch.rand((), generator=generator.clone_state()).item())
        return loss(model, generator)

    return drawing


def assert_same(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def saves_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A run in one piece: its folder, which is not to be written to, and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


# ---------------------------------------------------------------- learning


def test_the_loss_falls(tmp_path: Path) -> None:
    model = a_model()
    fresh = torch.Generator().manual_seed(1)
    before = regression(model, fresh).item()
    averaged = run(tmp_path, recipe=dataclasses.replace(RECIPE, steps=200), model=model)
    fresh.manual_seed(1)
    assert regression(averaged, fresh).item() < 0.1 * before
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    recipe = Recipe(steps=100, batch_size=1, learning_rate=2.0, warmup=10)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 10)
    assert rates[4] == pytest.approx(0.5 * (1 + math.cos(math.radians(7.2))))
    assert rates[9] == pytest.approx(1 + math.cos(math.radians(16.2)))  # the warm-up is over
    assert rates[50] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.radians(1.8)))
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_each_step_has_its_learning_rate_and_only_matrices_decay(tmp_path: Path) -> None:
    """Where no gradient is, AdamW multiplies a matrix by 1 - rate * decay, and nothing else."""
    recipe = dataclasses.replace(RECIPE, learning_rate=0.5, weight_decay=0.1)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    nn.init.constant_(model[0].bias, 0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tmp_path, lambda model, generator: 0 * model(torch.ones(1, 3)).sum(), recipe, model=model)
    factor = 1.0
    for step in range(recipe.steps):
        factor *= 1 - 0.1 * recipe.learning_rate_at(step)
    assert factor < 0.7
    for name, value in model.state_dict().items():
        expected = before[name] * (factor if name == "0.weight" else 1)
        torch.testing.assert_close(value, expected, msg=name)


def test_the_result_is_the_average_of_the_weights_ready_for_use(tmp_path: Path) -> None:
    """Against a loop in float64, with shares of 10/11, 10/12, ..."""
    model = a_model().train()
    seen = []

    def recording(model: nn.Module, generator: torch.Generator) -> Tensor:
        assert model.training
        seen.append({name: value.double() for name, value in model.state_dict().items()})
        return regression(model, generator)

    averaged = run(tmp_path, recording, model=model)
    seen.append({name: value.double() for name, value in model.state_dict().items()})
    expected = seen[1]  # the weights after the first step
    for number, weights in enumerate(seen[2:], start=2):
        share = 10 / (number + 9)
        expected = {k: v + share * (weights[k] - v) for k, v in expected.items()}
    assert len(seen) == RECIPE.steps + 1
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert (value - model.state_dict()[name]).abs().max() > 1e-4, name

    assert type(averaged) is type(model)
    assert not averaged.training
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert model.training


def test_bfloat16_is_mixed_precision(tmp_path: Path) -> None:
    seen = set()

    def recording(model: nn.Module, generator: torch.Generator) -> Tensor:
        seen.add(model(torch.ones(1, 3)).dtype)
        return regression(model, generator)

    recipe = dataclasses.replace(RECIPE, steps=2)
    averaged = run(tmp_path / "half", recording, recipe, dtype=torch.bfloat16)
    assert seen == {torch.bfloat16}
    assert {value.dtype for value in averaged.parameters()} == {torch.float32}
    seen.clear()
    run(tmp_path / "full", recording, recipe)
    assert seen == {torch.float32}


# ---------------------------------------------------------------- resuming


@pytest.mark.usefixtures("saves_every_step")
@pytest.mark.parametrize("step", [0, 1, 17, RECIPE.steps - 1])
def test_an_interrupted_run_ends_as_one_in_one_piece(
    step: int, finished: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(step))
    # The weights come from the folder, whatever the model held.
    model = a_model(seed=0 if step == 0 else 5)
    averaged = run(tmp_path, draws(seen), model=model)
    assert len(seen) == RECIPE.steps - step
    assert_same(averaged, finished[1])
    assert not averaged.training


@pytest.mark.usefixtures("saves_every_step")
def test_frozen_and_unused_parameters_do_not_hinder_resuming(tmp_path: Path) -> None:
    """They have no moments in the optimiser's state."""

    def build() -> nn.Module:
        model = a_model()
        model[0].requires_grad_(False)
        model.append(nn.Linear(1, 1))
        return model

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        return regression(model[:3], generator)

    whole = run(tmp_path / "whole", loss, model=build())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupted_at(11, loss), model=build())
    assert_same(run(tmp_path / "parts", loss, model=build()), whole)
    assert_same(whole[0], build()[0])
    assert not torch.equal(whole[2].weight, build()[2].weight)


@pytest.mark.usefixtures("saves_every_step")
def test_an_interrupted_run_in_channels_last_ends_as_one_in_one_piece(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3))
        return model.to(memory_format=torch.channels_last)

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        pictures = torch.randn(2, 3, 7, 7, generator=generator)
        return (model(pictures) - pictures[:, :1, 2:-2, 2:-2]).square().mean()

    whole = run(tmp_path / "whole", loss, model=build())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupted_at(11, loss), model=build())
    assert_same(run(tmp_path / "parts", loss, model=build()), whole)


def test_a_run_interrupted_before_the_first_save_starts_again(
    finished: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(17))
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}
    seen = []
    assert_same(run(tmp_path, draws(seen)), finished[1])
    assert len(seen) == RECIPE.steps


def test_the_state_is_saved_when_the_time_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 30))  # seconds: a step takes half a minute
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(training, "SAVE_SECONDS", 120)
    monkeypatch.setattr(training, "tqdm", lambda steps, *args, **options: Bar(steps))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(9))
    # More than 120 seconds after the beginning is after step 5; saving takes a reading too.
    assert int(load_tensors(tmp_path / "state.safetensors")["step"]) == 5


class Bar(list):
    """A progress bar that does not look at the clock."""

    def set_postfix(self, **values: str) -> None:
        pass


def test_a_finished_run_returns_at_once(
    finished: tuple[Path, nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    folder, averaged = finished
    before = contents(folder)
    caplog.set_level(logging.INFO, "tokenflow")
    again = run(folder, unreachable, model=a_model(seed=5), sheet=unreachable, sheet_every=1)
    assert_same(again, averaged)
    assert not again.training
    assert "tiny: 30 steps are done already" in caplog.text
    assert contents(folder).keys() == before.keys()
    for name in ("state.safetensors", "log.csv"):
        assert contents(folder)[name] == before[name]


def test_a_finished_run_goes_on_to_a_larger_number_of_steps(tmp_path: Path) -> None:
    first, later, whole = [], [], []
    run(tmp_path / "parts", draws(first))
    longer = dataclasses.replace(RECIPE, steps=45)
    model = a_model(seed=5)
    averaged = run(tmp_path / "parts", draws(later), longer, model=model)
    run(tmp_path / "whole", draws(whole), longer)
    assert len(later) == 15
    assert first + later == whole  # the batches of steps 30, 31, ...
    assert len(set(whole)) == 45
    assert load_yaml(tmp_path / "parts" / "recipe.yaml")["steps"] == 45
    assert int(load_tensors(tmp_path / "parts" / "state.safetensors")["step"]) == 45
    assert_same(run(tmp_path / "parts", unreachable, longer), averaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.03), ("batch_size", 17), ("warmup", 6), ("weight_decay", 0.02)],
)
def test_another_recipe_is_refused(
    key: str, value: float, finished: tuple[Path, nn.Module]
) -> None:
    folder, _ = finished
    before = contents(folder)
    changed = dataclasses.replace(RECIPE, steps=60, **{key: value})
    with pytest.raises(UserError, match=f"was trained with another {key}; remove the folder"):
        run(folder, unreachable, changed)
    assert contents(folder) == before


def test_another_seed_is_refused(finished: tuple[Path, nn.Module]) -> None:
    with pytest.raises(UserError, match=f"{finished[0]}: was trained with another seed; remove"):
        run(finished[0], unreachable, seed=1)


def test_a_state_made_from_other_inputs_is_refused(finished: tuple[Path, nn.Module]) -> None:
    with pytest.raises(UserError, match=f"{finished[0]}: was trained with another vae; remove"):
        run(finished[0], unreachable, inputs={"vae": "ba9876543210"})


def test_a_broken_state_is_refused(finished: tuple[Path, nn.Module], tmp_path: Path) -> None:
    for name, end in (("recipe.yaml", None), ("state.safetensors", -7)):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes()[:end])
    with pytest.raises(UserError, match=r"state\.safetensors: truncated"):
        run(tmp_path, unreachable)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml: no such file"):
        run(tmp_path, unreachable)


# ---------------------------------------------------------------- batches


def test_every_step_draws_its_own_batch_and_draws_it_again(tmp_path: Path) -> None:
    first, second = [], []
    run(tmp_path / "first", draws(first))
    run(tmp_path / "second", draws(second))
    assert len(set(first)) == RECIPE.steps
    assert first == second


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    calls = []

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        calls.append(generator)
        return regression(model, generator) * value

    with pytest.raises(UserError, match=f"tiny: the loss is (nan|{value}) at step 19"):
        run(tmp_path, loss)
    assert len(calls) == 20
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_the_log_has_a_row_every_twenty_steps_and_at_the_end(tmp_path: Path) -> None:
    losses = []

    def recording(model: nn.Module, generator: torch.Generator) -> Tensor:
        value = regression(model, generator)
        losses.append(value.item())
        return value

    recipe = dataclasses.replace(RECIPE, steps=45)
    run(tmp_path, recording, recipe)
    found = rows(tmp_path)
    assert list(found[0]) == ["step", "loss", "learning_rate", "time"]
    assert [int(row["step"]) for row in found] == [20, 40, 45]
    for row in found:
        step = int(row["step"]) - 1
        assert float(row["loss"]) == pytest.approx(losses[step], abs=1e-5)
        assert float(row["learning_rate"]) == pytest.approx(recipe.learning_rate_at(step), rel=0.01)


def test_a_sheet_is_drawn_when_promised_from_the_averaged_model(tmp_path: Path) -> None:
    drawn = []

    def sheet(model: nn.Module, path: Path) -> None:
        assert not model.training
        drawn.append((model, path, model[0].weight.clone()))

    averaged = run(tmp_path, sheet=sheet, sheet_every=8)
    assert [path for _, path, _ in drawn] == [
        tmp_path / f"sheet_{step:06d}.png" for step in (8, 16, 24, 30)
    ]
    assert all(model is averaged for model, _, _ in drawn)
    weights = [weight for _, _, weight in drawn]
    assert torch.equal(weights[-1], averaged[0].weight)
    assert not torch.equal(weights[0], weights[1])


def test_nothing_is_pickled(finished: tuple[Path, nn.Module]) -> None:
    folder, averaged = finished
    assert {path.name for path in folder.rglob("*")} == {
        "state.safetensors",
        "recipe.yaml",
        "log.csv",
    }
    tensors = load_tensors(folder / "state.safetensors")  # which reads no pickle
    for name, value in averaged.state_dict().items():
        assert torch.equal(tensors[f"average.module.{name}"], value)
        assert not torch.equal(tensors[f"model.{name}"], value)
    assert load_yaml(folder / "recipe.yaml") == {**dataclasses.asdict(RECIPE), "seed": 0, **INPUTS}
