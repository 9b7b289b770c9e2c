"""Gradients of people's own loops: windows, factors of losses, clipping, and when the loss scale is updated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from runner.api.optimizer import PreparedOptimizer
from runner.api.window import Flow, Window
from runner.engine.backend import Backend
from runner.errors import wrong

#: What torch's backward takes beside the gradient of the loss itself.
_BACKWARD = ("retain_graph", "create_graph", "inputs")


class Gradients:
    """What an engine knows about the gradients under way: shared by it, its optimizers and its schedulers."""

    def __init__(self, backend: Backend, flow: Flow) -> None:
        self.backend = backend
        self.flow = flow
        flow.on_batch = self._settle
        self.optimizers: list[PreparedOptimizer] = []
        #: Parameters as they were before their model was placed, to what they are now.
        self.replaced = WeakIdKeyDictionary()
        #: Whether the next step acts: gradients are those of all micro-batches and processes.
        self.synchronised = True
        self._windows: dict[tuple[int, ...], Window] = {}
        self._window: Window | None = None
        self._weight: Any = None
        self._in_block = 0  # backward passes in the present block
        self._staying = 0  # blocks of no_sync around the present moment
        self._stayed = False  # whether there was one since the last backward outside of them
        self._stepped: set[int] = set()
        self._overflowed = False

    @property
    def scaled(self) -> bool:
        return self.backend.precision.loss_scaling is not None

    def is_synchronised(self) -> bool:
        return self.synchronised

    def pending(self) -> bool:
        """Whether gradients of earlier micro-batches of a step that is still to come must stay."""
        window = self._window
        if window is None:
            return any(one.unfinished for one in self._windows.values())
        if window.size <= 1 or window.backwards == 0:
            return False
        return not (window.last and self._in_block)

    def unfinished(self) -> int:
        """Micro-batches whose gradients wait, outside of a block too, for a step that is still to come."""
        return max((window.unfinished for window in self._windows.values()), default=0)

    def zero(self, model: nn.Module, set_to_none: bool) -> bool:
        """`zero_grad` of a prepared model, for the optimizers that step no other's. Whether all of it is to go."""
        own = {id(p) for p in model.parameters()}
        for optimizer in self.optimizers:
            if optimizer.handle is not None and all(id(p) in own for p in optimizer.handle.parameters):
                optimizer.zero_grad(set_to_none)
        if self.pending():
            return False
        self.backend.forget(model)
        return True

    # --- windows -----------------------------------------------------------------------------------------------------

    @contextmanager
    def accumulate(
        self, models: Sequence[nn.Module], accumulation: int, weight: Any, steps: int | None
    ) -> Iterator[None]:
        key = tuple(sorted(id(model) for model in models))
        window = self._windows.setdefault(key, Window())
        if window.enter(self.flow, accumulation, self.backend.mesh.data_size, steps):
            self._drop()
        if window.count == 1:
            self._settle()
        self._window, self._weight, self._in_block = window, weight, 0
        self.synchronised = window.last
        try:
            with self.backend.accumulate(window.last):
                yield
        except BaseException:
            window.reset()
            raise
        finally:
            self._window, self._weight = None, None

    def _drop(self) -> None:
        """Forgets gradients of a window that a loop has left unfinished."""
        self.backend.forget()
        for optimizer in self.optimizers:
            optimizer.drop()

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        placed = getattr(model, "module", model)
        # The words of DistributedDataParallel concern that model alone.
        own: Any = placed.no_sync if isinstance(placed, DistributedDataParallel) else None
        context: AbstractContextManager[Any] = self.backend.accumulate(False) if own is None else own()
        self._staying += 1
        try:
            with context:
                yield
        finally:
            self._staying -= 1
            self._stayed = True

    def _travelling(self) -> AbstractContextManager[Any]:
        """Around a backward: outside of `no_sync` gradients travel, and those that had stayed, as the window wants."""
        if self._staying or (self._window is not None and not self._stayed):
            return nullcontext()
        self._stayed = False
        return self.backend.accumulate(self._window is None or self._window.last)

    def forget(self) -> None:
        """Drops all that belongs to a loop."""
        self._windows.clear()
        self.optimizers.clear()
        self._stepped.clear()
        self.synchronised = True

    # --- backward ----------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, **options: Any) -> None:
        _check_loss(loss)
        for word in options:
            if word not in _BACKWARD:
                raise wrong("backward", f"torch's backward takes no {word} here", f"known are {', '.join(_BACKWARD)}")
        if self._window is None:
            self.synchronised = True
            if not self.flow.live():
                self._settle()
        factor = self._factor()
        if self._window is not None:
            self._window.backwards += 1
        self._in_block += 1
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # the factor holds the loss scale, which float16 does not
        tensor = None if factor is None else torch.as_tensor(factor, dtype=loss.dtype, device=loss.device)
        with self._travelling():
            self.backend.backward(loss, tensor, **options)

    def _factor(self) -> Any:
        """What a loss is multiplied with; the backend averages over the processes, hence their number."""
        processes = self.backend.mesh.data_size
        latest = self.flow.latest()
        if latest is not None and latest.share.idle:
            return 0.0
        if self._weight is not None:
            return processes / self._weight
        if self._window is not None:
            total = self._window.total
        else:
            total = latest.active(0, processes) if latest is not None else processes
        return None if total == processes else processes / total

    # --- the loss scale ----------------------------------------------------------------------------------------------

    def stepped(self, optimizer: PreparedOptimizer, skipped: bool) -> None:
        self._stepped.add(id(optimizer))
        self._overflowed = self._overflowed or skipped
        if all(id(one) in self._stepped for one in self.optimizers):
            self._settle()

    def _settle(self) -> None:
        """Updates the loss scale, once for all optimizers that have stepped since the last time."""
        if self._stepped:
            self._stepped.clear()
            overflowed, self._overflowed = self._overflowed, False
            self.backend.settle(overflowed)

    # --- clipping ----------------------------------------------------------------------------------------------------

    def clip_norm(self, parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
        wanted, owners, rest = self._owners(parameters, "clip_grad_norm_")
        if not self.synchronised:
            return torch.zeros((), device=self.backend.device)
        for optimizer in owners:
            optimizer.unscale()
        whole = norm_type == 2 and not rest and all(_within(one, wanted) for one in owners)
        if not whole:
            return _clip_some(wanted.values(), max_norm, norm_type)
        handles = [optimizer.driven() for optimizer in owners]
        if not handles:
            return torch.zeros((), device=self.backend.device)
        if len(handles) == 1:
            return handles[0].clip(max_norm).detach().clone()
        norm = torch.linalg.vector_norm(torch.stack([handle.norm() for handle in handles]))
        for handle in handles:
            handle.clip(max_norm, norm)
        return norm

    def clip_values(self, parameters: Iterable[Tensor], most: float) -> None:
        wanted, owners, rest = self._owners(parameters, "clip_grad_value_")
        if not self.synchronised:
            return
        for optimizer in owners:
            optimizer.unscale()
        if not rest and all(_within(one, wanted) for one in owners):
            for optimizer in owners:
                optimizer.driven().clip_values(most)
            return
        with torch.no_grad():
            for parameter in wanted.values():
                if parameter.grad is not None:
                    parameter.grad.clamp_(-most, most)

    def unscale(self, optimizer: Any) -> None:
        if self.synchronised:
            chosen = self.optimizers if optimizer is None else optimizer
            for one in chosen if isinstance(chosen, (list, tuple)) else [chosen]:
                one.unscale()

    def _owners(
        self, parameters: Iterable[Tensor] | Tensor, word: str
    ) -> tuple[dict[int, Tensor], list[PreparedOptimizer], list[Tensor]]:
        """(parameters by identity, the optimizers that step some of them, those with a gradient that none steps).

        Raises InputError where there is neither.
        """
        given = [parameters] if isinstance(parameters, Tensor) else parameters
        wanted = {id(tensor): tensor for tensor in (self.replaced.get(one, one) for one in given)}
        owners = [one for one in self.optimizers if any(id(p) in wanted for p in one.parameters())]
        owned = {id(p) for one in owners for p in one.parameters()}
        rest = [p for key, p in wanted.items() if key not in owned and p.grad is not None]
        if wanted and not owners and not rest:
            why = "none of these parameters is stepped by a prepared optimizer, and none has a gradient"
            raise wrong(word, why, "give the prepared model's: model.parameters()")
        return wanted, owners, rest


def _within(optimizer: PreparedOptimizer, wanted: dict[int, Tensor]) -> bool:
    return all(id(p) in wanted for p in optimizer.parameters() if p.grad is not None)


def _clip_some(parameters: Iterable[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """By torch's own words: for another norm, or for a part of what an optimizer steps."""
    some = list(parameters)
    norm: Any = torch.nn.utils.clip_grad_norm_(some, max_norm, norm_type)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise wrong("backward", f"got a {type(loss).__name__}", "give the loss tensor, without .item()")
    if loss.dim() != 0:
        raise wrong("backward", f"the loss has shape {list(loss.shape)}", "give one number: its mean or its sum")
    if not loss.requires_grad:
        raise wrong("backward", "the loss is detached from the model", "compute it from the model's outputs")
