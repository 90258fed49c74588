"""Tables of cells as files with types: Parquet and AnnData."""

import io
import os
from typing import Any

import numpy as np

from dinocell.files import writing
from dinocell.io.optional import library
from dinocell.results.columns import unit_of
from dinocell.results.table import CellTable

_ABOUT_CELL = ("label", "touches_border")
_PLACES = ("bbox_", "centroid_")


def write_parquet(path: str | os.PathLike[str], table: CellTable, *, image_name: str = "") -> None:
    """Write a table as Parquet: one row per cell, columns named and typed as in `table`, its place first.

    Whole numbers are int64, others double, flags boolean, texts string; a missing value (NaN) is null.  The unit of a
    column is in its name where it is µm or µm², and always in its metadata (``unit``).  The metadata of
    the file hold ``pixel_size_um`` and ``image``, where they are known.

    Raises MissingExtraError (without the extra `tables`); DINOCellError (the file cannot be written).
    """
    arrow, parquet = (
        library(name, "Parquet files", "tables") for name in ("pyarrow", "pyarrow.parquet")
    )
    arrays, fields = [], []
    for name, column in table.with_place().items():
        arrays.append(arrow.array(column, from_pandas=True))
        unit = unit_of(name)
        fields.append(arrow.field(name, arrays[-1].type, metadata={"unit": unit} if unit else None))
    about = {"image": image_name} if image_name else {}
    if table.pixel_size_um is not None:
        about["pixel_size_um"] = repr(table.pixel_size_um)
    content = arrow.Table.from_arrays(arrays, schema=arrow.schema(fields, metadata=about))
    with writing(path) as temporary:
        parquet.write_table(content, temporary, compression="zstd")


def write_anndata(path: str | os.PathLike[str], table: CellTable, *, image_name: str = "") -> None:
    """Write a table as AnnData (``.h5ad``), which scanpy and squidpy read; the file is made in memory first.

    ``X`` (cells, measurements) float64 holds what was measured, NaN where a value is missing, with the
    unit of each in ``var["unit"]``.  ``obs`` has the place (texts as categories), the label,
    `touches_border`, the bounding box and the centroid of each cell; ``obsm["spatial"]`` the centroid as (x, y), in µm where the pixel size is known,
    else in px; ``uns`` the name of the image, the unit of ``spatial`` and the pixel size.

    Raises MissingExtraError (without the extra `tables`); DINOCellError (the file cannot be written).
    """
    anndata = library("anndata", "AnnData files", "tables")
    pandas = library("pandas", "AnnData files", "tables")
    h5py = library("h5py", "AnnData files", "tables")
    about = [n for n in table.columns if n in _ABOUT_CELL or n.startswith(_PLACES)]
    measured = [name for name in table.columns if name not in about]
    names = [str(label) for label in table["label"].tolist()]
    size_um = table.pixel_size_um
    places = np.stack([table["centroid_col"], table["centroid_row"]], axis=1)
    uns: dict[str, Any] = {"image": image_name, "spatial_unit": "px" if size_um is None else "µm"}
    if size_um is not None:
        uns["pixel_size_um"] = size_um

    def texts(values: Any) -> Any:  # of the type that anndata writes beside every pandas
        return pandas.Index(values, dtype=object)

    obs = {
        name: pandas.Categorical([value] * len(table), texts([value]))
        if isinstance(value, str)
        else np.full(len(table), value)
        for name, value in table.place.items()
    }
    values = np.empty((len(table), len(measured)))
    for number, name in enumerate(measured):
        values[:, number] = table[name]
    content = anndata.AnnData(
        X=values,
        obs=pandas.DataFrame(obs | {name: table[name] for name in about}, index=texts(names)),
        var=pandas.DataFrame(
            {"unit": texts([unit_of(name) for name in measured])}, index=texts(measured)
        ),
        obsm={"spatial": places * (size_um or 1.0)},
        uns=uns,
    )
    # Where a disk is full, h5py prints an error for every open part of the file; memory never is.
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        content.strings_to_categoricals()  # this and the next lines are `content.write_h5ad`
        anndata.io.write_elem(file, "/", content)
        file.pop("raw", None)  # empty, and of a type that anndata before 0.12 cannot read
    with writing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())
