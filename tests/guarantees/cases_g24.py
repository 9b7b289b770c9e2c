"""Canaries in all places where a secret may stand, and the search for them in everything that a run leaves behind.

Looked through are the user's whole folder, in which the home and the folder for temporary files lie as well, names of
files included, while the run is there and after it; what it says; and the command lines of all processes that it
starts. What the user typed is the command line of the program itself, as of every program.
"""
# ruff: noqa: E501 (a case a line)

from __future__ import annotations

import random
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from programs import Told, begin, end, living

_MODULE = '''
import sys, time
from pathlib import Path
from runner.train.hook import Hook

class Client:
    """A tracker and a hook in one: is given secrets, and does not keep them to itself."""

class Reporter(Hook):
    def __init__(self, fail=False, **options):
        self.fail, self.options = fail, options

    def on_run_start(self, run):
        import logging
        logging.getLogger("runner").info("connected with %s", self.options)
        logging.getLogger("runner").warning("again %r", list(self.options.values()))
        self.log = run.config

    def on_step_end(self, run):
        if run.progress.step == 1:
            while Path("wait").exists():
                time.sleep(0.02)
        if run.progress.step == 3 and self.fail:
            raise RuntimeError(f"401 from https://user:{self.options}@host: {self.options!r}")

class Tracker:
    def __init__(self, **options):
        self.options = options

    def start(self, folder, step, config):
        (folder / "tracker.json").write_text(repr(config))

    def log(self, record):
        pass

    def close(self):
        pass
'''

_RECIPE = """\
name: own
model: {{_target_: torch.nn.Linear, in_features: 4, out_features: 2}}
task: classification
data:
  train: {{_target_: runner.data.synthetic.random_classification, samples: 64, features: 4, classes: 2}}
  eval: {{_target_: runner.data.synthetic.random_classification, samples: 16, features: 4, classes: 2}}
train: {{steps: 4}}
batch: {{global_size: 8}}
device: cpu
log: {{every: 1}}
checkpoint: {{every: {{steps: 2}}}}
launch: {{nproc_per_node: {world}}}
hooks:
  reporter: {{_target_: leaking.Reporter, fail: {fail}{hook}}}
trackers:
  mine: {{_target_: leaking.Tracker{tracker}}}
"""

SECRET = "c4nary-{}-9f2e7d"
#: Where a case itself writes the secret down.
WRITTEN = ("recipes/own.yaml", "settings.txt")


@dataclass(frozen=True)
class Case:
    """Where the secret stands. `hook` and `tracker` are more arguments in the recipe."""

    name: str
    hook: str = ""
    tracker: str = ""
    words: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    #: A file of the project that git knows, changed since.
    changed: str = ""
    fail: bool = False
    world: int = 1

    @property
    def secret(self) -> str:
        return SECRET.format(self.name.replace(" ", "-"))

    @property
    def started(self) -> int:
        """The processes that the program starts at least, each with a command line of its own."""
        return self.world if self.world > 1 else int("-m" in self.words)

    def __str__(self) -> str:
        return self.name


def _of(name: str, **parts) -> Case:
    secret = SECRET.format(name.replace(" ", "-"))
    filled = {key: value.replace("SECRET", secret) if isinstance(value, str) else value for key, value in parts.items()}
    for key in ("words", "variables"):
        if key in parts:
            filled[key] = tuple(
                item.replace("SECRET", secret)
                if isinstance(item, str)
                else (item[0], item[1].replace("SECRET", secret))
                for item in parts[key]
            )
    return Case(name, **filled)


CASES = [
    _of("a key of a hook", hook=", api_key: SECRET"),
    _of("a nested list", hook=", clients: [{name: a, db.password: SECRET}, {tokens: {api_key: [SECRET]}}]"),
    _of("a tracker", tracker=", hub_token: SECRET, nested: {client_secret: SECRET}"),
    _of("an environment variable", tracker=", where: '${oc.env:MY_TOKEN}'", variables=[("MY_TOKEN", "SECRET")]),
    _of("a variable inside of a text", hook=", header: 'Bearer ${oc.env:MY_TOKEN}'", variables=[("MY_TOKEN", "SECRET")]),
    _of("a reference to a secret", hook=", api_key: SECRET, again: 'Bearer ${.api_key}'"),
    _of("a password in a URL", tracker=", url: 'postgres://me:SECRET@host:5432/runs'"),
    _of("the command line", words=["hooks.reporter.api_key=SECRET", "+trackers.mine.password='SECRET'"]),
    _of("a URL on the command line", words=["+trackers.mine.url='https://me:SECRET@host/x'"]),
    _of("the environment", variables=[("HF_TOKEN", "SECRET"), ("WANDB_API_KEY", "SECRET"), ("SECRET_KEY", "SECRET")]),
    _of("the difference of a file", changed="api_key: SECRET\nurl: https://me:SECRET@host\nTOKEN = 'SECRET'\n"),
    _of("the recipe's own difference", hook=", api_key: SECRET", changed="recipe"),
    _of("an exception", hook=", api_key: SECRET", fail=True),
    _of("an exception of a process", hook=", api_key: SECRET", fail=True, world=2),
    _of("several processes", hook=", api_key: SECRET", world=2),
    _of("the command line of several processes", words=["hooks.reporter.api_key=SECRET", "+trackers.mine.password='SECRET'", "data.num_workers=1"], world=2),
    _of("a URL on the command line of several processes", words=["+trackers.mine.url='https://me:SECRET@host/x'"], world=2),
    _of("a variable of several processes", hook=", header: 'Bearer ${oc.env:MY_TOKEN}'", variables=[("MY_TOKEN", "SECRET")], world=2),
    _of("an exception by the command line", words=["hooks.reporter.api_key=SECRET"], fail=True, world=2),
    _of("a sweep over secrets", words=["-m", "hooks.reporter.api_key=SECRET,SECRET-2"]),
]  # fmt: skip


def every() -> list[Case]:
    return CASES


def cases(count: int, seed: int) -> list[Case]:
    return CASES if count >= len(CASES) else random.Random(seed).sample(CASES, count)


def run(case: Case, folder: Path) -> str | None:
    """None where the secret is nowhere; else where it was found."""
    recipe = _RECIPE.format(fail=str(case.fail).lower(), hook=case.hook, tracker=case.tracker, world=case.world)
    (folder / "recipes").mkdir(parents=True)
    (folder / "leaking.py").write_text(_MODULE)
    (folder / "settings.txt").write_text("nothing: 1\n")
    if case.changed:
        (folder / "recipes" / "own.yaml").write_text("name: own\n")
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
        ):
            subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)
    (folder / "recipes" / "own.yaml").write_text(recipe)
    if case.changed not in ("", "recipe"):
        (folder / "settings.txt").write_text(case.changed)
    (folder / "wait").touch()
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    variables = {
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home" / ".cache"),
        "TMPDIR": str(folder / "tmp"),
        **dict(case.variables),
    }
    process = begin(folder, "+recipe=own", "run_dir=run", *case.words, **variables)
    titles = _titles(process.pid, folder)
    meanwhile = [f"{place} while it ran" for place in _places(case, folder)]
    (folder / "wait").unlink()
    told = end(process, folder / "run")
    if told.code != (1 if case.fail else 0):
        return f"{case.name}: exit {told.code}: {told.err[-1500:]}"
    return _found(case, folder, told, titles, meanwhile)


def _titles(parent: int, folder: Path) -> list[str]:
    """The command lines of all processes but the one that the user typed, once the first step is made."""
    until = time.monotonic() + 60
    while not any((folder / "run").rglob("metrics.jsonl")) and time.monotonic() < until and parent in living(parent):
        time.sleep(0.05)
    return [line for pid, line in living(parent).items() if pid != parent]


def _places(case: Case, folder: Path) -> list[str]:
    """Files that hold the secret, or are named by it."""
    secret, found = case.secret.encode(), []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        with suppress(FileNotFoundError):  # gone meanwhile
            held = path.is_file() and name not in WRITTEN and secret in path.read_bytes()
            if held or case.secret in name:
                found.append(name)
    return found


def _found(case: Case, folder: Path, told: Told, titles: list[str], meanwhile: list[str]) -> str | None:
    if len(titles) < case.started:
        return f"{case.name}: {case.started} processes are to be looked at, and there are {titles}"
    places = [*meanwhile, *_places(case, folder)]
    places += [name for name, text in (("stdout", told.out), ("stderr", told.err)) if case.secret in text]
    places += [f"the title {title}" for title in titles if case.secret in title]
    if places:
        return f"{case.name}: found in {', '.join(places)}"
    written = {path.name for path in (folder / "run").rglob("*")}
    saved = case.fail or any(name.startswith("step_") for name in written)
    if not saved or not written >= {"environment.json", "tracker.json", "main.log"}:
        return f"{case.name}: nothing was saved: {sorted(written)}"
    return None
