"""Secrets out of a configuration and a command line before they are written down."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from runner.console import REDACTED

_SECRET = frozenset({"token", "key", "password", "secret"})
#: A password inside of a URL: scheme://user:password@host.
_IN_URL = re.compile(r"(?<=://)([^/\s:@]*):([^/\s@]+)@")
#: `name: value`, `name = "value"`, `NAME=value` on a line of a file.
_ON_LINE = re.compile(
    r"""^(?P<before>[-+ ]?[\s{,"'-]*(?:export\s+)?(?P<name>[\w.-]+)["']?\s*(?P<sign>[:=])\s*)"""
    r"""(?P<value>"[^"]+"|'[^']+'|[^\s"'(){}\[\],]{6,})(?P<after>\s*[,}]?\s*(?:\#.*)?)$""",
    re.MULTILINE,
)
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")


def redact(config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with secrets replaced.

    A string under a key whose last word is token, key, password or secret (`hub_token`; not `tokenizer`, nor the
    `text_key` of a data set's column) becomes `<redacted>`, and so does a password inside of a URL. A value
    that comes from an environment variable of such a name, or that refers to a secret, keeps its interpolation, as it
    stands in `written`.
    """
    secrets = secrets_of(config, written)
    return {key: _one(str(key), value, written.get(key), secrets) for key, value in config.items()}


def secrets_of(config: Mapping[str, Any], written: Mapping[str, Any]) -> set[str]:
    """The secret strings that a configuration holds, by the rules of `redact`."""
    return {value for value in _secrets("", config, written) if value}


def redact_command(words: Sequence[str], secrets: Collection[str] = ()) -> list[str]:
    """A command line whose overrides of secret keys have lost their values, and all overrides the `secrets` in them."""
    hidden = sorted({form for secret in secrets for form in _forms(secret)}, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, hidden)) or r"(?!)")
    return [
        f"{key}={REDACTED}" if is_secret(key.lstrip("+~")) else f"{key}={pattern.sub(REDACTED, value)}"
        if equals else word
        for word in words
        for key, equals, value in [word.partition("=")]
    ]  # fmt: skip


def _forms(secret: str) -> Iterator[str]:
    """A text as it may stand in an override: as it is, or escaped inside quotes."""
    yield secret
    for quote in "'\"":
        yield secret.replace("\\", "\\\\").replace(quote, f"\\{quote}")
        yield secret.replace(quote, f"\\{quote}")


def is_secret(name: str) -> bool:
    """Whether the last word of a key (`hub_token`, `db.password`, `tokens.api_key.0`) says that its value is secret."""
    last = next((part for part in reversed(name.lower().split(".")) if part and not part.isdigit()), "")
    words = [word for word in re.split(r"[_\-]", last) if word]
    return bool(words) and words[-1] in _SECRET and words[:1] not in (["text"], ["pair"], ["label"])


def _from_secret_variable(written: Any) -> bool:
    return isinstance(written, str) and any(is_secret(name) for name in _FROM_ENVIRONMENT.findall(written))


def _pairs(value: Any, written: Any) -> Iterator[tuple[str | None, Any, Any]]:
    """The items of a mapping or list beside what was written for them; the name is None in a list."""
    if isinstance(value, Mapping):
        before = written if isinstance(written, Mapping) else {}
        yield from ((str(key), item, before.get(key)) for key, item in value.items())
    elif isinstance(value, list):
        same = isinstance(written, list) and len(written) == len(value)
        yield from ((None, item, written[i] if same else None) for i, item in enumerate(value))


def _secrets(key: str, value: Any, written: Any) -> Iterator[str]:
    """The secret strings themselves: other values may hold them."""
    if isinstance(value, str) and (is_secret(key) or _from_secret_variable(written)):
        yield value
    if isinstance(value, str):
        yield from (password for _, password in _IN_URL.findall(value))
    for name, item, before in _pairs(value, written):
        yield from _secrets(key if name is None else name, item, before)


def _one(key: str, value: Any, written: Any, secrets: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _one(str(name), item, before, secrets) for name, item, before in _pairs(value, written)}
    if isinstance(value, list):
        return [_one(key, item, before, secrets) for _, item, before in _pairs(value, written)]
    if not isinstance(value, str):
        return value
    if _from_secret_variable(written):
        return written
    if is_secret(key):
        return REDACTED
    if isinstance(written, str) and "${" in written and any(secret in value for secret in secrets):
        return written
    return without_password(value)


def without_password(text: str) -> str:
    """A text with the passwords of its URLs replaced."""
    return _IN_URL.sub(rf"\1:{REDACTED}@", text)


def redact_text(text: str) -> str:
    """A file's text, or a difference of files, with what its lines give to secret names replaced."""
    return without_password(_ON_LINE.sub(_line_without, text))


def _line_without(found: re.Match[str]) -> str:
    quoted = found["value"][0] in "'\""
    spaced = found["sign"] == "=" and " " in found["before"].rpartition("=")[0][-1:]
    reference = found["value"].strip("'\"").startswith("${")
    if not is_secret(found["name"]) or reference or (spaced and not quoted):
        return found[0]
    return f"{found['before']}{REDACTED}{found['after']}"
