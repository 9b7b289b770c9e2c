"""Gadgets of a recipe from elsewhere: each is refused by one problem, and nothing of it is imported or called."""
# ruff: noqa: E501, RUF001 (a gadget a line; letters that only look alike)

from __future__ import annotations

import random
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner import trust
from runner.errors import InputError
from runner.places import make_importable
from runner.recipe.compose import Composition, compose

BASE = """\
# A recipe that somebody sent.
name: sent
{model}
task: classification
data:
  train: {{_target_: runner.data.synthetic.random_classification, samples: 8}}
train: {{epochs: 1}}
batch: {{global_size: 8}}
"""
MODEL = "model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}"

#: What a gadget would leave behind, in the working directory.
CANARY = "canary"


@dataclass(frozen=True)
class Case:
    """Lines that are added to a recipe from elsewhere (or stand for its model), and where the refusal belongs."""

    name: str
    lines: str
    key: str
    overrides: tuple[str, ...] = ()
    model: str = MODEL
    #: Files of the user's own, and of the recipe's folder.
    mine: tuple[tuple[str, str], ...] = ()
    theirs: tuple[tuple[str, str], ...] = ()
    #: Only what a name leads to can be refused, after an import that the user allowed.
    late: bool = False


def _hook(name: str, target: str, arguments: str = "") -> Case:
    return Case(name, f"hooks: {{x: {{_target_: {target}{', ' if arguments else ''}{arguments}}}}}", "hooks.x._target_")


def _model(name: str, spec: str, key: str = "model._target_", **more: Any) -> Case:
    return Case(name, more.pop("lines", ""), key, model=f"model: {spec}", **more)


_TOUCH = f"_args_: ['touch {CANARY}']"
_WRITE = f"_args_: [\"open('{CANARY}', 'w')\"]"
_NEST = "{_target_: os.system, " + _TOUCH + "}"
#: A package of the user's own that leads elsewhere.
_LEADS = (("leads/__init__.py", "import os\nfrom leads import parts\n"), ("leads/parts.py", "import os\nfrom os import system\nimport torch\nrun = os.system\nclass Fine:\n    pass\nfine = Fine()\n"))  # fmt: skip
_EVIL_MODULE = f"open({CANARY!r}, 'w').close()\ndef make(**_): open({CANARY!r}, 'w').close()\n"

CASES = [
    _hook("a shell", "os.system", _TOUCH),
    _hook("posix's own name", "posix.system", _TOUCH),
    _hook("os.popen", "os.popen", _TOUCH),
    _hook("subprocess.run", "subprocess.run", f"_args_: [[touch, {CANARY}]]"),
    _hook("subprocess.Popen", "subprocess.Popen", f"_args_: [[touch, {CANARY}]]"),
    _hook("eval", "builtins.eval", _WRITE),
    _hook("exec", "builtins.exec", _WRITE),
    _hook("open", "builtins.open", f"_args_: [{CANARY}, w]"),
    _hook("getattr", "builtins.getattr", "_args_: [a, b]"),
    _hook("__import__", "builtins.__import__", "_args_: [os]"),
    _hook("importlib", "importlib.import_module", "_args_: [antigravity]"),
    _hook("runpy", "runpy.run_path", "_args_: [evil.py]"),
    _hook("pickle.loads", "pickle.loads", "_args_: [x]"),
    _hook("pickle.load of a file", "pickle.load", "file: x"),
    _hook("torch.load", "torch.load", "f: weights.pt, weights_only: false"),
    _hook("torch.hub.load", "torch.hub.load", "repo_or_dir: evil/evil, model: evil"),
    _hook("torch.jit.load", "torch.jit.load", "f: x"),
    _hook("torch's cpp extensions", "torch.utils.cpp_extension.load_inline", "name: x"),
    _hook("numpy.load", "numpy.load", "file: x, allow_pickle: true"),
    _hook("joblib.load", "joblib.load", "filename: x"),
    _hook("yaml.unsafe_load", "yaml.unsafe_load", "stream: x"),
    _hook("shutil.rmtree", "shutil.rmtree", "path: ."),
    _hook("ctypes", "ctypes.CDLL", "name: libc.so.6"),
    _hook("pty.spawn", "pty.spawn", "argv: ls"),
    _hook("webbrowser", "webbrowser.open", "url: x"),
    _hook("hydra's instantiate", "hydra.utils.instantiate", "config: x"),
    _hook("timeit", "timeit.timeit", _WRITE),
    _hook("functools.partial", "functools.partial", "_args_: [os.system]"),
    _hook("sys.exit", "sys.exit", "_args_: [3]"),
    _hook("the builder itself", "runner.build.build", "spec: {a: 1}"),
    _hook("a module behind the builder", "runner.build.importlib.import_module", "name: antigravity"),
    _hook("a module behind torch.nn", "torch.nn.modules.os.system", _TOUCH),
    _hook("warnings behind torch.nn", "torch.nn.modules.module.warnings.sys.exit", ""),
    _hook("an attribute of an allowed class", "torch.nn.Linear.__init__.__globals__.get", "_args_: [os]"),
    _hook("a method of an allowed class", "torch.nn.Module.load_state_dict", ""),
    _hook("a function beside the allowed ones", "runner.checkpoint.store.prune", ""),
    _hook("letters that only look alike", "ｏｓ.system", _TOUCH),
    _hook("spaces around", "' os.system'", _TOUCH),
    _hook("a class of the user's own project", "mine_own.Thing", ""),
    Case("a tracker", f"trackers: {{x: {{_target_: os.system, {_TOUCH}}}}}", "trackers.x._target_"),
    Case("a scheduler", f"scheduler: {{_target_: os.system, {_TOUCH}}}", "scheduler._target_"),
    Case("an optimizer", f"optimizer: {{_target_: os.system, {_TOUCH}}}", "optimizer._target_"),
    Case("a schedule's argument", f"scheduler: {{_target_: torch.optim.lr_scheduler.StepLR, step_size: {_NEST}}}", "scheduler.step_size._target_"),
    _model("collation", "{_target_: torch.nn.Identity, x: {_target_: os.system}}", "data.collate._target_", overrides=("data.collate=${model.x}",)),
    _model("inside a list of arguments", f"{{_target_: torch.nn.Sequential, _args_: [{_NEST}]}}", "model._args_.0._target_"),
    _model("inside an argument", f"{{_target_: torch.nn.Linear, in_features: {_NEST}, out_features: 2}}", "model.in_features._target_"),
    _model("five levels down", f"{{_target_: torch.nn.Sequential, _args_: [{{a: [{{b: {{c: {_NEST}}}}}]}}]}}", "model._args_.0.a.0.b.c._target_"),
    _model("as a partial", f"{{_target_: torch.nn.Sequential, _args_: [{{_target_: os.system, _partial_: true, {_TOUCH}}}]}}", "model._args_.0._target_"),
    _model("not built by us", f"{{_target_: torch.nn.Sequential, _recursive_: false, _args_: [{_NEST}]}}", "model._args_.0._target_"),
    _model("below a mapping without target", f"{{_target_: torch.nn.ModuleDict, modules: {{a: {_NEST}}}}}", "model.modules.a._target_"),
    Case("by alias", "hooks: {x: &e {_target_: os.system}}\ntrackers: {y: *e}", "trackers.y._target_"),
    Case("by merge key", "hooks: {x: {<<: &e {_target_: os.system}}}", "hooks.x._target_"),
    _model("an interpolated name", "{_target_: '${name}.system'}", lines=""),
    _model("an interpolated part", "{_target_: 'os.${.part}', part: system}"),
    _model("a resolver for the name", "{_target_: '${oc.env:PATH}'}"),
    _model("a whole mapping by interpolation", "${hooks.x}", lines="hooks: {x: {_target_: os.system}}"),
    _model("a mapping made by a resolver", "'${oc.create:{_target_: os.system}}'", "model"),
    _model("a decoded mapping", "\"${oc.decode:'{_target_: os.system}'}\"", "model"),
    Case("the user's interpolation of theirs", "compile: {a: {_target_: os.system}}", "model._target_", ("model=${compile.a}",)),
    Case("arguments for the user's own option", "", "model._target_", mine=(("conf/model/shell.yaml", f"_target_: os.system\ncommand: touch {CANARY}\n"),), model="model: shell"),
    Case("arguments for what the user's own root builds", "hooks: {x: {command: ls}}", "hooks.x._target_", mine=(("conf/hooks/default.yaml", "x: {_target_: os.system, command: 'true'}\n"),)),
    Case("the user's own recipe under theirs", "defaults: [own]", "hooks.x._target_", mine=(("recipes/own.yaml", "hooks: {x: {_target_: os.system, command: ls}}\n"),)),
    Case("trust of its own", "trust: [os.system]", "trust.0"),
    Case("trust of its own, by an interpolation", "trust: ['${name}.*']", "trust.0"),
    Case("trust beside the recipe", "hooks: {x: {_target_: os.system}}", "hooks.x._target_", theirs=(("conf/trust.yaml", "trust: [os.system]\n"),)),
    Case("conf beside the recipe", "", "model", theirs=(("conf/model/evil.yaml", "_target_: os.system\n"),), model="model: evil"),
    Case("a module beside the recipe", "hooks: {x: {_target_: evil_module.make}}", "hooks.x._target_", theirs=(("evil_module.py", _EVIL_MODULE),)),
    Case("a module in the working directory", "hooks: {x: {_target_: evil_module.make}}", "hooks.x._target_", mine=(("evil_module.py", _EVIL_MODULE),)),
    Case("a plugin beside the recipe", "hooks: {x: {_target_: plugins.evil.make}}", "hooks.x._target_", theirs=(("plugins/evil/__init__.py", _EVIL_MODULE),)),
    Case("a search path", "hydra: {searchpath: ['file:///tmp']}", "hydra"),
    Case("hydra's launcher", "defaults: [{override /hydra/launcher: joblib}]", "defaults"),
    Case("trust_remote_code", "optimizer: {trust_remote_code: true}", "optimizer.trust_remote_code"),
    _model("trust_remote_code of a model", "{_target_: transformers.AutoModel.from_pretrained, pretrained_model_name_or_path: a/b, trust_remote_code: true}", "model.trust_remote_code"),
    _model("a model that may ask", "{_target_: transformers.AutoModel.from_pretrained, pretrained_model_name_or_path: a/b}", "model.trust_remote_code"),
    _model("kernels from a hub", "{_target_: plugins.text.model.sequence_classifier, attn_implementation: evil/kernels}", "model.attn_implementation"),
    _model("weights that are a pickle", "{_target_: transformers.AutoModel.from_pretrained, pretrained_model_name_or_path: a/b, trust_remote_code: false, use_safetensors: false}", "model.use_safetensors"),
    Case("a compiler of its choice", "compile: {options: {cpp.cxx: [touch, canary]}}", "compile.options"),
    Case("a backend of the compiler", "compile: {backend: evil}", "compile.backend"),
    Case("another run's folder", "run_dir: ../victim", "run_dir"),
    Case("somebody's checkpoint", "resume: /tmp/evil", "resume"),
    Case("weights from anywhere", "init_from: /tmp/evil.pt", "init_from"),
    Case("a file by a link upwards", "optimizer: {lr: 0.1}\nprecision: fp32\nscheduler: {_target_: torch.optim.lr_scheduler.StepLR, path: ../../secret}", "scheduler.path"),
    Case("a path put together", "optimizer: {lr: 0.1, path: '${.dots}/secret', dots: ..}", "optimizer.path"),
    Case("the environment", "log: {every: '${oc.env:HOME}'}", "log.every"),
    Case("the user's secret", "run_dir: null\ninit_from: ${optimizer.api_key}", "init_from", ("optimizer.api_key=hidden",)),
    Case("where to meet", "launch: {rdzv_endpoint: 'evil:1', nnodes: 2}", "launch.rdzv_endpoint"),
    Case("a DeepSpeed file", "backend: {name: deepspeed, config_file: ds.json}", "backend.config_file"),
    _model("a re-export of an allowed package", f"{{_target_: leads.parts.system, {_TOUCH}}}", overrides=("trust=[leads.*]",), mine=_LEADS, late=True),
    _model("a name for it in an allowed package", f"{{_target_: leads.parts.run, {_TOUCH}}}", overrides=("trust=[leads.*]",), mine=_LEADS, late=True),
    _model("a module behind an allowed package", f"{{_target_: leads.os.system, {_TOUCH}}}", overrides=("trust=[leads.*]",), mine=_LEADS, late=True),
    _model("torch behind an allowed package", "{_target_: leads.parts.torch.load, f: x}", overrides=("trust=[leads.*]",), mine=_LEADS, late=True),
    _model("an object of an allowed package", "{_target_: leads.parts.fine.__class__}", overrides=("trust=[leads.*]",), mine=_LEADS),
    _model("something private of an allowed package", "{_target_: leads.parts._x}", overrides=("trust=[leads.*]",), mine=_LEADS),
]  # fmt: skip

_events: list[str] = []
_watched: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.spawn",
        "os.posix_spawn",
        "socket.connect",
        "pickle.find_class",
    ):
        _events.append(f"{event} {arguments!r}"[:200])
    elif event == "import" and arguments[0].partition(".")[0] in (
        "evil_module",
        "antigravity",
        "joblib",
        "plugins",
        "webbrowser",
        "pty",
    ):
        _events.append(f"import of {arguments[0]}")
    elif (
        event == "open"
        and isinstance(arguments[1], str)
        and set(arguments[1]) & set("wax+")
        and arguments[0] != "/dev/null"
    ):
        _events.append(f"open {arguments!r}"[:200])


_hooked: list[bool] = []


def cases(count: int, seed: int) -> list[Case]:
    """All gadgets, or so many of them."""
    return CASES if count >= len(CASES) else random.Random(seed).sample(CASES, count)


def prepared(case: Case, folder: Path) -> tuple[Path, list[str]]:
    """Writes the files of a case: the working directory, and the words of the command line."""
    mine, theirs = folder / "mine", folder / "elsewhere"
    for root, files in (
        (mine, case.mine),
        (theirs, (*case.theirs, ("sent.yaml", BASE.format(model=case.model) + case.lines + "\n"))),
    ):
        for name, text in files:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
        root.mkdir(exist_ok=True)
    return mine, [f"+recipe={theirs / 'sent.yaml'}", *case.overrides]


def run(case: Case, folder: Path) -> str | None:
    """None where the gadget was refused as it should be; else what was violated."""
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked.append(True)
    mine, words = prepared(case, folder)
    path, modules = list(sys.path), set(sys.modules)
    _events.clear()
    _watched.append(True)
    try:
        make_importable(mine)
        composition = compose(words, directory=mine)
        problems = composition.check()
        if case.late:
            problems += _late(composition)
    except Exception:
        return f"{case.name}: {traceback.format_exc()}"
    finally:
        _watched.clear()
        sys.path[:] = path
        for name in [n for n in sys.modules if n not in modules and n.partition(".")[0] in ("leads", "evil_module")]:
            del sys.modules[name]
    if _events:
        return f"{case.name}: {_events}"
    if any((root / CANARY).exists() for root in (mine, folder / "elsewhere", folder, Path.cwd())):
        return f"{case.name}: it ran"
    refused = [problem for problem in problems if problem.key == case.key]
    if len(refused) != 1:
        return f"{case.name}: {len(refused)} refusals at {case.key} of {[(p.key, p.why) for p in problems]}"
    if "\n" in str(InputError(*refused)):
        return f"{case.name}: more than a line"
    mark = refused[0].mark
    by_hand = bool(case.overrides) and mark is not None and mark.file == "command line"
    own = any(mark is not None and mark.file == str(mine / name) for name, _ in case.mine)
    if not by_hand and not own and (mark is None or mark.file != str(folder / "elsewhere" / "sent.yaml")):
        return f"{case.name}: it is said to stand at {mark}"
    return None


def _late(composition: Composition) -> list[Any]:
    try:
        trust.confirm(composition.bound, composition.config["trust"])
    except InputError as error:
        return [p.at(composition.origins.get(p.key or "")) for p in error.problems]
    return []
