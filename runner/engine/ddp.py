"""Several processes with a copy of the model each: torch's DistributedDataParallel (Li et al., 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from runner.engine.bucket_order import BucketOrder
from runner.engine.mesh import Mesh
from runner.engine.precision import Precision
from runner.engine.single import Single
from runner.errors import wrong


class DDP(Single):
    """Gradients are averaged over the processes while the last backward of a step still runs.

    Args:
        bucket_mb: MiB of gradients that travel together.
        gradient_as_bucket_view: gradients are views into the buckets, which saves a copy of them.
        static_graph: every step uses the same parameters in the same order.
        find_unused_parameters: walk the graph after each forward for parameters that get no gradient.
        comm_hook: how gradients travel: `bf16`, `fp16`, `powersgd` (Vogels et al., 2019), None for as they are.
        powersgd_rank: rank of the approximation by PowerSGD.
    """

    name = "ddp"
    grouped = True
    most_processes = None

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        mesh: Mesh,
        *,
        bucket_mb: float = 25.0,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        comm_hook: str | None = None,
        powersgd_rank: int = 1,
    ) -> None:
        super().__init__(device, precision, mesh)
        self._options: dict[str, Any] = {
            "bucket_cap_mb": bucket_mb,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
            "find_unused_parameters": find_unused_parameters,
        }
        self._comm_hook = comm_hook
        self._powersgd_rank = powersgd_rank
        self._wrapped: list[nn.parallel.DistributedDataParallel] = []
        #: Whether there may be a backward without a forward before it.
        self._kept_a_graph = False
        #: Whether there was a backward, which is the one that a static graph is learnt from.
        self._learnt = False
        #: Models whose first backward has shown that every parameter gets a gradient.
        self._seen: set[int] = set()
        #: A static graph has buckets of its own; where parameters may be unused, they stay as they are.
        self._lays_by_arrival = not (static_graph or find_unused_parameters)
        self._order = BucketOrder()

    def place(self, model: nn.Module) -> nn.Module:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = super().place(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # nothing to average: a frozen teacher, buffers only
        devices = None if self.device.type == "cpu" else [self.device]
        wrapped = nn.parallel.DistributedDataParallel(model, device_ids=devices, **self._options)
        self._register(wrapped)
        self._wrapped.append(wrapped)
        if self._lays_by_arrival:
            self._order.add(wrapped)
        return wrapped

    def _register(self, model: nn.parallel.DistributedDataParallel) -> None:
        if self._comm_hook is None:
            return
        if self._comm_hook == "powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

            state = powersgd.PowerSGDState(None, matrix_approximation_rank=self._powersgd_rank, start_powerSGD_iter=2)
            model.register_comm_hook(state, powersgd.powerSGD_hook)
            return
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as hooks

        hook: Any = {"bf16": hooks.bf16_compress_hook, "fp16": hooks.fp16_compress_hook}[self._comm_hook]
        if self.device.type == "cpu":
            # By its name torch refuses the one for bfloat16 where there is no GPU; gloo adds these up all the same.
            model.register_comm_hook(None, lambda state, bucket: hook(state, bucket))
        else:
            model.register_comm_hook(None, hook)

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        # A static graph is learnt from a first backward that sends: what is sent twice adds up to the same.
        if last or (self._options["static_graph"] and not self._learnt):
            return self._nothing
        stack = ExitStack()
        for model in self._wrapped:
            stack.enter_context(model.no_sync())
        return stack

    def backward(self, loss: Tensor, factor: Tensor | None, **options: Any) -> Tensor:
        self._learnt = True
        if self._kept_a_graph:
            # Without this the gradients of a graph's second backward would stay on this process.
            outputs = [loss] if self._options["find_unused_parameters"] else []
            for model in self._wrapped:
                if model.require_backward_grad_sync:
                    model.reducer._rebuild_buckets()
                    model.reducer.prepare_for_backward(outputs)
        self._kept_a_graph = self._kept_a_graph or bool(options.get("retain_graph") or options.get("create_graph"))
        share = super().backward(loss, factor, **options)
        if self._order.listens:
            self._order.came()
        for model in self._wrapped:
            if id(model) not in self._seen and model.require_backward_grad_sync:
                self._all_used(model)
        return share

    def _all_used(self, model: nn.parallel.DistributedDataParallel) -> None:
        """Raises InputError, naming them, where parameters got no gradient: torch would complain a step later."""
        self._seen.add(id(model))
        if self._options["find_unused_parameters"] or self._options["static_graph"]:
            return
        parameters = [(name, p) for name, p in model.module.named_parameters() if p.requires_grad]
        unused = [name for name, p in parameters if p.grad is None]
        if unused and len(unused) < len(parameters):
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            why = f"got no gradient in the first step: {', '.join(unused[:5])}{more}"
            fix = "backend.find_unused_parameters=true, or freeze them (requires_grad = False)"
            raise wrong("model", why, fix)

    def discard(self) -> None:
        super().discard()
        self._order.discard()
        for model in self._wrapped:
            # Processes that broke off at different places must agree on sending buffers.
            model.require_forward_param_sync = True

    def extras(self) -> Mapping[str, Any]:
        return {"buckets": self._order}

    def forgets(self) -> str | None:
        if self._comm_hook == "powersgd":
            return "with backend.comm_hook=powersgd each process keeps what it has not sent yet to itself"
        if self._options["static_graph"]:
            return "with backend.static_graph=true the first step of a process sends its gradients in another way"
        if self._order.unknown and self.mesh.data_size > 2:
            return "where gradients are sparse, or parameters have hooks, buckets are filled in another order at first"
        return None

    def describe(self) -> list[str]:
        count = sum(1 for model in self._wrapped for p in model.parameters() if p.requires_grad)
        options = ", ".join(f"{name}={value}" for name, value in self._options.items())
        hook = self._comm_hook or "none"
        return [f"DistributedDataParallel over {count} parameters ({options}), communication hook {hook}"]
