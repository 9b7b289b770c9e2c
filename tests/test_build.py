"""Building objects from `_target_` words: what is built, and every message about what cannot be."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest

from runner.build import accepts, build, check, find, is_spec
from runner.errors import InputError, Problem


class Box:
    """Takes anything plain."""

    def __init__(
        self, size: int, ratio: float = 1.0, name: str = "box", open: bool = False, inside: Any = None
    ) -> None:
        self.size, self.ratio, self.name, self.open, self.inside = size, ratio, name, open, inside

    @classmethod
    def small(cls) -> Box:
        return cls(1)


def pair(first: Any, second: Any = None, /, *rest: Any, **more: Any) -> tuple[Any, ...]:
    return (first, second, *rest, more)


def only(a: int, b: int) -> int:
    return a + b


CONSTANT = 3
HERE = __name__


def box(**arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.Box", **arguments}


def no(target: Any) -> Problem:
    with pytest.raises(InputError) as caught:
        find(target, "model._target_")
    (problem,) = caught.value.problems
    assert problem.key == "model._target_"
    assert problem.value == target
    return problem


# --- finding ----------------------------------------------------------------------------------------------------------


def test_classes_functions_and_what_is_inside_them_are_found() -> None:
    assert find("collections.OrderedDict").__name__ == "OrderedDict"
    assert find(f"{HERE}.Box") is Box
    assert find(f"{HERE}.Box.small")().size == 1
    assert find("os.path.join")("a", "b") == "a/b"
    assert find("builtins.dict") is dict


@pytest.mark.parametrize("target", ["", "Linear", ".a", "a..b", "a.b-c", "a b.c", 5, None, ["a"]])
def test_no_dotted_name(target: Any) -> None:
    problem = no(target)
    assert problem.why == "is not a dotted name"
    assert problem.fix == "write package.module.Name"


def test_a_missing_package_is_named() -> None:
    problem = no("nosuchpackage.module.Name")
    assert problem.why == "needs the package nosuchpackage, which is not installed"
    assert problem.fix.startswith("pip install nosuchpackage; if it is your own, put nosuchpackage.py into")


@pytest.mark.parametrize(("target", "package"), [("cv2.imread", "opencv-python"), ("sklearn.svm.SVC", "scikit-learn")])
def test_a_package_that_is_called_otherwise_on_the_index(
    monkeypatch: pytest.MonkeyPatch, target: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, target.partition(".")[0], None)
    assert no(target).fix == f"pip install {package}, or mend the name"


def test_a_missing_plugin_says_where_plugins_lie() -> None:
    problem = no("plugins.nosuchplugin.Model")
    assert problem.why == "there is no plugins.nosuchplugin"
    assert "plugins/" in problem.fix


def test_an_unknown_attribute_has_a_nearest_one() -> None:
    problem = no("collections.OrderdDict")
    assert problem.why == "collections has no OrderdDict"
    assert problem.fix.startswith("did you mean collections.OrderedDict")
    assert no(f"{HERE}.Box.smal").fix == f"did you mean {HERE}.Box.small?"
    assert no("collections.Zzzzzzz").fix == "look at its names"


def test_an_unknown_module_of_a_package_that_is_there() -> None:
    problem = no("collections.abd.Mapping")
    assert problem.why == "collections has no abd"
    assert problem.fix == "did you mean collections.abc?"


def test_modules_and_constants_cannot_be_called() -> None:
    assert no("os.path").why == "is a module, which cannot be called"
    problem = no(f"{HERE}.CONSTANT")
    assert problem.why == "is a int, which cannot be called"
    assert problem.fix == "name a class or a function"


def module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return f"{name}.Model"


def test_a_module_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = no(module(tmp_path, monkeypatch, "broken_on_purpose", "1 / 0"))
    assert problem.why == "importing broken_on_purpose failed: ZeroDivisionError: division by zero"
    assert problem.fix == "mend that module"


def test_a_module_with_a_syntax_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SyntaxError" in no(module(tmp_path, monkeypatch, "bad_syntax_on_purpose", "def (:")).why


def test_a_module_that_lacks_a_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = no(module(tmp_path, monkeypatch, "lacks_on_purpose", "import nosuchpackage.inner"))
    assert problem.why == "needs the package nosuchpackage, which is not installed"


def test_a_module_that_says_itself_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "raise ModuleNotFoundError('install the thing. It is nice')"
    problem = no(module(tmp_path, monkeypatch, "says_on_purpose", text))
    assert "install the thing. It is nice" in problem.why
    assert problem.why.startswith("importing says_on_purpose failed")


def test_a_lazy_attribute_that_fails_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "def __getattr__(name):\n    raise RuntimeError('needs another torch')"
    problem = no(module(tmp_path, monkeypatch, "lazy_on_purpose", text))
    assert problem.why == "importing lazy_on_purpose.Model failed: RuntimeError: needs another torch"


# --- checking ---------------------------------------------------------------------------------------------------------


def problems(spec: Any, **how: Any) -> list[tuple[str | None, str]]:
    return [(problem.key, problem.why) for problem in check(spec, "model", **how)]


def test_a_good_spec_has_no_problem_and_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Box, "__init__", functools.wraps(Box.__init__)(lambda *a, **k: pytest.fail("built")))
    assert check(box(size=1, inside=box(size=2)), "model") == []
    assert check({"_target_": f"{HERE}.pair", "_args_": [1, 2, 3], "x": 1}, "model") == []
    assert check(5, "model") == []
    assert check(None, "model") == []


def test_a_wrong_argument_has_a_nearest_one_and_the_list() -> None:
    (problem,) = check(box(size=1, ratoi=0.5), "model")
    assert (problem.key, problem.value) == ("model.ratoi", 0.5)
    assert problem.why == f"{HERE}.Box has no argument of that name"
    assert problem.fix == "did you mean ratio? It takes size, ratio, name, open, inside"
    (problem,) = check({"_target_": f"{HERE}.Box.small", "zzz": 1}, "model")
    assert problem.fix == "It takes none"


def test_missing_arguments_are_all_named() -> None:
    (problem,) = check({"_target_": f"{HERE}.only"}, "model")
    assert (problem.key, problem.why) == ("model", f"{HERE}.only needs a, b")
    assert problem.fix == "add model.a=…, model.b=…"


def test_what_the_runner_gives_is_not_missing_and_not_to_be_given() -> None:
    spec = {"_target_": f"{HERE}.only"}
    assert problems(spec, given=1, also=("b",)) == []
    assert problems(spec, given=2) == []
    assert problems({**spec, "a": 1, "b": 2}, given=1) == [("model.a", "is given by the runner itself")]


def test_an_argument_that_is_also_among_the_positional_ones() -> None:
    (problem,) = check({"_target_": f"{HERE}.only", "_args_": [1], "a": 1, "b": 2}, "model")
    assert (problem.key, problem.why) == ("model.a", "is given twice: _args_ has it too")


def test_too_many_positional_arguments() -> None:
    spec = {"_target_": f"{HERE}.only", "_args_": [1, 2, 3]}
    assert problems(spec) == [("model._args_", f"{HERE}.only takes 2 positional arguments")]
    assert problems({**spec, "_args_": [1, 2]}, given=1) == [
        ("model._args_", f"{HERE}.only takes 2 positional arguments")
    ]
    assert problems({"_target_": f"{HERE}.pair", "_args_": list(range(9))}) == []


def test_positional_only_arguments_cannot_be_given_by_name() -> None:
    assert problems({"_target_": f"{HERE}.pair", "first": 1}) == []  # goes to **more, which takes any
    assert problems({"_target_": "operator.add", "a": 1, "b": 2})[0] == (
        "model.a",
        "operator.add has no argument of that name",
    )


def test_a_partial_may_lack_arguments_but_not_have_wrong_ones() -> None:
    assert problems({"_target_": f"{HERE}.only", "_partial_": True}) == []
    assert problems({"_target_": f"{HERE}.only", "_partial_": True, "c": 1})[0][0] == "model.c"


@pytest.mark.parametrize(
    ("argument", "value", "why"),
    [
        ("size", "big", "must be a whole number"),
        ("size", 1.5, "must be a whole number"),
        ("size", 1e3, "must be a whole number"),
        ("size", True, "must be a whole number"),
        ("size", float("inf"), "must be a whole number"),
        ("ratio", "high", "must be a number"),
        ("ratio", False, "must be a number"),
        ("open", 1, "must be true or false"),
        ("open", "yes", "must be true or false"),
        ("name", 5, "must be a word"),
    ],
)
def test_plain_types_are_checked(argument: str, value: Any, why: str) -> None:
    (problem,) = check(box(**{"size": 1, argument: value}), "model")
    assert (problem.key, problem.why, problem.value) == (f"model.{argument}", why, value)


def test_a_float_that_is_whole_is_told_how_to_be_written() -> None:
    (problem,) = check(box(size=1e3), "model")
    assert problem.fix == "write 1000"


def test_right_types_and_what_is_no_plain_type_pass() -> None:
    assert check(box(size=3, ratio=2, open=True, name="x", inside=5), "model") == []
    assert check(box(size=None), "model") == []
    assert check(box(size=box(size=1)), "model") == []


def test_all_problems_at_once_with_their_keys() -> None:
    spec = box(
        size="x",
        inside=[box(), {"deep": box(size=1, wrong=2), "_target_": "nosuchpackage.Name"}],
        _args_=[],
    )
    keys = [problem.key for problem in check(spec, "model")]
    assert keys == ["model.size", "model.inside.0", "model.inside.1._target_", "model.inside.1.deep.wrong"]


def test_positional_specs_are_checked() -> None:
    assert problems({"_target_": f"{HERE}.pair", "_args_": [box(), 1]}) == [
        ("model._args_.0", f"{HERE}.Box needs size")
    ]


def test_specs_are_left_alone_where_they_are_not_built() -> None:
    assert problems(box(size=1, inside={"_target_": "nosuchpackage.Name"}, _recursive_=False)) == []


def test_a_target_without_a_signature_is_not_checked() -> None:
    assert check({"_target_": "builtins.dict", "anything": 1}, "model") == []


# --- building ---------------------------------------------------------------------------------------------------------


def test_nested_specs_are_built_first() -> None:
    made = build(box(size=1, inside={"list": [box(size=2), 3], "plain": {"a": [1]}}))
    assert type(made) is Box
    assert type(made.inside["list"][0]) is Box
    assert made.inside["list"][0].size == 2
    assert made.inside["list"][1] == 3
    assert made.inside["plain"] == {"a": [1]}


def test_values_without_a_target_come_back_as_copies() -> None:
    given = {"a": [1, {"b": 2}]}
    found = build(given)
    assert found == given
    assert found is not given
    assert found["a"] is not given["a"]
    assert build("word") == "word"
    assert build(None) is None


def test_positional_arguments_come_after_the_given_ones() -> None:
    spec = {"_target_": f"{HERE}.pair", "_args_": [2, box(size=3)], "x": 4}
    first, second, third, more = build(spec, 1, y=5)
    assert (first, second, third.size, more) == (1, 2, 3, {"x": 4, "y": 5})


def test_a_partial_is_a_plain_functools_partial() -> None:
    made = build({"_target_": f"{HERE}.only", "_partial_": True, "b": 2})
    assert type(made) is functools.partial
    assert made.func is only
    assert made(1) == 3
    inner = build(box(size=1, inside={"_target_": f"{HERE}.only", "_partial_": True})).inside
    assert type(inner) is functools.partial


def test_not_recursive_hands_specs_on() -> None:
    inside = box(size=2)
    assert build(box(size=1, inside=inside, _recursive_=False)).inside is inside
    args = build({"_target_": f"{HERE}.pair", "_args_": [inside], "_recursive_": False})
    assert args[0] is inside


def test_convert_is_accepted_and_means_nothing() -> None:
    assert build(box(size=1, _convert_="all")).size == 1
    assert check(box(size=1, _convert_="all"), "model") == []


def test_a_call_that_fails_shows_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError):
        build({"_target_": "operator.truediv", "_args_": [1, 0]})


def test_is_spec_and_accepts() -> None:
    assert is_spec({"_target_": "a.b"})
    assert not is_spec({"target": "a.b"})
    assert not is_spec("a.b")
    assert accepts(only, "a")
    assert not accepts(only, "c")
    assert not accepts(5, "c")
