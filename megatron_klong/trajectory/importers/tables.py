"""Parquet, Arrow and Feather files -> rows, read in small batches, one row in memory as Python objects at a time.

In a column of structures every row has every field of every other row, null where it had none: a tool call's
arguments would show the parameters of all other tools. So a null field is dropped, as absent is what it was.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.trajectory.importers.opening import Kind
from megatron_klong.trajectory.importers.refusal import Refusal, RefusalReason

_BATCH_ROWS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """size: its bytes in Arrow's memory."""

    row: dict[str, Any]
    size: int


def rows(path: Path, kind: Kind, max_bytes: int) -> Iterator[TableRow | Refusal]:
    """Every row; of one over the limit, and of a file that is damaged, the refusal."""
    import pyarrow

    number = 0
    try:
        for batch in _batches(path, kind):
            for index in range(batch.num_rows):
                one = batch.slice(index, 1)
                if one.nbytes > max_bytes:
                    detail = f"a row of more than {max_bytes:,} bytes, the limit on one transcript"
                    yield Refusal(source=f"{path}#{number}", reason=RefusalReason.TOO_LARGE, detail=detail)
                else:
                    (row,) = one.to_pylist(maps_as_pydicts="lossy")
                    yield TableRow(row=_without_nulls(row), size=one.nbytes)
                number += 1
    except UnicodeDecodeError as error:
        detail = f"text that is not UTF-8 ({error.reason}); rows from here on are not read"
        yield Refusal(source=f"{path}#{number}", reason=RefusalReason.NOT_UTF8, detail=detail)
    except (pyarrow.ArrowException, OSError) as error:
        detail = f"a damaged table: {str(error).splitlines()[0]}; the {number} rows before it are kept"
        yield Refusal(source=f"{path}#{number}", reason=RefusalReason.CORRUPT, detail=detail)


def _batches(path: Path, kind: Kind) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    if kind is Kind.PARQUET:
        with parquet.ParquetFile(path, pre_buffer=False) as table:
            for group in range(table.num_row_groups):  # one by one: damage to a later one does not reach the rows here
                yield from table.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False)
        return
    with pyarrow.memory_map(str(path)) as source:
        if kind is Kind.ARROW_STREAM:
            yield from map(_sound, pyarrow.ipc.open_stream(source))
            return
        table = pyarrow.ipc.open_file(source)
        for number in range(table.num_record_batches):
            yield _sound(table.get_batch(number))


def _sound(batch: Any) -> Any:
    """Raises ArrowInvalid for offsets that are damaged: pyarrow would follow them anywhere in memory."""
    batch.validate(full=True)
    return batch


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(field) for key, field in value.items() if field is not None}
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    return value
