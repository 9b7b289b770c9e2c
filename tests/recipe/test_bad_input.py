"""Bad input: each gives its problems, all at once, with the place, and never an exception."""
# ruff: noqa: E501 (tables read better with one case a line)

from __future__ import annotations

import random
import time

import pytest

from runner.errors import InputError
from runner.places import BUILTIN
from runner.recipe.problems import render


def only(problems):
    assert len(problems) == 1, [(p.key, p.why) for p in problems]
    return problems[0]


# Files

FILES = [
    ("tab", "name: x\noptimizer:\n\tlr: 1\n", "tab", (3, 1)),
    ("bad indent", "name: x\noptimizer:\n  lr: 1\n   momentum: 2\n", "indent", (4, 12)),
    ("duplicate key", "name: x\nname: y\n", "twice", (2, 1)),
    ("nested duplicate key", "optimizer:\n  lr: 1\n  lr: 2\n", "twice", (3, 3)),
    ("empty", "", "empty", None),
    ("comments only", "# nothing here\n", "empty", None),
    ("top-level list", "- a\n- b\n", "a list", (1, 1)),
    ("top-level text", "hello\n", "single value", (1, 1)),
    ("open quote", 'name: "x\nseed: 3\n', "not valid YAML", (3, 1)),
    ("open bracket", "a: [1, 2\nb: 3\n", "", None),
    ("two documents", "name: x\n---\nname: y\n", "more than one document", (2, 1)),
    ("unknown alias", "name: *x\n", "undefined alias", (1, 7)),
    ("custom tag", "name: !python/name:os.system x\n", "constructor", (1, 7)),
    ("object", "name: !!python/object/apply:os.system [ls]\n", "", (1, 7)),
    ("set", "name: !!set {a, b}\n", "", None),
    ("binary", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "UTF-8", (1, 1)),
    ("control character", b"name: x\nseed: \x07\n", "U+0007", (2, 7)),
    ("UTF-16", "name: x\n".encode("utf-16"), "UTF-8", None),
    ("UTF-16 without BOM", ("name: x\n" * 20).encode("utf-16-le"), "UTF-8", None),
    ("Latin-1", "name: é\n".encode("latin-1"), "UTF-8", (1, 7)),
    ("64-deep flow", "a: " + "[" * 64 + "]" * 64, "deep", (1, 33)),
    ("64-deep block", "".join("  " * i + f"k{i}:\n" for i in range(64)), "deep", None),
    ("100,000-deep", "a: " + "[" * 100_000, "deep", None),
    ("too large", "a: " + "x" * 10_000_000, "larger than", None),
    ("many values", "a: [" + "1," * 50_000 + "]", "more than", None),
    ("a key that is a list", "[a, b]: 3\n", "key must be a word", (1, 1)),
    ("an alias of itself", "a: &a [*a]\n", "deep", None),
    ("a number of 10,000 digits", "seed: " + "9" * 10_000 + "\n", "", None),
    ("bad header", "# @package a b\nname: x\n", "package header", (1, 1)),
    ("defaults that are no list", "defaults: {model: mlp}\n", "not a list", (1, 1)),
    ("a defaults entry that is none", "defaults:\n  - {a: b, c: d}\n", "no entry", (2, 5)),
    ("a defaults entry of blanks", "defaults: [' ']\n", "no entry", (1, 12)),
    ("a file that includes itself", "defaults: [own]\n", "", None),
    ("hydra's settings", "hydra: {run: {dir: x}}\n", "Hydra", (1, 1)),
    ("hydra's settings in defaults", "defaults:\n  - override /hydra/launcher: joblib\n", "Hydra", (2, 5)),
]


@pytest.mark.parametrize(("text", "why", "place"), [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_files_that_cannot_be_read(text, why, place, project):
    file = project.write("recipes/own.yaml", text)
    start = time.process_time()
    problems = project.check("+recipe=own")
    assert time.process_time() - start < 2
    own = [p for p in problems if p.mark and p.mark.file == str(file) and (p.key is None or why in p.why)]
    assert own, problems
    assert why in own[0].why
    if place is not None:
        assert (own[0].mark.line, own[0].mark.column) == place
    shown = render(problems, {}, directory=project.folder)
    assert "recipes/own.yaml" in shown
    assert "Traceback" not in shown


def test_a_broken_recipe_is_one_problem(project, good):
    project.write("recipes/own.yaml", good + "optimizer: {lr: 1\n")
    assert only(project.check("+recipe=own")).key is None


@pytest.mark.parametrize("change", [lambda t: b"\xef\xbb\xbf" + t, lambda t: t.replace(b"\n", b"\r\n")])
def test_bom_and_windows_line_ends_are_fine(change, project, good):
    project.write("recipes/own.yaml", change(good.encode()))
    assert project.check("+recipe=own") == []


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{c}: &{c} [{','.join('*' + p for _ in range(9))}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: &a {x: 1, y: 2}\n"
        + "".join(
            f"{c}: &{c} {{{', '.join(f'k{i}: *{p}' for i in range(9))}}}\n"
            for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "a: &a {x: 1, y: 2}\n"
        + "".join(
            f"{c}: &{c} {{<<: [{', '.join('*' + p for _ in range(9))}]}}\n"
            for p, c in zip("abcdefgh", "bcdefghi", strict=True)
        ),
    ],
    ids=["lists", "mappings", "merge keys"],
)
def test_alias_bombs_are_refused_quickly(text, project):
    project.write("recipes/own.yaml", text)
    start = time.process_time()
    problems = project.check("+recipe=own")
    assert time.process_time() - start < 2
    assert any("aliases" in p.why for p in problems)


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"k{i}: ${{k{i + 1}}}${{k{i + 1}}}\n" for i in range(40)) + "k40: xx\n",
        "".join(f"k{i}: {{a: '${{k{i + 1}}}', b: '${{k{i + 1}}}'}}\n" for i in range(40)) + "k40: {a: 1}\n",
        "".join(f"k{i}: ${{k{i + 1}}}\n" for i in range(500)) + "k500: 1\n",
        "k0: ${oc.select:k1}${oc.select:k1}\n"
        + "".join(f"k{i}: ${{oc.select:k{i + 1}}}${{oc.select:k{i + 1}}}\n" for i in range(1, 12))
        + "k12: x\n",
    ],
    ids=["text", "mappings", "a long chain", "resolvers"],
)
def test_interpolation_bombs_end(text, project):
    project.write("recipes/own.yaml", text)
    start = time.process_time()
    project.check("+recipe=own")
    assert time.process_time() - start < 2


# Keys and values in a recipe: (lines that are added, key, why, fix, line after the eight of the good recipe)

VALUES = [
    ("typo at the top", "sed: 3", "sed", "unknown key", "seed", 1),
    ("typo below", "log:\n  evry: 3", "log.evry", "unknown key", "log.every", 2),
    ("typo deep", "checkpoint:\n  best:\n    metrik: x", "checkpoint.best.metrik", "unknown key", "metric", 3),
    ("a key of another section", "global_size: 3", "global_size", "unknown key", "batch.global_size", 1),
    ("a dotted key", "optimizer.lr: 3", "optimizer.lr", "unknown key", "nested", 1),
    ("a key of data", "data2: 3", "data2", "unknown key", "data", 1),
    ("a word for a number", "seed: abc", "seed", "whole number", "", 1),
    ("a quoted number", 'seed: "3"', "seed", "whole number", "without quotes: 3", 1),
    ("a fraction", "seed: 1.5", "seed", "whole number", "", 1),
    ("a number with exponent", "seed: 1e3", "seed", "whole number", "1000", 1),
    ("a huge number", "seed: 1e30", "seed", "whole number", "", 1),
    ("a seed that is too large", f"seed: {2**80}", "seed", "2^63", "", 1),
    ("a negative seed", "seed: -1", "seed", "from 0", "", 1),
    ("true for a number", "seed: yes", "seed", "whole number", "", 1),
    ("null for something required", "seed: null", "seed", "not null", "0", 1),
    ("a list for a number", "seed: [1]", "seed", "whole number", "", 1),
    ("a section for a number", "seed: {a: 1}", "seed", "whole number", "", 1),
    ("a number for a section", "log: 5", "log", "section", "every", 1),
    ("an unknown word", "determinism: kernel", "determinism", "one of", "kernels", 1),
    ("no for a word", "nan: no", "nan", "one of", "quotes", 1),
    ("off for a word", "eval: {every: off}", "eval.every", "one of epoch, never", "never", 1),
    ("no for resume", "resume: no", "resume", "text", "never", 1),
    ("a number for text", "run_dir: 5", "run_dir", "text", '"5"', 1),
    ("an octal number", "log: {every: 012}", "log.every", "012 as the number 10", '"012"', 1),
    ("a time of day", "log: {every: 12:30:00}", "log.every", "45000", '"12:30:00"', 1),
    ("a key that is a boolean", "hooks: {on: null}", "hooks.on", "reads the key on as true", '"on"', 1),
    ("not a number", "grad_clip: .nan", "grad_clip", "above 0", "", 1),
    ("infinite", "grad_clip: .inf", "grad_clip", "above 0", "", 1),
    ("clipping at 0", "grad_clip: 0", "grad_clip", "above 0", "null", 1),
    ("a learning rate that is text", "optimizer: {lr: abc}", "optimizer.lr", "number", "1e-3", 1),
    ("a learning rate that is nan", "optimizer: {lr: .nan}", "optimizer.lr", "number", "1e-3", 1),
    ("an infinite learning rate", "optimizer: {lr: .inf}", "optimizer.lr", "number", "1e-3", 1),
    ("a negative learning rate", "optimizer: {lr: -1}", "optimizer.lr", "at least 0", "1e-3", 1),
    ("saving every 0", "checkpoint: {every: 0}", "checkpoint.every", "section", "{steps: N}", 1),
    ("saving every 0 steps", "checkpoint: {every: {steps: 0}}", "checkpoint.every.steps", "at least 1", "", 1),
    ("saving every nothing", "checkpoint: {every: {}}", "checkpoint.every", "exactly one", "", 1),
    ("two intervals", "checkpoint: {every: {steps: 1, epochs: 1}}", "checkpoint.every", "exactly one", "", 1),
    ("keeping one checkpoint", "checkpoint: {keep: 1}", "checkpoint.keep", "at least 2", "", 1),
    ("no process", "launch: {nproc_per_node: 0}", "launch.nproc_per_node", "at least 1", "", 1),
    ("an option of another backend", "backend: {name: ddp, blocks: [A]}", "backend.blocks", "option of backend=fsdp", "", 1),
    ("an option of no backend", "backend: {name: fsdp, block: [A]}", "backend.block", "unknown key", "backend.blocks", 1),
    ("a stage that is none", "backend: {name: deepspeed, stage: 4}", "backend.stage", "from 0 to 3", "", 1),
    ("blocks that are no list", "backend: {name: fsdp, blocks: A}", "backend.blocks", "a list of texts", "[a,b]", 1),
    ("an unknown option", "precision: fp17", "precision", "no option fp17", "fp16", 1),
    ("an unknown option in a list", "hooks: [default, early]", "hooks", "no option early", "early_stop", 1),
    ("an unknown option in defaults", "defaults: [{model: mpl}]", "model", "no option mpl", "mlp", 1),
    ("a class for an option", "scheduler: torch.optim.lr_scheduler.StepLR", "scheduler", "no option", "_target_", 1),
    ("a number for an option", "precision: 16", "precision", "section", "fp16", 1),
    ("an unknown group", "defaults: [{modle: mlp}]", "modle", "group", "model", 1),
    ("no target", "scheduler: {gamma: 1}", "scheduler", "_target_", "cosine", 1),
    ("a target that is no name", "scheduler: {_target_: Step LR}", "scheduler._target_", "dotted", "torch", 1),
    ("a target that is a number", "scheduler: {_target_: 3}", "scheduler._target_", "dotted", "torch", 1),
    ("a target without module", "scheduler: {_target_: StepLR}", "scheduler._target_", "dotted", "torch", 1),
    ("a nested target", "scheduler: {_target_: torch.x, a: [{_target_: y}]}", "scheduler.a.0._target_", "dotted", "", 1),
    ("a package that is not there", "scheduler: {_target_: nosuch.X}", "scheduler._target_", "nosuch", "pip install nosuch", 1),
    ("a typo of a package", "scheduler: {_target_: troch.X}", "scheduler._target_", "troch", "torch.X", 1),
    ("a typo of a word", "scheduler: {_target_: torch.x, _arg_: 3}", "scheduler._arg_", "builder", "_args_", 1),
    ("positional arguments that are no list", "scheduler: {_target_: torch.x, _args_: 3}", "scheduler._args_", "list", "", 1),
    ("a hook that is text", "hooks: {mine: ema}", "hooks.mine", "what to build", "_target_", 1),
    ("a hook without target", "hooks: {early_stop: {patience: 3}}", "hooks.early_stop", "_target_", "hooks=[default,early_stop]", 1),
    ("a key that is a number", "scheduler: {32: true}", "scheduler", "_target_", "cosine", 1),
    ("a hook that is a number", "hooks: {32: {a: 1}}", "hooks.32", "_target_", "", 1),
    ("a typo of a hook", "hooks: {progres: {every: 3}}", "hooks.progres", "_target_", "hooks.progress", 1),
    ("an interpolation of nothing", "run_dir: ${nosuch.key}", "run_dir", "no key nosuch", "", 1),
    ("an interpolation of itself", "run_dir: ${run_dir}", "run_dir", "itself", "circle", 1),
    ("an environment variable", "run_dir: ${oc.env:NOSUCH}", "run_dir", "NOSUCH is not set", "DEFAULT", 1),
    ("an unknown resolver", "run_dir: ${nosuch:x}", "run_dir", "no resolver", "", 1),
    ("hydra's resolver", "run_dir: ${hydra:runtime.cwd}", "run_dir", "", "", 1),
    ("half an interpolation", "run_dir: ${name", "run_dir", "not a valid interpolation", "", 1),
    ("a value that is missing", "run_dir: ???", "run_dir", "missing", "run_dir=", 1),
    ("a name that is a path", "device: cpu\nseed: -3", "seed", "from 0", "", 2),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "key", "why", "fix", "line"), [v[1:] for v in VALUES], ids=[v[0] for v in VALUES])
def test_values(lines, key, why, fix, line, project):
    problem = only(project.own(lines + "\n"))
    assert problem.key == key
    assert why in problem.why
    assert fix in problem.fix
    assert problem.mark.file.endswith("own.yaml")
    assert problem.mark.line == 8 + line
    assert "+" + key not in problem.fix  # never an advice that adds a dead key


@pytest.mark.parametrize(
    ("override", "key", "why", "fix"),
    [
        ("sed=3", "sed", "unknown key", "seed"),
        ("+sed=3", "sed", "unknown key", "seed"),
        ("++log.evry=3", "log.evry", "unknown key", "log.every"),
        ("optimzer.lr=3", "optimzer.lr", "unknown key", "optimizer.lr"),
        ("lr=3", "lr", "unknown key", "optimizer.lr"),
        ("global_size=3", "global_size", "unknown key", "batch.global_size"),
        ("train.steps=-5", "train.steps", "at least 1", ""),
        ("train.steps=0", "train.steps", "at least 1", ""),
        ("train.steps=1.5", "train.steps", "whole number", ""),
        ("train.steps=1e30", "train.steps", "whole number", ""),
        ("train.steps=99999999999999999999", "train.steps", "whole number", ""),
        ("optimizer.lr=abc", "optimizer.lr", "number", "1e-3"),
        ("optimizer.lr=nan", "optimizer.lr", "number", "1e-3"),
        ("optimizer.lr=inf", "optimizer.lr", "number", "1e-3"),
        ("optimizer.lr=-1", "optimizer.lr", "at least 0", "1e-3"),
        ("seed=012", "seed", "whole number", "12"),
        ("precision=fp17", "precision", "no option fp17", "bf16, bf16_full, fp16, fp32, fp8, tf32"),
        ("precision=", "precision", "no precision is named", "fp16"),
        ("model=../../etc/passwd", "model", "no option", "mlp"),
        ("~model", "model", "is missing", "mlp"),
        ("model=null", "model", "is missing", "mlp"),
        ("~seed", "seed", "required", "seed="),
        ("~nosuch", "nosuch", "nothing to remove", ""),
        ("~hooks.progres", "hooks.progres", "nothing to remove", "progress"),
        ("~seed=3", "seed", "not 3", "~seed"),
        ("~precision=bf16", "precision", "not bf16", "~precision"),
        ("~batch.global_size", "batch.global_size", "required", "batch.global_size="),
        ("batch.global_size=null", "batch.global_size", "is missing", "batch.global_size="),
        ("name=a/b", "name", "folder", ""),
        ("name=''", "name", "folder", ""),
        ("run_dir=''", "run_dir", "empty", ""),
        ("name.x=3", "name.x", "no keys of its own", ""),
        ("model._args_.9.x=3", "model._args_.9.x", "list of 3", "0 to 2"),
        ("hydra.run.dir=x", "hydra.run.dir", "Hydra", "run_dir=x"),
        ("hydra/launcher=joblib", "hydra/launcher", "Hydra", "process of its own"),
        ("hydra.job.chdir=true", "hydra.job.chdir", "Hydra", "remove"),
        ("precision=fp32,bf16", "precision", "several runs", "-m"),
        ("seed=range(3)", "seed", "several runs", "-m"),
        ("name=[a", "name", "cannot be read", "quotes"),
        ("name=é=", "name", "cannot be read", "\"name='é='\""),
        ("name=f(3)", "name", "cannot be read", "quotes"),
        ("=3", "", "", ""),
        ("seed@x=3", "seed", "no group", ""),
        ("recipe@x=smoke", "recipe", "no group", ""),
        ("batch.micro_size=5", "batch.micro_size", "32 = 5 x ? x 1", "batch.micro_size=4 or batch.micro_size=8"),
        ("accumulation.steps=3", "accumulation.steps", "32 = ? x 3 x 1", "accumulation.steps=2 or accumulation.steps=4"),
        ("batch.micro_size=100", "batch.micro_size", "32 = 100 x ?", "batch.micro_size=16 or batch.micro_size=32"),
        ("data.drop_last=maybe", "data.drop_last", "true or false", "without quotes"),
        ("data.num_workers=10000", "data.num_workers", "1024", ""),
        ("launch.threads=99999", "launch.threads", "1024", ""),
        ("data.num_workers=-1", "data.num_workers", "from 0", ""),
        ("data.foo=1", "data.foo", "unknown key", "data._target_"),
        ("device=gpu", "device", "one of auto, cpu, cuda, mps", ""),
        ("eval.every=0", "eval.every", "at least 1", ""),
        ("resume_allow=seed", "resume_allow", "list", "[a,b]"),
        ("data.train=a.tsv", "data.train", "what to build", "_target_"),
        ("hooks=null,default", "hooks", "several runs", "-m"),
    ],
)  # fmt: skip
def test_overrides(override, key, why, fix, project):
    problem = only(project.check("+recipe=smoke", override))
    assert problem.key == key or not key
    assert why in problem.why
    assert fix in problem.fix
    assert problem.mark.file == "command line"
    assert problem.mark.line is None


@pytest.mark.parametrize(
    ("override", "why", "fix"),
    [
        ("recipe=smok", "no recipe called smok", "did you mean smoke?"),
        ("recipe=zzz", "no recipe called zzz", "mlp_synthetic"),
        ("recipe=../../etc/passwd", "not the path of a recipe", "./recipes"),
        ("recipe=recipes/smoke.yaml", "no such file", "+recipe=smoke"),
        ("recipe=/etc/passwd", "not the path of a recipe", ""),
        ("recipe=..", "not the path of a recipe", ""),
        ("recipe=/nosuch/own.yaml", "no such file", "./recipes"),
        ("recipe=/dev/null.yaml/x.yaml", "no such file", ""),
        ("recipe=", "one recipe", ""),
        ("recipe=[smoke,mlp_synthetic]", "one recipe", "-m"),
        ("recipe=3", "one recipe", ""),
        ("recipe={a: 1}", "one recipe", ""),
        ("recipe=null", "no recipe is chosen", "smoke"),
        ("seed=3", "no recipe is chosen", "smoke"),
    ],
)
def test_recipes_that_are_not_there(override, why, fix, project):
    problem = only(project.check(override))
    assert problem.key == "recipe"
    assert why in problem.why
    assert fix in problem.fix


def test_no_recipe_is_needed_where_the_command_line_says_everything(project):
    choices = ["model=mlp", "task=classification", "data=random", "batch.global_size=8"]
    assert project.check(*choices, "train.steps=1") == []
    assert only(project.check(*choices)).key == "train"
    assert only(project.check(*choices[:3], "train.steps=1")).key == "batch.global_size"


def test_both_or_neither_of_steps_and_epochs(project, good):
    project.write("recipes/own.yaml", good.replace("{epochs: 1}", "{epochs: 1, steps: 2}"))
    problem = only(project.check("+recipe=own"))
    assert problem.key == "train"
    assert "epochs (line 7) and steps (line 7)" in problem.why
    project.write("recipes/own.yaml", good.replace("train: {epochs: 1}\n", ""))
    problem = only(project.check("+recipe=own"))
    assert (problem.key, problem.mark.file) == ("train", str(project.folder / "recipes/own.yaml"))
    problem = only(project.check("+recipe=smoke", "train.steps=1", "train.epochs=1"))
    assert "epochs (command line) and steps (command line)" in problem.why


def test_a_contradiction_of_the_batch_shows_the_equation(project, good):
    project.write("recipes/own.yaml", good.replace("{global_size: 8}", "{global_size: 64, micro_size: 16}"))
    problem = only(project.check("+recipe=own", "batch.micro_size=16", "accumulation.steps=2"))
    assert "64 is not 16 x 2 x 1 = 32" in problem.why
    assert "accumulation.steps=4 or batch.micro_size=32" in problem.fix


def test_everything_missing_is_said_at_once(project):
    project.write("recipes/own.yaml", "# nothing\nname: own\noptimizer: null\n")
    problems = project.check("+recipe=own")
    assert {p.key for p in problems} == {"model", "task", "optimizer", "batch.global_size", "data.train", "train"}
    assert all(p.mark.file.endswith("own.yaml") for p in problems)


def test_all_problems_at_once(project):
    extra = "sed: 3\nprecision: fp17\nlog: {evry: 1}\noptimizer: {lr: abc}\nscheduler: {_target_: nosuch.X}\nrun_dir: ${x}\n"
    problems = project.own(extra, "grad_clip=-1", "hooks=nosuch", "a b", "name=[x")
    assert {p.key for p in problems} == {
        "sed", "precision", "log.evry", "optimizer.lr", "scheduler._target_", "run_dir", "grad_clip", "hooks", "a b", "name",
    }  # fmt: skip


def test_an_unknown_recipe_and_other_mistakes_at_once(project):
    problems = project.check("recipe=smok", "precision=fp17", "seed=abc", "x=1")
    assert {p.key for p in problems} == {"recipe", "precision", "seed", "x"}


def test_every_missing_value_is_named(project):
    problems = project.own("run_dir: ???\ngrad_clip: ???\nhooks: {a: {_target_: torch.x, y: '???'}}\n")
    assert {p.key for p in problems} == {"run_dir", "grad_clip", "hooks.a.y"}


def test_a_circle_is_named_once(project):
    problems = project.own("run_dir: ${resume}\nresume: ${name2}\nname2: ${run_dir}\n")
    circles = [p for p in problems if "itself" in p.why]
    assert len(circles) == 1
    assert "resume -> name2 -> run_dir -> resume" in circles[0].why


def test_files_include_each_other(project, good):
    project.write("recipes/a.yaml", "# a\ndefaults: [b]\n" + good)
    project.write("recipes/b.yaml", "# b\ndefaults: [a]\n" + good)
    assert any("circle" in p.why for p in project.check("recipe=a"))


def test_a_broken_file_of_a_group(project):
    file = project.write("conf/optimizer/adamw.yaml", "_target_: torch.optim.AdamW\n\tlr: 1\n")
    problem = only(project.check("+recipe=smoke"))
    assert (problem.mark.file, problem.mark.line) == (str(file), 2)


@pytest.mark.parametrize("kind", ["folder", "unreadable", "dangling"])
def test_recipes_that_are_no_files(kind, project):
    if kind == "folder":
        (project.folder / "recipes/own.yaml").mkdir(parents=True)
    elif kind == "dangling":
        (project.folder / "recipes").mkdir()
        (project.folder / "recipes/own.yaml").symlink_to("nowhere")
    else:
        project.write("recipes/own.yaml", "x: 1").chmod(0)
    problems = project.check("+recipe=own")
    assert problems  # as root, an unreadable file is readable and has an unknown key


def test_a_config_dir_that_is_not_there(project):
    composition = project.compose("+recipe=smoke", config_dirs=(project.folder / "nosuch",))
    assert "no such folder" in only(composition.check()).why


CHARACTERS = "".join(map(chr, range(32, 127))) + "\t\n\0é☃"
RECIPES = sorted((BUILTIN / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_any_change_of_one_character_gives_a_plan_or_problems(path, project):
    """Two hundred random changes of every recipe: valid, or problems that can be shown; never an exception."""
    text = path.read_text()
    rng = random.Random(path.stem)
    slowest = 0.0
    for _ in range(200):
        at = rng.randrange(len(text))
        character = rng.choice(CHARACTERS)
        changed = rng.choice(
            [text[:at] + text[at + 1 :], text[:at] + character + text[at:], text[:at] + character + text[at + 1 :]]
        )
        project.write(f"recipes/{path.stem}.yaml", changed)
        start = time.process_time()
        composition = project.compose(f"+recipe={path.stem}")
        problems = composition.check()
        shown = render(problems, composition.origins, directory=project.folder)
        slowest = max(slowest, time.process_time() - start)
        assert all(
            len(line) <= 80 or " " not in line.strip() or line.startswith(("recipes/", "    "))
            for line in shown.split("\n")
        )
        assert all(p.why for p in problems)
    assert slowest < 2


@pytest.mark.parametrize("seed", range(3))
def test_any_command_line_gives_a_plan_or_problems(seed, project):
    from runner.recipe.overrides import parse_arguments

    rng = random.Random(seed)
    words = [
        "+recipe=smoke",
        "optimizer.lr=1e-3",
        "hooks=[default,ema]",
        "-m",
        "--cfg",
        "job",
        "~scheduler",
        "data=random",
    ]
    for _ in range(60):
        chosen = rng.sample(words, rng.randrange(1, len(words)))
        at = rng.randrange(len(chosen))
        word = list(chosen[at])
        for _ in range(rng.randrange(1, 4)):
            word.insert(rng.randrange(len(word) + 1), rng.choice(CHARACTERS.replace("\0", "")))
        chosen[at] = "".join(word)
        try:
            invocation = parse_arguments(chosen)
        except InputError:  # its first word is no verb
            continue
        composition = project.compose(*invocation.overrides)
        assert render([*invocation.problems, *composition.check()], composition.origins, directory=project.folder)


# Places


def test_an_option_stands_where_it_was_chosen(project, good):
    project.write("recipes/own.yaml", good + "precision: tf32\n")
    chosen = project.compose("+recipe=own").origins
    assert (chosen["precision"].line, chosen["precision"].column) == (9, 1)
    assert chosen["precision"].file.endswith("recipes/own.yaml")
    assert chosen["precision.tf32"].file.endswith("conf/precision/tf32.yaml")
    typed = project.compose("+recipe=own", "precision=bf16", "optimizer=sgd").origins
    assert str(typed["precision"]) == str(typed["optimizer"]) == "command line"
    assert typed["optimizer._target_"].file.endswith("conf/optimizer/sgd.yaml")


def test_what_the_recipe_says_below_a_group_stands_there(project, good):
    project.write("recipes/own.yaml", good + "optimizer:\n  lr: 3\n")
    assert project.compose("+recipe=own", "optimizer=adamw").origins["optimizer"].line == 9


@pytest.mark.parametrize("words", [("train.steps=5", "train.epochs=2"), ("batch.micro_size=8", "accumulation.steps=3")])
def test_typed_keys_that_contradict_each_other_stand_at_the_command_line(words, project):
    problem = only(project.own("", *words))
    assert str(problem.mark) == "command line"


def test_keys_of_a_file_that_contradict_each_other_stand_at_the_last(project, good):
    project.write("recipes/own.yaml", good.replace("train: {epochs: 1}", "train:\n  epochs: 1\n  steps: 2"))
    assert only(project.check("+recipe=own")).mark.line == 9
