"""torch.compile for a model or for each of its blocks, in place."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from runner.engine.wrapping import blocks_of
from runner.errors import Problem, wrong

Options = bool | Mapping[str, Any]

SCOPES = ("model", "block")
#: What torch.compile takes and a configuration cannot say: they are not plain values, or the runner's own affair.
_NOT_OURS = frozenset({"model", "disable", "name", "shapes_spec"})
_KINDS: dict[str, tuple[type, ...]] = {
    "fullgraph": (bool,),
    "dynamic": (bool,),
    "backend": (str,),
    "mode": (str,),
    "options": (Mapping,),
    "recompile_limit": (int,),
    "isolate_recompiles": (bool,),
}
#: Backends that run the captured graph as it is: nothing there draws the same random numbers a second time.
_NO_RECOMPUTATION = frozenset({"eager", "eager_noexcept", "eager_debug", "pre_dispatch_eager"})


def check(options: Options, device: torch.device, checkpointing: str = "none") -> list[Problem]:
    """What cannot be compiled so, told before a model exists: options, backend, what it needs on this machine.

    Args:
        options: false, true or a mapping: options of torch.compile and `scope`.
        checkpointing: activation_checkpointing, which some backends would do wrong.
    """
    if options is False:
        return []
    given = {} if options is True else dict(options)
    scope = given.pop("scope", "model")
    problems = []
    if scope not in SCOPES:
        problems.append(Problem("compile.scope", "is no part of a model", f"one of {', '.join(SCOPES)}", value=scope))
    problems += _check_options(given)
    if problems:
        return problems
    backend = given.get("backend") or "inductor"
    problems += _check_backend(backend, given, checkpointing)
    if not problems and backend == "inductor":
        problems += _check_tools(device)
    return problems


def _check_options(given: Mapping[str, Any]) -> list[Problem]:
    known = [name for name in inspect.signature(torch.compile).parameters if name not in _NOT_OURS]
    problems = []
    for name, value in given.items():
        if name not in known:
            close = get_close_matches(name, [*known, "scope"], 1)
            fix = f"did you mean {close[0]}? " if close else ""
            fix = f"{fix}It takes scope, {', '.join(known)}"
            problems.append(Problem(f"compile.{name}", "torch.compile has no option of that name", fix, value=value))
            continue
        kinds = _KINDS.get(name)
        if value is not None and kinds is not None and (not isinstance(value, kinds) or _is_bool_for_int(value, kinds)):
            what = {bool: "true or false", str: "a word", Mapping: "a mapping", int: "a whole number"}[kinds[0]]
            problems.append(Problem(f"compile.{name}", f"must be {what}", value=value))
    if given.get("mode") is not None and given.get("options") is not None:
        problems.append(Problem("compile.options", "cannot be given together with compile.mode", "give one of the two"))
    return problems


def _is_bool_for_int(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, bool) and bool not in kinds


def _check_backend(backend: str, given: Mapping[str, Any], checkpointing: str) -> list[Problem]:
    """Names that torch has to know. Imports the compiler, which whoever asks for it needs anyway."""
    from torch._dynamo.backends.registry import list_backends

    backends = sorted({*list_backends(exclude_tags=()), "inductor"})
    if backend not in backends:
        usual = sorted({*list_backends(), "inductor", "aot_eager"})
        return [Problem("compile.backend", "is no backend here", f"one of {', '.join(usual)}", value=backend)]
    if checkpointing != "none" and backend in _NO_RECOMPUTATION:
        why = f"does not repeat random numbers, so activation_checkpointing={checkpointing} would train wrongly"
        return [Problem("compile.backend", why, "compile.backend=aot_eager or inductor", value=backend)]
    problems = []
    if given.get("mode") is not None:
        from torch._inductor import list_mode_options

        modes = ["default", *(name for name in list_mode_options() if name != "default")]
        if backend != "inductor":
            problems.append(Problem("compile.mode", f"the backend {backend} has no modes", "leave it out"))
        elif given["mode"] not in modes:
            fix = f"one of {', '.join(modes)}"
            problems.append(Problem("compile.mode", "is no mode of the inductor", fix, value=given["mode"]))
    if given.get("options") is not None and backend == "inductor":
        from torch._inductor import list_options

        known = list_options()
        for name, value in given["options"].items():
            if name.replace("-", "_") not in known:
                close = get_close_matches(name, known, 3)
                fix = f"did you mean {' or '.join(close)}?" if close else "see torch._inductor.list_options()"
                key = f"compile.options.{name}"
                problems.append(Problem(key, "the inductor has no option of that name", fix, value=value))
    return problems


def _check_tools(device: torch.device) -> list[Problem]:
    """Whether the inductor can build its kernels here."""
    without = "compile={backend: aot_eager} (which needs none and is not quicker), or compile=false"
    if device.type == "cpu":
        compiler = cpp_compiler()
        if compiler is None:
            why = "the inductor builds its kernels for a CPU with a C++ compiler, and there is none"
            return [Problem("compile", why, f"install one (apt install g++, or dnf install gcc-c++), or {without}")]
    elif device.type == "cuda" and importlib.util.find_spec("triton") is None:
        why = "the inductor builds its kernels for a GPU with triton, which is not installed"
        return [Problem("compile", why, f"pip install triton, or {without}")]
    return []


def cpp_compiler() -> str | None:
    """The C++ compiler that the inductor would use, None where it finds none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except Exception:  # its own kind of error, and FileNotFoundError of what it tries to run
        return None


def compile_model(model: nn.Module, options: Options) -> list[str]:
    """Compiles the whole model, or each of its repeated blocks, at their first call; returns what is compiled.

    In place: classes and parameter names stay as they are. To be called before a backend wraps the model and after
    activation checkpointing, which the compiler then sees and plans with. `scope: block` compiles one graph for all
    blocks of a kind and leaves alone what happens between them, such as the gathering of shards.
    """
    if options is False:
        return []
    given = {} if options is True else dict(options)
    scope = given.pop("scope", "model")
    given = {name: value for name, value in given.items() if value is not None}
    given.setdefault("backend", "inductor")
    if isinstance(given.get("options"), Mapping):
        given["options"] = dict(given["options"])
    if scope == "model":
        model.compile(**given)
        return [type(model).__name__]
    blocks = blocks_of(model, None)
    if not blocks:
        why = "the model has no repeated blocks (a class used several times)"
        raise wrong("compile.scope", why, "compile.scope=model", value=scope)
    for _, block in blocks:
        block.compile(**given)
    return [name for name, _ in blocks]
