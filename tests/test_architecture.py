"""The house, by its syntax trees: arrows go down, nothing acts at import, and each fact has one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import runner

PACKAGE = Path(runner.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "bundle" not in path.relative_to(PACKAGE).parts)

#: The floor of each room: a folder or file of the package.
FLOORS = {
    **dict.fromkeys(
        [
            *["errors", "distributed", "collectives", "debugging", "places", "keyed", "folder", "console", "signals"],
            *["heartbeat", "shares", "garbage"],
        ],
        1,
    ),
    **dict.fromkeys(
        ["checkpoint", "engine", "data", "metrics", "recipe", "build", "trust", "launch", "environment"], 2
    ),
    **dict.fromkeys(["train", "tasks"], 3),
    **dict.fromkeys(["assemble", "hooks", "trackers", "drift", "resume", "job", "api"], 4),
    **dict.fromkeys(["__main__", "cli"], 5),
}

#: What may be called while a module is imported: it makes a value and does nothing.
HARMLESS = {
    *[
        "frozenset",
        "set",
        "tuple",
        "type",
        "vars",
        "getattr",
        "dataclass",
        "field",
        "TypeVar",
        "Counter",
        "re.compile",
        "logging.getLogger",
    ],
    *["Path", "resolve", "is_dir", "startswith"],  # places: where the package lies; schema and hook: names of a class
    *["key", "group", "Mark", "Precision", "LossScaling", "Ranks"],  # values of our own
}


def name_of(path: Path) -> str:
    """The dotted name of a file of the package: runner.train.loop, runner.train for an __init__."""
    words = ("runner", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = {name_of(path): path for path in FILES}


def imports(node: ast.AST) -> Iterator[str]:
    """The absolute names that are imported anywhere below a node, members as package.module.member."""
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "relative import"
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


def at_run_time(module: ast.Module) -> ast.Module:
    """The tree without what stands under `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if ast.unparse(node.test) == "TYPE_CHECKING" else node

    return Strip().visit(ast.parse(ast.unparse(module)))


def module_behind(name: str) -> str | None:
    """The module of ours that an imported name stands for or lives in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str | None:
    words = module.split(".")
    return words[1] if len(words) > 1 else None


def ours(path: Path, *, types: bool) -> set[str]:
    """The modules of ours that a file imports."""
    found = {module_behind(name) for name in imports(tree(path) if types else at_run_time(tree(path)))}
    return {name for name in found if name is not None}


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 50
    assert ours(PACKAGE / "train" / "loop.py", types=True) == {
        "runner.distributed",
        "runner.heartbeat",
        "runner.signals",
        "runner.train.evaluate",
        "runner.train.feed",
        "runner.train.fit",
        "runner.train.not_finite",
        "runner.train.rollback",
        "runner.train.run",
        "runner.train.saving",
        "runner.train.step",
    }


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    rooms = {room(module) for module in MODULES} - {None}
    assert rooms == set(FLOORS)
    assert "utils" not in {word for module in MODULES for word in module.split(".")}


def test_arrows_go_down() -> None:
    up = [
        f"{module} -> {other}"
        for module, path in MODULES.items()
        for other in ours(path, types=True)
        if room(module) and room(other) and FLOORS[room(other)] > FLOORS[room(module)]
    ]
    assert up == []


def test_rooms_make_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        here = room(module)
        if here is not None:
            graph.setdefault(here, set()).update(
                {str(room(name)) for name in ours(path, types=True) if room(name)} - {here}
            )
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"rooms in a circle: {' -> '.join(reversed(error.args[1]))}")


def test_modules_make_no_circle() -> None:
    graph = {module: ours(path, types=False) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules in a circle: {' -> '.join(reversed(error.args[1]))}")


def users_of(*packages: str) -> set[str]:
    """The modules that import one of the packages, anywhere."""
    return {
        module
        for module, path in MODULES.items()
        if any(name.split(".")[0] in packages for name in imports(tree(path)))
    }


def test_only_main_cli_and_recipe_know_hydra() -> None:
    assert {room(module) for module in users_of("hydra", "omegaconf")} <= {"__main__", "cli", "recipe"}


def test_deepspeed_is_imported_in_its_adapter_only_inside_functions() -> None:
    assert users_of("deepspeed") <= {"runner.engine.deepspeed"}
    for module in users_of("deepspeed"):
        body = [node for node in tree(MODULES[module]).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any(name.split(".")[0] == "deepspeed" for node in body for name in imports(node))


def test_the_engine_knows_neither_the_loop_nor_checkpoints() -> None:
    known = {room(other) for path in (PACKAGE / "engine").glob("*.py") for other in ours(path, types=True)}
    assert known <= {"engine", "errors", "keyed", "distributed", "shares", None}


def test_plugins_are_never_imported() -> None:
    # places.py imports the namespace itself, to lengthen its search path.
    assert users_of("plugins") <= {"runner.places"}
    assert [name for name in imports(tree(PACKAGE / "places.py")) if name.startswith("plugins")] == ["plugins"]


def test_only_launch_and_distributed_read_the_environment() -> None:
    readers = set()
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            touches = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb")
            named = (
                isinstance(node, ast.ImportFrom)
                and node.module == "os"
                and any("env" in alias.name for alias in node.names)
            )
            if touches or named:
                readers.add(module)
    # DeepSpeed takes its device and rank from the environment only: its adapter sets them.
    readers -= {"runner.engine.deepspeed"}
    assert {room(module) for module in readers} <= {"launch", "distributed"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_opens_with_a_line_that_says_what_it_is(path: Path) -> None:
    text = ast.get_docstring(tree(path))
    assert text
    assert text.splitlines()[0].rstrip().endswith((".", ":", "?")) or len(text.splitlines()) > 1
    assert "Copyright" not in text


# --- nothing acts at import -------------------------------------------------------------------------------------------


def calls_at_import(body: list[ast.stmt]) -> Iterator[ast.Call]:
    """The calls that run while a module is imported: its own level, class bodies, decorators, defaults."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            outside: list[ast.AST] = [
                *node.decorator_list,
                *node.args.defaults,
                *[d for d in node.args.kw_defaults if d],
            ]
        elif isinstance(node, ast.ClassDef):
            yield from calls_at_import(node.body)
            outside = [*node.decorator_list, *node.bases, *node.keywords]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        else:
            outside = [node]
        for part in outside:
            yield from (call for call in walk_eagerly(part) if isinstance(call, ast.Call))


def walk_eagerly(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node, but for the bodies of lambdas."""
    yield node
    if not isinstance(node, ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from walk_eagerly(child)


def called(call: ast.Call) -> str:
    """The name by which a call stands on the list: `a.b`, or `b` where a value's method is called."""
    function = call.func
    if isinstance(function, ast.Call):
        return called(function)  # a class that is made and used at once
    text = ast.unparse(function)
    return text if text in HARMLESS or not isinstance(function, ast.Attribute) else function.attr


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_acts_at_import(path: Path) -> None:
    known = {*HARMLESS, *(node.name for node in tree(path).body if isinstance(node, ast.ClassDef))}
    calls = [call for call in calls_at_import(tree(path).body) if called(call) not in known]
    assert [f"line {call.lineno}: {ast.unparse(call)[:80]}" for call in calls] == []


def test_what_acts_at_import_is_found() -> None:
    """The test above sees it in the places where it can hide."""
    text = """
x = open("a")
import os; os.makedirs("b")
class A:
    y = setup()
    def f(self, z=now()): inner()
@register("c")
def g(): inner()
if True:
    h()
later = lambda: inner()
"""
    found = {called(call) for call in calls_at_import(ast.parse(text).body)}
    assert found == {"open", "makedirs", "setup", "now", "register", "h"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_loops_or_files_at_import(path: Path) -> None:
    loops = [node for node in tree(path).body if isinstance(node, (ast.For, ast.While, ast.With, ast.AsyncFor))]
    assert [node.lineno for node in loops] == []


def test_event_names_are_written_once() -> None:
    from runner.train.hook import EVENTS

    # As words: `on_x` in a string. Methods that implement an event are not a second list of the names.
    strings: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in EVENTS:
                strings.setdefault(module, []).append(node.value)
    # The loop names each event where it fires it; a hook may name the row that it adds itself to.
    assert set(strings) <= {"runner.train.loop", "runner.hooks.gradient_norm"}
    assert sorted(strings["runner.train.loop"]) == sorted(EVENTS)


def test_annotations_are_lazy_everywhere() -> None:
    lacking = [
        name_of(path)
        for path in FILES
        if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree(path).body)
        and "__future__.annotations" not in set(imports(tree(path)))
    ]
    assert lacking == []
