"""The list of bad inputs: each row is typed as a user would, and says what is wrong, where, and what would work."""
# ruff: noqa: E501 (a row a line)

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

from runner.__main__ import main

GOOD = """\
name: own
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
task: classification
data:
  train: {_target_: runner.data.synthetic.random_classification, samples: 32, features: 4, classes: 2}
train: {epochs: 1}
batch: {global_size: 8}
device: cpu
"""
OWN = "+recipe=own"


@dataclass
class Row:
    """What is typed, the recipe `own` (or lines after a good one), and what must be said. Code 0 is accepted input."""

    name: str
    words: tuple[str, ...] = (OWN,)
    extra: str = ""
    file: str | bytes | None = None
    code: int = 2
    #: Pieces of what is said, white space aside.
    says: tuple[str, ...] = ()
    files: dict[str, str | bytes] = field(default_factory=dict)
    #: It is built, so torch is imported.
    builds: bool = False


def typed(name: str, words: str, *says: str, **more) -> Row:
    return Row(name, tuple(words.split(" ")), says=says, **more)


def lines(name: str, extra: str, *says: str, **more) -> Row:
    return Row(name, extra=extra, says=says, **more)


def recipe(name: str, file: str | bytes, *says: str, **more) -> Row:
    return Row(name, file=file, says=says, **more)


def bomb(levels: int = 9) -> str:
    names = "abcdefghij"[: levels + 1]
    rows = [f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in pairwise(names)]
    return "a: &a [x, x, x]\n" + "\n".join(rows) + "\n"


CONFIGURATION = [
    typed("a typo on the command line", "+recipe=own sed=3", "command line: sed = 3", "did you mean seed?"),
    typed("a typo below on the command line", "+recipe=own log.evry=3", "log.evry = 3", "did you mean log.every?"),
    typed("a typo deep on the command line", "+recipe=own checkpoint.best.metrik=x checkpoint.best.mode=min", "checkpoint.best.metrik", "did you mean checkpoint.best.metric?"),
    typed("a key whose name Python does not take", "+recipe=own checkpoint.asinc=true", "checkpoint.asinc", "did you mean checkpoint.async?"),
    typed("a wrong value of it", "+recipe=own checkpoint.async=maybe", "checkpoint.async = maybe", "true or false"),
    typed("its name in Python", "+recipe=own checkpoint.async_=true", "checkpoint.async_", "did you mean checkpoint.async?"),
    lines("a typo in a file", "sed: 3", "recipes/own.yaml:9:1: sed = 3", "did you mean seed?"),
    lines("a typo below in a file", "log: {evry: 3}", "recipes/own.yaml:9:7: log.evry = 3", "did you mean log.every?"),
    lines("a typo deep in a file", "checkpoint:\n  best:\n    metrik: x", "recipes/own.yaml:11:5: checkpoint.best.metrik", "metric"),
    recipe("a recipe without package header", GOOD, code=0),
    recipe("a recipe with package header", "# @package _global_\n" + GOOD, code=0),
    recipe("bad indent", "name: x\noptimizer:\n  lr: 1\n   momentum: 2\n", "recipes/own.yaml:4:12", "indented wrongly"),
    recipe("a tab", "name: x\noptimizer:\n\tlr: 1\n", "recipes/own.yaml:3:1", "indent with spaces only"),
    recipe("a key twice", "name: x\nname: y\n", "recipes/own.yaml:2:1: name", "first in line 1"),
    recipe("binary", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "recipes/own.yaml", "not UTF-8 text"),
    recipe("UTF-16", GOOD.encode("utf-16"), "recipes/own.yaml", "it looks like UTF-16", "save it as UTF-8"),
    recipe("an empty file", "", "recipes/own.yaml", "the file is empty"),
    recipe("a list", "- a\n", "recipes/own.yaml:1:1", "the file is a list"),
    typed("an unknown recipe", "+recipe=smok", "no recipe called smok", "did you mean smoke?"),
    typed("an unknown group", "+recipe=own modle=mlp", "modle = mlp", "did you mean model?"),
    lines("an unknown group in defaults", "defaults: [{modle: mlp}]", "there is no configuration group modle", "did you mean model?"),
    typed("an unknown option", "+recipe=own precision=fp17", "precision = fp17", "did you mean fp16?"),
    typed("a path for a recipe", "+recipe=../../etc/passwd", "command line: recipe = ../../etc/passwd", "not the path of a recipe"),
    typed("no equals sign", "+recipe=own seed", "not an override: it has no `=`"),
    typed("dashes", "+recipe=own --seed=3", "write `seed=3`"),
    typed("removing what is required", "+recipe=own ~batch.global_size", "required and cannot be removed", "batch.global_size="),
    typed("removing the model", "+recipe=own ~model", "model", "is missing: what is trained"),
    typed("null for what is required", "+recipe=own seed=null", "not null", "the default is 0"),
    typed("null for the batch", "+recipe=own batch.global_size=null", "batch.global_size", "is missing"),
    lines("an interpolation of an unknown key", "run_dir: ${nosuch.key}", "there is no key nosuch", "own.yaml:9:1"),
    lines("an interpolation in a circle", "run_dir: ${resume}\nresume: ${run_dir}", "refers to itself: resume -> run_dir -> resume", "break the circle"),
    lines("an environment variable that is not set", "run_dir: ${oc.env:NOSUCH}", "the environment variable NOSUCH is not set", "${oc.env:NOSUCH,DEFAULT}"),
    recipe("an alias bomb", bomb(), "more than 10,000 values once its aliases are expanded"),
    recipe("64 levels", "a: " + "[" * 64 + "]" * 64, "nested more than 30 levels deep"),
    lines("on", "debug: on", code=0),
    lines("off for a number", "log: {every: off}", "own.yaml:9:7: log.every = false", "whole number"),
    lines("yes for a word", "nan: yes", "YAML reads yes, on and true as true"),
    lines("no for a word", "eval: {every: no}", "write never"),
    lines("012", "seed: 012", "YAML reads 012 as the number 10", "12 if the zero means nothing"),
    typed("012 on the command line", "+recipe=own seed=012", "seed", "write the number without quotes: 12"),
    lines("1_000", "seed: 1_000", "seed: 1000", code=0),
    lines("1e-3", "optimizer: {lr: 1e-3}", "lr: 0.001", code=0),
    typed("1e-3 on the command line", "+recipe=own optimizer.lr=1e-3", "lr: 0.001", code=0),
    lines("1e3 for a whole number", "log: {every: 1e3}", "without a point or exponent: 1000"),
    lines("all that is left over", "run_dir: ???\ngrad_clip: ???\nhooks: {x: {_target_: a.B, y: '???'}}", 'run_dir = "???"', 'grad_clip = "???"', 'hooks.x.y = "???"'),
    recipe("a recipe of a newer format", f"format: 7\nfuture_key: 3\n{GOOD}", "1 problem", "own.yaml:1:1", "of format 7, and this program reads 1"),
    recipe("a recipe of no format", f"format: new\n{GOOD}", "own.yaml:1:1: format = new", "leave it out"),
    recipe("a recipe that says its format", f"format: 1\n{GOOD}", code=0),
    recipe("a byte order mark", b"\xef\xbb\xbf" + GOOD.encode(), code=0),
    recipe("Windows line ends", GOOD.replace("\n", "\r\n"), code=0),
    recipe("hydra.* in a recipe", f"{GOOD}hydra: {{job: {{chdir: true}}}}\n", "own.yaml:9:1: hydra", "no effect here"),
    typed("hydra.* on the command line", "+recipe=own hydra.run.dir=x", "write `run_dir=x`"),
]  # fmt: skip

VALUES = [
    typed("precision=fp17", "+recipe=own precision=fp17", "bf16, bf16_full, fp16, fp32, fp8, tf32"),
    *[typed(f"lr={lr}", f"+recipe=own optimizer.lr={lr}", f"optimizer.lr = {lr}", "for example 1e-3") for lr in ("abc", "nan", "inf", "-1")],
    typed("lr=-inf", "+recipe=own optimizer.lr=-inf", "optimizer.lr", "for example 1e-3"),
    *[typed(f"steps={steps}", f"+recipe=own train.steps={steps}", "train.steps =", "whole number, at least 1") for steps in ("-5", "0", "1.5", "1e30")],
    typed("accumulation that does not divide", "+recipe=own batch.global_size=32 accumulation.steps=3", "32 = ? x 3 x 1", "accumulation.steps=2 or accumulation.steps=4"),
    typed("a batch larger than the data, with drop_last", "+recipe=own batch.global_size=64 data.drop_last=true", "data.drop_last = true", "32 samples are fewer than batch.global_size=64", "at most 32", builds=True),
    typed("a warm-up longer than the run", "+recipe=own scheduler=linear scheduler.warmup=100 train.steps=10", "scheduler.warmup", "longer than the run of 10", builds=True),
    typed("no DeepSpeed", "+recipe=own backend=deepspeed", "deepspeed", "pip install", builds=True),
    typed("workers=-1", "+recipe=own data.num_workers=-1", "from 0 to 1024"),
    typed("workers=10,000", "+recipe=own data.num_workers=10000", "from 0 to 1024"),
    typed("checkpoint.every=0", "+recipe=own checkpoint.every=0", "checkpoint.every = 0", "{steps: N}"),
    typed("checkpoint.every.steps=0", "+recipe=own checkpoint.every.steps=0", "at least 1"),
    typed("checkpoint.keep=0", "+recipe=own checkpoint.keep=0", "checkpoint.keep = 0", "at least 2"),
    typed("checkpoint.keep=1", "+recipe=own checkpoint.keep=1", "checkpoint.keep = 1", "at least 2"),
    typed("checkpoint.milestones=0", "+recipe=own checkpoint.milestones=0", "at least 1"),
    typed("checkpoint.on_error=ignore", "+recipe=own checkpoint.on_error=ignore", "one of stop, continue"),
    typed("launch.max_restarts=-1", "+recipe=own launch.max_restarts=-1", "from 0"),
    typed("launch.timeout=0", "+recipe=own launch.timeout=0", "above 0"),
    typed("nan=rolback", "+recipe=own nan=rolback", "did you mean rollback?"),
    typed("determinism=canonic", "+recipe=own determinism=canonic", "did you mean canonical?"),
    typed("seed=2**80", f"+recipe=own seed={2**80}", "from 0 to 2^63 - 1"),
    typed("grad_clip=0", "+recipe=own grad_clip=0", "grad_clip = 0", "null for none"),
    typed("best of a metric that nobody logs", "+recipe=smoke device=cpu checkpoint.best.metric=f1", "checkpoint.best.metric = f1", "choose of loss, accuracy", builds=True),
    typed("best without held-out data", "+recipe=own checkpoint.best.metric=loss", "checkpoint.best.metric", "no held-out data", builds=True),
    typed("trust of everything", "+recipe=own trust=a.b", "must be a list of texts", "trust=[a,b]"),
]  # fmt: skip

TARGETS = [
    typed("an unknown attribute", "+recipe=own model._target_=torch.nn.Linaer", "torch.nn has no Linaer", "did you mean torch.nn.Linear", builds=True),
    typed("a wrong argument", "+recipe=own model.in_feature=3", "model.in_feature = 3", "no argument of that name", "did you mean in_features?", "It takes", builds=True),
    typed("a module", "+recipe=own model._target_=torch.nn", "is a module, which cannot be called", builds=True),
    typed("a constant", "+recipe=own model._target_=math.pi", "is a float, which cannot be called", builds=True),
    typed("arguments that are missing", "+recipe=smoke device=cpu model={_target_:torch.nn.Linear}", "torch.nn.Linear needs in_features, out_features", builds=True),
    typed("a package that is not there", "+recipe=own model._target_=nosuch.Net", "there is no package nosuch installed", "pip install nosuch"),
    typed("no dotted name", "+recipe=own model._target_=Net", "must be a dotted name"),
    lines("a module that fails to import", "hooks: {x: {_target_: broken.Hook}}", "importing broken failed: ValueError: on purpose", files={"broken.py": "raise ValueError('on purpose')\n"}, builds=True),
    lines("hydra.* in a recipe", "hydra: {run: {dir: x}}", "own.yaml:9:1: hydra", "`run_dir` says where a run writes"),
    lines("trust_remote_code", "hooks: {x: {_target_: a.B, trust_remote_code: true}}", "own.yaml:9:28: hooks.x.trust_remote_code = true", "remove it"),
    lines("trust_remote_code by interpolation", "hooks: {x: {_target_: a.B, trust_remote_code: '${debug}'}}\ndebug: true", "hooks.x.trust_remote_code = true"),
    lines("a data set with a loading script", "hooks: {x: {_target_: datasets.load_dataset, path: a/script.py}}", "own.yaml:9:46: hooks.x.path", "the script would be run"),
    typed("a data set of the plugin with a loading script", "+recipe=bert_sst2 data=glue_sst2 data.path=script.py", "data.path = script.py", "the script would be run", builds=True),
    typed("remote code for the plugin", "+recipe=bert_sst2 +model.trust_remote_code=true", "model.trust_remote_code = true", "never run", builds=True),
    Row("a recipe from elsewhere", ("+recipe=../elsewhere/sent.yaml",), files={"../elsewhere/sent.yaml": GOOD + "hooks: {x: {_target_: os.system}}\n"}, says=("sent.yaml:9:13: hooks.x._target_ = os.system", "may not build it")),
]  # fmt: skip

ROWS = [*CONFIGURATION, *VALUES, *TARGETS]


@pytest.fixture
def typing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Callable[[Row], tuple[int, str, str]]:
    def enter(row: Row) -> tuple[int, str, str]:
        folder = tmp_path / "mine"
        monkeypatch.delenv("NOSUCH", raising=False)
        monkeypatch.setattr(sys, "path", list(sys.path))
        text = GOOD + row.extra + "\n" if row.file is None else row.file
        for name, content in {"recipes/own.yaml": text, **row.files}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        monkeypatch.chdir(folder)
        before = sorted(folder.rglob("*"))
        words = [*row.words, *([] if row.code else ["--cfg", "job"])]
        code = main(words)
        after = [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts and path.name != "runs"]
        assert after == before, "something was written"
        told = capsys.readouterr()
        return code, told.out, told.err

    return enter


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_row(row, typing, monkeypatch):
    if row.name == "no DeepSpeed":
        monkeypatch.setitem(sys.modules, "deepspeed", None)
    code, out, err = typing(row)
    assert code == row.code, err
    said = " ".join((out if code == 0 else err).split())
    for piece in row.says:
        assert piece in said
    assert "Traceback" not in err
    if code:
        assert "in the configuration" in err.splitlines()[0]
        assert "fix: " in err


def test_no_row_stands_twice():
    names = [row.name for row in (*CONFIGURATION, *VALUES)]
    assert len(names) == len(set(names))
