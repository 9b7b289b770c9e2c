"""G24: secrets reach no file, log, tracker, checkpoint or process title."""

from __future__ import annotations

import pytest

from guarantees import cases_g24
from runner import console
from runner.recipe.redact import REDACTED, redact, redact_text

#: In the suite those that go different ways; all of them in the long form.
SHORT = (
    "a nested list", "a variable inside of a text", "a URL on the command line", "the difference of a file",
    "an exception by the command line",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases_g24.CASES if c.name in SHORT], ids=lambda case: case.name)
def test_a_secret_stays_where_it_was_written(case, tmp_path):
    assert cases_g24.run(case, tmp_path) is None


def test_the_short_form_names_cases():
    assert set(SHORT) <= {case.name for case in cases_g24.CASES}
    assert len(cases_g24.CASES) >= 10
    # Both what the user typed and what a program starts by itself.
    assert any(case.started and case.words for case in cases_g24.CASES if case.name in SHORT)


@pytest.mark.parametrize(
    "line",
    [
        "+  api_key: c4nary99", "-hub_token: 'c4nary99'", " password: \"c4nary99\"", "+TOKEN = 'c4nary99'",
        "+export HF_TOKEN=c4nary99", '+  "client_secret": "c4nary99",', "+url: https://me:c4nary99@host/x",
    ],
)  # fmt: skip
def test_a_difference_loses_its_secrets(line):
    assert "c4nary99" not in redact_text(f"a: 1\n{line}\nb: 2\n")
    assert REDACTED in redact_text(line)


@pytest.mark.parametrize(
    "line",
    [
        "+    key = compute(value)", "+tokenizer: minilm-l6", "+max_tokens: 1234567", "-  text_key: sentence",
        "+  api_key: ${oc.env:API_KEY}", "+    for key, value in items:", "+see https://host:80/x@y",
    ],
)  # fmt: skip
def test_a_difference_keeps_what_is_no_secret(line):
    assert redact_text(line) == line


def test_passwords_of_urls_are_redacted_in_the_configuration():
    config = {"trackers": {"x": {"uri": "postgres://me:hidden@host/db", "plain": "https://host/a:b@c"}}}
    found = redact(config, config)["trackers"]["x"]
    assert found == {"uri": f"postgres://me:{REDACTED}@host/db", "plain": "https://host/a:b@c"}


def test_scrubbing_knows_the_forms_of_a_secret():
    console.hide(["pass\"wo'rd\n\\é", "short"])
    try:
        for text in ("pass\"wo'rd\n\\é", repr("pass\"wo'rd\n\\é"), '"pass\\"wo\'rd\\n\\\\\\u00e9"'):
            assert console.REDACTED in console.scrub(f"error: {text}")
        assert console.scrub("in short") == "in short"  # too short to be told from a word
    finally:
        console.hide([])
    assert console.scrub("pass\"wo'rd\n\\é") == "pass\"wo'rd\n\\é"
