"""The states of a model and an optimizer that DeepSpeed has divided, whole and by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engine.deepspeed_layout import Layout, named_once
from runner.engine.model_state import OptimizerState
from runner.errors import wrong


class WholeModelState:
    """Parameters in float32 (from the weights that are stepped) and buffers, under the names of the bare model.

    All processes call it together, and each gets everything on the CPU.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self._module = module
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        return {name: self._saved(value) for name, value in named_once(self._module)}

    def _saved(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._layout.whole(value)
        return value.detach().cpu() if isinstance(value, Tensor) else value

    def template(self, saved: Any) -> dict[str, Any]:
        """Tensors of the whole shapes, to be filled."""
        return {name: self._empty(value) for name, value in named_once(self._module)}

    def _empty(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return torch.empty(self._layout.shape(value), dtype=torch.float32)
        return torch.empty_like(value, device="cpu") if isinstance(value, Tensor) else value

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this process's part of the values. Raises InputError where names are missing or left over."""
        own = dict(named_once(self._module))
        if own.keys() != state.keys():
            differ = ", ".join(sorted(own.keys() ^ state.keys())[:5])
            why = f"the checkpoint's state of the model does not fit: {differ}"
            raise wrong("resume", why, "resume with the configuration that saved it, or start anew")
        for name, value in own.items():
            if isinstance(value, nn.Parameter):
                self._layout.put(value, state[name])
            elif isinstance(value, Tensor):
                with torch.no_grad():
                    value.copy_(state[name])
        self._layout.refresh()


class WholeOptimizerState:
    """As `OptimizerState`, in the same format: the optimizer's state as if nothing were divided.

    All processes call it together, and each gets everything on the CPU. It is an `OptimizerState` of stand-ins: a
    model and an optimizer that have the names, shapes and groups of the real ones, with weights that take no memory.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]], layout: Layout
    ) -> None:
        self._optimizer = optimizer
        self._layout = layout
        names = {id(value): name for name, value in named_once(module) if isinstance(value, nn.Parameter)}
        self._parameters = {names[id(p)]: p for group in groups for p in group}
        #: One number in the place of each parameter.
        self._stand_ins = {name: torch.empty(1).expand(layout.shape(p)) for name, p in self._parameters.items()}
        listed = [[self._stand_ins[names[id(p)]] for p in group] for group in groups]
        kind = type(type(optimizer).__name__, (_StandInOptimizer,), {})
        self._whole: Any = kind(optimizer, listed)
        self._state = OptimizerState(_StandInModel(self._stand_ins), self._whole)

    def state_dict(self) -> dict[str, Any]:
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
                key: self._layout.whole(parameter, value)
                if isinstance(value, Tensor) and value.shape == flat.shape and key != "step"
                else value.detach().cpu().clone()
                if isinstance(value, Tensor)
                else value
                for key, value in held.items()
            }

    def _scatter(self) -> None:
        state = self._layout.state
        for name, parameter in self._parameters.items():
            flat = self._layout.piece(parameter).flat
            for key, value in self._whole.state.get(self._stand_ins[name], {}).items():
                held = state.setdefault(flat, {})
                if not isinstance(value, Tensor):
                    held[key] = value
                elif value.shape == self._layout.shape(parameter) and key != "step":
                    if not isinstance(held.get(key), Tensor) or held[key].shape != flat.shape:
                        held[key] = torch.zeros_like(flat, requires_grad=False)
                    self._layout.put(parameter, value, held[key])
                else:
                    on_device = any(group.get("fused") or group.get("capturable") for group in self._whole.param_groups)
                    held[key] = value.to(flat.device if on_device else "cpu", copy=True)


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
