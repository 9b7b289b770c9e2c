"""The same bits on any number of processes: a step's shards, and the tree by which they add up, follow the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runner import distributed
from runner.engine.backend import Backend
from runner.engine.engine import Engine, Exchange
from runner.engine.gradients import wide
from runner.engine.mesh import Mesh
from runner.engine.precision import Precision
from runner.engine.scaler import Scaler
from runner.engine.single import Single
from runner.errors import Problem, wrong
from runner.keyed import keyed, mixed, seed_all

#: The gradients that a part of a step has left; None for a parameter that got none.
Gradients = list[Tensor | None]


class Canonical(Single):
    """Every process has the bare model; sums of gradients do not depend on how many processes there are.

    A step is `shards` micro-batches, C of them, a power of two. Sums follow one tree: shard i is added to shard
    i + C/2, what results to its like C/4 further, and so on down to neighbours. Process r of N has the shards r,
    r + N, r + 2N, …, so for any power of two N up to C it owns a whole subtree, and only the sums at these subtrees'
    roots travel. The last step of an epoch has fewer shards: those that lack are left out of the sums, alike
    everywhere (to add -0.0 changes no number, so that is what is sent in their stead).

    Args:
        shards: micro-batches of a whole step, over all processes.
        kind: what the configuration calls it: `single` or `ddp`.
        bucket_mb: MiB of gradients that travel together.
        comm_hook: refused: it would round what travels.
        ddp: further options of the backend ddp, which change nothing here.
    """

    def __init__(
        self,
        device: torch.device,
        precision: Precision,
        mesh: Mesh,
        *,
        shards: int,
        kind: str = "ddp",
        bucket_mb: float = 25.0,
        comm_hook: str | None = None,
        **ddp: Any,
    ) -> None:
        super().__init__(device, precision, mesh)
        self.name = kind
        self.most_processes = 1 if kind == "single" else None
        self.shards = shards
        # The gradients of the processes are added up, not averaged.
        self.scaler = Scaler(precision.loss_scaling, device)
        self._comm_hook = comm_hook
        self._bucket_bytes = int(bucket_mb * 2**20)
        self._buckets: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def check(self) -> list[Problem]:
        problems = super().check()
        if self._comm_hook is not None:
            why = "rounds the gradients that travel, and determinism=canonical adds up the true ones"
            problems.append(Problem("backend.comm_hook", why, "leave it out", value=self._comm_hook))
        if self.shards % self.mesh.data_size:
            why = f"cuts each step into {self.shards} shards, which {self.mesh.data_size} processes cannot share"
            fix = f"launch.nproc_per_node={_largest_below(self.shards, self.mesh.data_size)}"
            problems.append(Problem("determinism", why, fix, value="canonical"))
        return problems

    def place(self, model: nn.Module) -> nn.Module:
        model = super().place(model)
        refuse_running_means(model)
        self._parameters = list(model.parameters())
        if self.mesh.data_size > 1:
            with torch.no_grad():
                for tensor in (*self._parameters, *model.buffers()):
                    dist.broadcast(tensor, 0)
        return model

    def walk(self, real: int) -> Iterator[int]:
        """The places of this process's micro-batches, in the order in which their gradients are added up.

        Each is to have gone through forward and backward when the next one is asked for. Once there is none left,
        the gradients are those of the whole step, on all processes.
        """
        own = self.shards // self.mesh.data_size
        nodes: list[tuple[int, Gradients]] = []
        for turn in range(own):
            place = mirrored(turn, own)
            if place < real:
                yield place
            if turn % 2 or own == 1:
                # The second shard of a pair: backward itself has added its gradients to those of the first.
                self._push(nodes, 2 if own > 1 else 1)
        ((_, gradients),) = nodes
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.mesh.data_size > 1:
            self._add_up()

    def _push(self, nodes: list[tuple[int, Gradients]], size: int) -> None:
        """Takes the gradients that lie there as a node of so many shards, and joins nodes of the same size."""
        node: Gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        while nodes and nodes[-1][0] == size:
            node = joined(nodes.pop()[1], node)
            size *= 2
        nodes.append((size, node))

    def _add_up(self) -> None:
        """Adds up the gradients of all processes: the rest of the tree."""
        there = torch.tensor([parameter.grad is not None for parameter in self._parameters], dtype=torch.int32)
        there = there.to(self.device)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        present = [p for p, any_has in zip(self._parameters, there.tolist(), strict=True) if any_has]
        for parameter in present:
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, -0.0, requires_grad=False)
        gradients = [parameter.grad for parameter in present if parameter.grad is not None]
        for bucket in in_buckets(gradients, self._bucket_bytes):
            self._add_up_bucket(bucket)

    def _add_up_bucket(self, gradients: list[Tensor]) -> None:
        """Each process adds up one piece of the bucket, from all processes and by the tree; then all get all pieces."""
        size, readers = sum(gradient.numel() for gradient in gradients), self.mesh.data_size
        piece = -(-size // readers)
        sent, received = (buffer[: piece * readers] for buffer in self._bucket(gradients[0].dtype, piece * readers))
        sent[size:].zero_()
        parts = sent[:size].split([gradient.numel() for gradient in gradients])
        views = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(views, gradients)
        # As bytes: nothing is computed on the way, and every library can carry them.
        dist.all_to_all_single(received.view(torch.uint8), sent.view(torch.uint8))
        sums = folded(received.view(readers, piece))
        dist.all_gather_into_tensor(sent.view(torch.uint8), sums.contiguous().view(torch.uint8))
        torch._foreach_copy_(gradients, views)

    def _bucket(self, dtype: torch.dtype, size: int) -> tuple[Tensor, ...]:
        """Two buffers of at least `size`, kept from step to step."""
        found = self._buckets.get(dtype)
        if found is None or found[0].numel() < size:
            found = self._buckets[dtype] = torch.empty(2, size, dtype=dtype, device=self.device).unbind()
        return found

    def describe(self) -> list[str]:
        own = self.shards // self.mesh.data_size
        return [
            f"canonical sums: {self.shards} shards a step, {own} on each process, of {len(self._parameters)} tensors"
        ]


class CanonicalEngine(Engine):
    """The engine where sums, randomness and weights are those of shards, not of processes."""

    backend: Canonical

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        assert isinstance(backend, Canonical)
        self.shards = backend.shards
        # What is drawn outside of shards is the same on all processes.
        self._reader = 0
        self._shard_keys: dict[tuple[int, int], int] = {}
        self._looked = False

    def walk(self, real: int) -> Iterator[int]:
        """See Canonical.walk. The first shard shows whether the model's buffers follow what it is shown."""
        before = None if self._looked else _buffers(self.model)
        for place in self.backend.walk(real):
            yield place
            if before is not None:
                refuse_moved(self.model, before)
                self._looked, before = True, None

    def seed_shard(self, seed: int, step: int, place: int) -> None:
        """Seeds the generators by (seed, step, shard) for this process's micro-batch number `place`."""
        shard = self._shard(place)
        if (seed, shard) not in self._shard_keys:
            self._shard_keys[seed, shard] = keyed(seed, "shard", shard)
        self._seed_all(mixed(self._shard_keys[seed, shard], step))

    def seed_update(self, seed: int, step: int) -> None:
        """Seeds the generators for what follows the shards, by (seed, step)."""
        self._seed_all(mixed(keyed(seed, "update"), step))

    def _seed_all(self, number: int) -> None:
        seed_all(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        elif self.device.type == "mps":
            torch.mps.manual_seed(number)

    def _shard(self, place: int) -> int:
        return place * self.mesh.data_size + self.mesh.data_rank

    def tally(self, values: Mapping[int, Any]) -> Tensor:
        """Numbers of this process's shards (by place) at their places in a vector of all shards."""
        vector = torch.zeros(self.shards, dtype=wide(self.device), device=self.device)
        for place, value in values.items():
            vector[self._shard(place)] = value.detach() if isinstance(value, Tensor) else value
        return vector

    def total(self, weight: Any) -> Tensor:
        return folded(distributed.total(weight.clone()) if self.mesh.data_size > 1 else weight)

    def factor(self, weight: Any) -> Tensor:
        """What a shard's summed loss is multiplied with: 1 / weight of the whole step, of one shard or a tally."""
        whole = weight if isinstance(weight, Tensor) else torch.tensor(float(weight), dtype=wide(self.device))
        return (1 / (folded(whole) if whole.dim() else whole)).to(self.device, torch.float32)

    def exchange(self, loss: Tensor, weight: Any = 0, flags: Sequence[float] = (), *, guard: bool = True) -> Exchange:
        """As the engine's, of tallies: each number travels at its shard's place, and all add them up in one order."""
        looks = guard or self.precision.loss_scaling is not None
        found = self.backend.handle.not_finite() if looks else None
        told: Any = weight
        heard: Sequence[float] = flags
        if self.mesh.data_size > 1:
            size = self.shards
            vector = torch.zeros(2 * size + len(flags), dtype=wide(self.device), device=self.device)
            vector[:size] = loss
            if isinstance(weight, Tensor):
                vector[size : 2 * size] = weight
            for i, flag in enumerate(flags, 2 * size):
                if flag:
                    vector[i] = float(flag)
            distributed.total(vector)
            loss, told, heard = vector[:size], folded(vector[size : 2 * size]), self._on_host(vector[2 * size :])
        mean = (folded(loss) if loss.dim() else loss).float()
        # Gradients are the same everywhere by now, and so is the answer.
        return Exchange(mean, told, heard, self._skip(found, mean if guard else None))


def mirrored(turn: int, count: int) -> int:
    """The number whose bits are those of `turn` in reverse, below a power of two `count`.

    In this order of leaves the pairs (i, i + count/2), (i, i + count/4), … follow each other, so that a sum needs
    log2(count) places.
    """
    bits = count.bit_length() - 1
    return int(f"{turn:0{bits}b}"[::-1], 2) if bits else 0


def folded(values: Tensor) -> Tensor:
    """The sum over the first dimension (a power of two): its halves are added, again and again. A new tensor."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return values[0]


def joined(ours: Gradients, theirs: Gradients) -> Gradients:
    """The sums of two nodes, in the tensors of the first; what only one of them has is the sum."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(ours, theirs, strict=True)]


def in_buckets(tensors: Sequence[Tensor], most_bytes: int) -> Iterator[list[Tensor]]:
    """The tensors by type, in runs of at most so many bytes (or one tensor)."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and size + tensor.nbytes > most_bytes:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.nbytes
        yield bucket


def refuse_running_means(model: nn.Module) -> None:
    """Raises InputError for modules that keep means of what they were shown: these depend on who was shown what."""
    kinds = (nn.modules.batchnorm._NormBase,)
    found = [
        (name or type(module).__name__, type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module.running_mean is not None
    ]
    if found:
        named = ", ".join(f"{name} ({kind})" for name, kind in found[:5])
        raise _moving(f"{named}{f' and {len(found) - 5} more' if len(found) > 5 else ''}")


def refuse_moved(model: nn.Module, before: Mapping[str, tuple[int, int]]) -> None:
    """Raises InputError where a forward pass has changed buffers."""
    moved = [name for name, seen in _buffers(model).items() if before.get(name) != seen]
    if moved:
        raise _moving(", ".join(moved[:5]) + (f" and {len(moved) - 5} more" if len(moved) > 5 else ""))


def _moving(names: str) -> Exception:
    why = f"keeps numbers that change with every forward pass ({names}), which determinism=canonical cannot"
    return wrong(
        "model", why, "use GroupNorm or LayerNorm instead (or track_running_stats=False), or another determinism"
    )


def _buffers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Each buffer's identity, and how often it was written to."""
    return {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}


def _largest_below(shards: int, processes: int) -> int:
    return next(n for n in range(min(shards, processes), 0, -1) if shards % n == 0)
