"""Where DeepSpeed keeps gradients, weights and optimizer state at each ZeRO stage; knows its objects, not its name."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runner import distributed


class Piece(NamedTuple):
    """This process's part of a parameter: `size` elements from `start` of the flat tensor that is stepped.

    They are the parameter's elements from `offset` on. `flat` is there on processes that have no part of it too.
    """

    flat: Tensor
    start: int
    offset: int
    size: int


class Layout:
    """Stage 0: every process has all of everything; and what the other stages do in other ways.

    Args:
        engine: the library's.
        parameters: those of its optimizer.
    """

    #: Whether gradients and the optimizer's state are divided among the processes.
    divided = False

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._engine = engine
        self._wrapper = engine.optimizer
        self._parameters = parameters

    @property
    def scale(self) -> float:
        """What the gradients are multiplied with."""
        return 1.0

    @property
    def state(self) -> MutableMapping[Tensor, dict[str, Any]]:
        """State of the optimizer, by flat tensor."""
        found: MutableMapping[Tensor, dict[str, Any]] = self._engine.basic_optimizer.state
        return found

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.shape

    def gradients(self) -> list[Tensor]:
        """This process's part of the averaged gradients, once the last backward of a step is done."""
        return [p.grad for p in self._parameters if p.grad is not None]

    def forget(self) -> None:
        """Drops the gradients, as after a step."""
        for parameter in self._parameters:
            parameter.grad = None

    def clear(self) -> None:
        """After a step: what the library left that could be taken for a gradient of the next."""

    def piece(self, parameter: nn.Parameter) -> Piece:
        return Piece(parameter, 0, 0, parameter.numel())

    def refresh(self) -> None:
        """Makes the weights that the model computes with anew from those that are stepped."""

    def whole(self, parameter: nn.Parameter, values: Tensor | None = None) -> Tensor:
        """A parameter's values, or those of a state tensor as long as its flat one, in float32 and in new memory.

        All processes call it together.
        """
        piece = self.piece(parameter)
        source = (piece.flat if values is None else values).detach()
        full = torch.zeros(self.shape(parameter).numel(), dtype=torch.float32, device=source.device)
        full[piece.offset : piece.offset + piece.size] = source.view(-1)[piece.start : piece.start + piece.size]
        # As integers, for a sum with 0.0 makes another zero of -0.0.
        distributed.total(full.view(torch.int32))
        return full.view(self.shape(parameter))

    def put(self, parameter: nn.Parameter, full: Tensor, values: Tensor | None = None) -> None:
        """The reverse of `whole`: takes this process's part of `full`."""
        piece = self.piece(parameter)
        target = piece.flat if values is None else values
        with torch.no_grad():
            part = full.reshape(-1)[piece.offset : piece.offset + piece.size]
            target.detach().view(-1)[piece.start : piece.start + piece.size] = part.to(target.device, target.dtype)


class Divided(Layout):
    """Stages 1 and 2: each group of the optimizer is one flat float32 tensor, divided evenly.

    Weights are whole on every process, and frozen ones nowhere else.
    """

    divided = True

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(engine, parameters)
        self._groups = {id(p): number for number, group in enumerate(self._wrapper.bit16_groups) for p in group}

    @property
    def scale(self) -> float:
        return float(self._wrapper.loss_scale)

    def _flats(self) -> list[Tensor]:
        found: list[Tensor] = self._wrapper.single_partition_of_fp32_groups
        return found

    def gradients(self) -> list[Tensor]:
        if self._wrapper.cpu_offload:
            self._wrapper._wait_for_offload_copies()
            return [flat.grad for flat in self._flats() if flat.grad is not None]
        return [g for group in self._wrapper.averaged_gradients.values() if group is not None for g in group]

    def forget(self) -> None:
        wrapper = self._wrapper
        wrapper.zero_grad(set_to_none=True)
        wrapper.micro_step_id = -1
        if wrapper.cpu_offload:
            wrapper._offload_accumulated_param_ids = set()
            wrapper.reset_cpu_buffers()
            for flat in self._flats():
                if flat.grad is not None:
                    flat.grad.zero_()
        for number in list(wrapper.averaged_gradients):
            wrapper.averaged_gradients[number] = None
            wrapper.all_grad_tensors[number] = None

    def piece(self, parameter: nn.Parameter) -> Piece:
        if id(parameter) not in self._groups:
            return Piece(parameter, 0, 0, parameter.numel() if distributed.rank() == 0 else 0)
        flat = self._flats()[self._groups[id(parameter)]]
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Piece(flat, 0, 0, 0)
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Piece(flat, here.start, there.start, there.numel)

    def put(self, parameter: nn.Parameter, full: Tensor, values: Tensor | None = None) -> None:
        if values is None and id(parameter) not in self._groups:
            with torch.no_grad():
                parameter.copy_(full)
        else:
            super().put(parameter, full, values)

    def refresh(self) -> None:
        self._wrapper.update_lp_params()


class DividedBf16(Divided):
    """Stage 1 in bfloat16: an optimizer of its own, with whole float32 gradients on every process."""

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        Layout.__init__(self, engine, parameters)
        self._groups = {id(p): number for number, group in enumerate(self._wrapper.bf16_groups) for p in group}

    @property
    def scale(self) -> float:
        return 1.0

    def _flats(self) -> list[Tensor]:
        found: list[Tensor] = self._wrapper.fp32_groups_flat_partition
        return found

    def gradients(self) -> list[Tensor]:
        return list(self._wrapper.fp32_groups_gradient_flat_partition)

    def forget(self) -> None:
        self._wrapper.clear_hp_grads()
        self._wrapper.clear_lp_grads()


class Partitioned(Layout):
    """Stage 3: each parameter is divided evenly; the parts of several lie in one flat float32 tensor."""

    divided = True

    def __init__(self, engine: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(engine, parameters)
        self._trained = {id(p) for group in self._wrapper.fp16_groups for p in group}

    @property
    def scale(self) -> float:
        return float(self._wrapper.loss_scale)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape  # type: ignore[attr-defined, no-any-return]

    def gradients(self) -> list[Tensor]:
        if self._wrapper.offload_optimizer:
            return [flat.grad for flat in self._wrapper.fp32_partitioned_groups_flat]
        return [g for group in self._wrapper.averaged_gradients.values() if group is not None for g in group]

    def forget(self) -> None:
        wrapper = self._wrapper
        # Before its own zero_grad, which wants streams of the device, and a CPU has none.
        super().forget()
        wrapper._pre_step()
        wrapper._partition_all_parameters()
        wrapper._overflow_clean_up(wrapper.loss_scale)
        self.clear()
        if len(wrapper.persistent_parameters) > 0:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)

    def clear(self) -> None:
        """The parts keep what they hold until something is written over it, so an unused parameter's must go."""
        self._wrapper.grad_partitions_flat_buffer.zero_()
        if self._wrapper.offload_optimizer:
            for flat in self._wrapper.fp32_partitioned_groups_flat:
                flat.grad.zero_()

    def piece(self, parameter: nn.Parameter) -> Piece:
        total = self.shape(parameter).numel()
        if id(parameter) in self._trained:
            wrapper = self._wrapper
            group, start, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            flat = wrapper.fp32_partitioned_groups_flat[group]
        else:
            flat = parameter.ds_tensor  # type: ignore[attr-defined]
            start, size = 0, flat.numel()
        offset = min(size * distributed.rank(), total)
        return Piece(flat, start, offset, min(size, total - offset))

    def refresh(self) -> None:
        wrapper = self._wrapper
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if len(wrapper.persistent_parameters) > 0:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)


def layout_of(engine: Any, parameters: Sequence[nn.Parameter]) -> Layout:
    """The layout of an engine; `parameters` are those of its optimizer."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return Partitioned(engine, parameters)
    if hasattr(wrapper, "fp32_groups_gradient_flat_partition"):
        return DividedBf16(engine, parameters)
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return Divided(engine, parameters)
    return Layout(engine, parameters)


def named_once(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model's parameters and saved buffers by name, tied ones once, by their first name."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) not in seen:
            seen.add(id(value))
            yield name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""), value
