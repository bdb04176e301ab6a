"""YAML files: what is written is read again; what is not valid is an error of one line."""

import pytest

from tokenflow.storage.yaml_files import load_yaml, save_yaml
from util import MissingFileError, UserError


def test_yaml_survives_saving_in_order(tmp_path):
    mapping = {"z": "狼 🐺", "a": [1, 2.5, None, 0, 0.5], "m": {"on": True}}
    mapping |= {text: text for text in ("1:30", "017", "0b1", "1_000")}
    save_yaml(tmp_path / "a.yaml", mapping)
    assert list(load_yaml(tmp_path / "a.yaml").items()) == list(mapping.items())
    text = (tmp_path / "a.yaml").read_text(encoding="utf-8")
    assert text.startswith("z:") and "狼" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", r"expected a mapping \(key: value\), found list"),
        ("just text", "found str"),
        ("", "found nothing"),
        ("a: 1\nb: [1, 2\n", "not valid YAML in line 3"),
        ("a: 1\nb: c: d\n", "not valid YAML in line 2: mapping values"),
        ("a: 1\nb: 2\na: 3\n", "not valid YAML in line 3: the key 'a' is given twice"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML in line 1"),
        ("a: 2024-13-45\n", "not valid YAML: month"),
        ("a: \x00\n", "not valid YAML"),
        ("a: 017\n", "line 1: '017' is no decimal number: write one, or quote it as text"),
        ("a: 1:30\n", "line 1: '1:30' is no decimal number"),
        ("a: [0, -0b11]\n", "line 1: '-0b11' is no decimal number"),
        ("1:30.5: 2\n", "line 1: '1:30.5' is no decimal number"),
        pytest.param("a: " + "[" * 1500, "not valid YAML", id="nested too deep"),
    ],
)
def test_bad_yaml_is_a_one_line_error(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"a\.yaml: .*{message}") as caught:
        load_yaml(path)
    assert "\n" not in str(caught.value)


def test_yaml_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(MissingFileError, match=r"b\.yaml: no such file"):
        load_yaml(tmp_path / "b.yaml")
    with pytest.raises(MissingFileError, match="a folder, not a file"):
        load_yaml(tmp_path)
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match=r"a\.yaml: not valid YAML"):
        load_yaml(tmp_path / "a.yaml")


def test_a_few_aliases_are_welcome(tmp_path):
    text = "defaults: &d {steps: 5, seed: 1}\nwolf: {<<: *d, seed: 2}\nfox: *d\n"
    (tmp_path / "a.yaml").write_text(text)
    loaded = load_yaml(tmp_path / "a.yaml")
    assert loaded["wolf"] == {"steps": 5, "seed": 2} and loaded["fox"] == loaded["defaults"]
