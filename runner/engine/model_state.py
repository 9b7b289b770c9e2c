"""The states of a model and of its optimizer, keyed by parameter name, whatever wraps or shards the model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from runner.errors import InputError, Problem, RunnerError, wrong


class ModelState:
    """Parameters and buffers under the names that the bare model has; tied ones once, by their first name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, not copies."""
        own = _tensors(self._model)
        first = _first_names(own)
        return {
            _plain(name): value.detach() if isinstance(value, Tensor) else value
            for name, value in own.items()
            if first.get(id(value), name) == name
        }

    def template(self, saved: Any) -> dict[str, Any]:
        """The model's own tensors: they are filled in place."""
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies the values into the model. Raises InputError where names are missing or left over."""
        own = _tensors(self._model)
        first = _first_names(own)
        source = {name: _plain(first.get(id(value), name)) for name, value in own.items()}
        compare_names("the model", source.values(), state)
        bare = _bare(self._model)
        values = {name: placed_as(own[name], state[saved]) for name, saved in source.items()}
        bare.load_state_dict(values, strict=False)


class OptimizerState:
    """An optimizer's state by parameter name, and what its groups were set to.

    What goes on from a checkpoint: the state of each parameter, and of each group's values (lr, momentum, ...) those
    that the configuration sets as it did when the checkpoint was saved, at whatever a scheduler had made of them. A
    value that the configuration now sets otherwise is the configured one; if it is the learning rate, the current
    one is moved in proportion. "As configured" is what the groups hold when this object is made, so make it before
    the first step.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._configured = [_values(group) for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """{"type", "state": {name: {...}}, "groups": [{"params": [names], "lr": ..., ...}], "configured", "dtypes"}.

        Parameters that have no state yet have no entry. Raises InputError where a parameter is not the model's.
        """
        names = self._names()
        held = {name: self._optimizer.state[p] for p, name in names.items() if self._optimizer.state.get(p)}
        if len(held) < sum(1 for entry in self._optimizer.state.values() if entry):
            raise RunnerError(f"{self._type} keeps state that belongs to no parameter; it cannot be saved by name")
        return {
            "type": self._type,
            "state": {name: dict(entry) for name, entry in held.items()},
            "groups": [
                {"params": [names[p] for p in group["params"]], **_values(group)}
                for group in self._optimizer.param_groups
            ],
            "configured": self._configured,
            "dtypes": {name: _dtype_name(p.dtype) for p, name in names.items()},
        }

    def template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors to be filled: the optimizer's own where they suit, else new ones, placed as their parameters are.

        Raises InputError where the optimizer is of another type or has other parameters.
        """
        self._check(saved)
        names = self._names()
        state = {}
        for group in self._optimizer.param_groups:
            counts_on_device = bool(group.get("fused") or group.get("capturable"))
            for p in group["params"]:
                if (name := names[p]) in saved["state"]:
                    place = _Place(p, saved["dtypes"][name], p.device if counts_on_device else torch.device("cpu"))
                    state[name] = _targets(saved["state"][name], self._optimizer.state.get(p), place)
        return {**saved, "state": state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Takes the tensors over, not copies of them. Raises InputError as `template` does."""
        self._check(saved)
        names = self._names()
        index = {name: number for number, name in enumerate(names.values())}
        groups = [
            {**values, "params": [index[names[p]] for p in group["params"]]}
            for group, values in zip(self._optimizer.param_groups, self._merged(saved), strict=True)
        ]
        state = {index[name]: dict(entry) for name, entry in saved["state"].items()}
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        # torch turns tensors into the type of their parameter, also where an optimizer wants another, and spoils words.
        for p, name in names.items():
            for key, value in saved["state"].get(name, {}).items():
                if not isinstance(value, Tensor) or self._optimizer.state[p][key].dtype != value.dtype:
                    self._optimizer.state[p][key] = value

    @property
    def _type(self) -> str:
        return type(self._optimizer).__name__

    def _names(self) -> dict[Tensor, str]:
        """The optimizer's parameters in its order, with their names."""
        _tensors(self._model)  # lets a sharded model show its shards, where a forward has left whole weights
        known = {id(p): _plain(name) for name, p in _bare(self._model).named_parameters()}
        names = {}
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in known:
                    raise wrong(
                        "optimizer",
                        f"{self._type} holds a parameter of shape {list(p.shape)} that is not the model's",
                        "give it parameters of the model only, so that they have names",
                    )
                names[p] = known[id(p)]
        return names

    def _check(self, saved: Mapping[str, Any]) -> None:
        if saved["type"] != self._type:
            why = f"the checkpoint has the state of {saved['type']}, which {self._type} cannot take"
            fix = f"{saved['type']}, or a new run that begins with its weights: init_from=CHECKPOINT"
            raise wrong("optimizer", why, fix, value=self._type)
        names = [name for group in saved["groups"] for name in group["params"]]
        compare_names("the optimizer", self._names().values(), names)

    def _merged(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each group's values to go on with."""
        place = {name: number for number, group in enumerate(saved["groups"]) for name in group["params"]}
        names = self._names()
        merged = []
        for group, now in zip(self._optimizer.param_groups, self._configured, strict=True):
            live = {key: value for key, value in group.items() if key != "params"}
            if group["params"]:
                number = place[names[group["params"][0]]]
                values = {key: value for key, value in saved["groups"][number].items() if key != "params"}
                live = _merge(live, now, saved["configured"][number], values)
            merged.append(live)
        return merged


class _Place(NamedTuple):
    """Where a parameter's state belongs: beside the parameter, in its type if it was in that (`was`) when saved."""

    parameter: Tensor
    was: str
    step_device: torch.device


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by the bare model's names: themselves, sharded where they are."""
    named = _bare(model).named_parameters()
    return {_plain(name): parameter for name, parameter in named if parameter.requires_grad}


def _targets(saved: Any, held: Any, place: _Place, key: str = "") -> Any:
    """`saved` with a tensor to be filled in the place of each of its tensors: the `held` one where it suits."""
    if isinstance(saved, Mapping):
        inside = held if isinstance(held, Mapping) else {}
        return {name: _targets(value, inside.get(name), place, name) for name, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_targets(value, None, place) for value in saved)
    if not isinstance(saved, Tensor):
        return saved
    p, step = place.parameter, key == "step"
    dtype = p.dtype if not step and _dtype_name(saved.dtype) == place.was else saved.dtype
    device = place.step_device if step else p.device
    if isinstance(held, Tensor) and (held.shape, held.dtype, held.device) == (saved.shape, dtype, device):
        return held
    if not step and saved.shape == p.shape:
        return torch.empty_like(p, dtype=dtype, requires_grad=False)
    return torch.empty(saved.shape, dtype=dtype, device=device)


def _merge(
    live: Mapping[str, Any], now: Mapping[str, Any], then: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """A group's values: `saved` where the configuration is the same `now` as `then`, else what is `live`."""
    nothing = object()
    merged = dict(live)
    merged |= {key: value for key, value in saved.items() if now.get(key, nothing) == then.get(key, nothing)}
    if "lr" not in live or "lr" not in saved:
        return merged
    # A scheduler starts with a rate of its own, so the configured one is initial_lr where there is a scheduler.
    base_now, base_then = now.get("initial_lr", now["lr"]), then.get("initial_lr", then["lr"])
    if "initial_lr" in saved and "initial_lr" not in live:
        return merged | {"lr": live["lr"]}  # there was a scheduler, and there is none: the rate is the configured one
    merged["lr"] = saved["lr"]
    if base_now != base_then:
        merged["lr"] = saved["lr"] * (base_now / base_then) if base_then else live["lr"]
        if "initial_lr" in live:
            merged["initial_lr"] = live["initial_lr"]
    if isinstance(live["lr"], Tensor):
        merged["lr"] = torch.full_like(live["lr"], float(merged["lr"]))
    return merged


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group holds beside its parameters, as far as it can be written down; code makes the rest anew."""
    numbers = {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key != "params"
    }
    return {key: value for key, value in numbers.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _bare(model: nn.Module) -> nn.Module:
    """The user's own model inside of DistributedDataParallel and torch.compile."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def _tensors(model: nn.Module) -> dict[str, Any]:
    """The bare model's state by its full names, with the parameters and buffers themselves."""
    return dict(_bare(model).state_dict(keep_vars=True))


def placed_as(own: Any, value: Any) -> Any:
    """A value that can be copied into the model's `own`: cut, or put together, where only one of them is sharded."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None or not isinstance(own, Tensor) or not isinstance(value, Tensor):
        return value
    if isinstance(own, tensor.DTensor) and not isinstance(value, tensor.DTensor):
        # Every process has the whole value: nothing to send.
        placed = value.to(own.device)
        return tensor.distribute_tensor(placed, own.device_mesh, own.placements, src_data_rank=None)
    if isinstance(value, tensor.DTensor) and not isinstance(own, tensor.DTensor):
        return value.full_tensor()
    return value


def _first_names(values: Mapping[str, Any]) -> dict[int, str]:
    """The first name of each tensor, by its identity."""
    names: dict[int, str] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), name)
    return names


def _plain(name: str) -> str:
    """A parameter's name without the words of wrappers around modules inside the model."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare_names(what: str, own: Iterable[str], saved: Iterable[str], most: int = 5) -> None:
    """Raises InputError where the names differ, with the first five each way."""
    own, saved = list(own), list(saved)
    lists = {"it lacks": set(own) - set(saved), "nothing here takes": set(saved) - set(own)}
    words = []
    for word, names in lists.items():
        first = [name for name in dict.fromkeys([*own, *saved]) if name in names]
        more = f" and {len(first) - most} more" if len(first) > most else ""
        words += [f"{word} {', '.join(first[:most])}{more}"] if first else []
    if words:
        why = f"the checkpoint's state of {what} does not fit: {'; '.join(words)}"
        raise InputError(Problem("resume", why, "resume with the configuration that saved it, or start anew"))
