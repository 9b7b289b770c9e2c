"""A prepared model: forward runs under autocast and gives float32; everything else is the user's own model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from runner.engine.backend import Backend
from runner.engine.engine import floats_as

if TYPE_CHECKING:
    from runner.api.gradients import Gradients


class PreparedModel(nn.Module):
    """Calls the placed model as the precision wants it.

    Attributes and methods that this class lacks are those of the user's own model, and so are the names of parameters
    and buffers and the state. Only a call of the model itself takes part in the averaging of gradients: call
    `model(x)`, not `model.some_method(x)`, where gradients are wanted.

    Parameters are those that an optimizer steps, at any time: a sharded model has whole ones in their place between
    its forward and its backward.
    """

    own: nn.Module

    def __init__(self, module: nn.Module, own: nn.Module, backend: Backend, gradients: Gradients | None = None) -> None:
        super().__init__()
        self.module = module
        # Not as a second child: its parameters are those of `module`.
        self.__dict__["own"] = own
        self.training = module.training
        precision = backend.precision
        self.__dict__["_backend"] = backend
        self.__dict__["_gradients"] = gradients
        named = bare(own).named_parameters(remove_duplicate=False)
        #: The sharded ones, as they are outside of forward and backward.
        self._shards = {name: parameter for name, parameter in named if _is_sharded(parameter)}
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
        self.__dict__["_gradients"] = None

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in bare(self).named_parameters("", recurse, remove_duplicate):
            if name in self._shards and not _is_sharded(parameter):
                parameter = self._shards[name]
            yield f"{prefix}.{name}" if prefix else name, parameter

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As a prepared optimizer's: while micro-batches accumulate, their gradients stay."""
        gradients = self.__dict__["_gradients"]
        if gradients is None or gradients.zero(self, set_to_none):
            super().zero_grad(set_to_none)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return bare(self).named_buffers(*args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return bare(self).named_modules(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return bare(self).state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return bare(self).load_state_dict(state_dict, *args, **kwargs)


def _is_sharded(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "full_tensor")


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
