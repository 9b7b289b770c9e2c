"""Secrets out of a configuration before it is written down."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"
_SECRET = frozenset({"token", "key", "password", "secret"})
_FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([^,}\s]+)")


def redact(config: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with secrets replaced.

    A string under a key whose last word is token, key, password or secret (`hub_token`; not `tokenizer`, `text_key`
    of a column name is the documented exception) becomes `<redacted>`. A value that comes from an environment variable
    of such a name keeps its interpolation, as it stands in `written`.
    """
    return {key: _one(str(key), value, written.get(key)) for key, value in config.items()}


def _one(key: str, value: Any, written: Any) -> Any:
    if isinstance(value, Mapping):
        return redact(value, written if isinstance(written, Mapping) else {})
    if isinstance(value, list):
        old = written if isinstance(written, list) and len(written) == len(value) else [None] * len(value)
        return [_one(key, item, before) for item, before in zip(value, old, strict=True)]
    if isinstance(value, str):
        if isinstance(written, str) and any(is_secret(name) for name in _FROM_ENVIRONMENT.findall(written)):
            return written
        if is_secret(key):
            return REDACTED
    return value


def is_secret(name: str) -> bool:
    """Whether a name's last word says that its value is secret."""
    words = [word for word in re.split(r"[_\-.]", name.lower()) if word]
    return bool(words) and words[-1] in _SECRET and words[:1] not in (["text"], ["pair"], ["label"])
