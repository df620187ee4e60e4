"""What the commands print with: plain-text tables and progress bars.

Shared by every command of `python -m moepad`; knows nothing of what is in a table.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def table(rows: Sequence[Sequence[object]], header: Sequence[str], align: str = "") -> str:
    """Lay rows out in aligned columns.

    Parameters
    ----------
    rows : sequence of rows
        One cell per column of `header`. None prints as "-", a bool as yes or no, a float with
        four digits, anything else as `str` has it.
    header : sequence of str
        The column titles.
    align : str
        One letter per column, "l" or "r"; without it a column whose cells are all numbers goes to
        the right, any other to the left.

    Returns
    -------
    str
        Title line, rule, one line per row; no trailing spaces, no final newline.

    Raises
    ------
    ValueError
        A row, or `align`, has another number of columns than `header`.
    """
    n_column = len(header)
    for i, row in enumerate(rows):
        if len(row) != n_column:
            raise ValueError(f"rows[{i}]: expected {n_column} cells, got {len(row)}")
    sides = align or "".join("r" if _is_numeric(rows, i) else "l" for i in range(n_column))
    if len(sides) != n_column or set(sides) - {"l", "r"}:
        raise ValueError(f"align: expected {n_column} letters out of 'l' and 'r', got {align!r}")
    cells = [list(header), *([_text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(n_column)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(_line(line, widths, sides) for line in cells)


def progress(
    iterable: Iterable[T], description: str = "", *, total: int | None = None, unit: str = "it"
) -> Generator[T, None, None]:
    """Pass `iterable` through, showing a bar on stderr where that is a terminal.

    Closing the generator before its end takes the bar away.

    Parameters
    ----------
    iterable : iterable
        What to walk through.
    description : str
        Text in front of the bar.
    total : int, optional
        Number of items where `iterable` has no length.
    unit : str
        What an item is called.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    # disable=None: no bar unless stderr is a terminal.
    yield from tqdm(
        iterable, desc=description or None, total=total, unit=unit, disable=None, leave=False
    )


def _is_numeric(rows: Sequence[Sequence[object]], column: int) -> bool:
    cells = [row[column] for row in rows if row[column] is not None]
    return bool(cells) and all(
        isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in cells
    )


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return str(cell)


def _line(cells: Sequence[str], widths: Sequence[int], sides: str) -> str:
    padded = (
        cell.rjust(width) if side == "r" else cell.ljust(width)
        for cell, width, side in zip(cells, widths, sides, strict=True)
    )
    return "  ".join(padded).rstrip()
