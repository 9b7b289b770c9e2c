"""Canaries in all places where a secret may stand, and the search for them in everything that a run leaves behind."""
# ruff: noqa: E501 (a case a line)

from __future__ import annotations

import os
import random
import subprocess
import time
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
]  # fmt: skip


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
    process = begin(
        folder, "+recipe=own", "run_dir=run", *case.words, **{"OMP_NUM_THREADS": "1", **dict(case.variables)}
    )
    titles = _titles(process.pid, folder)
    (folder / "wait").unlink()
    told = end(process, folder / "run")
    if told.code != (1 if case.fail else 0):
        return f"{case.name}: exit {told.code}: {told.err[-1500:]}"
    return _found(case, folder, told, titles)


def _titles(parent: int, folder: Path) -> list[str]:
    """The command lines of all processes but the one that the user typed, once the first step is made."""
    until = time.monotonic() + 60
    while not (folder / "run" / "metrics.jsonl").exists() and time.monotonic() < until and parent in living(parent):
        time.sleep(0.05)
    return [line for pid, line in living(parent).items() if pid != parent]


def _found(case: Case, folder: Path, told: Told, titles: list[str]) -> str | None:
    secret = case.secret.encode()
    places = [
        str(path.relative_to(folder))
        for path in sorted((folder / "run").rglob("*"))
        if path.is_file() and secret in path.read_bytes()
    ]
    places += [name for name, text in (("stdout", told.out), ("stderr", told.err)) if case.secret in text]
    places += [f"the title {title}" for title in titles if case.secret in title]
    if places:
        return f"{case.name}: found in {', '.join(places)}"
    saved = case.fail or list((folder / "run" / "checkpoints").glob("step_*"))
    if not saved or not (folder / "run" / "environment.json").is_file():
        return f"{case.name}: nothing was saved: {sorted(os.listdir(folder / 'run'))}"
    return None
