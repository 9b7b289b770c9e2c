"""The order of samples: a permutation, a function of (seed, epoch), cut into steps."""

from __future__ import annotations

import itertools

import pytest
import torch

from runner.data.order import Order, Permutation

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize(
    "length", [*range(1, 40), 63, 64, 65, 100, 127, 1000, 1023, 1024, 1025, 65_535, 65_537, 100_003]
)
def test_a_permutation_hits_everything_once(length: int) -> None:
    found = Permutation(length, 7, "order", 0)(torch.arange(length))
    assert found.dtype == torch.int64
    assert torch.equal(found.sort().values, torch.arange(length))


def test_a_huge_permutation_needs_no_memory_and_stays_inside() -> None:
    length = 10**12 + 39
    positions = torch.cat(
        [torch.arange(1000), torch.arange(length - 1000, length), torch.arange(0, length, length // 1000)]
    )
    found = Permutation(length, 1)(positions)
    assert int(found.min()) >= 0
    assert int(found.max()) < length
    assert len(set(found.tolist())) == len(set(positions.tolist()))


def test_a_permutation_is_the_same_in_blocks_and_depends_on_every_word_of_its_key() -> None:
    permutation = Permutation(1000, 1, "order", 0)
    whole = permutation(torch.arange(1000))
    assert torch.equal(torch.cat([permutation(block) for block in torch.arange(1000).split(77)]), whole)
    others = [
        Permutation(1000, *key)(torch.arange(1000)) for key in [(2, "order", 0), (1, "window", 0), (1, "order", 1)]
    ]
    for one, two in itertools.combinations([whole, *others], 2):
        assert int((one == two).sum()) < 15


def test_positions_given_are_left_alone() -> None:
    positions = torch.arange(10)
    Permutation(11, 0)(positions)
    assert torch.equal(positions, torch.arange(10))


def test_a_permutation_looks_random() -> None:
    """Every sample comes to every place about equally often: chi-squared over 2,000 seeds."""
    counts = torch.zeros(10, 10)
    for seed in range(2000):
        counts[torch.arange(10), Permutation(10, seed)(torch.arange(10))] += 1
    chi = float(((counts - 200) ** 2 / 200).sum())
    # 81 degrees of freedom: 99.99% below 135.
    assert chi < 135


def test_neighbours_do_not_stay_neighbours() -> None:
    found = Permutation(10_000, 3)(torch.arange(10_000))
    assert int((found.diff().abs() == 1).sum()) < 15


SIZES = [(1, 1), (7, 8), (8, 8), (20, 8), (24, 8), (25, 8), (1000, 1), (70_000, 64), (200_000, 70_000)]


@pytest.mark.parametrize(("length", "size"), SIZES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_covers_every_index_once(length: int, size: int, drop_last: bool) -> None:
    order = Order(length, size, seed=3, drop_last=drop_last)
    if drop_last and length < size:
        assert order.steps_per_epoch == 0
        return
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.indices(step) for step in range(first, first + order.steps_per_epoch)]
        seen = torch.cat(steps)
        assert len(seen) == len(seen.unique()) == order.samples_per_epoch
        assert int(seen.min()) >= 0
        assert int(seen.max()) < length
        assert all(len(indices) == size for indices in steps[:-1])
        assert len(steps[-1]) == (size if drop_last else (length - 1) % size + 1)
    assert order.samples_per_epoch == (length // size * size if drop_last else length)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def epoch(seed: int, number: int, size: int = 8) -> torch.Tensor:
        order = Order(50, size, seed)
        return torch.cat([order.indices(number * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)])

    assert torch.equal(epoch(1, 0), epoch(1, 0))
    assert not torch.equal(epoch(1, 0), epoch(1, 1))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))
    # The order does not depend on how it is cut into steps.
    assert torch.equal(epoch(1, 1), epoch(1, 1, size=5))


def test_steps_in_any_order_are_the_same_steps() -> None:
    order = Order(1000, 8, 5, lengths=torch.arange(1000) % 37, window=4)
    one_by_one = [order.indices(step).clone() for step in range(300)]
    for step in [299, 0, 130, 7, 124, 125, 126, 3, 250]:
        assert torch.equal(Order(1000, 8, 5, lengths=torch.arange(1000) % 37, window=4).indices(step), one_by_one[step])
        assert torch.equal(order.indices(step), one_by_one[step])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [8, 9, 23, 64, 65])
def test_count_and_samples_agree_with_indices(length: int, drop_last: bool, grouped: bool) -> None:
    lengths = torch.arange(length) % 5 if grouped else None
    order = Order(length, 8, 1, drop_last=drop_last, lengths=lengths, window=3)
    seen = 0
    for step in range(3 * order.steps_per_epoch):
        assert order.samples(step) == seen
        assert order.count(step) == len(order.indices(step))
        seen += order.count(step)
    assert order.samples(3 * order.steps_per_epoch) == seen == 3 * order.samples_per_epoch


def test_without_shuffling_the_data_keep_their_order() -> None:
    order = Order(20, 8, 1, shuffle=False)
    assert torch.equal(torch.cat([order.indices(step) for step in range(3)]), torch.arange(20))
    assert torch.equal(order.indices(3), torch.arange(8))


# --- grouping by length -----------------------------------------------------------------------------------------------

LENGTHS = torch.randint(1, 100, (1000,), generator=torch.Generator().manual_seed(0))


def padding(order: Order) -> int:
    """Cells that padding adds over an epoch."""
    steps = [LENGTHS[order.indices(step)] for step in range(order.steps_per_epoch)]
    return int(sum(len(lengths) * lengths.max() - lengths.sum() for lengths in steps))


def test_grouping_keeps_the_samples_of_each_window() -> None:
    plain, grouped = Order(1000, 8, 3), Order(1000, 8, 3, lengths=LENGTHS, window=10)
    for epoch_start in (0, 125):
        for first in range(0, 125, 10):
            steps = range(epoch_start + first, epoch_start + min(first + 10, 125))
            one, other = (
                torch.cat([order.indices(step) for step in steps]).sort().values for order in (plain, grouped)
            )
            assert torch.equal(one, other)


def test_grouping_reduces_padding_and_still_mixes() -> None:
    grouped = Order(1000, 8, 3, lengths=LENGTHS, window=50)
    assert padding(grouped) < padding(Order(1000, 8, 3)) / 5
    longest = [int(LENGTHS[grouped.indices(step)].max()) for step in range(50)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_grouping_is_deterministic_and_differs_by_epoch_and_seed() -> None:
    def first(seed: int, step: int) -> list[int]:
        return Order(1000, 8, seed, lengths=LENGTHS).indices(step).tolist()

    assert first(3, 0) == first(3, 0)
    assert first(3, 0) != first(3, 125)
    assert first(3, 0) != first(4, 0)


def test_the_short_step_stays_the_last() -> None:
    order = Order(1001, 8, 3, lengths=torch.cat([LENGTHS, torch.tensor([1])]), window=7)
    assert [len(order.indices(step)) for step in range(126)] == [8] * 125 + [1]


def test_lengths_may_be_a_list_and_fewer_than_a_step() -> None:
    order = Order(3, 8, 1, lengths=[5, 1, 3])
    assert sorted(order.indices(0).tolist()) == [0, 1, 2]
    assert Order(4, 2, 1, lengths=[4, 1, 3, 2], shuffle=False).indices(0).tolist() == [1, 3]
