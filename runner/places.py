"""Where the files that come with the program lie: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_BUNDLE = _PACKAGE / "bundle"

#: The folder that holds the built-in conf/, recipes/ and plugins/.
BUILTIN = _BUNDLE if _BUNDLE.is_dir() else _PACKAGE.parent


def plugin_folders(directory: Path) -> list[Path]:
    """The folders of plugins that can be found from `directory`: its own first, then the built-in ones."""
    roots = [directory / "plugins", BUILTIN / "plugins"]
    seen: dict[Path, Path] = {}
    for root in roots:
        if root.is_dir():
            seen.setdefault(root.resolve(), root)
    return [child for root in seen.values() for child in sorted(root.iterdir()) if (child / "__init__.py").is_file()]


def make_importable(directory: Path) -> None:
    """Lets `_target_: plugins.NAME…` and the user's own modules be imported, from a script and under `-m` alike.

    `plugins` is a namespace package, so the user's plugins/ and the built-in one are merged; a user's
    plugins/__init__.py would hide ours, so its search path is extended.
    """
    if str(directory) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(directory))
    if str(BUILTIN) not in sys.path:
        sys.path.append(str(BUILTIN))
    if (directory / "plugins" / "__init__.py").is_file():
        import plugins

        ours = str(BUILTIN / "plugins")
        if ours not in plugins.__path__:
            plugins.__path__.append(ours)
