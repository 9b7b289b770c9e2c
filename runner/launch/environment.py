"""What the environment says: another launcher's ranks (torchrun, srun), and two switches for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from runner.distributed import Ranks
from runner.errors import Problem

_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
_WORDS = (*_NUMBERS, "MASTER_ADDR")
_FIX = "start it by torchrun, or unset them: the program starts its processes itself (launch.nproc_per_node)"
#: SLURM's numbers of steps that are none of srun's: batch script, interactive shell and the like.
_NO_STEP = 4294967290


@dataclass(frozen=True)
class Environment:
    """Another launcher's ranks and its name, if there is one; what is wrong with them; how to talk to the user."""

    ranks: Ranks | None = None
    launcher: str | None = None
    problems: tuple[Problem, ...] = ()
    full_error: bool = False
    terminal: str | None = None

    @classmethod
    def read(cls) -> Environment:
        """Reads the environment once. What is wrong is in `problems`; only who trains has to care."""
        variables = {name: value.strip() for name, value in os.environ.items() if value.strip()}
        problems: list[Problem] = []
        launcher, ranks = None, None
        if "RANK" in variables or "LOCAL_RANK" in variables:
            launcher, ranks = "torchrun", _torchrun(variables, problems)
        elif _in_step(variables):
            launcher, ranks = "srun", _srun(variables, problems)
        elif variables.get("WORLD_SIZE", "1") != "1":
            ranks = _torchrun(variables, problems)
        return cls(
            ranks=ranks,
            launcher=launcher if ranks is not None else None,
            problems=tuple(problems),
            full_error=variables.get("HYDRA_FULL_ERROR", "0") != "0",
            terminal=os.environ.get("TERM"),
        )


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,18}", text) else None


def _torchrun(variables: Mapping[str, str], problems: list[Problem]) -> Ranks | None:
    """The ranks in torchrun's words. WORLD_SIZE=1 needs none of the others."""
    if variables.get("WORLD_SIZE") == "1" and variables.get("RANK", "0") == "0":
        return Ranks()
    given = [f"{name}={variables[name]}" for name in _WORDS if name in variables]
    missing = [name for name in _WORDS if name not in variables]
    if missing:
        why = f"the environment names this process's rank by halves: {', '.join(given)}, without {', '.join(missing)}"
        problems.append(Problem(None, why, _FIX))
        return None
    found = {name: _number(variables[name]) for name in _NUMBERS}
    found["LOCAL_WORLD_SIZE"] = _number(variables.get("LOCAL_WORLD_SIZE", variables["WORLD_SIZE"]))
    for name, number in found.items():
        if number is None:
            problems.append(Problem(None, f"{name}={variables[name]} in the environment is not a number", _FIX))
    if problems:
        return None
    rank, local_rank, world, port, local_world = (number or 0 for number in found.values())
    for wrong, why in (
        (world < 1, f"WORLD_SIZE={world} in the environment: there is at least one process"),
        (rank >= world > 0, f"RANK={rank} in the environment is not below WORLD_SIZE={world}"),
        (local_rank >= local_world, f"LOCAL_RANK={local_rank} in the environment is not below {local_world}"),
        (not 0 < port < 65536, f"MASTER_PORT={port} in the environment is no port"),
    ):
        if wrong:
            problems.append(Problem(None, why, _FIX))
    keeps = variables.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in ("true", "1")
    master = (variables["MASTER_ADDR"], port)
    attempt = _number(variables.get("TORCHELASTIC_RESTART_COUNT")) or 0
    return None if problems else Ranks(rank, world, local_rank, local_world, master, keep_store=keeps, attempt=attempt)


# --- SLURM ----------------------------------------------------------------------------------------------------------


def _in_step(variables: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks that srun started; a batch script is none, though it has a SLURM_PROCID."""
    if not {"SLURM_PROCID", "SLURM_LOCALID"} <= variables.keys() or _tasks(variables) in (None, 1):
        return False
    step = variables.get("SLURM_STEP_ID", variables.get("SLURM_STEPID"))
    if step is None:
        return variables.get("ENVIRONMENT") != "BATCH"
    number = _number(step)
    return number is not None and number < _NO_STEP


def _tasks(variables: Mapping[str, str]) -> int | None:
    return _number(variables.get("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS")))


def _srun(variables: Mapping[str, str], problems: list[Problem]) -> Ranks | None:
    """The ranks of a task of srun: its store is on the first node, at a port that follows from job and step."""
    rank, local_rank = _number(variables["SLURM_PROCID"]), _number(variables["SLURM_LOCALID"])
    world = _tasks(variables) or 1
    if rank is None or local_rank is None or rank >= world:
        found = ", ".join(f"{name}={variables[name]}" for name in ("SLURM_PROCID", "SLURM_LOCALID"))
        problems.append(Problem(None, f"{found} of {world} tasks: these are not srun's own values", "start it by srun"))
        return None
    nodes = _first(variables, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    counts = tasks_per_node(_first(variables, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") or "")
    node = _number(variables.get("SLURM_NODEID")) or 0
    local_world = counts[node] if node < len(counts) else (world if len(counts) < 2 else local_rank + 1)
    host = variables.get("MASTER_ADDR")
    if host is None and (local_world == world or nodes is None):
        host = "127.0.0.1"
    port = _number(variables.get("MASTER_PORT"))
    if port is None:
        job, step = (_number(_first(variables, *names)) or 0 for names in _JOB_AND_STEP)
        port = 10_000 + (job * 31 + step) % 20_000  # below the ports that systems hand out themselves
    return Ranks(rank, world, local_rank, max(local_world, local_rank + 1), (host or first_host(nodes or ""), port))


_JOB_AND_STEP = (("SLURM_JOB_ID", "SLURM_JOBID"), ("SLURM_STEP_ID", "SLURM_STEPID"))


def _first(variables: Mapping[str, str], *names: str) -> str | None:
    return next((variables[name] for name in names if name in variables), None)


def tasks_per_node(text: str) -> list[int]:
    """SLURM's short form of the number of tasks on each node: `2(x3),1` is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of SLURM's list of nodes: `n[07-09,12],gpu1` begins with n07."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes
