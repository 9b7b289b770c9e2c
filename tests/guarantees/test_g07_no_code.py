"""G7: a checkpoint cannot run code: not by what is in its files, and not by how the program reads files at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from guarantees.cases_g07 import Case, _payloads, cases, run

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = [*(ROOT / "runner").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]

#: A batch that one process of a job sends to its others, as the collectives do it.
ALLOWED = {"runner/train/fit.py": ["import pickle"]}

#: Between the job's own processes torch pickles what is gathered, scattered and broadcast; these modules do so.
EXCHANGING = {"gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object"}


@pytest.mark.parametrize("case", cases(40, seed=0), ids=str)
def test_forty_payloads_in_every_kind_of_file(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


def test_the_payloads_do_what_they_say(tmp_path: Path) -> None:
    """Else nothing would be shown."""
    import io
    import pickle

    import numpy
    import torch

    for name, payload in _payloads(tmp_path / "mark").items():
        if name.startswith("pickle"):
            pickle.loads(payload)
        elif name.startswith("torch"):
            torch.load(io.BytesIO(payload), weights_only=False)
        elif name.startswith("numpy"):
            numpy.load(io.BytesIO(payload), allow_pickle=True)
        else:
            continue
        for _ in range(200):
            if (tmp_path / "mark").exists():
                break
            import time

            time.sleep(0.01)
        (tmp_path / "mark").unlink()


def dangerous(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls by which data becomes code: (line, what)."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
                    yield node.lineno, f"import {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in ("eval", "exec", "compile", "os.system", "os.popen", "torch.hub.load", "builtins.eval"):
            yield node.lineno, called
        if called.endswith("torch.load") and given.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        if called.startswith("yaml.") and called.endswith((".load", ".load_all")):
            safe = any(ast.unparse(word) in ("yaml.SafeLoader", "yaml.CSafeLoader") for word in node.args[1:])
            if not safe and not given.get("Loader", "").endswith("SafeLoader"):
                yield node.lineno, called
        if given.get("shell", "False") != "False":
            yield node.lineno, f"{called} with a shell"
        if given.get("allow_pickle", "False") != "False" or given.get("weights_only", "True") == "False":
            yield node.lineno, f"{called} that unpickles"
        if given.get("trust_remote_code", "False") == "True":
            yield node.lineno, f"{called} with remote code"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_data_become_code(path: Path) -> None:
    found = [what for _, what in dangerous(ast.parse(path.read_text(encoding="utf-8")))]
    assert found == ALLOWED.get(str(path.relative_to(ROOT)), [])


def test_what_is_dangerous_is_seen() -> None:
    text = """
import pickle
from marshal import loads
torch.load(f)
torch.load(f, weights_only=False)
yaml.load(f)
yaml.load(f, Loader=yaml.Loader)
eval("1"); exec("1")
subprocess.run("ls", shell=True)
numpy.load(f, allow_pickle=True)
"""
    assert sorted({line for line, _ in dangerous(ast.parse(text))}) == list(range(2, 11))
    assert not list(dangerous(ast.parse("model.eval(); torch.load(f, weights_only=True); yaml.safe_load(f)")))


def test_only_collectives_pickle_and_only_these_modules_use_them() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in EXCHANGING and "ollectives" not in ast.unparse(node.value)
    }
    assert users == {
        "runner/checkpoint/peers.py",
        "runner/collectives.py",
        "runner/data/main.py",
        "runner/distributed.py",
    }
