"""Turn the rows of parquet files and of `datasets` into Python values, as they are stored.

No image or sound is decoded. What `datasets` stores as JSON text (its `Json` feature, for values
without a common type) becomes what the text says.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megablocks_utils.errors import DataError
from megablocks_utils.training.data.json_reader import decode_json

if TYPE_CHECKING:
    import pyarrow

__all__ = ["JsonObject", "as_json_objects", "read_parquet", "table_rows"]


class JsonObject(dict[str, Any]):
    """Mark an object read from JSON text in a typed table: its nulls are its own, not padding."""


def as_json_objects(value: Any) -> Any:
    """Return a decoded JSON value with every object in it marked as a `JsonObject`."""
    if isinstance(value, dict):
        return JsonObject((key, as_json_objects(item)) for key, item in value.items())
    if isinstance(value, list):
        return [as_json_objects(item) for item in value]
    return value


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: the file is no readable parquet, or two of its columns have one name.
    """
    import pyarrow

    try:
        if path.stat().st_size == 0:
            raise _source_error(f"data_path {path} is empty")
        yield from _file_rows(path)
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split())
        raise _source_error(f"data_path {path} cannot be read as parquet: {reason}") from error


def table_rows(table: "pyarrow.Table | pyarrow.RecordBatch", source: str) -> list[dict[str, Any]]:
    """Return the rows of a table; ``source`` is named where its JSON text is none."""
    rows = table.to_pylist(maps_as_pydicts="strict")
    for field in table.schema:
        place = f"{source}, column {field.name}"
        if _holds_json(field.type):
            for row in rows:
                row[field.name] = _decode(row[field.name], field.type, place)
    return rows


def _source_error(message: str) -> DataError:
    return DataError(message, parameters=("data_path",))


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path, page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two of its columns are named {twice!r}")
        for batch in file.iter_batches():
            yield from table_rows(batch, str(path))


def _holds_json(kind: "pyarrow.DataType") -> bool:
    return "extension<arrow.json" in str(kind)


def _decode(value: Any, kind: "pyarrow.DataType", place: str) -> Any:
    """Decode the JSON texts within a value of an Arrow type that holds some."""
    from pyarrow import types

    if value is None or not _holds_json(kind):
        return value
    if types.is_struct(kind):
        return {f.name: _decode(value[f.name], f.type, place) for f in kind}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [_decode(item, kind.value_type, place) for item in value]
    return as_json_objects(decode_json(value, place))
