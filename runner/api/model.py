"""A prepared model: forward runs under autocast and gives float32; everything else is the user's own model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runner.engine.backend import Backend
from runner.engine.engine import floats_as


class PreparedModel(nn.Module):
    """Calls the placed model as the precision wants it.

    Attributes and methods that this class lacks are those of the user's own model, and so are the names of parameters
    and buffers and the state. Only a call of the model itself takes part in the averaging of gradients: call
    `model(x)`, not `model.some_method(x)`, where gradients are wanted.
    """

    own: nn.Module

    def __init__(self, module: nn.Module, own: nn.Module, backend: Backend) -> None:
        super().__init__()
        self.module = module
        # Not as a second child: its parameters are those of `module`.
        self.__dict__["own"] = own
        self.training = module.training
        precision = backend.precision
        self.__dict__["_backend"] = backend
        self._takes = None if precision.param_dtype is torch.float32 else precision.param_dtype
        self._casts = precision.autocast or self._takes is not None

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not self._casts:
            return self.module(*inputs, **named)
        if self._takes is not None:
            inputs, named = floats_as(inputs, self._takes), floats_as(named, self._takes)
        with self.__dict__["_backend"].autocast():
            return floats_as(self.module(*inputs, **named), torch.float32)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "own" not in self.__dict__:
                raise
            return getattr(bare(self), name)

    def __getitem__(self, index: Any) -> Any:
        own: Any = bare(self)
        return own[index]

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedModel:
        """A copy of the user's own model, called in the same precision; no other process knows of it."""
        own = copy.deepcopy(bare(self), memo)
        return PreparedModel(own, own, self.__dict__["_backend"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What surrounds the model belongs to this process: the user's own model comes out of a pickle.
        return _itself, (bare(self),)

    def release(self) -> None:
        """Leaves the user's own model alone here, so that what wrapped it can go."""
        self.module = self.own

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return bare(self).named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return bare(self).named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return bare(self).named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return bare(self).state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return bare(self).load_state_dict(state_dict, *args, **kwargs)


def _itself(model: nn.Module) -> nn.Module:
    return model


def bare(model: nn.Module, *, keep_compiled: bool = False) -> nn.Module:
    """The user's own model inside of everything that was put around it."""
    while True:
        if isinstance(model, PreparedModel):
            model = model.own
        elif isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inside := model._modules.get("_orig_mod"), nn.Module):
            if keep_compiled and not isinstance(inside, (PreparedModel, DistributedDataParallel)):
                return model
            model = inside
        else:
            return model
