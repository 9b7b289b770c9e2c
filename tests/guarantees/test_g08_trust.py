"""G8: a recipe from elsewhere cannot choose any function; what is allowed works; the user can widen it."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import begin, end

from guarantees import cases_g08
from guarantees.cases_g08 import BASE, CASES, MODEL, prepared
from runner import trust
from runner.errors import InputError
from runner.recipe.compose import compose


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_gadget_is_refused_and_does_nothing(case, tmp_path):
    assert cases_g08.run(case, tmp_path) is None


def test_there_are_enough_and_each_once():
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.fixture
def sent(tmp_path: Path):
    """`sent(lines, *words, **files)`: composes a recipe from elsewhere in a working directory."""

    def compose_it(lines: str = "", *words: str, mine: dict[str, str] | None = None, model: str = MODEL):
        case = cases_g08.Case("", lines, "", words, model, tuple((mine or {}).items()))
        directory, command = prepared(case, tmp_path)
        return compose(command, directory=directory)

    return compose_it


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "optimizer: sgd\nscheduler: cosine\nhooks: [default, ema, early_stop]\nprecision: bf16",
        "scheduler: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 3}",
        "optimizer: {_target_: torch.optim.AdamW, lr: 1e-3, weight_decay: '${.lr}'}",
        "hooks: {mine: {_target_: runner.hooks.early_stop.EarlyStop, patience: 2}}",
        "run_dir: null\nresume: auto\nlaunch: {nnodes: 1}\ntrust: []",  # what config.yaml of a run says anyway
        "compile: {mode: default, scope: block}",
    ],
)
def test_what_is_listed_works(lines, sent):
    assert sent(lines).check() == []


def test_options_that_come_with_the_program_work_with_arguments(sent):
    composition = sent("model:\n  num_labels: 3\n", model="defaults: [{model: bert}]")
    assert composition.check() == []
    assert composition.config["model"]["num_labels"] == 3


def test_the_users_own_command_line_may_name_anything(sent):
    assert sent("", "model._target_=os.system").check() == []
    assert sent("", "hooks.x={_target_: os.system}").check() == []
    composition = sent("", "model=mine", mine={"conf/model/mine.yaml": "_target_: os.system\ncommand: x\n"})
    assert composition.check() == []
    assert "model._target_" not in composition.bound


@pytest.mark.parametrize(
    "words", [("trust=[decimal.Decimal]",), ("trust=[decimal.*]",), ("trust=[a.b,decimal.*]",)], ids=" ".join
)
def test_the_command_line_widens_the_list(words, sent):
    composition = sent("hooks: {x: {_target_: decimal.Decimal}}", *words)
    assert composition.check() == []
    assert composition.bound["hooks.x._target_"] == "decimal.Decimal"
    trust.confirm(composition.bound, composition.config["trust"])


def test_a_file_of_the_project_widens_the_list(sent):
    lines = "hooks: {x: {_target_: decimal.Decimal}}"
    assert sent(lines).check() != []
    assert sent(lines, mine={"conf/trust.yaml": "trust: [decimal.Decimal]\n"}).check() == []


@pytest.mark.parametrize(
    "text", ["trust: ['*']", "trust: [os]", "trust: [a b]", "trust: a.B", "other: 1", "trust: [a.B"]
)
def test_a_file_of_trust_that_makes_no_sense(text, sent):
    problems = sent("", mine={"conf/trust.yaml": f"{text}\n"}).check()
    assert problems
    assert all(p.mark.file.endswith("conf/trust.yaml") for p in problems)


def test_a_name_of_a_grant_must_be_defined_below_it():
    trust.confirm({"k": "json.decoder.JSONDecoder", "l": "json.JSONDecoder"}, ["json.*"])
    with pytest.raises(InputError) as caught:
        trust.confirm({"k": "json.decoder.re.compile", "l": "json.JSONDecoder"}, ["json.*"])
    assert [p.key for p in caught.value.problems] == ["k"]
    assert "re defines" in caught.value.problems[0].why


def test_every_listed_name_is_what_it_says():
    torch = {name for name in trust.listed() if not name.startswith("transformers.")}
    trust.confirm({name: name for name in torch}, [])


def test_a_path_below_the_working_directory_is_the_users_own(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/own.yaml").write_text(BASE.format(model="model: {_target_: os.system, command: x}"))
    for form in ("sub/own.yaml", "./sub/own.yaml", str(tmp_path / "sub/own.yaml")):
        composition = compose([f"+recipe={form}"], directory=tmp_path)
        assert composition.check() == []
        assert composition.config["name"] == "sent"


def test_a_link_to_elsewhere_given_by_its_path_is_foreign(tmp_path):
    mine, there = tmp_path / "mine", tmp_path / "there.yaml"
    mine.mkdir()
    there.write_text(BASE.format(model="model: {_target_: os.system, command: x}"))
    (mine / "link.yaml").symlink_to(there)
    assert [p.key for p in compose(["+recipe=./link.yaml"], directory=mine).check()] == ["model._target_"]


def test_a_folder_of_configuration_from_elsewhere_is_foreign(tmp_path):
    mine, there = tmp_path / "mine", tmp_path / "there"
    (there / "recipes").mkdir(parents=True)
    (there / "model").mkdir()
    mine.mkdir()
    (there / "recipes/sent.yaml").write_text(BASE.format(model="model: shell"))
    (there / "model/shell.yaml").write_text("_target_: os.system\ncommand: x\n")
    problems = compose(["+recipe=sent"], directory=mine, config_dirs=(there,)).check()
    assert [p.key for p in problems] == ["model._target_"]
    assert problems[0].mark.file == str(there / "model/shell.yaml")
    within = mine / "there"
    there.rename(within)
    assert compose(["+recipe=sent"], directory=mine, config_dirs=(within,)).check() == []


def test_all_refusals_are_told_at_once_and_the_program_ends_with_2(tmp_path):
    lines = "hooks: {x: {_target_: os.system}, y: {_target_: pickle.load}}\nrun_dir: /x\nlog: {every: '${oc.env:HOME}'}"
    case = cases_g08.Case("", lines, "")
    directory, words = prepared(case, tmp_path)
    told = end(begin(directory, *words), tmp_path)
    assert told.code == 2
    assert told.err.startswith("4 problems in the configuration")
    for line, key in ((9, "hooks.x._target_"), (9, "hooks.y._target_"), (10, "run_dir"), (11, "log.every")):
        assert any(f"sent.yaml:{line}:" in text and key in text for text in told.err.split("\n\n"))
    assert "Traceback" not in told.err
    assert list(directory.iterdir()) == []


def test_a_late_refusal_ends_the_program_with_2_as_well(tmp_path):
    case = next(case for case in CASES if case.name == "a re-export of an allowed package")
    directory, words = prepared(case, tmp_path)
    told = end(begin(directory, *words), tmp_path)
    assert told.code == 2
    assert "which posix defines" in told.err
    assert not (directory / cases_g08.CANARY).exists()


def test_a_recipe_from_elsewhere_trains(tmp_path):
    directory, words = prepared(cases_g08.Case("", "", ""), tmp_path)
    small = ["device=cpu", "data.train.features=4", "data.train.classes=2", "run_dir=run", "trackers.tensorboard=null"]
    told = end(begin(directory, *words, *small), directory / "run")
    assert told.code == 0, told.err
    assert "comes from elsewhere" in told.out
    assert told.json("summary.json")["status"] == "completed"
