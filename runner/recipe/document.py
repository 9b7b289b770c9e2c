"""Reads one YAML file: plain data, the place of every key, and everything that is wrong with the file."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from runner.errors import Mark, Problem

#: Bounds of a file: bytes, levels of nesting, and nodes after aliases are expanded.
MAX_BYTES = 200_000
MAX_DEPTH = 30
MAX_NODES = 10_000

#: The way to a value: keys of mappings and positions in lists.
Keys = tuple[str | int, ...]

_COLLECTIONS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_MERGE = "tag:yaml.org,2002:merge"
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


@dataclass
class Document:
    """A file's top-level mapping without its defaults list, with marks; empty where it could not be read."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    defaults: list[Any] = field(default_factory=list)
    marks: dict[Keys, Mark] = field(default_factory=dict)
    package: str | None = None
    problems: list[Problem] = field(default_factory=list)

    def mark(self, *keys: str | int) -> Mark:
        """Where a key stands, or the nearest one above it, or the file."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.marks:
                return self.marks[keys[:length]]
        return Mark(self.file)


class _Stop(Exception):
    """Reading cannot go on: what is wrong, where, and what to do."""

    def __init__(self, why: str, fix: str = "", mark: Any = None, place: tuple[int, int] | None = None) -> None:
        self.why, self.fix = why, fix
        self.place = place if mark is None else (mark.line + 1, mark.column + 1)
        super().__init__(why)


def read(path: Path, *, may_be_empty: bool = True) -> Document:
    """The document in a file. Problems of its text are in `problems`; nothing is raised for them."""
    document = Document(str(path))
    try:
        text = _text(path)
        document.package = _package(text)
        _parse(text, document, may_be_empty)
    except _Stop as stop:
        document.problems.append(Problem(None, stop.why, stop.fix, mark=_mark(document.file, stop.place)))
        document.data, document.defaults = {}, []
    return document


def comments(path: Path) -> Iterator[str]:
    """The comment lines at the top of a file, without the ones that are for the program."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                line = line.strip()
                if line and not line.startswith("#"):
                    return
                text = line.lstrip("#").strip()
                if text and not text.startswith("@"):
                    yield text
    except OSError:
        return


def _mark(file: str, place: tuple[int, int] | None) -> Mark:
    return Mark(file) if place is None else Mark(file, *place)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _Stop(f"the file cannot be read: {error.strerror or error}") from None
    if len(raw) > MAX_BYTES:
        raise _Stop(f"the file is larger than {MAX_BYTES:,} bytes", "keep data in files of its own, and name them")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in raw[:200] and raw[:200].count(b"\0") > 20):
        raise _Stop("the file is not UTF-8 text (it looks like UTF-16)", "save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(raw[: error.start].decode("utf-8", "replace"))
        raise _Stop("the file is not UTF-8 text", "save it as UTF-8, or name another file", place=place) from None
    odd = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if odd:
        why = f"the character U+{ord(odd.group()):04X} cannot stand in a configuration file"
        raise _Stop(why, "remove it; is this a binary file?", place=_place(text[: odd.start()]))
    return text


def _place(before: str) -> tuple[int, int]:
    """Line and column of what follows a text."""
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _package(text: str) -> str | None:
    """The package that a `# @package NAME` among the comments at the top gives."""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            break
        words = line.lstrip("#").split()
        if words[:1] == ["@package"]:
            if len(words) != 2:
                raise _Stop("a package header is `# @package NAME`", "remove the line, or name one", place=(number, 1))
            return words[1]
    return None


@functools.cache
def _loader() -> Any:
    """OmegaConf's loader (1e-3 is a float, dates are text), bounded in depth and number of nodes."""

    class Loader(get_yaml_loader()):  # type: ignore[misc]
        depth = 0
        nodes = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            self.nodes += 1
            mark = self.peek_event().start_mark
            if self.depth > MAX_DEPTH:
                raise _Stop(f"nested more than {MAX_DEPTH} levels deep", "make it flatter", mark)
            if self.nodes > MAX_NODES:
                raise _Stop(f"more than {MAX_NODES:,} values in one file", "keep data in files of its own", mark)
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    return Loader


def _parse(text: str, document: Document, may_be_empty: bool) -> None:
    loader = _loader()(text)
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _syntax(error, text) from None
    except (ValueError, RecursionError) as error:
        raise _Stop(f"the file cannot be read as YAML: {error}") from None
    if node is None:
        if may_be_empty and text.strip():
            return
        raise _Stop("the file is empty", "write what it is to configure, or remove it")
    if not isinstance(node, MappingNode):
        kind = "a list" if isinstance(node, SequenceNode) else "a single value"
        raise _Stop(
            f"the file is {kind}, not keys with values", "write lines of the form `key: value`", node.start_mark
        )
    document.data = _Plain(loader, document).mapping(node, ())
    defaults = document.data.pop("defaults", None)
    if defaults is not None and not isinstance(defaults, list):
        why, fix = "the defaults list is not a list", "write lines of the form `- group: option` below it"
        document.problems.append(Problem("defaults", why, fix, defaults, document.mark("defaults")))
    document.defaults = defaults if isinstance(defaults, list) else []


def _syntax(error: yaml.MarkedYAMLError, text: str) -> _Stop:
    """What PyYAML found, in words that say what to do."""
    found = str(error.problem or error.context or error)
    mark = error.problem_mark or error.context_mark
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    indent = line[: len(line) - len(line.lstrip())]
    if "\\t" in found or "\t" in indent:
        return _Stop("a tab stands where YAML wants spaces", "indent with spaces only", mark)
    if "mapping values are not allowed" in found:
        return _Stop(
            "a second `: ` on one line, or a line that is indented wrongly",
            "put values that contain `: ` in quotes; keys of one section start in the same column",
            mark,
        )
    if "expected <block end>" in found or "could not find expected ':'" in found:
        return _Stop(
            "the indentation or a colon is wrong here",
            "write `key: value`; keys of one section start in the same column",
            mark,
        )
    if "expected a single document" in str(error.context) or "another document" in found:
        return _Stop("the file holds more than one document", "remove the line `---`", mark)
    if "undefined alias" in found:
        return _Stop(found, "an alias *name needs an anchor &name above it", mark)
    if "cannot start any token" in found:
        return _Stop(found, "put the value in quotes", mark)
    context = f" ({error.context})" if error.context and error.context not in found else ""
    return _Stop(f"not valid YAML: {found}{context}", "is a quote, bracket or brace left open above?", mark)


class _Plain:
    """Turns nodes into plain data, noting marks and problems on the way."""

    def __init__(self, loader: Any, document: Document) -> None:
        self.loader = loader
        self.document = document
        self.nodes = 0
        #: Levels, those of merged sections as well, whose keys stand beside the merging one's.
        self.depth = 0

    def value(self, node: Node, keys: Keys) -> Any:
        self.depth += 1
        try:
            return self._value(node, keys)
        finally:
            self.depth -= 1

    def _value(self, node: Node, keys: Keys) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            why = f"more than {MAX_NODES:,} values once its aliases are expanded"
            raise _Stop(why, "remove the aliases (*name)", node.start_mark)
        if self.depth > MAX_DEPTH:
            why = f"nested more than {MAX_DEPTH} levels deep once its aliases are expanded"
            raise _Stop(why, "an alias must not contain itself", node.start_mark)
        if not isinstance(node, ScalarNode) and node.tag not in _COLLECTIONS:
            self._problem(keys[:-1], keys[-1], f"the tag {node.tag} is not allowed", "write a plain value", node)
            return None
        if isinstance(node, MappingNode):
            return self.mapping(node, keys)
        if isinstance(node, SequenceNode):
            for position, item in enumerate(node.value):
                self._note((*keys, position), item)
            return [self.value(item, (*keys, position)) for position, item in enumerate(node.value)]
        return self.scalar(node, keys)

    def mapping(self, node: MappingNode, keys: Keys) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self._key(key_node, keys)
            if key is not None and key in own:
                first = self.document.marks[(*keys, key)]
                why = f"the key stands twice in one section, first in line {first.line}"
                self._problem(keys, key, why, "remove one of the two", key_node)
            elif key is not None:
                self._note((*keys, key), key_node)
                own[key] = self.value(value_node, (*keys, key))
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                for source in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                    if not isinstance(source, MappingNode):
                        raise _Stop("`<<` takes a section, or a list of sections", "", value_node.start_mark)
                    for key, value in self.value(source, keys).items():
                        merged.setdefault(key, value)
        return {**merged, **own}

    def scalar(self, node: Node, keys: Keys) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, KeyError, TypeError, OverflowError) as error:
            why = str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else "the value cannot be read"
            self._problem(keys[:-1], keys[-1] if keys else None, why, "write a plain value", node, node.value)
            return None
        if value is not None and not isinstance(value, (bool, int, float, str)):
            why = f"a value of type {type(value).__name__} cannot stand in a configuration"
            self._problem(keys[:-1], keys[-1], why, "write a plain value", node, node.value)
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self._surprise(node, keys, value)
        return value

    def _surprise(self, node: Node, keys: Keys, value: float) -> None:
        """YAML 1.1 reads 012 as 10 and 12:30:00 as 45000: nobody means that."""
        text = node.value
        if not isinstance(node, ScalarNode) or not (":" in text or _OCTAL.fullmatch(text)):
            return
        if isinstance(value, int) and value.bit_length() > 2000:  # Python does not write out more than 4,300 digits
            why = "YAML reads it as a number of more than 600 digits"
            self._problem(keys[:-1], keys[-1], why, "put it in quotes", node, text)
            return
        plain = f"{value} for the number"
        if ":" not in text:
            plain += f", or {text.lstrip('+-0_') or 0} if the zero means nothing"
        self._problem(
            keys[:-1], keys[-1], f"YAML reads {text} as the number {value}", f'write {plain}, or "{text}"', node, text
        )

    def _key(self, node: Node, keys: Keys) -> str | int | None:
        if not isinstance(node, ScalarNode):
            raise _Stop("a key must be a word", "is a `{` or `[` too much?", node.start_mark)
        key = self.scalar(node, (*keys, str(node.value)))
        if isinstance(key, (bool, float)) or key is None:
            why = f"YAML reads the key {node.value or '(nothing)'} as {'null' if key is None else str(key).lower()}"
            self._problem(keys, str(node.value), why, f'put it in quotes: "{node.value}"', node)
            return None
        return key  # type: ignore[no-any-return]

    def _note(self, keys: Keys, node: Node) -> None:
        mark = node.start_mark
        self.document.marks.setdefault(keys, Mark(self.document.file, mark.line + 1, mark.column + 1))

    def _problem(self, keys: Keys, key: str | int | None, why: str, fix: str, node: Node, *value: Any) -> None:
        dotted = ".".join(str(k) for k in (*keys, key) if k is not None)
        mark = Mark(self.document.file, node.start_mark.line + 1, node.start_mark.column + 1)
        self.document.problems.append(Problem(dotted or None, why, fix, *value).at(mark))
