"""How many processes a configuration and a launcher ask for, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runner.distributed import Ranks
from runner.errors import Problem
from runner.launch.devices import cuda_count
from runner.launch.environment import Environment


def on_node(config: Mapping[str, Any]) -> int:
    """The processes that each node starts itself."""
    given = _number(_launch(config).get("nproc_per_node"))
    if given is not None:
        return given
    backend = config.get("backend")
    single = isinstance(backend, Mapping) and backend.get("name") == "single"
    return 1 if single or config.get("device") in ("cpu", "mps") else max(1, cuda_count())


def processes(config: Mapping[str, Any], environment: Environment) -> int:
    """The processes of the whole job. Values that make no sense count as not given; others complain about them."""
    ranks = environment.ranks
    return ranks.world_size if ranks is not None else on_node(config) * nodes(config)


def check(config: Mapping[str, Any], environment: Environment) -> list[Problem]:
    """What cannot be launched, before anything starts."""
    if environment.problems:
        return list(environment.problems)
    ranks = environment.ranks
    if ranks is not None:
        return [*_disagreements(config, ranks), *_too_many(config, ranks.local_world_size, environment)]
    return [*_several_nodes(config), *_too_many(config, on_node(config), environment)]


def notes(config: Mapping[str, Any], environment: Environment) -> list[str]:
    """What has no effect where another launcher has started the processes."""
    restarts, ranks = _number(_launch(config).get("max_restarts")), environment.ranks
    if restarts is None or ranks is None or ranks.world_size == 1:
        return []
    again = {
        "torchrun": f"torchrun, which starts the processes again itself: torchrun --max-restarts={restarts}",
        "srun": "srun: the scheduler starts the job again (sbatch --requeue)",
    }
    under = again.get(environment.launcher or "", "another launcher")
    return [f"launch.max_restarts={restarts} has no effect under {under}"]


def _disagreements(config: Mapping[str, Any], ranks: Ranks) -> list[Problem]:
    problems = []
    given = _number(_launch(config).get("nproc_per_node"))
    here = ranks.local_world_size
    if given is not None and given != here:
        why = f"the launcher started {here}, and launch.nproc_per_node says {given}"
        problems.append(Problem("launch.nproc_per_node", why, "leave it out, or say the same to both", given))
    count = nodes(config)
    if count > 1 and ranks.world_size < count * here:
        why = f"the launcher started {ranks.world_size} processes, {here} of them here, and launch.nnodes says {count}"
        problems.append(Problem("launch.nnodes", why, "leave it out under a launcher", count))
    return problems


def _too_many(config: Mapping[str, Any], here: int, environment: Environment) -> list[Problem]:
    """More processes than devices. Under srun each task may see a device of its own only."""
    device = config.get("device")
    if here < 2 or device not in ("auto", "cuda", "mps") or environment.launcher == "srun":
        return []
    count = 1 if device == "mps" else cuda_count()
    if count >= here or (count == 0 and device == "auto"):
        return []
    there = {0: "is no GPU", 1: "is one GPU"}.get(count, f"are {count} GPUs")
    key, value = ("device", device) if device == "mps" else ("launch.nproc_per_node", here)
    fix = f"launch.nproc_per_node={count}, or device=cpu" if count else "device=cpu"
    return [Problem(key, f"{here} processes want a GPU each, and there {there}", fix, value)]


def _several_nodes(config: Mapping[str, Any]) -> list[Problem]:
    launch, count = _launch(config), nodes(config)
    if count < 2:
        return []
    problems = []
    endpoint = launch.get("rdzv_endpoint")
    if endpoint is None:
        why = f"{count} nodes have to meet somewhere"
        problems.append(Problem("launch.rdzv_endpoint", why, "HOST:PORT of the first node", endpoint))
    elif isinstance(endpoint, str) and address(endpoint) is None:
        problems.append(Problem("launch.rdzv_endpoint", "is not HOST:PORT", "for example node1:29400", endpoint))
    rank = launch.get("node_rank")
    if isinstance(rank, int) and rank >= count:
        why = f"nodes are numbered from 0, and launch.nnodes is {count}"
        problems.append(Problem("launch.node_rank", why, f"0 to {count - 1}", rank))
    return problems


def address(endpoint: str) -> tuple[str, int] | None:
    """Host and port of HOST:PORT."""
    host, _, port = endpoint.rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() and 0 < int(port) < 65536 else None


def _launch(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("launch")
    return found if isinstance(found, Mapping) else {}


def nodes(config: Mapping[str, Any]) -> int:
    """The computers that train together."""
    return _number(_launch(config).get("nnodes")) or 1


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
