"""Seeds from words."""

from __future__ import annotations

from runner.keyed import keyed


def test_seeds_are_known_numbers() -> None:
    """Written down: another number would be another training for every recipe."""
    assert keyed(0, "step", 0, 0) == -1572917448708403644
    assert keyed("x") == keyed("x")


def test_seeds_are_64_bits_and_depend_on_every_word() -> None:
    found = {keyed(seed, "step", step) for seed in range(100) for step in range(100)}
    assert len(found) == 10_000
    assert all(-(2**63) <= value < 2**63 for value in found)
    assert keyed(1, 23) != keyed(12, 3)
    assert keyed("a", "b") != keyed("b", "a")
