"""Configuration that is too much: each is refused, by a program that takes little time and memory for it."""
# ruff: noqa: E501 (a case a line)

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from guarantees.supervised import slack

ROOT = Path(__file__).resolve().parent.parent.parent

#: Seconds of the processor and MiB that the whole process ever had, and seconds of the clock from its start to its end.
SECONDS = 2.0
MEMORY = 300
WAITED = 5.0

GOOD = """\
name: own
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
task: classification
data:
  train: {_target_: runner.data.synthetic.random_classification, samples: 8, features: 4, classes: 2}
train: {epochs: 1}
batch: {global_size: 8}
"""

#: What a recipe has that is within all limits: it is refused for this, and for nothing else.
TYPO = "sed: 3\n"

_CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from runner.__main__ import main
code = main(json.loads(sys.stdin.read()))
seconds = time.process_time()
memory = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"code": code, "seconds": seconds, "memory": memory}))
"""


@dataclass(frozen=True)
class Case:
    """Lines that are added to a good recipe (or the whole of it), and words.

    Where something is over a limit, `says` is a part of what it must be refused with. What is not has a typo to be
    refused for; keys that nobody knows are told as well.
    """

    name: str
    lines: str = ""
    says: str = ""
    words: tuple[str, ...] = ()
    whole: bool = False
    #: Bytes that the file is lengthened to.
    size: int = 0


def _laughs(kind: str, levels: int = 30) -> str:
    last = {"text": "x", "mapping": "{a: 1}", "list": "[1, 2]"}[kind]
    forms = {"text": "{0}{0}", "mapping": "{{a: '{0}', b: '{0}'}}", "list": "['{0}', '{0}']"}
    rows = [f"k{i}: {forms[kind].format(f'${{k{i + 1}}}')}" for i in range(levels)]
    return "\n".join([*rows, f"k{levels}: {last}"])


def _aliases(kind: str, levels: int = 9) -> str:
    names = "abcdefghij"
    forms = {
        "list": lambda old: f"[{', '.join(['*' + old] * 9)}]",
        "mapping": lambda old: f"{{{', '.join(f'k{i}: *{old}' for i in range(9))}}}",
        "merge": lambda old: f"{{<<: [{', '.join(['*' + old] * 9)}]}}",
    }
    first = "[x, x]" if kind == "list" else "{x: 1, y: 2}"
    rows = [f"z{i}: &{names[i]} {forms[kind](names[i - 1])}" for i in range(1, levels)]
    return "\n".join([f"z0: &a {first}", *rows])


ALIASES = "more than 10,000 values once its aliases are expanded"
CIRCLE = "nested more than 30 levels deep once its aliases are expanded"
DEEP = "nested more than 30 levels deep fix: make it flatter"
LARGE = "the file is larger than 200,000 bytes"
MANY = "more than 10,000 values in one file"
COPIES = "interpolations copy more than 3,000 values"
WRITTEN = "the texts with interpolations have more than 10,000 characters"
TYPED = "characters, more than 10,000"
HUGE = "must be a whole number from 0 to 2^63 - 1"
DIGITS = "YAML reads it as a number of more than 600 digits"
UNREADABLE = "the value cannot be read"
SYNTAX = "the indentation or a colon is wrong here"
LISTED = "entries, more than 64"

CASES = [
    *[Case(f"aliases of a {kind}", _aliases(kind), ALIASES) for kind in ("list", "mapping", "merge")],
    Case("an alias of itself", "a: &a [*a]", CIRCLE),
    Case("aliases in a circle", "a: &a {b: &b {c: *a, d: *b}}", CIRCLE),
    Case("merge keys of itself", "a: &a {<<: *a}", CIRCLE),
    Case("many aliases of one value", "a: &a [1, 2, 3]\nb: [" + "*a, " * 8_000 + "]", ALIASES),
    Case("nested flow lists", "a: " + "[" * 90_000 + "]" * 90_000, DEEP),
    Case("nested flow mappings", "a: " + "{a: " * 30_000 + "1" + "}" * 30_000, DEEP),
    Case("nested block lists", "a:\n  " + "- " * 90_000 + "x", DEEP),
    Case("nested block mappings", "".join("  " * i + f"k{i}:\n" for i in range(300)), DEEP),
    Case("questions", "? " * 90_000, DEEP),
    Case("a scalar of 10 MB", "a: " + "x" * 10_000_000, LARGE),
    Case("a file of 200 MB", says=LARGE, size=200_000_000),
    Case("a scalar that just fits", "a: " + "x" * 190_000),
    Case("a quoted scalar that just fits", 'a: "' + "\\x41" * 45_000 + '"'),
    Case("a name that just fits", GOOD.replace("own", "x" * 190_000), "must be letters, digits and . _ - only", whole=True),
    Case("a path that just fits", "run_dir: " + "x/" * 90_000, "cannot be made: File name too long"),
    Case("a path of weights that just fits", "init_from: " + "x/" * 90_000, "does not exist, and is no name of the hub"),
    Case("a key that just fits", "x" * 190_000 + ": 3", SYNTAX),
    Case("a known key with much behind it", "seed" + "x" * 100_000 + ": 3", SYNTAX),
    Case("many similar keys", "\n".join(f"seed{i}: 3" for i in range(5_000)), MANY),
    Case("many long keys", "\n".join(f"{'optimizer' * 20}{i}: 3" for i in range(900))),
    Case("many keys", "\n".join(f"k{i}: 3" for i in range(9_000)), MANY),
    Case("many keys of one mapping", "a: {" + ", ".join(f"k{i}: 3" for i in range(9_000)) + "}", MANY),
    Case("values without end", "a: [" + "1," * 90_000 + "]", MANY),
    Case("an integer of 190,000 digits", "seed: " + "9" * 190_000, UNREADABLE),
    Case("an integer of 4,000 digits", "seed: " + "9" * 4_000, HUGE),
    Case("a hexadecimal integer", "seed: 0x" + "f" * 190_000, HUGE),
    Case("a binary integer", "seed: 0b" + "1" * 190_000, HUGE),
    Case("an octal integer", "seed: 0" + "7" * 190_000, DIGITS),
    Case("an integer in sixties", "seed: 1" + ":59" * 60_000, DIGITS),
    Case("a float in sixties", "seed: 1" + ":59" * 60_000 + ".5", UNREADABLE),
    Case("a float of many digits", "optimizer: {lr: -1." + "9" * 190_000 + "}", "must be a number, at least 0"),
    Case("a float beyond all", "optimizer: {lr: 1e999999999}", "must be a number, at least 0"),
    Case("an integer with many underscores", "seed: 1" + "_" * 190_000 + "x", HUGE),
    Case("a date of many", "seed: " + "2020-01-01 " * 15_000, HUGE),
    Case("laughs by interpolation of a text", _laughs("text"), "characters fix: at most 10,000 are allowed"),
    *[Case(f"laughs by interpolation of a {kind}", _laughs(kind), COPIES) for kind in ("mapping", "list")],
    Case("a circle of two", "run_dir: ${resume}\nresume: ${run_dir}", "refers to itself: resume -> run_dir -> resume"),
    Case("a circle of 900", "\n".join(f"k{i}: ${{k{(i + 1) % 900}}}" for i in range(900)), "refers to itself: k0 -> k1 -> k2"),
    Case("a chain of 900", "\n".join(f"k{i}: ${{k{i + 1}}}" for i in range(900)) + "\nk900: 1"),
    Case("a chain backwards", "\n".join(f"k{i}: ${{k{i - 1}}}" for i in range(1, 900)) + "\nk0: 1"),
    Case("everything refers to everything", "\n".join(f"k{i}: '{''.join(f'${{k{j}}}' for j in range(40) if j != i)}'" for i in range(40)), "refers to itself: k0 -> k1 -> k0"),
    Case("many interpolations in one text", "run_dir: '" + "${name}" * 25_000 + "'", WRITTEN),
    Case("interpolations in interpolations", "run_dir: '" + "${a" * 40_000 + "}" * 40_000 + "'", WRITTEN),
    Case("open interpolations", "run_dir: '" + "${" * 90_000 + "'", WRITTEN),
    Case("a resolver with many arguments", "run_dir: '${oc.create:[" + "1," * 80_000 + "1]}'", WRITTEN),
    Case("resolvers of resolvers", "run_dir: '" + "${oc.decode:" * 300 + "1" + "}" * 300 + "'", "interpolations in interpolations, too many levels deep"),
    Case("selects of selects", "\n".join(f"k{i}: ${{oc.select:k{i + 1}}}${{oc.select:k{i + 1}}}" for i in range(25)) + "\nk25: x", "characters fix: at most 10,000 are allowed"),
    Case("a large part copied often", "a: {" + ", ".join(f"k{i}: {i}" for i in range(2_000)) + "}\n" + "\n".join(f"b{i}: ${{a}}" for i in range(500)), COPIES),
    Case("a path of many dots", "run_dir: '${" + "a." * 60_000 + "b}'", WRITTEN),
    Case("dots that go up", "run_dir: '${" + "." * 150_000 + "b}'", WRITTEN),
    Case("an option of 190,000 characters", "precision: " + "f" * 190_000, "precision has no option ffff"),
    Case("a word of 190,000 characters", "device: " + "cpu" * 60_000, "must be one of auto, cpu, cuda, mps"),
    Case("a target of 190,000 characters", "hooks: {x: {_target_: " + "a." * 90_000 + "b}}", "there is no package a installed"),
    Case("a package of 190,000 characters", "hooks: {x: {_target_: " + "torch" * 36_000 + ".nn}}", "there is no package torchtorch"),
    Case("a hook for each day", "hooks: {" + ", ".join(f"h{i}: {{_target_: a.B}}" for i in range(2_000)) + "}", "there is no package a installed"),
    Case("a defaults list without end", "defaults: [" + "default, " * 4_000 + "]", LISTED),
    Case("a defaults list of options", "defaults:\n" + "\n".join(f"- model@m{i}: mlp" for i in range(1_000)), LISTED),
    Case("a defaults list of what is not there", "defaults:\n" + "\n".join(f"- model@m{i}: nosuch{i}" for i in range(2_000)), "model has no option nosuch0"),
    Case("a choice of many options", "hooks: [" + "default, " * 5_000 + "]", "chooses 5,000 options, more than 64"),
    Case("comments without end", "# " + "x" * 190_000),
    Case("lines without end", "\n" * 190_000),
    Case("spaces without end", "x: 3" + " " * 190_000),
    Case("brackets and quotes", "[\"{'" * 40_000, "not valid YAML: expected ',' or ']'", whole=True),
    Case("colons", ": " * 90_000, SYNTAX, whole=True),
    Case("ampersands", "&a " * 60_000, "not valid YAML: expected '<document start>'", whole=True),
    Case("many overrides", words=tuple(f"log.every={i}" for i in range(1_000))),
    Case("many overrides that are wrong", says="did you mean log?", words=tuple(f"logg.every{i}={i}" for i in range(1_000))),
    Case("a long override", says=TYPED, words=("name=" + "x" * 100_000,)),
    Case("a long list on the command line", says=TYPED, words=("resume_allow=[" + "a," * 50_000 + "a]",)),
    Case("a long mapping on the command line", says=TYPED, words=("hooks={" + ",".join(f"a{i}:1" for i in range(10_000)) + "}",)),
    Case("brackets on the command line", says=TYPED, words=("name=" + "[" * 50_000,)),
    Case("quotes on the command line", says=TYPED, words=("name=" + "'" * 50_000,)),
    Case("a deep key on the command line", says=TYPED, words=("a." * 50_000 + "b=1",)),
    Case("dots on the command line", says=TYPED, words=("." * 100_000 + "=1",)),
    Case("laughs on the command line", says="characters fix: at most 10,000 are allowed", words=(*(f"k{i}=${{k{i + 1}}}${{k{i + 1}}}" for i in range(40)), "k40=x")),
    Case("interpolations on the command line", says=TYPED, words=("run_dir=" + "${name}" * 14_000,)),
    Case("a number on the command line", says=TYPED, words=("seed=" + "9" * 100_000,)),
    Case("a folder of configuration without end", says="there is no such folder", words=("--config-dir", "x" * 100_000)),
    Case("a verb without end", says="not an override: it has no `=`", words=("x" * 100_000,)),
    Case("a flag without end", says="there is no such flag", words=("--" + "x" * 100_000,)),
    Case("a recipe without end", says=TYPED, words=("recipe=" + "x" * 100_000,)),
    Case("a sweep that is not meant", says=TYPED, words=("seed=" + "1," * 50_000 + "1",)),
    Case("a sweep without end", says="the sweep has 1,000,000,000,000 jobs", words=("-m", "seed=range(1000000000000)")),
    Case("sweeps of sweeps", says="the sweep has 282,429,536,481 jobs", words=("-m", *(f"hooks.h{i}=1,2,3,4,5,6,7,8,9" for i in range(12)))),
]  # fmt: skip


def cases(count: int, seed: int) -> list[Case]:
    return CASES if count >= len(CASES) else random.Random(seed).sample(CASES, count)


def run(case: Case, folder: Path) -> str | None:
    """None where the program refused in time; else what was violated."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    text = case.lines if case.whole else GOOD + (TYPO if not case.says else "") + case.lines + "\n"
    (folder / "recipes" / "own.yaml").write_text(text, encoding="utf-8")
    if case.size:
        os.truncate(folder / "recipes" / "own.yaml", case.size)
    words = list(case.words) if any(word.startswith("recipe=") for word in case.words) else ["+recipe=own", *case.words]
    started = time.monotonic()
    try:
        told = subprocess.run(
            [sys.executable, "-c", _CHILD],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            input=json.dumps(words),
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return f"{case.name}: it hangs"
    finally:
        (folder / "recipes" / "own.yaml").unlink()
    if told.returncode or "Traceback" in told.stderr:
        return f"{case.name}: exit {told.returncode}: {told.stderr[-1500:]}"
    waited = time.monotonic() - started
    found = json.loads(told.stdout.splitlines()[-1])
    if found["code"] != 2:
        return f"{case.name}: exit code {found['code']}"
    if found["seconds"] > SECONDS or found["memory"] > MEMORY:
        return f"{case.name}: {found['seconds']:.2f} s, {found['memory']:.0f} MiB"
    if waited > WAITED * slack():
        return f"{case.name}: it took {waited:.1f} s, most of which it waited"
    if len(told.stderr) > 100_000:
        return f"{case.name}: says {len(told.stderr):,} characters"
    if case.says:
        return None if case.says in " ".join(told.stderr.split()) else f"{case.name}: not refused: {told.stderr[:1500]}"
    problems = [" ".join(paragraph.split()) for paragraph in told.stderr.strip().split("\n\n")[1:]]
    if not any(": sed = 3 unknown key fix: did you mean seed?" in problem for problem in problems):
        return f"{case.name}: does not name the typo: {told.stderr[:1500]}"
    if other := [problem for problem in problems if not re.search(r" unknown key |^and [\d,]+ more$", problem)]:
        return f"{case.name}: is within the limits, and was refused: {other[0][:1500]}"
    return None
