"""DeepSpeed's own configuration from the recipe, merged with a user's JSON file; knows nothing of the library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from runner.engine.precision import Precision
from runner.errors import InputError, Problem, wrong

FILE_KEY = "backend.config_file"
AUTO = "auto"

#: Sections that would decide what the recipe decides, with what to do instead.
_TAKEN = {
    "scheduler": "choose it in the recipe (scheduler=cosine)",
    "amp": "choose the precision in the recipe (precision=bf16)",
    "torch_autocast": "choose the precision in the recipe (precision=bf16)",
    "data_efficiency": "the recipe decides the order of samples",
    "curriculum_learning": "the recipe decides the order of samples",
    "elasticity": "the recipe decides the batch",
    "autotuning": "run DeepSpeed's own tuner by hand",
    "compile": "choose it in the recipe (compile=true)",
    "tensor_parallel": "every process here reads its own data",
    "zero_optimization.cpu_offload": "say backend.offload_optimizer=true",
    "zero_optimization.cpu_offload_param": "say backend.offload_parameters=true",
    "zero_optimization.zenflow": "its steps use gradients of earlier steps",
}

#: Values that the steps here need, with why; the file may repeat them.
_NEEDED: dict[str, tuple[Any, str]] = {
    "managed_gradient_accumulation": (True, "the loop says which micro-batch is the last of a step"),
    "gradient_allreduce_op": ("mean", "the loss is scaled for averaged gradients"),
    "sequence_parallel_size": (1, "every process reads its own data"),
}

#: What the library is told where neither the recipe nor the file says anything else.
_DEFAULTS: dict[str, Any] = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
#: The same where weights are in another type than float32: gradients are summed, and travel, in float32.
_LOW_PRECISION: dict[str, Any] = {
    "data_types.grad_accum_dtype": "fp32",
    "communication_data_type": "fp32",
}


class Wanted(NamedTuple):
    """A value that the recipe decides: as the user would write it in the file, and the key that says it here."""

    value: Any
    key: str


def read(file: str | Path) -> dict[str, Any]:
    """The user's file. Raises InputError where there is none, or no JSON object, or a key twice."""
    path = Path(file)
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except _Twice as error:
        raise wrong(
            FILE_KEY, f"has the key `{error}` twice in one object", "keep one of them", value=str(file)
        ) from None
    except json.JSONDecodeError as error:
        why = f"is no JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        raise wrong(FILE_KEY, why, "correct it there", value=str(file)) from None
    except UnicodeDecodeError:
        raise wrong(FILE_KEY, "is no JSON: it is not UTF-8 text", "give a JSON file", value=str(file)) from None
    except OSError as error:
        why = f"cannot be read ({error.strerror or error})"
        raise wrong(FILE_KEY, why, "give a path from the working directory", value=str(file)) from None
    if not isinstance(found, dict):
        raise wrong(FILE_KEY, f"holds a {type(found).__name__}, not an object", 'begin it with "{"', value=str(file))
    return found


class _Twice(ValueError):
    """A key that stands twice in one object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


def wanted(
    precision: Precision,
    processes: int,
    recipe: Mapping[str, Any],
    *,
    stage: int,
    offload_optimizer: bool,
    offload_parameters: bool,
) -> dict[str, Wanted]:
    """What the recipe decides, by the dotted key of DeepSpeed's JSON."""
    clip = recipe.get("grad_clip")
    found = {
        "zero_optimization.stage": Wanted(stage, "backend.stage"),
        "zero_optimization.offload_optimizer.device": Wanted(
            "cpu" if offload_optimizer else "none", "backend.offload_optimizer"
        ),
        "zero_optimization.offload_param.device": Wanted(
            "cpu" if offload_parameters else "none", "backend.offload_parameters"
        ),
        "bf16.enabled": Wanted(precision.name == "bf16", "precision"),
        "fp16.enabled": Wanted(precision.loss_scaling is not None, "precision"),
        "gradient_clipping": Wanted(0.0 if clip is None else float(clip), "grad_clip"),
    }
    if stage == 3 and recipe.get("activation_checkpointing") == "selective":
        # The library's own linear layer adds its bias in place, to a product that is kept for the backward.
        found["zero_optimization.memory_efficient_linear"] = Wanted(False, "activation_checkpointing")
    batch = {
        "train_batch_size": ("global_size", "batch.global_size"),
        "train_micro_batch_size_per_gpu": ("micro_size", "batch.micro_size"),
        "gradient_accumulation_steps": ("accumulation", "accumulation.steps"),
    }
    for key, (name, ours) in batch.items():
        if isinstance(recipe.get(name), int):
            found[key] = Wanted(recipe[name], ours)
    scaling = precision.loss_scaling
    if scaling is not None:
        found |= {
            "fp16.loss_scale": Wanted(0, "precision"),
            "fp16.initial_scale_power": Wanted(round(math.log2(scaling.init_scale)), "precision.loss_scaling"),
            "fp16.loss_scale_window": Wanted(scaling.growth_interval, "precision.loss_scaling"),
            "fp16.hysteresis": Wanted(1, "precision.loss_scaling"),
            "fp16.min_loss_scale": Wanted(scaling.floor, "precision.loss_scaling"),
        }
    return found


def merged(
    recipe: Mapping[str, Wanted],
    file: Mapping[str, Any],
    name: str = "",
    optimizer: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON to train with: the file's values, what the recipe decides in their midst, "auto" filled in.

    Args:
        recipe: from `wanted`.
        file: the user's JSON, empty where there is none; `name` is its name in messages.
        optimizer: the recipe's, `_target_` and arguments, to compare an "optimizer" section with; None where unknown.

    Raises InputError with all values of the file that contradict the recipe.
    """
    given = dict(_flat(file))
    problems = [
        *_contradictions(recipe, given, name),
        *_taken(file, given, name),
        *_optimizer(file.get("optimizer"), name, optimizer),
    ]
    if problems:
        raise InputError(*problems)
    low = recipe["bf16.enabled"].value or recipe["fp16.enabled"].value
    chosen = {key: value for key, value in given.items() if value != AUTO}
    values = {**_DEFAULTS, **(_LOW_PRECISION if low else {}), **chosen}
    values |= {key: want.value for key, want in recipe.items()}
    values = {key: value for key, value in values.items() if not key.startswith("optimizer.")}
    for section in ("offload_optimizer", "offload_param"):
        prefix = f"zero_optimization.{section}"
        if values[f"{prefix}.device"] == "none":
            values = {key: value for key, value in values.items() if key != prefix and not key.startswith(f"{prefix}.")}
    return _nested(_by_the_loop(values))


def _by_the_loop(values: dict[str, Any]) -> dict[str, Any]:
    """Without what the loop does itself: it weighs losses and clips, so the library must do neither."""
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    rest = {key: value for key, value in values.items() if key not in batch}
    micro = values.get("train_micro_batch_size_per_gpu") or 1
    return {
        **rest,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }


def _contradictions(recipe: Mapping[str, Wanted], given: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for key, want in recipe.items():
        if key in given and given[key] != AUTO and not _same(given[key], want.value):
            yield _says(
                key, given[key], name, f"{want.key} says {_shown(want.value)}", f"change {want.key} or the file"
            )
        section = key.rpartition(".")[0]
        if given.get(section) not in (None, {}, AUTO):
            yield _says(section, given[section], name, "it is a section", "write an object there")
    for key, (value, why) in _NEEDED.items():
        if key in given and given[key] != AUTO and not _same(given[key], value):
            yield _says(key, given[key], name, f"it must be {_shown(value)}: {why}", f"remove `{key}` from the file")


def _taken(file: Mapping[str, Any], given: Mapping[str, Any], name: str) -> Iterator[Problem]:
    for key, instead in _TAKEN.items():
        section: Any = file
        for word in key.split("."):
            section = section.get(word) if isinstance(section, Mapping) else None
        off = isinstance(section, Mapping) and section.get("enabled") is False
        if section and not off:
            why = f"{name} has `{key}`, which would take it out of the recipe's hands"
            yield Problem(FILE_KEY, why, f"remove it; {instead}")


def _optimizer(section: Any, name: str, recipe: Mapping[str, Any] | None) -> Iterator[Problem]:
    """The file may repeat the recipe's optimizer, as files made for other programs do; it cannot choose another."""
    if section is None:
        return
    fix = "remove `optimizer` from the file; the recipe's is used"
    if not isinstance(section, Mapping):
        yield _says("optimizer", section, name, "it is a section", fix)
        return
    params = section.get("params") or {}
    said = {f"optimizer.params.{key}": value for key, value in params.items() if value != AUTO}
    if section.get("type", AUTO) != AUTO:
        said = {"optimizer.type": section["type"], **said}
    if recipe is None:
        for key, value in said.items():
            yield _says(key, value, name, "the optimizer is the recipe's", fix)
        return
    kind = str(recipe.get("_target_", "")).rpartition(".")[2]
    for key, value in said.items():
        word = key.rpartition(".")[2]
        ours = kind if key == "optimizer.type" else recipe.get(word)
        same = str(value).lower() == kind.lower() if key == "optimizer.type" else _same(value, ours)
        if not same:
            there = "optimizer._target_" if key == "optimizer.type" else f"optimizer.{word}"
            says = f"{there} says {_shown(ours)}" if ours is not None else f"the recipe has no {there}"
            yield _says(key, value, name, says, fix)


def _says(key: str, value: Any, name: str, other: str, fix: str) -> Problem:
    return Problem(FILE_KEY, f"{name} says {key} = {_shown(value)}, but {other}", fix)


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _same(one: Any, other: Any) -> bool:
    """Whether two values mean the same: 1 and 1.0, a list and a tuple; but not true and 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, str) and isinstance(other, int | float):
        try:
            return float(one) == other
        except ValueError:
            return False
    return bool(one == other)


def _flat(nested: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves by dotted key; an empty object is a leaf."""
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        place = found
        for word in above:
            inner = place.get(word)
            if not isinstance(inner, dict):
                inner = place[word] = {}
            place = inner
        place[last] = value
    return found
