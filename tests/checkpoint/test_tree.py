"""A nested state taken apart into JSON and tensors, and put together again."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch

from runner.checkpoint.tree import join, split
from runner.errors import RunnerError


def there_and_back(value: Any) -> Any:
    document, tensors = split(value, "x")
    return join(json.loads(json.dumps(document, allow_nan=False)), tensors.__getitem__)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        2**200,
        -(2**63),
        0.1,
        5e-324,
        1.7976931348623157e308,
        math.inf,
        -math.inf,
        "",
        "ä\n\ud800",
        [],
        {},
        (),
        [1, [2.5, (3, None)], {"a": {"b": [False]}}],
        {1: "int", "1": "str", None: 0, 2.5: 1, False: "bool"},
        {"$tensor": "a user's own key", "$float": "nan"},
        {"$tuple": [1]},
        {"": {"": 1}},
        ((1, 2), [(3,)]),
    ],
)
def test_plain_values_come_back_with_value_and_type(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert repr(back) == repr(value)


def test_nan_and_minus_zero() -> None:
    nan, zero = there_and_back([math.nan, -0.0])
    assert math.isnan(nan)
    assert math.copysign(1, zero) == -1


def test_tensors_are_named_by_their_path() -> None:
    weight, step = torch.ones(2), torch.tensor(3)
    value = {"a.b": {"w/x": weight, "~": [step, {7: weight}]}}
    document, tensors = split(value, "m")
    assert list(tensors) == ["m/a.b/w~1x", "m/a.b/~0/0", "m/a.b/~0/1/7"]
    assert document["a.b"]["w/x"] == {"$tensor": "m/a.b/w~1x"}
    back = there_and_back(value)
    assert back["a.b"]["w/x"] is weight
    assert back["a.b"]["~"][1] == {7: weight}


def test_subclasses_come_back_plain() -> None:
    back = there_and_back([OrderedDict(b=1, a=2), torch.Size([1, 2])])
    assert back == [{"b": 1, "a": 2}, (1, 2)]
    assert [type(item) for item in back] == [dict, tuple]
    assert list(back[0]) == ["b", "a"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": {"b": b"raw"}}, "`x/a/b`: a value of type bytes"),
        ({"a": [0, {1, 2}]}, "`x/a/1`: a value of type set"),
        ({"a": torch.float32}, "`x/a`: a value of type torch.dtype"),
        ({"a": print}, "`x/a`: a value of type builtin_function_or_method"),
        ({"a": {(1, 2): 0}}, "`x/a`: a dictionary key of type tuple"),
        ({"a": torch.eye(2).to_sparse()}, "`x/a`: a tensor of layout torch.sparse_coo"),
        ({1: torch.ones(1), "1": torch.ones(1)}, "`x/1`: two keys"),
    ],
)
def test_what_cannot_be_saved_is_named(value: Any, words: str) -> None:
    with pytest.raises(RunnerError) as caught:
        split(value, "x")
    assert words in str(caught.value)
