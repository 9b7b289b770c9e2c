"""`_target_` words to objects: found, checked against the signature, built.

Keeps Hydra's words (`_target_`, `_partial_`, `_args_`, `_recursive_`, `_convert_`) and gives plain objects and plain
functools.partial, so that calling what was built costs nothing more than calling it.
"""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from runner.errors import InputError, Problem

WORDS = frozenset({"_target_", "_partial_", "_args_", "_recursive_", "_convert_"})


def is_spec(value: Any) -> bool:
    """Whether a plain value says what to build."""
    return isinstance(value, Mapping) and "_target_" in value


def find(target: str, key: str = "_target_") -> Any:
    """The object that a dotted name names. Raises InputError: package missing, attribute unknown, import failing."""
    parts = target.split(".") if isinstance(target, str) else []
    if not all(part.isidentifier() for part in parts) or len(parts) < 2:
        raise _no(key, target, "is not a dotted name", "write package.module.Name")
    found, depth = _module(parts, key, target)
    for i in range(depth, len(parts)):
        try:
            found = getattr(found, parts[i])
        except AttributeError:
            where = ".".join(parts[:i])
            if where == "plugins":
                raise _missing(key, target, f"plugins.{parts[i]}") from None
            close = get_close_matches(parts[i], [name for name in dir(found) if not name.startswith("_")], 3)
            fix = f"did you mean {' or '.join(f'{where}.{name}' for name in close)}?" if close else "look at its names"
            raise _no(key, target, f"{where} has no {parts[i]}", fix) from None
        except Exception as error:
            # A package that imports its parts only when they are asked for.
            raise _broken(key, target, ".".join(parts[: i + 1]), error) from error
    if not callable(found):
        what = "a module" if inspect.ismodule(found) else f"a {type(found).__name__}"
        raise _no(key, target, f"is {what}, which cannot be called", "name a class or a function")
    return found


def _module(parts: list[str], key: str, target: str) -> tuple[Any, int]:
    """The innermost module that the name goes through, and how many of its parts that takes."""
    module: Any = None
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None:
                raise _broken(key, target, name, error) from error
            if error.name != name or module is None:
                raise _missing(key, target, error.name) from error
            return module, depth - 1
        except Exception as error:
            raise _broken(key, target, name, error) from error
    return module, len(parts)


def check(spec: Any, key: str, given: int = 0, also: Sequence[str] = ()) -> list[Problem]:
    """All problems of a spec and the specs inside it, found by signature, without building anything.

    Args:
        given: positional arguments that the runner adds in front.
        also: keyword arguments that the runner adds where the signature has them.
    """
    if isinstance(spec, (list, tuple)):
        return [problem for i, item in enumerate(spec) for problem in check(item, f"{key}.{i}")]
    if not isinstance(spec, Mapping):
        return []
    inside = {
        name: value
        for name, value in spec.items()
        if name not in WORDS - {"_args_"} and isinstance(value, (Mapping, list))
    }
    problems = (
        []
        if spec.get("_recursive_") is False
        else [problem for name, value in inside.items() for problem in check(value, f"{key}.{name}")]
    )
    if not is_spec(spec):
        return problems
    try:
        target = find(spec["_target_"], f"{key}._target_")
    except InputError as error:
        return [*error.problems, *problems]
    return [*_check_call(target, spec, key, given, also), *problems]


def _check_call(target: Any, spec: Mapping[str, Any], key: str, given: int, also: Sequence[str]) -> list[Problem]:
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return []
    parameters = signature.parameters
    named = {name: value for name, value in spec.items() if name not in WORDS}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = given + len(spec.get("_args_", ()))
    taken = {p.name for p in positional[:count]}
    problems = []
    for name, value in named.items():
        if name in taken:
            ours = any(p.name == name for p in positional[:given])
            why = "is given by the runner itself" if ours else "is given twice: _args_ has it too"
            problems.append(Problem(f"{key}.{name}", why, "remove it", value=value))
        elif name not in by_name and not takes_any:
            open_names = [n for n in by_name if n not in taken]
            close = get_close_matches(name, open_names, 1)
            fix = f"did you mean {close[0]}? " if close else ""
            problems.append(
                Problem(
                    f"{key}.{name}",
                    f"{spec['_target_']} has no argument of that name",
                    f"{fix}It takes {', '.join(open_names) or 'none'}",
                    value=value,
                )
            )
    if count > len(positional) and not any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        problems.append(
            Problem(f"{key}._args_", f"{spec['_target_']} takes {len(positional)} positional arguments", value=count)
        )
    if not spec.get("_partial_"):
        missing = [
            p.name
            for p in parameters.values()
            if p.default is p.empty
            and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            and p.name not in taken
            and p.name not in named
            and p.name not in also
        ]
        if missing:
            problems.append(
                Problem(
                    key,
                    f"{spec['_target_']} needs {', '.join(missing)}",
                    f"add {', '.join(f'{key}.{name}=…' for name in missing)}",
                )
            )
    return [*problems, *_check_types(target, named, key)]


def _check_types(target: Any, named: Mapping[str, Any], key: str) -> list[Problem]:
    """Plain numbers and words against annotations that are plain types; anything subtler is the target's business."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:
        return []
    problems = []
    for name, value in named.items():
        hint = hints.get(name)
        if hint not in (int, float, bool, str) or value is None or isinstance(value, (Mapping, list)):
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        right = {
            int: number and isinstance(value, int),
            float: number,
            bool: isinstance(value, bool),
            str: isinstance(value, str),
        }[hint]
        if not right:
            kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[hint]
            whole = hint is int and number and float(value).is_integer()
            problems.append(
                Problem(f"{key}.{name}", f"must be {kind}", f"write {int(value)}" if whole else "", value=value)
            )
    return problems


def build(spec: Any, *given: Any, **also: Any) -> Any:
    """Builds what a spec names, the specs inside its arguments first; other values come back as plain copies.

    `given` and `also` are arguments of the runner's own for the outermost target. `_partial_: true` gives a
    functools.partial.
    """
    if isinstance(spec, (list, tuple)):
        return [build(item) for item in spec]
    if not isinstance(spec, Mapping):
        return spec
    deep = spec.get("_recursive_", True)
    arguments = {k: build(v) if deep else v for k, v in spec.items() if k not in WORDS}
    if "_target_" not in spec:
        return arguments
    target: Callable[..., Any] = find(spec["_target_"])
    positional = [*given, *(build(v) if deep else v for v in spec.get("_args_", ()))]
    if spec.get("_partial_"):
        return partial(target, *positional, **arguments, **also)
    return target(*positional, **arguments, **also)


def accepts(target: Any, name: str) -> bool:
    """Whether a callable takes a keyword argument of this name."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters


def _no(key: str, target: str, why: str, fix: str) -> InputError:
    return InputError(Problem(key, why, fix, value=target))


def _broken(key: str, target: str, name: str, error: Exception) -> InputError:
    return _no(key, target, f"importing {name} failed: {type(error).__name__}: {error}", "mend that module")


def _missing(key: str, target: str, package: str) -> InputError:
    top = package.partition(".")[0]
    if top == "plugins":
        return _no(key, target, f"there is no {package}", "plugins lie in plugins/ of the current directory")
    fix = (
        f"pip install {_ON_INDEX[top]}, or mend the name"
        if top in _ON_INDEX
        else (f"pip install {top}; if it is your own, put {top}.py into the directory where you start")
    )
    return _no(key, target, f"needs the package {top}, which is not installed", fix)


#: Import names whose package has another name on the index.
_ON_INDEX = {
    "cv2": "opencv-python",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "skimage": "scikit-image",
    "transformers": "'runner[text]'",
    "tokenizers": "'runner[text]'",
    "datasets": "'runner[text]'",
}
