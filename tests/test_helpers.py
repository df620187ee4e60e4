"""SGLang's two size helpers, against what SGLang 0.5.23 itself returned (data/sglang_helpers.json).

Where upstream answers nonsense, negative or fractional sizes, ours raises; those cases are listed
here, so that any other difference is a failure.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import moepad
import numpy as np
import pytest
from moepad import get_moe_padding_size, get_moe_weight_sizes

GOLDEN = json.loads((Path(__file__).parent / "data" / "sglang_helpers.json").read_text())
VARIABLE = "SGLANG_MOE_PADDING"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_every_row() -> None:
    rows = GOLDEN["rows"]
    assert len(rows) == 2472
    wrong = [
        (row, got) for row in rows if (got := get_moe_weight_sizes(*row[:4])) != tuple(row[4:])
    ]
    assert not wrong


def test_result_types() -> None:
    result = get_moe_weight_sizes(192, True, False, True)
    assert type(result) is tuple
    assert [type(item).__name__ for item in result] == GOLDEN["result_types"]
    assert type(get_moe_padding_size(True)) is int


def environments() -> list[Any]:
    return [pytest.param(key, id=key) for key in GOLDEN["env"]]


@pytest.mark.parametrize("key", environments())
def test_environment(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for assignment in key.split(","):
        name, _, text = assignment.partition("=")
        if text == "None":
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, text.strip("'"))
    expected = GOLDEN["env"][key]
    if "error" in expected:
        with pytest.raises(ValueError) as caught:
            get_moe_padding_size(False)
        assert expected["error"] == f"ValueError: {caught.value}"
    else:
        sizes = expected["padding_size"]
        assert get_moe_padding_size(False) == sizes["no_aiter"]
        assert expected["weight_sizes_unchanged"]
    assert get_moe_padding_size(True) == 128
    for row in GOLDEN["rows"][:40]:
        assert get_moe_weight_sizes(*row[:4]) == tuple(row[4:])


# What int() accepts is what upstream accepts: sign, spaces, leading zeros, underscores.
@pytest.mark.parametrize(
    ("text", "size"),
    [(" 1 ", 128), ("01", 128), ("+1", 128), ("-0", 0), ("00", 0), ("1_0", 128), ("\t0\n", 0)],
)
def test_environment_as_int_reads_it(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    assert (128 if int(text) else 0) == size
    assert get_moe_padding_size(False) == size


@pytest.mark.parametrize("text", ["", " ", "true", "1.0", "0x1", "1 2", "_1", "1__0", "--1", "+"])
def test_environment_that_int_refuses(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError) as expected:
        int(text)
    with pytest.raises(ValueError) as caught:
        get_moe_padding_size(False)
    assert str(caught.value) == str(expected.value)
    assert get_moe_padding_size(True) == 128, "with AITER the variable is not read"


# The keys of GOLDEN["edge"], as calls.
EDGES: dict[str, Any] = {
    "inter_dim=0,aiter,concat": lambda: get_moe_weight_sizes(0, True, False, True),
    "inter_dim=-1,aiter,concat": lambda: get_moe_weight_sizes(-1, True, False, True),
    "inter_dim=-192,aiter,concat": lambda: get_moe_weight_sizes(-192, True, False, True),
    "inter_dim=192.0,aiter,concat": lambda: get_moe_weight_sizes(192.0, True, False, True),  # type: ignore[arg-type]
    "inter_dim=True,aiter,concat": lambda: get_moe_weight_sizes(True, True, False, True),
    "inter_dim='192'": lambda: get_moe_weight_sizes("192", True, False, True),  # type: ignore[arg-type]
    "flags as ints (192,1,0,1)": lambda: get_moe_weight_sizes(192, 1, 0, 1),
    "flags as str (192,'','','x')": lambda: get_moe_weight_sizes(192, "", "", "x"),
    "is_aiter_moe=None": lambda: get_moe_weight_sizes(192, True, False, None),
    "keywords": lambda: get_moe_weight_sizes(
        is_aiter_moe=True, inter_dim=192, is_packed=False, is_concat=True
    ),
    "padding_size(None)": lambda: get_moe_padding_size(None),
    "padding_size(2)": lambda: get_moe_padding_size(2),
    "padding_size()": lambda: get_moe_padding_size(),  # type: ignore[call-arg]
}
RAISES = {
    "inter_dim=-1,aiter,concat": ValueError,
    "inter_dim=-192,aiter,concat": ValueError,
    "inter_dim=192.0,aiter,concat": TypeError,
    "inter_dim='192'": TypeError,
    "padding_size()": TypeError,
}


def test_edges_are_all_here() -> None:
    assert EDGES.keys() == GOLDEN["edge"].keys()


@pytest.mark.parametrize("key", EDGES)
def test_edge(key: str) -> None:
    if key in RAISES:
        with pytest.raises(RAISES[key]):
            EDGES[key]()
        return
    expected = GOLDEN["edge"][key]
    assert EDGES[key]() == (tuple(expected) if isinstance(expected, list) else expected)


@pytest.mark.parametrize("value", [-1, -(2**62), -(2**70)])
def test_negative(value: int) -> None:
    with pytest.raises(ValueError, match="inter_dim"):
        get_moe_weight_sizes(value, True, False, True)


# Sizes that C integers hold, and some that only Python's do.
@pytest.mark.parametrize("value", [2**31, 2**31 + 1, 2**60, 2**60 + 130, 2**63 - 1, 2**80 + 5])
def test_large(value: int) -> None:
    stored, half = -(-value // 128) * 128, -(-(value // 2) // 128) * 128
    assert get_moe_weight_sizes(value, True, False, False) == (2 * value, value, False)
    assert get_moe_weight_sizes(value, False, True, False) == (value, value // 2, False)
    assert get_moe_weight_sizes(value, True, False, True) == (2 * stored, stored, stored != value)
    assert get_moe_weight_sizes(value, True, True, True) == (4 * half, half, half != value // 2)
    assert get_moe_weight_sizes(value, False, True, True)[:2] == (2 * value, half)


def test_numpy_integers() -> None:
    assert get_moe_weight_sizes(np.int64(192), np.True_, np.False_, np.True_) == (512, 256, True)
    with pytest.raises(TypeError):
        get_moe_weight_sizes(np.float64(192), True, False, True)


def test_padding_size_by_keyword() -> None:
    assert get_moe_padding_size(is_aiter_moe=True) == 128
    assert get_moe_padding_size(is_aiter_moe=False) == 0


def test_constants() -> None:
    sizes = {GOLDEN["constants"][name] for name in ("AITER_PADDING_SIZE", "TRITON_PADDING_SIZE")}
    assert sizes == {get_moe_padding_size(True)}


def test_docstrings() -> None:
    assert "SGLANG_MOE_PADDING" in (moepad.get_moe_padding_size.__doc__ or "")
    # The way out of its traps.
    assert "plan" in (moepad.get_moe_weight_sizes.__doc__ or "")
