"""G19: every difference between a checkpoint and the run that goes on is shown, and dangerous ones stop."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from guarantees.cases_g19 import Case, cases, every, run
from runner.__main__ import main


@pytest.mark.parametrize("case", every(), ids=str)
def test_a_changed_field_is_shown(case: Case, tmp_path: Path, quiet: None) -> None:
    assert run(case, tmp_path) is None


def test_there_are_forty() -> None:
    assert len({case.name for case in every()}) == len(every()) >= 40
    assert [case.name for case in cases(100, seed=1)] == [case.name for case in cases(100, seed=1)]


def test_as_a_user_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    net = (
        "import torch\n\n\ndef net(width=8):\n"
        "    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Linear(width, 4))\n"
    )
    (tmp_path / "seen_g19.py").write_text(net)
    words = ["+recipe=smoke", "run_dir=r", "model={_target_: seen_g19.net}"]
    changed = [*words, "train.steps=8", "optimizer.lr=0.5", "seed=3", "log.every=1"]
    assert main([*words, "train.steps=4"]) == 0
    (tmp_path / "seen_g19.py").write_text(f"{net}# another line\n")
    capsys.readouterr()
    assert main(changed) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "2 problems" in said
    assert "was 0.001 in the run that goes on" in said
    assert "resume_allow=[optimizer.lr]" in said
    assert "was 0 in the run that goes on" in said
    assert "Traceback" not in said
    assert main([*changed, "resume_allow=[optimizer,seed]"]) == 0
    said = capsys.readouterr().out
    assert "warning: optimizer.lr was 0.001 and is 0.5: allowed, and applies" in said
    assert "warning: the code differs from the checkpoint's: seen_g19.py is changed" in said
    assert "differs  " in said
    assert "log.every 2 -> 1" in said
    assert "optimizer.lr was 0.001 and is 0.5" in (tmp_path / "r" / "logs" / "main.log").read_text()
    records = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [r["lr"] for r in records if r["split"] == "train"] == [0.001, 0.001, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("words", "key", "why"),
    [
        (["train.steps=3"], "train.steps", "makes 3 steps, and 4 are done"),
        (["train.steps=8", "resume_allow=[optimzer]"], "resume_allow", "did you mean optimizer?"),
        (["train.steps=8", "resume_allow=[lr]"], "resume_allow", "did you mean optimizer.lr?"),
    ],
)
def test_what_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None,
    words: list[str], key: str, why: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["+recipe=smoke", "run_dir=a", "train.steps=4"]) == 0
    assert main(["+recipe=smoke", "run_dir=b", "resume=a", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert key in said
    assert why in said


def test_another_kind_of_optimizer_says_what_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: None
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["+recipe=smoke", "run_dir=a", "train.steps=4", "optimizer=adam"]) == 0
    assert main(["+recipe=smoke", "run_dir=a", "train.steps=8"]) == 2
    assert "was torch.optim.Adam in the run that goes on" in " ".join(capsys.readouterr().err.split())
    assert main(["+recipe=smoke", "run_dir=a", "train.steps=8", "resume_allow=[optimizer]"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the state of Adam, which AdamW cannot take" in said
    assert "init_from=" in said
