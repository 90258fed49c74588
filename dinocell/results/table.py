"""Tables: measurements with one row per cell, and rows of text with aligned columns."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from types import MappingProxyType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from dinocell.files import writing

_ROWS_AT_A_TIME = 4096


def align_columns(
    rows: Sequence[Sequence[str]],
    *,
    numbers: bool = True,
    width_of: Callable[[str], int] = len,
) -> list[str]:
    """Lines of text whose columns stand below each other, two spaces apart.

    Parameters
    ----------
    rows : sequence of rows of equal length
        Cells as text; the header is a row like the others.
    numbers : bool
        True: the columns after the first are aligned to the right.
    width_of : callable
        Columns that a text takes in the terminal, where this is not its number of characters.

    Returns
    -------
    list of str
        One line per row, without spaces at its end.
    """
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            space = " " * (width - width_of(cell))
            cells.append(space + cell if numbers and place else cell + space)
        lines.append("  ".join(cells).rstrip())
    return lines


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8, line ends as they are; raises as `writing` does."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


@dataclass(frozen=True, eq=False, repr=False)
class CellTable:
    """One row per cell, one read-only array per column.

    Parameters
    ----------
    data : mapping of str to (N,) ndarray
        Columns in their order; all of the same length N >= 0.  Arrays are copied.
    pixel_size_um : float, optional
        Side of a pixel in micrometres, where it is known.
    place : mapping of str to value
        Where the image is: its well, z and so on; columns before the others in files.

    Examples
    --------
    >>> table = CellTable({"label": np.array([1, 7]), "area": np.array([2, 1])})
    >>> len(table), table["area"].tolist()
    (2, [2, 1])

    `pandas.DataFrame(dict(table.data))` gives a data frame.

    Raises ValueError (a column is not one-dimensional, or lengths differ).
    """

    data: Mapping[str, NDArray[Any]]
    pixel_size_um: float | None = None
    place: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, NDArray[Any]] = {}
        length: int | None = None
        for name, values in self.data.items():
            column = np.array(values)
            if column.ndim != 1 or (length is not None and len(column) != length):
                raise ValueError(
                    f"Columns of a table must be 1-D and equally long, got shape {column.shape} "
                    f"for {name!r} after columns of length {length}: pass one value per cell"
                )
            length = len(column)
            column.flags.writeable = False
            columns[name] = column
        object.__setattr__(self, "data", MappingProxyType(columns))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        return tuple(self.data)

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(next(iter(self.data.values()))) if self.data else 0

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return one column as a read-only (N,) array; KeyError names the known columns."""
        try:
            return self.data[name]
        except KeyError:
            raise KeyError(
                f"A column must be one of {', '.join(self.data)}; got {name!r}: choose one of them"
            ) from None

    def __contains__(self, name: object) -> bool:
        """Tell whether there is a column of this name."""
        return name in self.data

    def __repr__(self) -> str:
        return f"CellTable({len(self)} cells, {len(self.data)} columns)"

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield one dict of plain Python values per cell; a missing value (NaN) is None."""
        columns = list(self.to_dict().values())
        for values in zip(*columns, strict=True):
            yield dict(zip(self.data, values, strict=True))

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the columns as lists of plain Python values, fit for JSON; NaN becomes None."""
        return {name: _python_values(column) for name, column in self.data.items()}

    def with_place(self) -> dict[str, NDArray[Any]]:
        """Columns of files: those of the place, the same value in each row, before the others."""
        place = {name: np.full(len(self), value) for name, value in self.place.items()}
        return place | dict(self.data)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table as CSV: UTF-8, one header line, comma, ``\\n``; whole or not at all.

        A missing value (NaN) becomes an empty field, booleans become ``true`` and ``false``, and
        floats are written with all their digits, so that reading gives the same numbers.

        Raises DINOCellError (`path` is a folder, or the disk refuses).
        """
        head = StringIO()
        data = self.with_place()
        csv.writer(head, lineterminator="\n").writerow(data)
        columns = list(data.values())
        with writing(path) as temporary, temporary.open("wb") as file:
            file.write(head.getvalue().encode(errors="backslashreplace"))
            for begin in range(0, len(self), _ROWS_AT_A_TIME):
                rows = slice(begin, begin + _ROWS_AT_A_TIME)
                file.write(_csv_lines([column[rows] for column in columns]))


def _csv_lines(columns: Sequence[NDArray[Any]]) -> bytes:
    kinds = {column.dtype.kind for column in columns}
    if kinds <= set("biuf") and not any(np.isinf(c).any() for c in columns if c.dtype.kind == "f"):
        # JSON has the same numbers, and null for NaN; it is written several times as fast as by `csv`
        rows = orjson.dumps(list(zip(*(column.tolist() for column in columns), strict=True)))
        return rows[2:-2].replace(b"],[", b"\n").replace(b"null", b"") + b"\n"
    text = StringIO()
    words = [
        ["true" if value else "false" for value in column.tolist()]
        if column.dtype == np.bool_
        else _python_values(column)
        for column in columns
    ]
    csv.writer(text, lineterminator="\n").writerows(zip(*words, strict=True))
    return text.getvalue().encode(errors="backslashreplace")


def _python_values(column: NDArray[Any]) -> list[Any]:
    values: list[Any] = column.tolist()
    if column.dtype.kind == "f":
        values = [None if value != value else value for value in values]
    return values
