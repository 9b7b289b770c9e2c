"""`runner recipes`, `--help`, `--info`: what is there, without importing torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.help import usage
from runner.cli.hydra import delegate
from runner.cli.recipes import recipes
from runner.errors import InputError
from runner.places import BUILTIN
from runner.recipe.overrides import parse_arguments

RECIPES = sorted(path.stem for path in (BUILTIN / "recipes").glob("*.yaml"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list(here, capsys):
    assert recipes([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    assert all(line.endswith("built-in") for line in lines)
    assert "A tiny network" in next(line for line in lines if line.startswith("smoke"))


def test_every_recipe_has_a_description_and_its_command():
    for name in RECIPES:
        first, second = (BUILTIN / f"recipes/{name}.yaml").read_text().splitlines()[:2]
        assert first.startswith("# ")
        assert second == f"# python -m runner +recipe={name}"


def test_the_users_own_come_first(here, capsys):
    (here / "recipes").mkdir()
    (here / "recipes/smoke.yaml").write_text("# Mine.\nname: smoke\n")
    (here / "recipes/other.yaml").write_text("name: other\n")
    assert recipes(["--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert sorted(found) == sorted([*RECIPES, "other"])
    assert found["smoke"] == {
        "name": "smoke",
        "description": "Mine.",
        "from": "./recipes",
        "file": str(here / "recipes/smoke.yaml"),
        "replaces": "built-in",
    }
    assert found["other"]["description"] == ""
    assert recipes([]) == 0
    assert "./recipes, replaces the built-in one" in capsys.readouterr().out


def test_one_recipe_is_printed(here, capsys):
    assert recipes(["smoke"]) == 0
    assert capsys.readouterr().out == (BUILTIN / "recipes/smoke.yaml").read_text()
    assert recipes(["smoke.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("# A tiny network")


@pytest.mark.parametrize(
    ("argv", "fix"),
    [(["smok"], "did you mean smoke?"), (["--x"], "usage"), (["-cd", "/nosuch"], "name one"), (["a", "b"], "usage")],
)
def test_wrong_arguments(argv, fix, here):
    with pytest.raises(InputError) as caught:
        recipes(argv)
    assert fix in caught.value.problems[0].fix


def test_a_folder_without_recipes_and_strange_files(here, capsys):
    (here / "recipes").mkdir()
    (here / "recipes/broken.yaml").write_bytes(b"\xff\xfe\0")
    (here / "recipes/folder.yaml").mkdir()
    (here / "recipes/.hidden.yaml").write_text("x: 1")
    assert recipes([]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == sorted([*RECIPES, "broken"])


def test_the_help_fits_and_is_complete(here):
    text = usage(here)
    assert max(map(len, text.splitlines())) <= 80
    for word in (*RECIPES, "bf16_full", "batch.global_size", "checkpoint.every.steps", "runner recipes", "--cfg job"):
        assert word in text


def test_info(here, capsys):
    assert delegate(parse_arguments(["--info", "+recipe=smoke", "precision=bf16"])) == 0
    text = capsys.readouterr().out
    assert "precision: bf16" in text
    assert str(BUILTIN / "recipes/smoke.yaml") in text
    assert "built-in" in text
    assert delegate(parse_arguments(["--info", "searchpath"])) == 0
    assert delegate(parse_arguments(["--hydra-help"])) == 0
    with pytest.raises(InputError):
        delegate(parse_arguments(["-i", "defaults", "+recipe=smok"]))


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["--help"], ["--info", "+recipe=smoke"], ["--cfg", "job", "+recipe=smoke"]]
)
def test_nothing_imports_torch(arguments, here):
    code = (
        f"import sys; from runner.__main__ import main; code = main({arguments!r})\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "smoke" in done.stdout
