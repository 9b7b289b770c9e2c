"""Losses of mlp_synthetic that stay what they were: a change that computes nothing new keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runner.__main__ import main

GOLDEN = Path(__file__).with_name("golden_mlp_synthetic.json")


def test_losses_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["+recipe=mlp_synthetic", "train.steps=60", "log.every=1", "run_dir=r", "launch.threads=1"]) == 0
    records = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    golden = json.loads(GOLDEN.read_text())
    losses = [record["loss"] for record in records if record["split"] == "train"]
    norms = [record["grad_norm"] for record in records if record["split"] == "train"]
    assert losses == pytest.approx(golden["losses"], rel=1e-6)
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-5)
    evaluation = records[-1]
    assert evaluation["loss"] == pytest.approx(golden["eval_loss"], rel=1e-6)
    assert evaluation["accuracy"] == golden["eval_accuracy"]
