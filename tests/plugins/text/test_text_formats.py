"""TSV, CSV and JSON lines: what is read, and what each mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plugins.text.formats import Columns, read
from runner.errors import InputError

ONE = Columns("sentence", "label")
PAIR = Columns("a", "y", "b")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problem(path: Path, columns: Columns = ONE, **options: object) -> tuple[str, str, str]:
    with pytest.raises(InputError) as caught:
        read(path, "data.train", columns, **options)  # type: ignore[arg-type]
    (found,) = caught.value.problems
    assert found.fix
    return str(found.key), found.why, found.fix


def test_tsv_is_read_without_quoting_and_with_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", '\ufeffsentence\tlabel\r\n"Not" a, \u2028quote"\t1\r\n\r\nsecond\t0\r\n')
    table = read(path, "data.train", ONE)
    assert table.texts == ['"Not" a, \u2028quote"', "second"]
    assert table.labels == [1, 0]
    assert table.lines == [2, 4]
    assert table.pairs is None


def test_csv_is_read_with_quoting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'label,sentence\npos,"one, ""two""\nlines"\nneg,three\n')
    table = read(path, "data.train", ONE)
    assert table.texts == ['one, "two"\nlines', "three"]
    assert table.labels == ["pos", "neg"]
    assert table.lines == [2, 4]


def test_json_lines_with_pairs(tmp_path: Path) -> None:
    rows = [{"a": "x\ty", "b": "z", "y": 3}, {"a": "", "b": "w", "y": -1, "more": []}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    table = read(path, "data.train", PAIR)
    assert (table.texts, table.pairs, table.labels) == (["x\ty", ""], ["z", "w"], [3, -1])


def test_booleans_and_listed_labels_are_words(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '{"sentence": "x", "label": true}\n{"sentence": "y", "label": false}\n')
    assert read(path, "data.train", ONE).labels == ["true", "false"]
    path = write(tmp_path / "b.tsv", "sentence\tlabel\nx\t2\ny\tnone\n")
    assert read(path, "data.train", ONE, as_text=True).labels == ["2", "none"]


def test_the_format_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "sentence\tlabel\nx\t1\n")
    assert read(path, "data.train", ONE, format="tsv").texts == ["x"]
    key, why, fix = problem(path)
    assert key == "data.format"
    assert "a.txt" in why
    assert "tsv, csv, jsonl" in fix
    assert problem(path, format="xml")[:2] == ("data.format", "unknown format")


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    key, why, fix = problem(tmp_path / "no.tsv")
    assert key == "data.train"
    assert why == f"no such file: {tmp_path / 'no.tsv'}"
    assert str(Path.cwd()) in fix
    assert "cannot be read" in problem(write(tmp_path / "x", "") and tmp_path, format="tsv")[1]


@pytest.mark.parametrize(
    ("name", "content", "why", "fix"),
    [
        ("a.tsv", "sentense\tlabel\nx\t1", "1: no column 'sentence'; there are 'sentense', 'label'", "'sentense'"),
        ("a.csv", "sentence,y\nx,1\n", "1: no column 'label'; there are 'sentence', 'y'", "data.label="),
        ("a.jsonl", '{"sentence": "x"}\n', "1: no column 'label'; there are 'sentence'", "data.label="),
        ("a.tsv", "", " the file has no samples", "header"),
        ("a.tsv", "sentence\tlabel\n\n", " the file has no samples", "header"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\tz\t0\n", "3: 3 columns where the header has 2", "separator"),
        ("a.csv", "sentence,label\nx,1\ny\n", "3: 1 columns where the header has 2", "header"),
        ("a.csv", 'sentence,label\n"x"y,1\n', "2: not CSV", "quote"),
        ("a.jsonl", '{"sentence": "x", "label": 1}\n{"sentence\n', "2: not JSON", "object a line"),
        ("a.jsonl", "[1]\n", "1: a JSON list, not an object", "object a line"),
        ("a.jsonl", '{"sentence": 1, "label": 1}', "1: the text is 1, not a string", "strings"),
        ("a.jsonl", '{"sentence": "x", "label": 0.5}', "1: the label in column 'label' is 0.5", "integers or words"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\t \n", "3: the label in column 'label' is ' '", "integers or words"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\to\nz\t0", "3: the label 'o' is a word where most are int", "data.labels"),
        ("a.tsv", "sentence\tlabel\nx\tn\ny\t1\nz\ty", "3: the label '1' is an integer where most", "data.labels"),
        ("a.tsv", b"sentence\tlabel\nx\t1\ncaf\xe9\t1\n", "3: not UTF-8", "UTF-8"),
        ("a.tsv", "sentence\tlabel\nx\t1\n".encode("utf-16"), "1: not UTF-8", "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_told_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, why: str, fix: str
) -> None:
    key, found_why, found_fix = problem(write(tmp_path / name, content))
    assert key == "data.train"
    assert found_why.startswith(f"{tmp_path / name}:{why}")
    assert fix in found_fix
