"""Secrets do not get into what is written down."""

from __future__ import annotations

from typing import Any

import pytest

from runner.recipe.redact import REDACTED, is_secret, redact, redact_command, secrets_of


def one(key: str, value: Any, written: Any = None) -> Any:
    return redact({key: value}, {key: value if written is None else written})[key]


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub_token",
        "HUB_TOKEN",
        "api_key",
        "api-key",
        "key",
        "password",
        "db.password",
        "client_secret",
        "hf_token_",
        "model.api_key.0",
    ],
)
def test_secret_names(key: str) -> None:
    assert is_secret(key)
    assert one(key, "canary") == REDACTED


@pytest.mark.parametrize(
    "key",
    [
        "tokenizer",
        "max_tokens",
        "text_key",
        "pair_key",
        "label_key",
        "data.text_key",
        "keys",
        "secrets_file",
        "monkey",
        "passwords",
        "",
        "_",
    ],
)
def test_names_that_are_none(key: str) -> None:
    assert not is_secret(key)
    assert one(key, "value") == "value"


@pytest.mark.parametrize("value", [5, 0.5, None, True])
def test_only_words_are_secret(value: Any) -> None:
    assert one("token", value) == value


@pytest.mark.parametrize(
    "written",
    ["${oc.env:HF_TOKEN}", "${oc.env:HF_TOKEN,none}", "${ oc.env : API_KEY }", "https://u:${oc.env:DB_PASSWORD}@host"],
)
def test_what_comes_from_a_secret_variable_keeps_its_interpolation(written: str) -> None:
    assert one("url", "canary", written) == written
    assert one("token", "canary", written) == written


def test_what_comes_from_another_variable_is_resolved() -> None:
    assert one("home", "/root", "${oc.env:HOME}") == "/root"


def test_secrets_at_any_depth() -> None:
    config = {"a": [{"token": "x"}, "plain"], "b": {"c": {"api_key": "y", "n": 1}}, "list_token": ["p", "q"]}
    assert redact(config, config) == {
        "a": [{"token": REDACTED}, "plain"],
        "b": {"c": {"api_key": REDACTED, "n": 1}},
        "list_token": [REDACTED, REDACTED],
    }
    assert config["a"][0] == {"token": "x"}


def test_interpolations_inside_lists() -> None:
    config = {"args": ["run", "canary"]}
    assert redact(config, {"args": ["run", "${oc.env:MY_TOKEN}"]}) == {"args": ["run", "${oc.env:MY_TOKEN}"]}


def test_what_was_written_may_have_another_shape() -> None:
    assert redact({"a": {"b": "c"}}, {"a": "${other}"}) == {"a": {"b": "c"}}
    assert redact({"a": {"token": "c"}}, {}) == {"a": {"token": REDACTED}}
    assert redact({"a": ["x", "y"]}, {"a": ["x"]}) == {"a": ["x", "y"]}


def test_a_secret_that_is_reached_through_another_key() -> None:
    """`url: ${hub_token}` holds the secret although neither its own name nor its text says so."""
    config = {"hub_token": "canary", "url": "https://canary@host"}
    written = {"hub_token": "${oc.env:HF_TOKEN}", "url": "https://${hub_token}@host"}
    assert "canary" not in str(redact(config, written))


def test_a_command_line_loses_its_secrets() -> None:
    words = ["+recipe=smoke", "data.hub_token=canary", "data.tokenizer=bert", "~hooks.progress"]
    assert redact_command(words) == [
        "+recipe=smoke",
        f"data.hub_token={REDACTED}",
        "data.tokenizer=bert",
        "~hooks.progress",
    ]


@pytest.mark.parametrize("word", ["token=canary", "+token=canary", "++model.api_key=canary", "~a.password=canary"])
def test_an_override_of_any_form_loses_its_secret(word: str) -> None:
    assert redact_command([word]) == [word.replace("canary", REDACTED)]


def test_secrets_inside_values_of_overrides() -> None:
    config = {"model": {"width": 3, "api_key": "HUSH1234", "args": [{"token": "it's"}]}, "name": "x"}
    secrets = secrets_of(config, config)
    assert secrets == {"HUSH1234", "it's"}
    words = ["model={width: 3, api_key: HUSH1234, args: [{token: 'it\\'s'}]}", "name=x", "HUSH1234=3"]
    assert redact_command(words, secrets) == [
        f"model={{width: 3, api_key: {REDACTED}, args: [{{token: '{REDACTED}'}}]}}", "name=x", "HUSH1234=3"
    ]  # fmt: skip
