"""What is declared of a mapping, and the one-line errors about what is not so."""

from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from tokenflow.storage.schema import Model, add_arguments, from_arguments, load_config, parse
from util import ArgumentParser, MissingFileError, UserError


class Example(Model):
    ALIASES: ClassVar = {"cfg": "guidance_scale"}

    prompt: str
    sd_version: str = "2.1"
    steps: int = Field(50, ge=1, le=1000, description="100% of the steps")
    start: float = Field(0.5, gt=0, le=1)
    guidance_scale: float = 7.5
    fixed: bool = False
    blend: Literal["sigmoid", "linear"] = "sigmoid"
    fps: float | None = Field(None, gt=0)
    seed: int
    tags: str | None = None
    city: str | None = None
    checked: bool = Field(True, description="check it")

    @field_validator("city")
    @classmethod
    def check_city(cls, value: str | None) -> str | None:
        if value == "Atlantis":
            raise ValueError("expected a city, got Atlantis")
        return value

    @model_validator(mode="after")
    def check_rules(self) -> "Example":
        if self.steps < 10 and self.fixed:
            raise MissingFileError("steps: must be 10 or more where fixed is true")
        return self


class Examples(Model):
    examples: list[Example]
    by_name: dict[str, Example] = Field({})
    counts: dict[str, int] = Field({})


GOOD = {"prompt": "a wolf", "seed": 1}


def load(tmp_path: Path, text: str, *overrides: str) -> Example:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(Example, path, overrides)


def test_config_takes_defaults_and_whole_numbers_as_floats(tmp_path):
    config = load(tmp_path, "prompt: a wolf\nseed: 1\nguidance_scale: 7\nfps: null\n")
    assert config == Example(prompt="a wolf", seed=1, guidance_scale=7.0)
    assert type(config.guidance_scale) is float
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2


def test_overrides_win_and_only_the_first_equals_sign_splits(tmp_path):
    config = load(
        tmp_path,
        yaml.safe_dump(GOOD | {"steps": "refused, were it not overridden", "fps": 3}),
        "steps=20",
        "prompt=a=b",
        "fps=",
        "fixed=true",
        "sd_version='1.5'",
        "seed=1",
        "seed=2",
    )
    assert config == Example(prompt="a=b", steps=20, fps=None, fixed=True, sd_version="1.5", seed=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promt": "x"}, "promt: unknown key; did you mean prompt?"),
        ({"zzzzz": 1}, "zzzzz: unknown key; known keys: prompt, sd_version, steps, start"),
        ({1: 2}, "1: unknown key; known keys"),
        ({"prompt": None}, "prompt: expected text, got nothing"),
        ({"prompt": ["a", "b"]}, "prompt: expected text, got ['a', 'b']"),
        ({"sd_version": 2.1}, "sd_version: expected text, got 2.1; quote it: sd_version: '2.1'"),
        ({"prompt": True}, "prompt: expected text, got True; quote it: prompt: '...'"),
        ({"steps": "many"}, "steps: expected a whole number, got 'many'"),
        ({"steps": 5.0}, "steps: expected a whole number, got 5.0"),
        ({"steps": True}, "steps: expected a whole number, got True"),
        ({"steps": 0}, "steps: expected at least 1 and at most 1000, got 0"),
        ({"steps": 1001}, "steps: expected at least 1 and at most 1000, got 1001"),
        ({"start": 0}, "start: expected more than 0 and at most 1, got 0"),
        ({"start": 1.5}, "start: expected more than 0 and at most 1, got 1.5"),
        ({"guidance_scale": "high"}, "guidance_scale: expected a number, got 'high'"),
        ({"guidance_scale": False}, "guidance_scale: expected a number, got False"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite number, got nan"),
        ({"guidance_scale": float("-inf")}, "guidance_scale: expected a finite number, got -inf"),
        ({"guidance_scale": 10**400}, "guidance_scale: expected a number, got 1000"),
        ({"fixed": 1}, "fixed: expected true or false, got 1"),
        ({"fixed": "yes"}, "fixed: expected true or false, got 'yes'"),
        ({"blend": 2.1}, "blend: expected text, got 2.1; quote it: blend: '2.1'"),
        ({"blend": ["a"]}, "blend: expected one of sigmoid, linear; got ['a']"),
        ({"blend": "cubic"}, "blend: expected one of sigmoid, linear; got 'cubic'"),
        ({"fps": 0}, "fps: expected more than 0, got 0"),
        ({"fps": "fast"}, "fps: expected a number or null, got 'fast'"),
        ({"seed": None}, "seed: expected a whole number, got nothing"),
        ({"steps": 5, "fixed": True}, "steps: must be 10 or more where fixed is true"),
    ],
)
def test_each_rule_refuses(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, yaml.safe_dump(GOOD | change))
    assert str(caught.value).startswith(f"{tmp_path / 'c.yaml'}: {message}")


def test_a_required_key_may_not_be_missing(tmp_path):
    with pytest.raises(UserError, match=r"c\.yaml: seed: is missing; expected a whole number"):
        load(tmp_path, "prompt: a wolf")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set steps: expected key=value"),
        ("=5", "--set =5: expected key=value"),
        ("stps=5", "--set stps: unknown key; did you mean steps?"),
        ("steps=many", "--set steps: expected a whole number, got 'many'"),
        ("steps=0", "--set steps: expected at least 1"),
        ("steps=[1", "--set steps: not valid YAML"),
        ("steps=1:30", "--set steps: not valid YAML in line 1: '1:30' is no decimal number"),
        ("steps=017", "--set steps: not valid YAML in line 1: '017' is no decimal number"),
        ("prompt=null", "--set prompt: expected text, got nothing; '' is the empty text"),
        ("blend=~", "--set blend: expected one of sigmoid, linear; got nothing"),
    ],
)
def test_bad_overrides_name_themselves(tmp_path, override, message):
    with pytest.raises(UserError) as caught:
        load(tmp_path, yaml.safe_dump(GOOD), override)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("prompt=a wolf #2: gold", "a wolf #2: gold"),
        ("prompt=- yes", "- yes"),
        ("prompt='quoted'", "quoted"),
        ('prompt="STOP" sign that says "GO"', '"STOP" sign that says "GO"'),
        ("prompt='null'", "null"),
        ("prompt=a=b", "a=b"),
        ("prompt=", ""),
        ("prompt=2.1", "2.1"),
    ],
)
def test_text_in_an_override_is_taken_as_it_stands(tmp_path, override, value):
    assert load(tmp_path, yaml.safe_dump(GOOD), override).prompt == value


def test_a_rule_between_keys_names_the_overrides_that_break_it(tmp_path):
    text = yaml.safe_dump(GOOD | {"fixed": True, "steps": 10})
    with pytest.raises(UserError, match=r"c\.yaml with --set steps: steps: must be 10 or more"):
        load(tmp_path, text, "prompt=a fox", "steps=5")


def test_an_exploding_alias_gives_a_short_message(tmp_path):
    lines = ["prompt:", "  - &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(UserError, match=r"c\.yaml: .* aliases stand for too much") as caught:
        load(tmp_path, "\n".join(lines))
    assert len(str(caught.value)) < 1000


MERGES = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(["a0: &a0 {x: 1}", *MERGES]), "aliases stand for too much"),
        ("prompt: &p [*p]", "aliases stand for too much"),
        ("prompt: &p {<<: *p}", "aliases stand for too much"),
        ("a: " + "[" * 100_000, "nested too deep"),
        ("\n".join(" " * depth + "a:" for depth in range(600)), "nested too deep"),
        ("- " * 100_000, "nested too deep"),
        ("seed: 1" + ":1" * 100_000, "line 1: '1:1:1:.* is too long for a number"),
        ("seed: 0x" + "f" * 100_000, "line 1: '0xff.* is too long for a number"),
        ("prompt: " + "x" * 300_000, "c.yaml: larger than the 256 KB"),
        ("steps: 0x" + "f" * 990, "steps: expected .* at most 1000, got "),
        ("steps: [0x" + "f" * 990 + "]", "steps: expected a whole number, got "),
        ("fixed: !!bool x", "line 1: a value is not what its tag .*bool says"),
        ("prompt: !!timestamp x", "line 1: a value is not what its tag .*timestamp says"),
        ("seed: !!int ''", "line 1: a value is not what its tag .*int says"),
        ("? 0x" + "f" * 990 + "\n: 1", "unknown key"),
        ("? " + "k" * 100_000 + "\n: 1", r"kkk\.\.\.: unknown key"),
        ("? [a, b]\n: 1", "unhashable key"),
    ],
    ids=lambda value: value[:12],
)
def test_no_text_keeps_the_parser_busy(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('prompt: "a\\0b"', r"c\.yaml: prompt: 'a\\x00b' holds a NUL character"),
        ('prompt: "a\\ud800b"', "prompt: .* is not valid Unicode text"),
        ('"a\\x1b[31m": 1', r"c\.yaml: a\\x1b\[31m: unknown key"),
    ],
)
def test_text_that_no_file_can_hold_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, f"seed: 1\n{text}")


def test_a_long_override_is_refused(tmp_path):
    with pytest.raises(UserError, match="--set prompt: longer than 256 KB"):
        load(tmp_path, yaml.safe_dump(GOOD), "prompt=" + "x" * 300_000)
    assert len(load(tmp_path, yaml.safe_dump(GOOD), "prompt=" + "x" * 10_000).prompt) == 10_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": 3}, "examples: expected a list, got 3"),
        ({"examples": [3]}, "examples: number 1: expected keys and values, got 3"),
        ({"examples": [GOOD, GOOD | {"steps": 0}]}, "examples: number 2: steps: expected at least"),
        ({"examples": [GOOD | {"promt": 1}]}, "examples: number 1: promt: unknown key; did you me"),
        ({"examples": [GOOD | {1: 1}]}, "examples: number 1: 1: unknown key; known keys: prompt,"),
        (
            {"examples": [GOOD | {"steps": 5, "fixed": True}]},
            "examples: number 1: steps: must be 10 or more",
        ),
        ({"examples": [], "by_name": {"a": {"seed": 1}}}, "by_name: a: prompt: is missing; expect"),
        ({"examples": [], "counts": {"a": "x"}}, "counts: a: expected a whole number, got 'x'"),
        ({"examples": [], "counts": {"a\0": 1}}, "counts: 'a\\x00' holds a NUL"),
        ([], "expected keys and values, got []"),
    ],
)
def test_a_fault_within_lists_and_mappings_is_placed(given, message):
    with pytest.raises(UserError) as caught:
        parse(Examples, given, "list.yaml")
    assert str(caught.value).startswith(f"list.yaml: {message}")


def test_an_alias_is_accepted_beside_the_field_s_name_but_not_both(tmp_path):
    assert load(tmp_path, yaml.safe_dump(GOOD | {"cfg": 3})).guidance_scale == 3
    assert load(tmp_path, yaml.safe_dump(GOOD | {"cfg": 3}), "guidance_scale=4").guidance_scale == 4
    assert load(tmp_path, yaml.safe_dump(GOOD), "cfg=5").guidance_scale == 5
    with pytest.raises(UserError, match=r"guidance_scale is given twice"):
        load(tmp_path, yaml.safe_dump(GOOD | {"guidance_scale": 4, "cfg": 3}))
    with pytest.raises(UserError, match="guidance_scale: expected a number, got 'x'"):
        parse(Example, GOOD | {"cfg": "x"}, "a mapping")
    nested = parse(Examples, {"examples": [GOOD | {"cfg": 3}]}, "a mapping")
    assert nested.examples[0].guidance_scale == 3


# ---------------------------------------------------------------- command lines


def read(*words: str) -> Example:
    parser = ArgumentParser()
    add_arguments(parser, Example)
    return from_arguments(Example, parser.parse_args(["--prompt", "p", "--seed", "1", *words]))


def test_a_command_line_gives_the_same_model_as_a_mapping():
    assert read() == parse(Example, {"prompt": "p", "seed": 1}, "a mapping")
    words = "--steps 7 --start 1 --blend linear --fps 0.5 --tags 3 --cfg 2 --no_checked"
    expected = {"steps": 7, "start": 1.0, "blend": "linear", "fps": 0.5, "tags": "3", "cfg": 2}
    expected |= {"prompt": "p", "seed": 1, "checked": False}
    assert read(*words.split()) == parse(Example, expected, "a mapping")
    assert read("--fixed", "--steps", "10").fixed and read("--no_checked", "--checked").checked
    assert read("--steps", "7").model_fields_set == {"prompt", "seed", "steps"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "--steps: 0, expected at least 1 and at most 1000"),
        ("--steps many", "--steps: 'many', expected a whole number"),
        ("--steps 5.0", "--steps: '5.0', expected a whole number"),
        ("--steps " + "1" * 5000, "--steps: '1111"),
        ("--start nan", "--start: nan, expected a finite number"),
        ("--fps -1", "--fps: -1.0, expected more than 0"),
        ("--blend cubic", "--blend: 'cubic', expected one of sigmoid, linear"),
        ("--city Atlantis", "--city: expected a city, got Atlantis"),
        ("--fixed --steps 5", "steps: must be 10 or more where fixed is true"),
        ("--step 5", "unrecognized arguments: --step 5"),
        ("--no_fixed", "unrecognized arguments: --no_fixed"),
    ],
    ids=lambda text: text[:20],
)
def test_a_bad_command_line_names_the_option(words, message):
    with pytest.raises(UserError) as caught:
        read(*words.split())
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 300


def test_a_required_option_may_not_be_missing():
    parser = ArgumentParser()
    add_arguments(parser, Example)
    with pytest.raises(UserError, match="are required: --seed"):
        parser.parse_args(["--prompt", "p"])


def test_the_help_says_what_the_fields_say(capsys):
    parser = ArgumentParser()
    add_arguments(parser, Example)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--steps N 100% of the steps (default: 50)" in shown
    assert "--blend {sigmoid,linear}" in shown and "--guidance_scale X, --cfg X" in shown
    assert "--checked check it --no_checked do not: see --checked" in shown
