"""The states of a model and an optimizer that DeepSpeed has divided, by parameter name, in parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner import shares
from runner.engine.deepspeed_layout import Layout, named_once
from runner.engine.model_state import ModelState, OptimizerState, compare_names


def states(
    module: nn.Module, optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], layout: Layout
) -> dict[str, Any]:
    """Those of the model and of the optimizer, under "model" and "optimizer"."""
    if not layout.divided:  # stage 0 keeps both as torch does
        return {"model": ModelState(module), "optimizer": OptimizerState(module, optimizer)}
    return {
        "model": DividedModelState(module, layout),
        "optimizer": DividedOptimizerState(module, optimizer, groups, layout),
    }


class DividedModelState:
    """Parameters in float32 (from the weights that are stepped) and buffers, under the names of the bare model.

    The library's pieces of a parameter are runs of elements that no checkpoint knows, so each parameter is put
    together, one at a time, and each process keeps a part of it (`shares.cut`) in memory of its own: what it holds is
    the model / processes, and for a moment one parameter. Loading is the reverse. All processes call the same words.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module = module
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        """Copies of the parameters, in parts; the buffers themselves."""
        return {name: self._saved(value) for name, value in named_once(self._module)}

    def _saved(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return shares.cut(self._layout.whole(value))
        return value.detach() if isinstance(value, Tensor) else value

    def template(self, saved: Any) -> dict[str, Any]:
        """Parts to be filled; buffers are filled in place."""
        return {name: self._target(value) for name, value in named_once(self._module)}

    def _target(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return shares.empty(self._layout.shape(value), torch.float32)
        return value.detach() if isinstance(value, Tensor) else value

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes values in parts or whole ones. Raises InputError where names are missing or left over."""
        own = dict(named_once(self._module))
        compare_names("the model", own, state)
        for name, value in own.items():
            if isinstance(value, nn.Parameter):
                self._layout.put(value, shares.whole(state[name]))
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(shares.whole(state[name]))
        self._layout.refresh()


class DividedOptimizerState:
    """As `OptimizerState`, in the same format: the optimizer's state as if the library had divided nothing.

    In parts, one tensor at a time, as `DividedModelState`. It is an `OptimizerState` of stand-ins: a model and an
    optimizer that have the names, shapes and groups of the real ones, with weights that take no memory.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], layout: Layout
    ) -> None:
        self._layout = layout
        names = {id(value): name for name, value in named_once(module) if isinstance(value, nn.Parameter)}
        self._parameters = {names[id(p)]: p for group in groups for p in group}
        self._stand_ins = {name: shares.stand_in(layout.shape(p)) for name, p in self._parameters.items()}
        listed = [[self._stand_ins[names[id(p)]] for p in group] for group in groups]
        kind = type(type(optimizer).__name__, (_StandInOptimizer,), {})
        self._whole: Any = kind(optimizer, listed)
        self._state = OptimizerState(_StandInModel(self._stand_ins), self._whole)

    def state_dict(self) -> dict[str, Any]:
        """Copies, of what is as long as its parameter in parts."""
        self._gather()
        try:
            return self._state.state_dict()
        finally:
            self._whole.state = {}

    def template(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        return self._state.template(saved)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._state.load_state_dict(saved)
        try:
            self._scatter()
        finally:
            self._whole.state = {}

    def _gather(self) -> None:
        self._whole.state = {}
        for name, parameter in self._parameters.items():
            flat = self._layout.piece(parameter).flat
            held = self._layout.state.get(flat) or {}
            self._whole.state[self._stand_ins[name]] = {
                key: shares.cut(self._layout.whole(parameter, value))
                if isinstance(value, Tensor) and value.shape == flat.shape and key != "step"
                else value.detach().cpu().clone()
                if isinstance(value, Tensor)
                else value
                for key, value in held.items()
            }

    def _scatter(self) -> None:
        state = self._layout.state
        self._forget()
        for name, parameter in self._parameters.items():
            flat = self._layout.piece(parameter).flat
            for key, value in self._whole.state.get(self._stand_ins[name], {}).items():
                held = state.setdefault(flat, {})
                if not isinstance(value, Tensor):
                    held[key] = value
                elif value.shape == self._layout.shape(parameter) and key != "step":
                    if not isinstance(held.get(key), Tensor) or held[key].shape != flat.shape:
                        held[key] = torch.zeros_like(flat, requires_grad=False)
                    self._layout.put(parameter, shares.whole(value), held[key])
                else:
                    on_device = any(group.get("fused") or group.get("capturable") for group in self._whole.param_groups)
                    held[key] = value.to(flat.device if on_device else "cpu", copy=True)

    def _forget(self) -> None:
        """Drops the state of parameters that have none in what is loaded: they begin anew."""
        state = self._layout.state
        kept = {
            self._layout.piece(p).flat for n, p in self._parameters.items() if self._stand_ins[n] in self._whole.state
        }
        for name, parameter in self._parameters.items():
            flat, start, _, size = self._layout.piece(parameter)
            if flat not in kept:
                state.pop(flat, None)
            elif self._stand_ins[name] not in self._whole.state:
                for value in state.get(flat, {}).values():
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        value.view(-1)[start : start + size].zero_()


class _StandInModel(nn.Module):
    """Nothing but names."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Any]]:
        return iter(self._named.items())


class _StandInOptimizer:
    """The real optimizer's groups, with other parameters; its state is what was put there."""

    def __init__(self, optimizer: Optimizer, groups: Sequence[Sequence[Tensor]]) -> None:
        self._real = optimizer
        self._groups = groups
        self.state: dict[Tensor, dict[str, Any]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        pairs = zip(self._real.param_groups, self._groups, strict=True)
        return [{**real, "params": list(parameters)} for real, parameters in pairs]

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for real, group in zip(self._real.param_groups, saved["param_groups"], strict=True):
            real.update({key: value for key, value in group.items() if key != "params"})
        everyone = [parameter for group in self._groups for parameter in group]
        self.state = {everyone[number]: dict(entry) for number, entry in saved["state"].items()}
