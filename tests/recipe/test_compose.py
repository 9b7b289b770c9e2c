"""Composition: precedence, the beginner's form, the user's overlay, marks, replacement of what is built."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from runner.errors import Mark
from runner.places import BUILTIN
from runner.recipe.compose import compose, dump

RECIPES = sorted((BUILTIN / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert {"smoke", "mlp_synthetic"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_plain(path, project):
    composition = project.compose(f"+recipe={path.stem}")
    assert composition.check() == []
    assert composition.recipe == path.stem
    assert json.loads(json.dumps(composition.config)) == composition.config
    assert composition.layers[-1] == str(path)
    assert composition.config["name"] == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dump_reads_back(path, project):
    config = project.compose(f"+recipe={path.stem}").config
    assert yaml.load(dump(config), Loader=get_yaml_loader()) == config


def test_defaults_of_the_schema_are_filled_in(project):
    config = project.compose("+recipe=smoke").config
    assert config["log"] == {"every": 2}
    assert config["grad_clip"] is None
    assert config["resume"] == "auto"
    assert config["checkpoint"] == {
        "every": None, "keep": 2, "best": None, "milestones": None, "async": True, "on_error": "stop",
    }  # fmt: skip
    assert config["train"] == {"epochs": 2, "steps": None}
    assert config["data"]["num_workers"] == 0
    assert config["precision"]["param_dtype"] == "float32"
    assert set(config["hooks"]) == {"progress", "metrics_log", "learning_rate", "throughput", "gradient_norm"}
    assert list(config["trackers"]) == ["jsonl", "tensorboard"]


def test_precedence(project, good):
    project.write("recipes/own.yaml", good + "grad_clip: 2.0\nlog: {every: 3}\noptimizer: {lr: 0.5}\n")
    project.write("conf/optimizer/adamw.yaml", "_target_: torch.optim.AdamW\nlr: 0.25\nweight_decay: 0.125\n")
    config = project.compose("+recipe=own", "log.every=4").config
    assert config["log"]["every"] == 4  # command line
    assert config["grad_clip"] == 2.0  # recipe before schema
    assert config["optimizer"]["lr"] == 0.5  # recipe before user's conf
    assert config["optimizer"]["weight_decay"] == 0.125  # user's conf before built-in conf
    assert "no_decay" not in config["optimizer"]  # a user's file replaces the built-in one
    assert config["seed"] == 0  # schema


@pytest.mark.parametrize("form", ["recipe=smoke", "+recipe=smoke", "++recipe=smoke", "recipe=smoke.yaml"])
def test_a_recipe_can_be_named_in_any_form(form, project):
    from runner.recipe.overrides import parse_arguments

    invocation = parse_arguments([form])
    composition = project.compose(*invocation.overrides)
    assert invocation.problems == []
    assert composition.check() == []
    assert composition.recipe == "smoke"


@pytest.mark.parametrize(
    "lines",
    [
        "precision: bf16\n",
        "defaults: [{precision: bf16}]\n",
        "defaults:\n  - /precision: bf16\n",
        "defaults:\n  - override /precision: bf16\n",
        "defaults:\n  - override precision: bf16\n  - _self_\n",
    ],
)
def test_ways_to_choose_an_option_in_a_recipe(lines, project):
    assert project.own(lines) == []
    composition = project.compose("+recipe=own")
    assert composition.config["precision"]["compute_dtype"] == "bfloat16"
    assert composition.choices["precision"] == "bf16"
    assert project.compose("+recipe=own", "precision=fp32").config["precision"]["name"] == "fp32"


def test_a_recipe_with_and_without_package_header_has_the_same_effect(project, good):
    project.write("recipes/a.yaml", good)
    project.write("recipes/b.yaml", "# @package _global_\n" + good)
    assert project.compose("recipe=a").config == project.compose("recipe=b").config


def test_lists_of_options(project):
    assert project.own("hooks: [default, early_stop]\n") == []
    in_recipe = project.compose("+recipe=own").config["hooks"]
    on_command_line = project.compose("+recipe=smoke", "hooks=[default,early_stop]").config["hooks"]
    assert in_recipe == on_command_line
    assert in_recipe["early_stop"]["patience"] == 3
    assert "progress" in in_recipe
    only = project.compose("+recipe=smoke", "hooks=early_stop", "hooks.early_stop.patience=7").config["hooks"]
    assert only == {"early_stop": {**in_recipe["early_stop"], "patience": 7}}
    assert project.compose("+recipe=smoke", "trackers=[]").config["trackers"] == {}


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["checkpoint=none"], "checkpoint", None),
        (["checkpoint=null"], "checkpoint", None),
        (["~checkpoint"], "checkpoint", None),
        (["scheduler=cosine", "scheduler=null"], "scheduler", None),
        (["scheduler=constant"], "scheduler", None),
        (["hooks=null"], "hooks", {}),
        (["~trackers.tensorboard"], "trackers", {"jsonl": {"_target_": "runner.trackers.jsonl.Jsonl"}}),
        (["~grad_clip"], "grad_clip", None),
    ],
)
def test_nothing_can_be_chosen(overrides, key, expected, project):
    composition = project.compose("+recipe=mlp_synthetic", *overrides)
    assert composition.check() == []
    assert composition.config[key] == expected


@pytest.mark.parametrize("text", ["checkpoint: null\n", "checkpoint: none\n", "defaults: [{checkpoint: null}]\n"])
def test_a_recipe_can_choose_nothing(text, project):
    assert project.own(text) == []
    assert project.compose("+recipe=own").config["checkpoint"] is None


def test_another_target_replaces_the_whole_node(project):
    assert project.own("optimizer: {_target_: torch.optim.SGD, lr: 0.1}\n") == []
    composition = project.compose("+recipe=own")
    assert composition.config["optimizer"] == {"_target_": "torch.optim.SGD", "lr": 0.1}
    assert composition.origins["optimizer.lr"].file.endswith("own.yaml")
    assert "optimizer.weight_decay" not in composition.origins


def test_another_target_inside_a_node_replaces_that_only(project):
    assert project.own("", "data=random", "data.train={_target_: torch.utils.data.TensorDataset}") == []
    data = project.compose("+recipe=own", "data=random", "data.train={_target_: a.B}").config["data"]
    assert data["train"] == {"_target_": "a.B"}
    assert data["eval"]["samples"] == 1000


def test_the_same_target_and_single_arguments_merge(project):
    assert project.own("optimizer: {_target_: torch.optim.AdamW, lr: 0.5}\n", "optimizer.weight_decay=0") == []
    optimizer = project.compose("+recipe=own", "optimizer.weight_decay=0").config["optimizer"]
    assert optimizer == {"_target_": "torch.optim.AdamW", "lr": 0.5, "weight_decay": 0, "no_decay": ["bias", "norm"]}


def test_a_choice_on_the_command_line_replaces_what_the_recipe_says(project):
    project.own("optimizer: {_target_: torch.optim.SGD, lr: 0.3}\n")
    composition = project.compose("+recipe=own", "optimizer=adam", "model=mlp")
    assert composition.config["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 0.001}
    assert composition.config["model"]["_target_"] == "torch.nn.Sequential"
    assert composition.notes == [
        "model=mlp replaces what the recipe own says about model",
        "optimizer=adam replaces what the recipe own says about optimizer",
    ]


def test_the_same_choice_on_the_command_line_keeps_what_the_recipe_says(project):
    assert project.own("optimizer: {lr: 0.3}\n", "optimizer=adamw") == []
    assert project.compose("+recipe=own", "optimizer=adamw").config["optimizer"]["lr"] == 0.3
    assert project.compose("+recipe=own", "optimizer=sgd").config["optimizer"]["lr"] == 0.1


def test_positions_in_lists_can_be_set(project):
    config = project.compose("+recipe=smoke", "model._args_.0.out_features=7", "resume_allow=[seed]").config
    assert config["model"]["_args_"][0]["out_features"] == 7
    assert config["model"]["_args_"][2]["in_features"] == 32
    assert config["resume_allow"] == ["seed"]


@pytest.mark.parametrize(
    ("recipe", "overrides", "train"),
    [
        ("", ["train.steps=5"], {"epochs": None, "steps": 5}),
        ("", ["train={steps: 5}"], {"epochs": None, "steps": 5}),
        ("", ["train.epochs=5"], {"epochs": 5, "steps": None}),
        ("", ["++train.steps=5"], {"epochs": None, "steps": 5}),
    ],
)
def test_steps_and_epochs_replace_each_other(recipe, overrides, train, project):
    assert project.own(recipe, *overrides) == []
    assert project.compose("+recipe=own", *overrides).config["train"] == train


def test_a_saving_interval_replaces_the_other(project):
    assert project.own("checkpoint: {every: {epochs: 1}}\n", "checkpoint.every.steps=5") == []
    every = project.compose("+recipe=own", "checkpoint.every.steps=5").config["checkpoint"]["every"]
    assert every == {"steps": 5, "epochs": None, "seconds": None}


@pytest.mark.parametrize(
    ("batch", "overrides", "expected"),
    [
        ("batch: {global_size: 64}", [], (64, 64, 1)),
        ("batch: {global_size: 64}", ["batch.micro_size=16"], (64, 16, 4)),
        ("batch: {global_size: 64}", ["accumulation.steps=4"], (64, 16, 4)),
        ("batch: {global_size: 64}", ["batch.micro_size=16", "accumulation.steps=4"], (64, 16, 4)),
        ("batch: {global_size: 64, micro_size: 16}", ["accumulation.steps=2"], (64, 32, 2)),
        ("batch: {global_size: 64, micro_size: 16}", ["accumulation.steps=4"], (64, 16, 4)),
        ("batch: {global_size: 64}\naccumulation: {steps: 2}", ["batch.micro_size=8"], (64, 8, 8)),
        ("batch: {global_size: 64}", ["batch.global_size=10"], (10, 10, 1)),
    ],
)
def test_the_batch_is_derived(batch, overrides, expected, project, good):
    project.write("recipes/own.yaml", good.replace("batch: {global_size: 8}", batch))
    composition = project.compose("+recipe=own", *overrides)
    assert composition.check() == []
    config = composition.config
    assert (config["batch"]["global_size"], config["batch"]["micro_size"], config["accumulation"]["steps"]) == expected


def test_marks_are_exact(project):
    project.write(
        "recipes/own.yaml", b"\xef\xbb\xbf# own\r\nname: own\r\noptimizer:\r\n  lr:   0.5\r\n  betas: [1, 2]\r\n"
    )
    origins = project.compose("+recipe=own", "seed=3").origins
    file = str(project.folder / "recipes/own.yaml")
    assert origins["name"] == Mark(file, 2, 1)
    assert origins["optimizer"] == Mark(file, 3, 1)
    assert origins["optimizer.lr"] == Mark(file, 4, 3)
    assert origins["optimizer.betas.1"] == Mark(file, 5, 14)
    assert origins["optimizer.weight_decay"].file == str(BUILTIN / "conf/optimizer/adamw.yaml")
    assert origins["seed"] == Mark("command line")
    assert origins[""] == Mark(file)


def test_marks_through_flow_style_anchors_and_merge_keys(project, good):
    text = "common: &c {lr: 1.0, momentum: 0.5}\n" + good + "optimizer:\n  <<: *c\n  _target_: torch.optim.SGD\n"
    project.write("recipes/own.yaml", text)
    composition = project.compose("+recipe=own")
    assert composition.config["optimizer"] == {"lr": 1.0, "momentum": 0.5, "_target_": "torch.optim.SGD"}
    assert (composition.origins["optimizer.momentum"].line, composition.origins["optimizer.momentum"].column) == (1, 22)
    assert [(p.key, p.mark.line) for p in composition.check()] == [("common", 1)]


def test_a_recipe_can_build_on_another(project, good):
    project.write("recipes/base.yaml", good + "precision: bf16\noptimizer: {_target_: torch.optim.SGD, lr: 0.5}\n")
    project.write("recipes/derived.yaml", "# more\ndefaults: [base]\nname: derived\nlog: {every: 1}\n")
    composition = project.compose("+recipe=derived")
    assert composition.check() == []
    assert composition.config["name"] == "derived"
    assert composition.config["precision"]["name"] == "bf16"
    assert composition.config["optimizer"]["lr"] == 0.5
    project.write("recipes/third.yaml", "# third\ndefaults: [base]\nprecision: fp32\noptimizer: adam\n")
    config = project.compose("+recipe=third").config
    assert config["precision"]["name"] == "fp32"
    assert config["optimizer"] == {"_target_": "torch.optim.Adam", "lr": 0.001}


def test_the_users_overlay(project, good):
    project.write("conf/model/tiny.yaml", "# tiny\n_target_: torch.nn.Linear\nin_features: 128\nout_features: 10\n")
    project.write("conf/precision/fp32.yaml", "name: fp32\ntf32: true\n")
    project.write("recipes/smoke.yaml", good)
    composition = project.compose("+recipe=smoke", "model=tiny", "task=classification", "data=random")
    assert composition.check() == []
    assert composition.config["name"] == "own"
    assert composition.config["model"]["in_features"] == 128
    assert composition.config["precision"]["tf32"] is True
    assert sorted(composition.notes)[-2:] == [
        "precision fp32 is ./conf/precision/fp32.yaml, which replaces the built-in one",
        "recipe smoke is ./recipes/smoke.yaml, which replaces the built-in one",
    ]
    assert composition.options["model"].count("tiny") == 1


def test_plugins_bring_configuration(project):
    project.write("plugins/mine/__init__.py", "raise RuntimeError('a plugin must not be imported')")
    project.write("plugins/mine/conf/model/mine.yaml", "_target_: plugins.mine.model.Model\n")
    composition = project.compose("+recipe=smoke", "model=mine")
    assert composition.check() == []
    assert composition.config["model"] == {"_target_": "plugins.mine.model.Model"}


def test_installed_plugins_bring_configuration(project, monkeypatch):
    from runner.recipe import sources

    project.write("site/acme_runner/__init__.py", "raise RuntimeError('a plugin must not be imported')")
    project.write("site/acme_runner/conf/model/acme.yaml", "_target_: acme_runner.Model\n")
    project.write("site/acme-1.dist-info/entry_points.txt", "[other]\na = b\n[runner.plugins]\nacme = acme_runner\n")
    monkeypatch.syspath_prepend(str(project.folder / "site"))
    sources.installed_plugins.cache_clear()
    try:
        composition = project.compose("+recipe=smoke", "model=acme")
    finally:
        sources.installed_plugins.cache_clear()
    assert composition.check() == []
    assert composition.config["model"] == {"_target_": "acme_runner.Model"}


def test_config_dir(project, good, tmp_path_factory):
    other = tmp_path_factory.mktemp("shared folder")
    (other / "model").mkdir()
    (other / "recipes").mkdir()
    (other / "model/tiny.yaml").write_text("_target_: torch.nn.Identity\n")
    (other / "recipes/shared.yaml").write_text(good)
    composition = project.compose("+recipe=shared", "model=tiny", config_dirs=(other,))
    assert composition.check() == []
    assert composition.config["model"] == {"_target_": "torch.nn.Identity"}
    assert composition.layers[-1] == str(other / "recipes/shared.yaml")


def test_paths_on_the_command_line_stay_as_typed(project):
    config = project.compose("+recipe=smoke", "run_dir=../runs/a", "resume=runs/latest").config
    assert (config["run_dir"], config["resume"]) == ("../runs/a", "runs/latest")


def test_interpolations(project, monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    extra = "run_dir: runs/${name}-${seed}-${oc.env:PLACE}\noptimizer: {lr: '${.weight_decay}'}\neval: ${log}\n"
    assert project.own(extra) == []
    composition = project.compose("+recipe=own", "seed=7", "scheduler.x=${optimizer.lr}", "scheduler._target_=a.B")
    assert composition.config["run_dir"] == "runs/own-7-here"
    assert composition.config["optimizer"]["lr"] == 0.01
    assert composition.config["scheduler"]["x"] == 0.01
    assert composition.config["eval"] == {"every": 10}
    assert composition.unresolved["run_dir"] == "runs/${name}-${seed}-${oc.env:PLACE}"


def test_only_the_chosen_recipe_is_read(project):
    project.write("recipes/broken.yaml", "{")
    assert project.check("+recipe=smoke") == []


def test_nothing_imports_torch_and_it_is_quick(tmp_path):
    code = (
        "import sys, time; t = time.process_time()  # also true on a busy machine\n"
        "from runner.recipe.compose import compose\n"
        "from pathlib import Path\n"
        "problems = compose(['+recipe=mlp_synthetic', 'precision=bf16'], directory=Path.cwd()).check()\n"
        "assert not problems, problems\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules\n"
        "print(time.process_time() - t)\n"
    )

    def run() -> float:
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert min(run() for _ in range(3)) < 1.0  # 0.25 s on an idle machine


def test_a_thousand_recipes_cost_nothing(project, good):
    for number in range(1000):
        project.write(f"recipes/r{number}.yaml", good)
    start = time.perf_counter()
    assert compose(["+recipe=r7"], directory=project.folder).check() == []
    assert time.perf_counter() - start < 1.0


def test_an_option_can_be_placed_elsewhere(project):
    overrides = ["+optimizer@model.inner=sgd", "+optimizer@model.inner.deeper=adam"]
    composition = project.compose("+recipe=smoke", *overrides)
    assert composition.check() == []
    assert composition.config["model"]["inner"]["_target_"] == "torch.optim.SGD"
    assert composition.config["model"]["inner"]["deeper"]["_target_"] == "torch.optim.Adam"
    assert composition.config["optimizer"]["_target_"] == "torch.optim.AdamW"


def test_a_folder_with_the_name_of_a_value_is_no_group(project):
    project.write("conf/seed/a.yaml", "x: 1\n")
    composition = project.compose("+recipe=smoke", "seed=3")
    assert composition.check() == []
    assert composition.config["seed"] == 3
    assert "seed" not in composition.options


def test_a_root_configuration_of_ones_own(project):
    root = (BUILTIN / "conf/runner.yaml").read_text().replace("precision: fp32", "precision: bf16")
    project.write("conf/runner.yaml", root + "scheduler: cosine\nseed: 5\n")
    composition = project.compose("+recipe=smoke")
    assert composition.check() == []
    assert composition.config["precision"]["name"] == "bf16"
    assert composition.config["scheduler"]["_target_"] == "runner.train.schedules.cosine"
    assert composition.config["seed"] == 5
    assert "the root configuration is ./conf/runner.yaml, which replaces the built-in one" in composition.notes
