"""The command line: flags in any order, one form of `recipe=`, sweeps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from runner.errors import InputError
from runner.recipe.overrides import Invocation, assignment, jobs, parse, parse_arguments, split_jobs


def test_flags_and_overrides_in_any_order():
    words = [["+recipe=x"], ["-m"], ["precision=a,b"], ["--cfg", "job"], ["~scheduler"]]
    for order in itertools.permutations(words):
        found = parse_arguments([word for part in order for word in part])
        assert found.problems == []
        assert found.multirun
        assert found.cfg == "job"
        assert sorted(found.overrides) == ["precision=a,b", "recipe=x", "~scheduler"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--help"], {"help": True}),
        (["-h"], {"help": True}),
        (["--hydra-help"], {"hydra_help": True}),
        (["--version"], {"version": True}),
        (["--multirun"], {"multirun": True}),
        (["--run"], {"run": True}),
        (["-r"], {"run": True}),
        (["--json"], {"json": True}),
        (["--cfg=all"], {"cfg": "all"}),
        (["-c", "hydra"], {"cfg": "hydra"}),
        (["--cfg", "job", "--resolve"], {"cfg": "job", "resolve": True}),
        (["--cfg", "job", "-p", "model"], {"cfg": "job", "package": "model"}),
        (["--info"], {"info": "all"}),
        (["-i", "defaults"], {"info": "defaults"}),
        (["--info=searchpath"], {"info": "searchpath"}),
        (["--info", "+recipe=x"], {"info": "all", "overrides": ["recipe=x"]}),
        (["-cd", "/", "--config-dir=/"], {"config_dirs": [Path("/"), Path("/")]}),
        (["++recipe=x", "recipe=y", "+a=3", "~c"], {"overrides": ["recipe=x", "recipe=y", "+a=3", "~c"]}),
        (["a=--b", "a=-1"], {"overrides": ["a=--b", "a=-1"]}),
    ],
)  # fmt: skip
def test_flags(argv, expected):
    assert parse_arguments(argv) == Invocation(**expected)


@pytest.mark.parametrize(
    ("argv", "fix"),
    [
        (["--seed=3"], "write `seed=3`"),
        (["--optimizer.lr=3"], "write `optimizer.lr=3`"),
        (["--run-dir=3"], "write `run_dir=3`"),
        (["--seed", "3"], "write `seed=3`"),
        (["-x"], "`--help`"),
        (["--confg", "job"], "did you mean --cfg?"),
        (["--cfg"], "job|hydra|all"),
        (["--cfg", "jobs"], ""),
        (["--config-dir"], "FOLDER"),
        (["--resolve"], "--cfg job"),
        (["--config-name=x"], "runner.yaml"),
        (["--shell-completion"], "not there yet"),
        (["smoke"], "+recipe=smoke"),
        (["+recipe/smoke"], "+recipe=smoke"),
        (["smoke.yaml"], "+recipe=smoke"),
        (["+recipe=smoke", "nosuch"], "key=value"),
        ([""], "key=value"),
    ],
)
def test_what_is_neither_is_one_problem(argv, fix):
    found = parse_arguments(argv)
    assert len(found.problems) == 1
    assert fix in found.problems[0].fix
    assert found.problems[0].mark.file == "command line"


@pytest.mark.parametrize(("word", "fix"), [("evaluate", "verbs: recipes"), ("recipe", "did you mean recipes?")])
def test_a_first_word_that_is_no_verb(word, fix):
    with pytest.raises(InputError) as caught:
        parse_arguments([word, "run_dir=r"])
    (problem,) = caught.value.problems
    assert problem.why == "there is no such verb"
    assert fix in problem.fix


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=größe", "größe"),
        ("+model.a=x;y", "x;y"),
        ("run_dir=runs/2026-größe_x-e7ab", "runs/2026-größe_x-e7ab"),
        ("run_dir=sw/1_precision=bf16", "sw/1_precision=bf16"),
        ("data.train=a<b>#c)", "a<b>#c)"),
        ("name='größe'", "größe"),
    ],
)
def test_characters_that_the_grammar_does_not_know_are_text(text, value):
    (found,), problems = parse([text])
    assert problems == []
    assert found.value == value


@pytest.mark.parametrize(
    "text", ["seed=range(1", "name=a=b", "größe=3", "name=é,ü", "name=a\x07", "name={é", "name=é'"]
)
def test_what_is_no_plain_text_stays_refused(text):
    found, problems = parse([text])
    assert found == []
    assert len(problems) == 1


@pytest.mark.parametrize(
    "path", ["sw/0", "sw/1_seed=1", "a,b/größe", "it's/[x]", "a\\b", "a\\\\'[", "[b\\", "f(1)", "a b"]
)
def test_any_path_can_be_an_override(path):
    (found,), problems = parse([assignment("run_dir", path)])
    assert problems == []
    assert found.value == path


def test_jobs_of_a_sweep():
    found = parse_arguments(["precision=fp32,bf16", "-m", "+recipe=smoke", "seed=range(0,2)"])
    assert jobs(found) == [
        ["precision=fp32", "recipe=smoke", "seed=0"],
        ["precision=fp32", "recipe=smoke", "seed=1"],
        ["precision=bf16", "recipe=smoke", "seed=0"],
        ["precision=bf16", "recipe=smoke", "seed=1"],
    ]
    assert jobs(parse_arguments(["+recipe=smoke", "seed=1"])) == [["recipe=smoke", "seed=1"]]
    assert jobs(parse_arguments(["+recipe=smoke", "-m"])) == [["recipe=smoke"]]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a=1,2", ["a=1", "a=2"]),
        ("+a=1,2", ["+a=1", "+a=2"]),
        ("a=choice(x,y)", ["a=x", "a=y"]),
        ("a=range(1,4)", ["a=1", "a=2", "a=3"]),
        ("a=range(0,1,0.5)", ["a=0.0", "a=0.5"]),
        ("a='x,y','z'", ["a='x,y'", "a='z'"]),
        ("hooks=[default],[default,ema]", ["hooks=[default]", "hooks=[default,ema]"]),
        ("a='x y'", ["a='x y'"]),
        ("~hooks.progress", ["~hooks.progress"]),
        ("~hooks=default", ["~hooks=default"]),
        ("precision=glob(bf*)", ["precision=bf16", "precision=bf16_full"]),
        ("recipe=glob(smok*)", ["recipe=smoke"]),
    ],
)
def test_values_of_a_sweep(override, values):
    assert split_jobs([override]) == [[value] for value in values]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["a=interval(0,1)"], "interval"),
        (["a=range(0,1000000000)"], "jobs"),
        (["a=range(0,1,0)"], "no end"),
        (["a=range(3,3)"], "no jobs"),
        ([f"{key}=range(0,30)" for key in "abc"], "27,000 jobs"),
        (["a=[1", "b=x(3)"], "cannot be read"),
    ],
)
def test_sweeps_that_cannot_be(overrides, why):
    with pytest.raises(InputError) as caught:
        split_jobs(overrides)
    assert why in caught.value.problems[0].why


def test_every_job_of_a_sweep_composes(project):
    for overrides in split_jobs(["recipe=smoke", "precision=fp32,bf16,fp16", "hooks=[default,ema]", "run_dir='a b'"]):
        assert project.check(*overrides) == []
