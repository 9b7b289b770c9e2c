"""The command line: flags and overrides in any order, in Hydra's grammar."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, RangeSweep
from hydra.errors import HydraException

from runner.errors import InputError, Mark, Problem
from runner.recipe.document import Keys
from runner.recipe.sources import RECIPE, Repository, near, search

#: Where a value stands that was typed.
COMMAND_LINE = Mark("command line")

#: The words that stand first and are no override.
VERBS = ("recipes",)

#: A value that can only be a text: nothing of Hydra's grammar is in it.
_TEXT = re.compile(r"""(?!\w+\()[^\[\]{},='"\\\x00-\x1f\x7f]+""")

#: Keys whose value is a path, where `=` is a character like others: jobs of a sweep have it in their folders' names.
_PATHS = ("run_dir", "resume", "recipe")

#: Characters of one override, and of all: Hydra's grammar reads some ten thousand a second.
MAX_TEXT = 10_000
MAX_ALL = 30_000

#: More jobs than this in one sweep are a mistake.
MAX_JOBS = 10_000

_SWITCHES = {
    "--help": "help", "-h": "help", "--hydra-help": "hydra_help", "--version": "version",
    "--resolve": "resolve", "--multirun": "multirun", "-m": "multirun", "--json": "json",
    "--run": "run", "-r": "run",
}  # fmt: skip
_WITH_VALUE = {
    "--cfg": "cfg", "-c": "cfg", "--config-dir": "config_dirs", "-cd": "config_dirs",
    "--package": "package", "-p": "package", "--info": "info", "-i": "info",
}  # fmt: skip
_CHOICES = {"cfg": ("job", "hydra", "all"), "info": ("all", "config", "defaults", "searchpath")}
_NOT_USED = {
    "--config-name": "the root configuration is always runner.yaml", "-cn": "the root configuration is runner.yaml",
    "--config-path": "use --config-dir FOLDER", "-cp": "use --config-dir FOLDER",
    "--shell-completion": "completion is not there yet", "-sc": "completion is not there yet",
    "--experimental-rerun": "repeat the command with run_dir=…",
}  # fmt: skip


@dataclass
class Invocation:
    """What was typed: flags, and overrides in their order."""

    overrides: list[str] = field(default_factory=list)
    help: bool = False
    hydra_help: bool = False
    version: bool = False
    cfg: str | None = None
    resolve: bool = False
    info: str | None = None
    package: str | None = None
    run: bool = False
    multirun: bool = False
    json: bool = False
    shell_completion: bool = False
    config_dirs: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse_arguments(argv: Sequence[str]) -> Invocation:
    """Sorts the arguments into flags and overrides; what is neither becomes a problem.

    Raises InputError where the first word is meant as a verb that there is not: nothing else is worth saying then.
    """
    found = Invocation()
    if argv and re.fullmatch(r"[a-z][a-z_-]*", argv[0]) and argv[0] not in _recipes():
        raise InputError(_not_a_verb(argv[0]))
    words = iter(range(len(argv)))
    for position in words:
        word = argv[position]
        flag, equals, value = word.partition("=")
        following = argv[position + 1] if position + 1 < len(argv) else None
        if word in _SWITCHES:
            setattr(found, _SWITCHES[word], True)
        elif flag in _WITH_VALUE:
            if not equals and _takes(_WITH_VALUE[flag], following):
                value = str(following)
                next(words)
            _set(found, _WITH_VALUE[flag], flag, value)
        elif word.startswith("-"):
            found.problems.append(_not_a_flag(word, following))
            if not equals and following and "=" not in following and following[0] not in "-~+":
                next(words)
        elif "=" not in word and not word.startswith("~"):
            found.problems.append(_not_an_override(word))
        else:
            found.overrides.append(_one_form(word))
    if found.resolve and not (found.cfg or found.help):
        found.problems.append(_problem("--resolve", "goes with --cfg only", "write `--cfg job --resolve`"))
    return found


def _takes(name: str, following: str | None) -> bool:
    """Whether a flag takes the word after it."""
    if following is None or (name == "info" and following not in _CHOICES["info"]):
        return False
    return not following.startswith("-")


def _set(found: Invocation, name: str, flag: str, value: str) -> None:
    if name == "info":
        value = value or "all"
    choices = _CHOICES.get(name)
    if not value:
        found.problems.append(_problem(flag, "wants a value", f"write `{flag} {'|'.join(choices or ('FOLDER',))}`"))
    elif choices and value not in choices:
        found.problems.append(_problem(f"{flag} {value}", f"{flag} takes {' or '.join(choices)}", ""))
    elif name == "config_dirs":
        found.config_dirs.append(Path(value))
    else:
        setattr(found, name, value)


def _problem(word: str, why: str, fix: str) -> Problem:
    return Problem(word, why, fix, mark=COMMAND_LINE)


def _not_a_flag(word: str, following: str | None) -> Problem:
    flag, equals, value = word.partition("=")
    if flag in _NOT_USED:
        return _problem(word, f"{flag} is not used here", _NOT_USED[flag])
    key = flag.lstrip("-").replace("-", "_")
    known = [*_SWITCHES, *(f for f in _WITH_VALUE)]
    close = difflib.get_close_matches(flag, [f for f in known if f.startswith("--")], n=1, cutoff=0.75)
    if close and flag.startswith("--"):
        return _problem(word, "there is no such flag", f"did you mean {close[0]}? `--help` lists them")
    if equals:
        return _problem(word, "overrides have no dashes", f"write `{key}={value}`")
    if flag.startswith("--") and following and "=" not in following and following[0] not in "-~+":
        return _problem(word, "there is no such flag; overrides have no dashes", f"write `{key}={following}`")
    return _problem(word, "there is no such flag", "`--help` lists the flags; overrides are written `key=value`")


def _recipes() -> list[str]:
    return Repository(search(Path.cwd())).options(RECIPE)


def _not_a_verb(word: str) -> Problem:
    fix = f"{near(word, VERBS)}verbs: {', '.join(VERBS)}; `+recipe=NAME` trains, `--help` says more"
    return _problem(word, "there is no such verb", fix)


def _not_an_override(word: str) -> Problem:
    plain = word.lstrip("+").removeprefix("recipe/").removesuffix(".yaml")
    if plain in _recipes():
        return _problem(word, "not an override: it has no `=`", f"write `+recipe={plain}`")
    return _problem(
        word, "not an override: it has no `=`", "overrides are written `key=value`, `--help` lists the keys"
    )


def _one_form(word: str) -> str:
    """`+recipe=x` and `++recipe=x` mean `recipe=x`."""
    plain = word.lstrip("+")
    return plain if plain.startswith(f"{RECIPE}=") else word


@dataclass(frozen=True)
class Assignment:
    """One override: `key=value` or `~key`."""

    key: str
    keys: Keys
    value: Any
    delete: bool
    text: str
    package: str | None = None
    has_value: bool = True


def parse(overrides: Sequence[str]) -> tuple[list[Assignment], list[Problem]]:
    """The overrides of one run, parsed; those that cannot be are problems."""
    assignments: list[Assignment] = []
    problems: list[Problem] = []
    if (total := sum(map(len, overrides))) > MAX_ALL and max(map(len, overrides)) <= MAX_TEXT:
        why = f"the overrides have {total:,} characters, more than {MAX_ALL:,}"
        return [], [_problem("overrides", why, "write them into a recipe")]
    for text in overrides:
        override = _grammar(text, problems)
        if override is None:
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            why = "several values ask for several runs"
            fix = f"add -m for a sweep, or quote a text with commas: {_quoted(text)}"
            problems.append(Problem(key, why, fix, text.partition("=")[2], COMMAND_LINE))
        elif key == "hydra" or key.startswith(("hydra.", "hydra/")):
            problems.append(_hydra(key, override))
        elif not key:
            problems.append(_problem(text, "there is no key before the `=`", "write `key=value`"))
        else:
            keys: Keys = tuple(int(k) if k.isdigit() else k for k in key.split("."))
            has_value = not override.is_delete() or override.value_type is not None
            assignments.append(
                Assignment(key, keys, override.value(), override.is_delete(), text, override.package, has_value)
            )
    return assignments, problems


def _grammar(text: str, problems: list[Problem]) -> Override | None:
    if len(text) > MAX_TEXT:
        why = f"the override has {len(text):,} characters, more than {MAX_TEXT:,}"
        problems.append(_problem(text.partition("=")[0][:100], why, "write it into a recipe"))
        return None
    try:
        return OverridesParser.create().parse_overrides([text])[0]
    except (HydraException, ValueError, RecursionError) as error:
        key, equals, value = text.partition("=")
        is_text = _TEXT.fullmatch(value.replace("=", "") if key.lstrip("+") in _PATHS else value)
        if is_text and (plain := _as_text(key, value)) is not None:
            return plain
        lines = str(error).split("\n")
        found = lines[1] if lines[0].startswith("Error parsing override") and len(lines) > 1 else lines[0]
        if found.startswith("LexerNoViableAltException"):
            found = "a character in it has a meaning of its own, or none"
        fix = f"put the value in quotes: {_quoted(text)}" if equals and value else "write `key=value`"
        problems.append(Problem(key, f"the override cannot be read: {found}", fix, value, COMMAND_LINE))
        return None


def _as_text(key: str, value: str) -> Override | None:
    """`key=value` with the value as a text, whatever its characters; None where the key is no key."""
    try:
        override = OverridesParser.create().parse_overrides([f"{key}=text"])[0]
    except (HydraException, ValueError, RecursionError):
        return None
    override._value = QuotedString(value.strip(), Quote.single)
    override.input_line = f"{key}={value}"
    return override


def assignment(key: str, value: str) -> str:
    """`key=value` as an override that gives just this text."""
    if key in _PATHS and _TEXT.fullmatch(value.replace("=", "")):
        return f"{key}={value}"
    doubled = re.sub(r"(\\+)(?='|$)", r"\1\1", value)  # only before a quote does the grammar halve them
    escaped = doubled.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _quoted(text: str) -> str:
    """An override with its value quoted for Hydra's grammar and the shell."""
    key, _, value = text.partition("=")
    value = value.replace("'", "\\'")
    return f"\"{key}='{value}'\""


def _hydra(key: str, override: Override) -> Problem:
    why = "Hydra's own settings have no effect here"
    if key in ("hydra.run.dir", "hydra.sweep.dir"):
        fix = f"write `run_dir={override.get_value_element_as_str() if not override.is_delete() else '…'}`"
    elif "launcher" in key or "sweeper" in key:
        fix = "every job of a sweep (-m) is a process of its own; remove the override"
    else:
        fix = "remove the override; `run_dir` says where a run writes"
    return Problem(key, why, fix, override.value(), COMMAND_LINE)


def jobs(invocation: Invocation) -> list[list[str]]:
    """The overrides of every run that was asked for: one, or with -m one for each combination."""
    return split_jobs(invocation.overrides) if invocation.multirun else [invocation.overrides]


def split_jobs(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every combination of a sweep, the last sweep changing fastest."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    problems: list[Problem] = []
    parsed = [p for text in overrides if (p := _grammar(text, problems)) is not None]
    loader = Repository(search(Path.cwd())) if "glob(" in " ".join(overrides) else None
    count = 1
    for override in parsed:
        override.config_loader = loader  # type: ignore[assignment]
        if override.is_sweep_override():
            count *= _length(override, problems)
    if count > MAX_JOBS:
        problems.append(_problem("-m", f"the sweep has {count:,} jobs", f"at most {MAX_JOBS:,} are allowed"))
    if not count:
        problems.append(_problem("-m", "the sweep has no jobs: one of its lists is empty", "give it values"))
    if problems:
        raise InputError(*problems)
    removals = {f"{p.get_key_element()}=null" for p in parsed if p.is_delete() and p.value_type is None}
    found = BasicSweeper.split_arguments(parsed, None)[0]
    return [[text.removesuffix("=null") if text in removals else text for text in job] for job in found]


def _length(override: Override, problems: list[Problem]) -> int:
    """How many values a sweep has; a range is counted and not written out."""
    sweep = override.value()
    text = (override.input_line or "").partition("=")[2]
    if not override.is_discrete_sweep():
        why, fix = "an interval has no list of values", "write a list, or range(start, stop, step)"
        problems.append(Problem(override.key_or_group, why, fix, text, COMMAND_LINE))
        return 1
    if isinstance(sweep, RangeSweep):
        start, stop, step = sweep.start or 0, sweep.stop or 0, sweep.step
        if not step or not all(math.isfinite(v) for v in (start, stop, step)):
            fix = "write range(start, stop, step) with a step that is not 0"
            problems.append(Problem(override.key_or_group, "this range has no end", fix, text, COMMAND_LINE))
            return 1
        return max(0, math.ceil((stop - start) / step))
    return sum(1 for _ in _values(override))


def _values(override: Override) -> Iterator[Any]:
    yield from override.sweep_iterator()
