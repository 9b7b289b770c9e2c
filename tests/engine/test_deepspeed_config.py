"""DeepSpeed's JSON from the recipe and a file, and what is refused before a model exists; needs no library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from runner.engine import deepspeed, deepspeed_config
from runner.engine.deepspeed import DeepSpeed, LibraryScale
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS, LossScaling
from runner.errors import InputError, Problem

CPU, TWO = torch.device("cpu"), Mesh(0, 2)
RECIPE = {"global_size": 32, "micro_size": 4, "accumulation": 4, "grad_clip": 1.0}


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "_version", lambda: (0, 19, 8))


def backend(
    precision: str = "fp32",
    mesh: Mesh = TWO,
    device: torch.device = CPU,
    **options: Any,
) -> DeepSpeed:
    return DeepSpeed(device, PRECISIONS[precision], mesh, **{"recipe": RECIPE, **options})


def config(tmp_path: Path, file: Any, recipe: Any = RECIPE, **options: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    return backend(config_file=str(path), recipe=recipe, **options)._config()


def refused(tmp_path: Path, file: Any, **options: Any) -> list[str]:
    with pytest.raises(InputError) as found:
        config(tmp_path, file, **options)
    return [problem.why for problem in found.value.problems]


def test_without_a_file() -> None:
    assert backend(stage=1)._config() == {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
    }


def test_bf16_sums_gradients_in_float32() -> None:
    found = backend("bf16", stage=3, offload_optimizer=True, offload_parameters=True)._config()
    assert found["bf16"] == {"enabled": True}
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["communication_data_type"] == "fp32"
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_loss_scaling_follows_the_precision() -> None:
    found = backend("fp16", device=torch.device("cuda"))._config()["fp16"]
    expected = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
    assert found == {"enabled": True, **expected, "min_loss_scale": 1.0}


def test_a_file_that_agrees_and_adds(tmp_path: Path) -> None:
    file = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1,
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6, "overlap_comm": "auto", "offload_param": None},
        "wall_clock_breakdown": True,
        "scheduler": {},
        "elasticity": {"enabled": False},
    }
    found = config(tmp_path, file)
    assert found["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1e6}
    assert found["wall_clock_breakdown"] is True
    assert found["bf16"] == {"enabled": False}
    assert found["gradient_clipping"] == 0.0  # the loop clips
    assert found["gradient_accumulation_steps"] == 1  # the loop weighs the losses
    assert "train_batch_size" not in found


def test_every_contradiction_is_named_with_both_values(tmp_path: Path) -> None:
    file = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "gradient_allreduce_op": "sum",
    }
    found = refused(tmp_path, file)
    assert len(found) == 8
    name = str(tmp_path / "ds.json")
    assert f"{name} says zero_optimization.stage = 3, but backend.stage says 2" in found
    assert f"{name} says train_batch_size = 64, but batch.global_size says 32" in found
    assert f"{name} says bf16.enabled = true, but precision says false" in found
    assert f"{name} says gradient_clipping = 0.5, but grad_clip says 1.0" in found
    assert any("zero_optimization.offload_optimizer.device" in why and '"none"' in why for why in found)
    assert any("gradient_allreduce_op" in why for why in found)


def test_clipping_that_nobody_asked_for(tmp_path: Path) -> None:
    (why,) = refused(tmp_path, {"gradient_clipping": 1.0}, recipe={**RECIPE, "grad_clip": None})
    assert why.endswith("but grad_clip says 0.0")


@pytest.mark.parametrize(
    "section",
    [
        {"scheduler": {"type": "WarmupLR"}},
        {"amp": {"enabled": True}},
        {"torch_autocast": {"enabled": True}},
        {"elasticity": {"enabled": True}},
        {"zero_optimization": {"cpu_offload": True}},
        {"compile": {"deepcompile": True}},
    ],
)
def test_sections_that_take_from_the_recipe(tmp_path: Path, section: dict[str, Any]) -> None:
    (why,) = refused(tmp_path, section)
    assert "the recipe's hands" in why


def test_a_section_that_is_none(tmp_path: Path) -> None:
    found = refused(tmp_path, {"zero_optimization": 2, "bf16": True})
    assert all("it is a section" in why for why in found)
    assert len(found) == 2


def test_an_optimizer_may_repeat_the_recipes(tmp_path: Path) -> None:
    recipe = {**RECIPE, "optimizer": {"_target_": "torch.optim.AdamW", "lr": 1e-3, "betas": [0.9, 0.99]}}
    same = {"type": "adamw", "params": {"lr": 0.001, "betas": [0.9, 0.99], "eps": "auto"}}
    assert "optimizer" not in config(tmp_path, {"optimizer": same}, recipe)
    other = {"type": "Adam", "params": {"lr": 0.1, "eps": 1e-8}}
    found = refused(tmp_path, {"optimizer": other}, recipe=recipe)
    assert [why.split(" says ", 1)[1] for why in found] == [
        'optimizer.type = "Adam", but optimizer._target_ says "AdamW"',
        "optimizer.params.lr = 0.1, but optimizer.lr says 0.001",
        "optimizer.params.eps = 1e-08, but the recipe has no optimizer.eps",
    ]
    assert "optimizer" not in config(tmp_path, {"optimizer": {"type": "auto", "params": {"lr": "auto"}}})
    assert len(refused(tmp_path, {"optimizer": same})) == 3  # nothing to compare with


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds a list"),
        ('{"bf16": {}, "bf16": {}}', "`bf16` twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "`stage` twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, words: str) -> None:
    (why,) = refused(tmp_path, text)
    assert words in why


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = backend(config_file=str(tmp_path / "none.json")).check()
    assert "No such file" in problem.why
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (problem,) = backend(config_file=str(tmp_path / "binary")).check()
    assert "not UTF-8" in problem.why


# --- check ------------------------------------------------------------------------------------------------------------


def keys(problems: list[Problem]) -> list[str | None]:
    return [problem.key for problem in problems]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_works_is_not_refused(precision: str, stage: int) -> None:
    assert backend(precision, stage=stage).check() == []


@pytest.mark.parametrize(("precision", "words"), [("fp16", "no fp16 on a CPU"), ("bf16_full", "float32 copies")])
def test_precisions_that_it_cannot_do(precision: str, words: str) -> None:
    (problem,) = backend(precision).check()
    assert problem.key == "precision"
    assert words in problem.why


def test_stage_0_in_bf16() -> None:
    (problem,) = backend("bf16", stage=0).check()
    assert "stage 0 sums gradients in bf16" in problem.why


def test_tf32_on_a_cpu_is_refused_as_everywhere() -> None:
    (problem,) = backend("tf32").check()
    assert "no TF32" in problem.why


def test_options_that_make_no_sense() -> None:
    assert keys(backend(stage=4).check()) == ["backend.stage"]
    assert keys(backend(offload_optimizer=True).check()) == ["backend.offload_optimizer"]
    assert keys(backend(offload_parameters=True).check()) == ["backend.offload_parameters"] * 2
    assert keys(backend(mesh=Mesh(0, 4, replicas=2)).check()) == ["backend.replicas"]
    assert keys(backend(device=torch.device("mps")).check()) == ["device"]


def test_all_problems_are_told_at_once() -> None:
    assert keys(backend("fp16", stage=5, offload_optimizer=True).check()) == [
        "precision",
        "backend.stage",
        "backend.offload_optimizer",
    ]


def scaled(**options: Any) -> DeepSpeed:
    precision = replace(PRECISIONS["fp16"], loss_scaling=LossScaling(**options))
    return DeepSpeed(torch.device("cuda"), precision, TWO, recipe=RECIPE)


def test_loss_scaling_that_the_library_cannot_do() -> None:
    assert scaled(init_scale=2.0**10, growth_interval=50, floor=8.0).check() == []
    problems = scaled(init_scale=60000.0, growth_factor=4.0, backoff_factor=0.25).check()
    names = ("growth_factor", "backoff_factor", "init_scale")
    assert keys(problems) == [f"precision.loss_scaling.{name}" for name in names]
    assert [problem.fix.partition(",")[0] for problem in problems] == ["2.0", "0.5", "65536.0"]


def test_the_loss_scale_is_divided_by_the_readers_and_told_for_one() -> None:
    library = SimpleNamespace(cur_scale=65536.0, min_scale=1.0, cur_iter=7, last_overflow_iter=3)
    scale = LibraryScale(library, LossScaling(init_scale=1024.0, floor=4.0), 2)
    assert (library.cur_scale, library.min_scale) == (512.0, 2.0)
    assert scale.state_dict() == {"scale": 1024.0, "growth_tracker": 3}
    scale.load_state_dict({"scale": 64.0, "growth_tracker": 5})
    assert library.cur_scale == 32.0
    assert scale.state_dict() == {"scale": 64.0, "growth_tracker": 5}
    scale.load_state_dict({"scale": 0.0, "growth_tracker": 0})
    assert library.cur_scale == 32.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_cannot_be_ignored(stage: int) -> None:
    problems = backend(stage=stage, recipe={**RECIPE, "nan": "ignore"}).check()
    assert keys(problems) == (["nan"] if stage else [])
    assert backend(stage=stage, recipe={**RECIPE, "nan": "skip"}).check() == []


def test_not_installed_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "_version", lambda: None)
    (problem,) = backend().check()
    assert problem.fix == "pip install 'runner[deepspeed]'"
    monkeypatch.setattr(deepspeed, "_version", lambda: (0, 14, 2))
    (problem,) = backend().check()
    assert "0.14.2 is installed, and 0.19 or newer is needed" in problem.why


def test_contradictions_are_found_by_check(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    (problem,) = backend(config_file=str(tmp_path / "ds.json")).check()
    assert problem.key == deepspeed_config.FILE_KEY
