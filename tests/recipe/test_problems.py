"""How problems are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import Mark, Problem
from runner.recipe.problems import nearest, place, render, show


def test_a_whole_report():
    problems = [
        Problem("model", "is missing", "name one"),
        Problem("optimizer.lr", "must be a number", "for example 1e-3", "abc"),
        Problem("seed", "must be a whole number", "", 1.5, Mark("command line")),
        Problem(None, "the file is empty", "", mark=Mark("/home/me/recipes/own.yaml", 9, 1)),
        Problem("wandb", "is not installed", "pip install wandb"),
    ]
    origins = {"optimizer": Mark("/home/me/recipes/own.yaml", 3, 1), "": Mark("/home/me/recipes/own.yaml")}
    assert render(problems, origins, directory=Path("/home/me")) == (
        "5 problems in the configuration\n"
        "\n"
        "command line: seed = 1.5\n"
        "  must be a whole number\n"
        "\n"
        "recipes/own.yaml: model\n"
        "  is missing\n"
        "  fix: name one\n"
        "\n"
        "recipes/own.yaml:3:1: optimizer.lr = abc\n"
        "  must be a number\n"
        "  fix: for example 1e-3\n"
        "\n"
        "recipes/own.yaml:9:1\n"
        "  the file is empty\n"
        "\n"
        "wandb\n"
        "  is not installed\n"
        "  fix: pip install wandb"
    )


def test_one_problem_is_said_in_the_singular():
    assert render([Problem("a", "b")], {}, directory=Path("/")).startswith("1 problem in")


def test_long_texts_are_wrapped_and_paths_are_not_cut():
    path = "/somewhere/" + "x" * 100 + "/file.yaml"
    text = render([Problem("a", "word " * 40, f"look into {path}")], {}, directory=Path("/"))
    assert path in text
    assert all(len(line) <= 80 for line in text.split("\n") if path not in line)


def test_many_problems_are_cut():
    text = render([Problem(f"k{i}", "x") for i in range(60)], {}, directory=Path("/"))
    assert text.startswith("60 problems")
    assert text.endswith("and 10 more")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"), (True, "true"), (3, "3"), (1e-05, "1e-05"), ("abc", "abc"), ("no", '"no"'), ("3", '"3"'),
        ("", '""'), ("a: b", '"a: b"'), ("a\nb\x1b", '"a\\nb\\u001b"'), ([1, "x"], "[1, x]"),
        ({"a": {"b": None}}, "{a: {b: null}}"),
        ("é.tsv", "é.tsv"), ("../a/b.tsv", "../a/b.tsv"), (10**700, "a number of more than 600 digits"),
    ],
)  # fmt: skip
def test_values(value, expected):
    assert show(value) == expected


def test_long_values_are_cut():
    assert len(show("x" * 10_000)) == 200
    assert len(show(list(range(10_000)))) == 200


def test_secrets_are_not_shown():
    assert show("hunter2", "hub_token") == "***"
    assert show({"api_key": "hunter2", "text_key": "x", "tokenizer": "bert"}, "a") == (
        "{api_key: ***, text_key: x, tokenizer: bert}"
    )
    assert "hunter2" not in render([Problem("a.password", "x", "", "hunter2")], {}, directory=Path("/"))


def test_places(tmp_path):
    assert place(Mark(str(tmp_path / "a/b.yaml"), 1, 2), tmp_path) == "a/b.yaml:1:2"
    assert place(Mark("/elsewhere/b.yaml", 1, 2), tmp_path) == "/elsewhere/b.yaml:1:2"
    assert place(None, tmp_path) == ""


def test_the_nearest_mark():
    origins = {"a": Mark("f", 1, 1), "a.b": Mark("f", 2, 1), "": Mark("recipe")}
    assert nearest(origins, "a.b.c") == Mark("f", 2, 1)
    assert nearest(origins, "a.x") == Mark("f", 1, 1)
    assert nearest(origins, "model") == Mark("recipe")
    assert nearest(origins, "resume") is None  # a default: it stands nowhere
    assert nearest(origins, "RANK") is None
    assert nearest(origins, None) is None
