"""G9: configuration errors are told all at once, each with its place, key and remedy, before torch is imported."""

from __future__ import annotations

import subprocess
import sys

from programs import ROOT, begin, end

from guarantees import cases_g09

CHANGES = 400


def test_any_change_of_one_character_gives_a_plan_or_problems(tmp_path):
    found = [cases_g09.run(case, tmp_path) for case in cases_g09.cases(CHANGES, seed=9)]
    assert [violation for violation in found if violation is not None] == []


def test_what_is_no_number_of_classes_is_told_before_labels_are_compared_with_it(tmp_path):
    text = next(path for path in cases_g09.RECIPES if path.stem == "smoke").read_text(encoding="utf-8")
    assert "num_classes: 4\n" in text
    case = cases_g09.Case("smoke", "a letter", text.replace("num_classes: 4\n", "num_classes: 4T\n"), builds=True)
    assert cases_g09.run(case, tmp_path) is None


def test_all_at_once_with_place_key_and_remedy_and_without_torch(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/own.yaml").write_text(
        "name: own\nsed: 3\nprecision: fp17\nlog: {evry: 1}\noptimizer: {lr: abc}\nmodel: {_target_: troch.nn.Linear}\n"
        "task: classification\ndata: random\ntrain: {steps: 0}\nbatch: {global_size: 7, micro_size: 2}\n"
    )
    code = (
        "import sys; from runner.__main__ import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, "+recipe=own", "grad_clip=-1"],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert told.returncode == 2, told.stderr
    paragraphs = told.stderr.strip().split("\n\n")
    assert paragraphs[0] == "8 problems in the configuration"
    expected = [
        ("command line: grad_clip = -1", "above 0"),
        ("recipes/own.yaml:2:1: sed", "did you mean seed?"),
        ("recipes/own.yaml:3:1: precision = fp17", "fp16"),
        ("recipes/own.yaml:4:7: log.evry = 1", "did you mean log.every?"),
        ("recipes/own.yaml:5:13: optimizer.lr = abc", "for example 1e-3"),
        ("recipes/own.yaml:6:9: model._target_ = troch.nn.Linear", "did you mean torch.nn.Linear?"),
        ("recipes/own.yaml:9:9: train.steps = 0", "at least 1"),
        ("recipes/own.yaml:10:25: batch.micro_size = 2", "batch.micro_size=1 or batch.micro_size=7"),
    ]
    for paragraph, (head, remedy) in zip(paragraphs[1:], expected, strict=True):
        assert paragraph.startswith(head)
        assert remedy in " ".join(paragraph.split())
    assert "Traceback" not in told.stderr


def test_what_torch_has_to_be_asked_is_told_all_at_once_as_well(tmp_path):
    words = ["model._target_=torch.nn.Linaer", "optimizer.betta=1", "task.num_clases=3", "device=cpu"]
    told = end(begin(tmp_path, "+recipe=mlp_synthetic", *words), tmp_path)
    assert told.code == 2
    assert told.err.startswith("3 problems in the configuration")
    for remedy in ("did you mean torch.nn.Linear", "did you mean betas?", "did you mean num_classes?"):
        assert remedy in " ".join(told.err.split())
    assert "Traceback" not in told.err
