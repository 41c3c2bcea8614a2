from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.configs.base import read_file
from mindspeed_mm.errors import UserError


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"a": {"b": [1, 2.5, null, true]}}'),
        ("a.yaml", "a:\n  b: [1, 2.5, null, true]  # a comment\n"),
        ("a.yml", "a: {b: [1, 2.5, ~, True]}"),
        ("a.JSON", b'\xef\xbb\xbf{"a":\r\n {"b": [1, 2.5, null, true]}}'),  # as some editors on Windows save it
    ],
)
def test_reads_json_and_yaml_by_suffix(tmp_path: Path, name: str, text: str | bytes) -> None:
    assert read_file(write(tmp_path, name, text)) == {"a": {"b": [1, 2.5, None, True]}}


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", "1.e-5", "+1e-05"])
def test_yaml_reads_exponents_as_numbers(tmp_path: Path, number: str) -> None:
    assert read_file(write(tmp_path, "a.yaml", f"lr: {number}\nname: e5\nhex: 1e5a\n")) == {
        "lr": 1e-5,
        "name": "e5",
        "hex": "1e5a",
    }


def test_yaml_keys_are_strings_as_in_json(tmp_path: Path) -> None:
    assert read_file(write(tmp_path, "a.yaml", "on: 1\n2: {null: 3}\n")) == {"on": 1, "2": {"null": 3}}


def test_yaml_anchors_and_merges_still_work(tmp_path: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nnext: &next\n  <<: *base\n  b: 3\nlast:\n  <<: *next\n  a: 4\n"
    assert read_file(write(tmp_path, "a.yaml", text))["last"] == {"a": 4, "b": 3}


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.json", "", ["empty"]),
        ("a.yaml", " \n\n", ["empty"]),
        ("a.yaml", "# nothing\n", ["nothing but comments"]),
        ("a.json", "[1]", ["must be an object", "a list"]),
        ("a.yaml", "just text", ["must be an object", "a str"]),
        ("a.json", '{\n  "a": 1\n  "b": 2\n}', ["line 3, column 3", "','"]),
        ("a.json", '{\n  "a": 1, // one\n  "b": 2\n}', ["line 2, column 11", "no comments", ".yaml"]),
        ("a.json", '{\n  # one\n  "b": 2\n}', ["line 2", "no comments"]),
        ("a.json", '{\n  "a": [1, 2,]\n}', ["line 2", "Delete the comma"]),
        ("a.json", '{\n  "a": 1,\n}', ["Delete the comma"]),
        ("a.json", '{"a": 1', ["line 1, column 8"]),
        ("a.yaml", "a: 1\nb: [1, 2\nc: 3\n", ["line 3, column 2"]),
        ("a.yaml", "a:\n\tb: 1\n", ["line 2, column 1", "spaces, not tabs"]),
        ("a.yaml", "a: \x00\n", ["a.yaml: "]),
        ("a.yaml", "a: !!python/object:os.system {}\n", ["line 1", "could not determine a constructor"]),
        ("a.json", b'{"a": "\xff"}', ["byte 7 is not UTF-8"]),
        pytest.param("a.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", ["too deeply"], id="deep JSON"),
        pytest.param("a.yaml", "a: " + "[" * 10_000 + "]" * 10_000, ["too deeply"], id="deep YAML"),
        ("a.toml", "a = 1", ["'.toml'", ".json, .yaml or .yml"]),
    ],
)
def test_a_broken_file_is_named_with_line_and_column(
    tmp_path: Path, name: str, text: str | bytes, parts: list[str]
) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(UserError) as error:
        read_file(path)
    assert str(error.value).startswith(f"{path}: ")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "line", "key"),
    [
        ("a.json", '{\n "a": {"x": 1},\n "b": {"x": 2},\n "a": 3\n}', "line 4, column 2", "'a'"),
        ("a.json", '{"list": [{"k": 1}, {"k": "}{\\"k\\": ",\n "k": 3}]}', "line 2, column 2", "'k'"),
        ("a.yaml", "a: 1\nb:\n  x: 1\n  'x': 2\n", "line 4, column 3", "'x'"),
        ("a.yaml", "a: {k: 1, k: 2}\n", "line 1, column 11", "'k'"),
    ],
)
def test_a_key_given_twice_is_an_error(tmp_path: Path, name: str, text: str, line: str, key: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(UserError, match=line) as error:
        read_file(path)
    assert f"key {key} was already given on line " in str(error.value)


def test_equal_keys_in_different_objects_are_fine(tmp_path: Path) -> None:
    text = '{"a": {"a": 1, "b": "\\"a\\": {"}, "b": [{"a": 1}, {"a": 2}], "c": "a"}'
    assert len(read_file(write(tmp_path, "a.json", text))) == 3


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "model.json", "{}")
    with pytest.raises(UserError, match=r"mode\.json: no such file\. Did you mean 'model\.json'\?"):
        read_file(tmp_path / "mode.json")
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "no" / "such" / "folder.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: cannot be read"):
        read_file(tmp_path / "folder.json")
