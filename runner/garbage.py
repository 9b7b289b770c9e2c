"""How often Python looks for garbage: seldom while a program starts, as ever from the first step on.

Importing torch makes hundreds of thousands of objects that stay; to look through them again and again for some that
may go costs a fifth of the time until training begins.
"""

from __future__ import annotations

import gc

#: Objects made, less those gone again, after which Python looks; enough not to count, and never without end.
_SELDOM = 50_000

_before: list[tuple[int, int, int]] = []


def seldom() -> None:
    """From now on, until `as_ever`. Does nothing where it is so already, or where a user lets Python never look."""
    if not _before:
        first, *others = before = gc.get_threshold()
        if 0 < first < _SELDOM:
            _before.append(before)
            gc.set_threshold(_SELDOM, *others)


def imported() -> None:
    """What there is now stays, mostly modules: it is not looked through again, until `released`."""
    gc.freeze()


def as_ever() -> None:
    """Undoes `seldom`, unless somebody has set a threshold of their own since."""
    if _before:
        before = _before.pop()
        if gc.get_threshold() == (_SELDOM, *before[1:]):
            gc.set_threshold(*before)


def released() -> None:
    """Undoes all of it: for a program that goes on after a run."""
    as_ever()
    gc.unfreeze()
