"""Rows of results as Parquet: a table of one row per agent, with the stamp of its block and a checksum."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trpo_jax.config_pytree import Config
from trpo_jax.env_args import PREFIX
from trpo_jax.files import BLANK_SEAL, is_intact, sealed
from trpo_jax.sentences import UsageError, first_line
from trpo_jax.settings import setting_names, value_of


def encode_rows(columns: Mapping[str, Any], stamp: str) -> bytes:
    """The bytes of a file of rows; `columns` have one value or list per agent, and `stamp` says whose rows they are."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({name: _column(values) for name, values in columns.items()})
    data = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({"of": stamp, "checksum": BLANK_SEAL}), data, compression="zstd")
    return sealed(data.getvalue())


def settings_as_columns(configs: Sequence[Config]) -> Any:
    """Every setting of some points, as an Arrow record batch; text where a setting has several kinds of values."""
    import pyarrow as pa

    columns = {}
    for name in setting_names(configs):
        values = [value_of(config, name) for config in configs]
        kinds = {type(value) for value in values} - {type(None)}
        if len(kinds) > 1 and kinds != {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(values)
    return pa.record_batch(columns)


def read_rows(file: Path, columns: list[str] | None = None) -> Any:
    """Read a block's rows as a pyarrow table; raise `UsageError` if they were changed."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        data = file.read_bytes()
        if not is_intact(data):
            raise OSError("it was changed since it was written")
        return parquet.ParquetFile(io.BytesIO(data)).read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{file} is damaged ({first_line(error)}).") from error


def with_common_types(tables: list[Any]) -> list[Any]:
    """Let the columns of an environment setting that has numbers in some tables and words in others be text in all."""
    import pyarrow as pa

    kinds: dict[str, set[Any]] = {}
    for table in tables:
        for field in table.schema:
            if field.name.startswith(PREFIX) and not pa.types.is_null(field.type):
                kinds.setdefault(field.name, set()).add(field.type)
    is_number = lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind)  # noqa: E731
    mixed = {name for name, found in kinds.items() if len(found) > 1 and not all(map(is_number, found))}

    def cast(table: Any) -> Any:
        fields = [field.with_type(pa.string()) if field.name in mixed else field for field in table.schema]
        return table.cast(pa.schema(fields)) if mixed & set(table.column_names) else table

    return [cast(table) for table in tables]


def _column(values: Any) -> Any:
    """Make a column from one value per agent (masked: none), or from one list per agent."""
    import pyarrow as pa

    if isinstance(values, pa.Array):
        return values
    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, mask=np.ma.getmaskarray(values))
    return pa.array(values)
