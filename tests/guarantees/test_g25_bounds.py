"""G25: configuration that is too large, too deep or too slow is refused in little time and memory."""

from __future__ import annotations

import pytest

from guarantees import cases_g25

#: In the suite a case of each kind; all of them in the long form.
SHORT = (
    "aliases of a list", "aliases of a merge", "an alias of itself", "merge keys of itself", "nested flow lists",
    "a file of 200 MB",
    "a key that just fits", "many keys of one mapping", "an integer of 4,000 digits", "an integer in sixties",
    "a float in sixties", "laughs by interpolation of a mapping", "a chain of 900", "open interpolations",
    "a resolver with many arguments", "a large part copied often", "dots that go up",
    "a package of 190,000 characters", "a defaults list of what is not there", "a choice of many options",
    "many overrides", "brackets on the command line", "laughs on the command line", "a flag without end",
    "sweeps of sweeps", "a path that just fits", "a folder of configuration without end", "an octal integer",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases_g25.CASES if c.name in SHORT], ids=lambda case: case.name)
def test_it_is_refused_in_time(case, tmp_path):
    assert cases_g25.run(case, tmp_path) is None


def test_the_short_form_names_cases():
    names = [case.name for case in cases_g25.CASES]
    assert set(SHORT) <= set(names)
    assert len(names) == len(set(names)) >= 80
