"""G16: every sample once an epoch, in the order of (seed, epoch), over kills and changes of world."""

from __future__ import annotations

import pytest

from guarantees.cases_g16 import KINDS, Case, cases, oracle, run

pytestmark = pytest.mark.usefixtures("quiet")

ALL = cases(600, seed=16)
QUICK = [case for case in ALL if not case.parts[0].workers]
WITH_WORKERS = [case for case in ALL if case.parts[0].workers]


@pytest.mark.parametrize("part", range(6))
def test_generated_cases(part: int) -> None:
    for case in QUICK[part::6]:
        violated = run(case)
        assert violated is None, violated


@pytest.mark.parametrize("case", WITH_WORKERS[:10], ids=str)
def test_real_workers(case: Case) -> None:
    violated = run(case)
    assert violated is None, violated


def test_the_cases_meet_everything() -> None:
    assert {case.kind for case in ALL} == set(KINDS)
    assert {case.kind for case in WITH_WORKERS[:10]} >= {"indexed", "grouped", "stream", "stateful"}
    assert any(len({part.readers for part in case.parts}) > 2 for case in ALL)
    # Kills within an epoch, in its first step, and where it ends.
    places = {case.parts[0].until % (-(-case.length // case.size)) for case in ALL if len(case.parts) > 1}
    assert {0, 1, 2, 3} <= places
    for case in ALL:
        if not case.drop_last:
            whole = oracle(case)[: -(-case.length // case.size)]
            assert sorted(sample for step in whole for sample in step) == list(range(case.length))
