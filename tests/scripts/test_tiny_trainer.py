"""The training loop: it learns, resumes, and refuses states that it cannot resume from."""

import csv
import itertools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scripts.tiny_model import trainer
from scripts.tiny_model.settings import Recipe, Training
from scripts.tiny_model.trainer import train
from tests.helpers import contents
from tokenflow.storage.yaml_files import load_yaml
from util import UserError, load_tensors

RECIPE = Recipe(steps=30, batch_size=16, learning_rate=0.02, warmup=5)
SLOPES = torch.tensor([1.0, -2.0, 0.5])
INPUTS = {"vae": "0123456789ab"}


def with_changes(**changes):
    return RECIPE.model_copy(update=changes)


def a_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def regression(model, generator):
    """The squared error of a fit to a plane."""
    inputs = torch.randn(RECIPE.batch_size, 3, generator=generator)
    return (model(inputs)[:, 0] - (inputs @ SLOPES + 0.3)).square().mean()


def no_sheet(model, path):
    pass


def run(
    folder, loss=regression, recipe=RECIPE, *, model=None, sheet=no_sheet, inputs=INPUTS, **changes
):
    given = {"seed": 0, "dtype": torch.float32, "sheet_every": 1000, "device": torch.device("cpu")}
    budget = SimpleNamespace(recipes={folder.name: recipe})
    training = Training(model=None, work=folder.parent, budget=budget, **given | changes)
    return train(training, folder.name, model or a_model(), loss, sheet, inputs)


def interrupted_at(step, loss=regression):
    """A loss during whose call number `step` (from 0) somebody presses Ctrl-C."""
    calls = itertools.count()

    def interrupted(model, generator):
        if next(calls) == step:
            raise KeyboardInterrupt
        return loss(model, generator)

    return interrupted


def unreachable(model, generator):
    pytest.fail("a step was trained")


def draws(seen):
    """A loss that writes down the first number that each call draws."""

    def drawing(model, generator):
        seen.append(torch.rand((), generator=generator.clone_state()).item())
        return regression(model, generator)

    return drawing


def assert_same(first, second):
    """Bit for bit."""
    weights, others = first.state_dict(), second.state_dict()
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def rows(folder):
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def saves_every_step(monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in one piece: its folder, which is not to be written to, and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


# ---------------------------------------------------------------- learning


def test_the_loss_falls(tmp_path):
    model = a_model()
    before = regression(model, torch.Generator().manual_seed(1)).item()
    averaged = run(tmp_path, recipe=with_changes(steps=200), model=model)
    assert regression(averaged, torch.Generator().manual_seed(1)).item() < 0.1 * before
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    recipe = Recipe(steps=100, batch_size=1, learning_rate=2.0, warmup=10)
    rates = [recipe.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(2.0 / 10)
    assert rates[4] == pytest.approx(0.5 * (1 + math.cos(math.radians(7.2))))
    assert rates[9] == pytest.approx(1 + math.cos(math.radians(16.2)))  # the warm-up is over
    assert rates[50] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.radians(1.8)))
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_each_step_has_its_learning_rate_and_only_matrices_decay(tmp_path):
    """Where no gradient is, AdamW multiplies a matrix by 1 - rate * decay, and nothing else."""
    recipe = with_changes(learning_rate=0.5, weight_decay=0.1)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    nn.init.constant_(model[0].bias, 0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tmp_path, lambda model, generator: 0 * model(torch.ones(1, 3)).sum(), recipe, model=model)
    factor = math.prod(1 - 0.1 * recipe.learning_rate_at(step) for step in range(recipe.steps))
    assert factor < 0.7
    for name, value in model.state_dict().items():
        expected = before[name] * (factor if name == "0.weight" else 1)
        torch.testing.assert_close(value, expected, msg=name)


def test_the_result_is_the_average_of_the_weights_ready_for_use(tmp_path):
    """Against a loop in float64, with shares of 10/11, 10/12, ..."""
    model = a_model().train()
    seen = []

    def weights():
        return {name: value.double() for name, value in model.state_dict().items()}

    def recording(model, generator):
        assert model.training
        seen.append(weights())
        return regression(model, generator)

    averaged = run(tmp_path, recording, model=model)
    _, expected, *later = [*seen, weights()]
    assert len(later) == RECIPE.steps - 1
    for number, new in enumerate(later, start=2):
        share = 10 / (number + 9)
        expected = {k: v + share * (new[k] - v) for k, v in expected.items()}
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
        assert (value - model.state_dict()[name]).abs().max() > 1e-4, name
    assert not averaged.training
    assert not any(parameter.requires_grad for parameter in averaged.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_mixed_precision(tmp_path, dtype):
    seen = set()

    def recording(model, generator):
        seen.add(model(torch.ones(1, 3)).dtype)
        return regression(model, generator)

    averaged = run(tmp_path, recording, with_changes(steps=2), dtype=dtype)
    assert seen == {dtype}
    assert {value.dtype for value in averaged.parameters()} == {torch.float32}


# ---------------------------------------------------------------- resuming


@pytest.mark.usefixtures("saves_every_step")
@pytest.mark.parametrize("step", [0, 1, 17, 25, RECIPE.steps - 1])
def test_an_interrupted_run_ends_as_one_in_one_piece(step, finished, tmp_path):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(step))
    # The weights come from the folder, whatever the model held.
    averaged = run(tmp_path, draws(seen), model=a_model(seed=0 if step == 0 else 5))
    assert len(seen) == RECIPE.steps - step
    assert_same(averaged, finished[1])
    assert not averaged.training
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in rows(finished[0])]


def partly_frozen():
    """Frozen and unused parameters have no moments in the optimiser's state."""
    model = a_model()
    model[0].requires_grad_(False)
    return model.append(nn.Linear(1, 1)), lambda model, generator: regression(model[:3], generator)


def channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3))

    def loss(model, generator):
        pictures = torch.randn(2, 3, 7, 7, generator=generator)
        return (model(pictures) - pictures[:, :1, 2:-2, 2:-2]).square().mean()

    return model.to(memory_format=torch.channels_last), loss


@pytest.mark.usefixtures("saves_every_step")
@pytest.mark.parametrize("build", [partly_frozen, channels_last])
def test_parameters_of_every_kind_are_resumed(build, tmp_path):
    model, loss = build()
    whole = run(tmp_path / "whole", loss, model=model)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupted_at(11, loss), model=build()[0])
    assert_same(run(tmp_path / "parts", loss, model=build()[0]), whole)
    assert torch.equal(whole[0].weight, build()[0][0].weight) == (build is partly_frozen)
    assert not torch.equal(whole[2].weight, build()[0][2].weight)


def test_a_run_interrupted_before_the_first_save_starts_again(finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(25))
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}
    seen = []
    assert_same(run(tmp_path, draws(seen)), finished[1])
    assert len(seen) == RECIPE.steps


def test_the_state_is_saved_when_the_time_has_come(tmp_path, monkeypatch):
    clock = itertools.count(0, 30)  # seconds: a step takes half a minute
    fake = SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 0.0)
    monkeypatch.setattr(trainer, "time", fake)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted_at(9))
    # More than 120 seconds after the beginning is after step 5; saving takes a reading too.
    assert int(load_tensors(tmp_path / "state.safetensors")["step"]) == 5


def test_a_finished_run_returns_at_once(finished, caplog):
    folder, averaged = finished
    before = contents(folder)
    caplog.set_level(logging.INFO, "tokenflow")
    again = run(folder, unreachable, model=a_model(seed=5), sheet=unreachable, sheet_every=1)
    assert_same(again, averaged)
    assert not again.training
    assert f"{folder.name}: 30 steps are done already" in caplog.text
    before.pop("recipe.yaml")
    assert before.items() <= contents(folder).items()


def test_a_finished_run_is_resumed_with_more_steps(tmp_path):
    first, later, whole = [], [], []
    run(tmp_path / "parts", draws(first))
    longer = with_changes(steps=45)
    averaged = run(tmp_path / "parts", draws(later), longer, model=a_model(seed=5))
    run(tmp_path / "whole", draws(whole), longer)
    assert len(later) == 15
    assert first + later == whole  # the batches of steps 30, 31, ...
    assert len(set(whole)) == 45  # and every step has its own
    assert load_yaml(tmp_path / "parts" / "recipe.yaml")["steps"] == 45
    assert_same(run(tmp_path / "parts", unreachable, longer), averaged)


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("learning_rate", {"recipe": with_changes(steps=60, learning_rate=0.03)}),
        ("batch_size", {"recipe": with_changes(batch_size=17)}),
        ("seed", {"seed": 1}),
        ("vae", {"inputs": {"vae": "ba9876543210"}}),
    ],
)
def test_another_recipe_seed_or_input_is_refused(what, changes, finished):
    folder, _ = finished
    before = contents(folder)
    with pytest.raises(UserError, match=f"{folder}: was trained with another {what}; remove the f"):
        run(folder, unreachable, **changes)
    assert contents(folder) == before


def test_a_broken_state_is_refused(finished, tmp_path):
    for name, end in (("recipe.yaml", None), ("state.safetensors", -7)):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes()[:end])
    with pytest.raises(UserError, match=r"state\.safetensors: truncated"):
        run(tmp_path, unreachable)
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(UserError, match=r"recipe\.yaml: no such file"):
        run(tmp_path, unreachable)


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused(value, tmp_path):
    def loss(model, generator):
        return regression(model, generator) * value

    with pytest.raises(UserError, match=f": the loss is (nan|{value}) at step 19"):
        run(tmp_path, loss)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}


def test_the_log_has_a_row_every_twenty_steps_and_at_the_end(tmp_path):
    losses = []

    def recording(model, generator):
        value = regression(model, generator)
        losses.append(value.item())
        return value

    recipe = with_changes(steps=45)
    run(tmp_path, recording, recipe)
    found = rows(tmp_path)
    assert list(found[0]) == ["step", "loss", "learning_rate", "time"]
    assert [int(row["step"]) for row in found] == [20, 40, 45]
    for row in found:
        step = int(row["step"]) - 1
        assert float(row["loss"]) == pytest.approx(losses[step], abs=1e-5)
        assert float(row["learning_rate"]) == pytest.approx(recipe.learning_rate_at(step), rel=0.01)


def test_a_sheet_is_drawn_when_promised_from_the_averaged_model(tmp_path):
    drawn = []

    def sheet(model, path):
        assert not model.training
        drawn.append((model, path.name, model[0].weight.clone()))

    averaged = run(tmp_path, sheet=sheet, sheet_every=8)
    assert [name for _, name, _ in drawn] == [f"sheet_{s:06d}.png" for s in (8, 16, 24, 30)]
    assert all(model is averaged for model, _, _ in drawn)
    assert torch.equal(drawn[-1][2], averaged[0].weight)
    assert not torch.equal(drawn[0][2], drawn[1][2])


def test_nothing_is_pickled(finished):
    folder, averaged = finished
    names = {"state.safetensors", "recipe.yaml", "log.csv"}
    assert {path.name for path in folder.rglob("*")} == names
    tensors = load_tensors(folder / "state.safetensors")  # which reads no pickle
    for name, value in averaged.state_dict().items():
        assert torch.equal(tensors[f"average.module.{name}"], value)
        assert not torch.equal(tensors[f"model.{name}"], value)
    assert load_yaml(folder / "recipe.yaml") == {**RECIPE.model_dump(), "seed": 0, **INPUTS}
