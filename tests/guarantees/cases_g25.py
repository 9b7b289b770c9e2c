"""Configuration that is too much: each is refused, by a program that takes little time and memory for it."""
# ruff: noqa: E501 (a case a line)

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

#: Seconds of the processor from the first word to the exit code, and MiB that the whole process ever had.
SECONDS = 2.0
MEMORY = 300

GOOD = """\
name: own
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
task: classification
data:
  train: {_target_: runner.data.synthetic.random_classification, samples: 8}
train: {epochs: 1}
batch: {global_size: 8}
"""

_CHILD = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from runner.__main__ import main
import runner.cli.train, hydra.core.override_parser.overrides_parser
words = json.loads(sys.stdin.read())
started = time.process_time()
code = main(words)
seconds = time.process_time() - started
memory = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"code": code, "seconds": seconds, "memory": memory}))
"""


@dataclass(frozen=True)
class Case:
    """Lines that are added to a good recipe (or the whole of it), and words."""

    name: str
    lines: str = ""
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


CASES = [
    *[Case(f"aliases of a {kind}", _aliases(kind)) for kind in ("list", "mapping", "merge")],
    Case("an alias of itself", "a: &a [*a]"),
    Case("aliases in a circle", "a: &a {b: &b {c: *a, d: *b}}"),
    Case("merge keys of itself", "a: &a {<<: *a}"),
    Case("many aliases of one value", "a: &a [1, 2, 3]\nb: [" + "*a, " * 8_000 + "]"),
    Case("nested flow lists", "a: " + "[" * 90_000 + "]" * 90_000),
    Case("nested flow mappings", "a: " + "{a: " * 40_000 + "1" + "}" * 40_000),
    Case("nested block lists", "a:\n  " + "- " * 90_000 + "x"),
    Case("nested block mappings", "".join("  " * i + f"k{i}:\n" for i in range(300))),
    Case("questions", "? " * 90_000),
    Case("a scalar of 10 MB", "a: " + "x" * 10_000_000),
    Case("a file of 200 MB", size=200_000_000),
    Case("a scalar that just fits", "a: " + "x" * 190_000),
    Case("a quoted scalar that just fits", 'a: "' + "\\x41" * 45_000 + '"'),
    Case("a name that just fits", "name: " + "x" * 190_000),
    Case("a path that just fits", "run_dir: " + "x/" * 90_000),
    Case("a key that just fits", "x" * 190_000 + ": 3"),
    Case("a known key with much behind it", "seed" + "x" * 100_000 + ": 3"),
    Case("many similar keys", "\n".join(f"seed{i}: 3" for i in range(5_000))),
    Case("many long keys", "\n".join(f"{'optimizer' * 20}{i}: 3" for i in range(900))),
    Case("many keys", "\n".join(f"k{i}: 3" for i in range(9_000))),
    Case("many keys of one mapping", "a: {" + ", ".join(f"k{i}: 3" for i in range(9_000)) + "}"),
    Case("values without end", "a: [" + "1," * 90_000 + "]"),
    Case("an integer of 190,000 digits", "seed: " + "9" * 190_000),
    Case("an integer of 4,000 digits", "seed: " + "9" * 4_000),
    Case("a hexadecimal integer", "seed: 0x" + "f" * 190_000),
    Case("a binary integer", "seed: 0b" + "1" * 190_000),
    Case("an octal integer", "seed: 0" + "7" * 190_000),
    Case("an integer in sixties", "seed: 1" + ":59" * 60_000),
    Case("a float in sixties", "seed: 1" + ":59" * 60_000 + ".5"),
    Case("a float of many digits", "optimizer: {lr: -1." + "9" * 190_000 + "}"),
    Case("a float beyond all", "optimizer: {lr: 1e999999999}"),
    Case("an integer with many underscores", "seed: 1" + "_" * 190_000 + "x"),
    Case("a date of many", "seed: " + "2020-01-01 " * 15_000),
    *[Case(f"laughs by interpolation of a {kind}", _laughs(kind)) for kind in ("text", "mapping", "list")],
    Case("a circle of two", "run_dir: ${resume}\nresume: ${run_dir}"),
    Case("a circle of 900", "\n".join(f"k{i}: ${{k{(i + 1) % 900}}}" for i in range(900))),
    Case("a chain of 900", "\n".join(f"k{i}: ${{k{i + 1}}}" for i in range(900)) + "\nk900: 1"),
    Case("a chain backwards", "\n".join(f"k{i}: ${{k{i - 1}}}" for i in range(1, 900)) + "\nk0: 1"),
    Case("everything refers to everything", "\n".join(f"k{i}: '{''.join(f'${{k{j}}}' for j in range(40) if j != i)}'" for i in range(40))),
    Case("many interpolations in one text", "run_dir: '" + "${name}" * 25_000 + "'"),
    Case("interpolations in interpolations", "run_dir: '" + "${a" * 40_000 + "}" * 40_000 + "'"),
    Case("open interpolations", "run_dir: '" + "${" * 90_000 + "'"),
    Case("a resolver with many arguments", "run_dir: '${oc.create:[" + "1," * 80_000 + "1]}'"),
    Case("resolvers of resolvers", "run_dir: '" + "${oc.decode:" * 300 + "1" + "}" * 300 + "'"),
    Case("selects of selects", "\n".join(f"k{i}: ${{oc.select:k{i + 1}}}${{oc.select:k{i + 1}}}" for i in range(25)) + "\nk25: x"),
    Case("a large part copied often", "a: {" + ", ".join(f"k{i}: {i}" for i in range(2_000)) + "}\n" + "\n".join(f"b{i}: ${{a}}" for i in range(500))),
    Case("a path of many dots", "run_dir: '${" + "a." * 60_000 + "b}'"),
    Case("dots that go up", "run_dir: '${" + "." * 150_000 + "b}'"),
    Case("an option of 190,000 characters", "precision: " + "f" * 190_000),
    Case("a word of 190,000 characters", "device: " + "cpu" * 60_000),
    Case("a target of 190,000 characters", "hooks: {x: {_target_: " + "a." * 90_000 + "b}}"),
    Case("a package of 190,000 characters", "hooks: {x: {_target_: " + "torch" * 36_000 + ".nn}}"),
    Case("a hook for each day", "hooks: {" + ", ".join(f"h{i}: {{_target_: a.B}}" for i in range(2_000)) + "}"),
    Case("a defaults list without end", "defaults: [" + "default, " * 4_000 + "]"),
    Case("a defaults list of options", "defaults:\n" + "\n".join(f"- model@m{i}: mlp" for i in range(1_000))),
    Case("a defaults list of what is not there", "defaults:\n" + "\n".join(f"- model@m{i}: nosuch{i}" for i in range(2_000))),
    Case("a choice of many options", "hooks: [" + "default, " * 5_000 + "]"),
    Case("comments without end", "# " + "x" * 190_000),
    Case("lines without end", "\n" * 190_000 + "sed: 3"),
    Case("spaces without end", "sed: 3" + " " * 190_000),
    Case("brackets and quotes", "[\"{'" * 40_000, whole=True),
    Case("colons", ": " * 90_000, whole=True),
    Case("ampersands", "&a " * 60_000, whole=True),
    Case("many overrides", words=tuple(f"log.every={i}" for i in range(1_000))),
    Case("many overrides that are wrong", words=tuple(f"logg.every{i}={i}" for i in range(1_000))),
    Case("a long override", words=("name=" + "x" * 100_000,)),
    Case("a long list on the command line", words=("resume_allow=[" + "a," * 50_000 + "a]",)),
    Case("a long mapping on the command line", words=("hooks={" + ",".join(f"a{i}:1" for i in range(10_000)) + "}",)),
    Case("brackets on the command line", words=("name=" + "[" * 50_000,)),
    Case("quotes on the command line", words=("name=" + "'" * 50_000,)),
    Case("a deep key on the command line", words=("a." * 50_000 + "b=1",)),
    Case("dots on the command line", words=("." * 100_000 + "=1",)),
    Case("laughs on the command line", words=tuple(f"k{i}=${{k{i + 1}}}${{k{i + 1}}}" for i in range(40))),
    Case("interpolations on the command line", words=("run_dir=" + "${name}" * 14_000,)),
    Case("a number on the command line", words=("seed=" + "9" * 100_000,)),
    Case("a verb without end", words=("x" * 100_000,)),
    Case("a flag without end", words=("--" + "x" * 100_000,)),
    Case("a recipe without end", words=("recipe=" + "x" * 100_000,)),
    Case("a sweep that is not meant", words=("seed=" + "1," * 50_000 + "1",)),
    Case("a sweep without end", words=("-m", "seed=range(1000000000000)")),
    Case("sweeps of sweeps", words=("-m", *(f"hooks.h{i}=1,2,3,4,5,6,7,8,9" for i in range(12)))),
]  # fmt: skip


def cases(count: int, seed: int) -> list[Case]:
    return CASES if count >= len(CASES) else random.Random(seed).sample(CASES, count)


def run(case: Case, folder: Path) -> str | None:
    """None where the program refused in time; else what was violated."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    text = case.lines if case.whole else GOOD + "sed: 3\n" + case.lines + "\n"
    (folder / "recipes" / "own.yaml").write_text(text, encoding="utf-8")
    if case.size:
        os.truncate(folder / "recipes" / "own.yaml", case.size)
    words = list(case.words) if any(word.startswith("recipe=") for word in case.words) else ["+recipe=own", *case.words]
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
    found = json.loads(told.stdout.splitlines()[-1])
    if found["code"] != 2:
        return f"{case.name}: exit code {found['code']}"
    if found["seconds"] > SECONDS or found["memory"] > MEMORY:
        return f"{case.name}: {found['seconds']:.2f} s, {found['memory']:.0f} MiB"
    if len(told.stderr) > 100_000:
        return f"{case.name}: says {len(told.stderr):,} characters"
    return None
