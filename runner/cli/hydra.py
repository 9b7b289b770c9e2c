"""`--info` and `--hydra-help`: where the configuration comes from, and what of Hydra is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from runner.errors import InputError, Mark, wrong
from runner.recipe.compose import Composition, compose, dump, nearest
from runner.recipe.overrides import Invocation
from runner.recipe.problems import place

_HYDRA = """\
From Hydra (https://hydra.cc/docs/1.3) work as described there: the grammar of
overrides, sweeps (-m key=a,b key=range(0,3) key=choice(a,b)), defaults lists,
config groups, packages, --config-dir, interpolations and OmegaConf's resolvers.

Not used: hydra.* settings, launchers and sweepers. A sweep's jobs are processes
of their own; run_dir says where a run writes; --help lists the flags.
"""


def delegate(invocation: Invocation) -> int:
    """Answers the flag that was given. Raises InputError where the configuration cannot be put together."""
    if invocation.hydra_help:
        print(_HYDRA, end="")
        return 0
    if invocation.json:
        raise wrong("--json", "--info prints text only", "--cfg job --json prints the configuration")
    directory = Path.cwd()
    composition = compose(invocation.overrides, directory=directory, config_dirs=invocation.config_dirs)
    what = invocation.info or "all"
    problems = [*invocation.problems, *([] if what == "searchpath" else composition.problems)]
    if problems:
        raise InputError(*(problem.at(nearest(composition.origins, problem.key)) for problem in problems))
    sections = {"searchpath": _search_path, "defaults": _defaults, "config": _config}
    parts = ["\n".join(write(composition)) for name, write in sections.items() if what in (name, "all")]
    print("\n\n".join(parts))
    return 0


def _search_path(composition: Composition) -> Iterator[str]:
    yield "Search path, the first that has a file wins:"
    width = max(len(provider) for provider, _ in composition.folders)
    for provider, folder in composition.folders:
        yield f"  {provider:{width}}  {folder}"


def _defaults(composition: Composition) -> Iterator[str]:
    yield "Choices:"
    for group, choice in composition.choices.items():
        shown = "null" if choice is None else choice if isinstance(choice, str) else f"[{','.join(choice)}]"
        yield f"  {group}: {shown}"
    yield ""
    yield "Files, later ones win:"
    for file in composition.layers:
        yield f"  {place(Mark(file), composition.directory)}"
    yield from (f"  note: {note}" for note in composition.notes)


def _config(composition: Composition) -> Iterator[str]:
    yield "Configuration:"
    yield from (f"  {line}" for line in dump(composition.unresolved).splitlines())
