"""Hooks: what counts as an event, and what is told of a misnamed one."""

from __future__ import annotations

from typing import Any

from runner.train.hook import EVENTS, Hook, check, events


class Wrong(Hook):
    def on_step_ends(self, run: Any) -> None: ...

    def on_breakfast(self, run: Any) -> None: ...

    on_off = True


class Duck:
    """No base class: the methods are what counts."""

    def on_step_end(self, run: Any) -> None: ...


def test_misnamed_events_are_problems_with_the_nearest_name() -> None:
    first, second = sorted(check("mine", Wrong), key=lambda problem: problem.why)
    assert (first.key, first.why) == ("hooks.mine", "Wrong.on_breakfast is named like an event and is none")
    assert "on_run_start" in first.fix
    assert second.why == "Wrong.on_step_ends is named like an event and is none"
    assert second.fix == "did you mean on_step_end?"


def test_every_built_in_event_is_fine() -> None:
    assert check("mine", type("All", (Hook,), {name: lambda self, *about: None for name in EVENTS})) == []


def test_a_row_holds_the_bound_methods_in_the_order_of_the_hooks() -> None:
    one, two, child = Duck(), Duck(), type("Child", (Duck,), {})()
    table = events([one, Hook(), two, child])
    assert table["on_step_end"] == (one.on_step_end, two.on_step_end, child.on_step_end)
    assert all(row == () for name, row in table.items() if name != "on_step_end")


def test_an_override_that_calls_the_base_counts_once() -> None:
    class Base(Hook):
        def on_run_end(self, run: Any) -> None: ...

    class Child(Base):
        def on_run_end(self, run: Any) -> None:
            super().on_run_end(run)

    assert len(events([Child()])["on_run_end"]) == 1
