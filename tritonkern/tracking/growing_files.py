"""Files of tracks that are whole while they grow, however the program ends, `kill -9` included."""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tritonkern._optional import how_to_install
from tritonkern.files import atomic_path
from tritonkern.tracking.stream import StreamOutput

if TYPE_CHECKING:
    import pyarrow as pa

HEADER = b"point,t,x,y,visible,confidence,seconds_from_the_start_of_stream\n"


class GrowingCsv:
    """A CSV file of tracks that is complete after every line.

    One line for each point and frame: `point,t,x,y,visible,confidence,seconds_from_the_start_of_stream`, where point
    is the id. All lines have 64 bytes, numbers with leading zeros: the system copies what is written page by page, and
    no line is in two pages.

    Raises:
        ValueError: another process is writing to the file.
        OSError: the file cannot be written; the lines before stay.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._size = 0
        _lock(self._file, path)
        os.ftruncate(self._file, 0)
        self._write(HEADER)

    def append(self, out: StreamOutput, number: int, seconds: float) -> None:
        """The points of one frame, which has this number and time in the source."""
        rows = zip(out.ids.tolist(), out.xy.tolist(), out.visible.tolist(), out.confidence.tolist(), strict=True)
        lines = (
            f"{point:07d},{number:09d},{x:010.3f},{y:010.3f},{visible:d},{confidence:.3f},{seconds:015.3f}\n"
            for point, (x, y), visible, confidence in rows
        )
        text = "".join(lines).encode()
        if len(text) != len(HEADER) * len(out.ids):
            raise ValueError("a number has too many digits for the file: restart the stream")
        self._write(text)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def __enter__(self) -> GrowingCsv:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


class GrowingParquet:
    """A folder of Parquet files that together are one table of tracks.

    A single Parquet file cannot be read before its end is written. The rows are therefore collected and written as
    `part-000001.parquet`, `part-000002.parquet` and so on, each after `MOST_ROWS` rows or, with the next frame, after
    `MOST_SECONDS` seconds; a file has its name once it is complete. What is not written yet is lost by `kill -9`, and
    written when the stream ends in any other way.

    The columns are those of `GrowingCsv`. Parts of an earlier run are removed.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: the folder holds other files, or another process is writing to it.
        OSError: the folder cannot be made; while it grows, a part cannot be written, and the parts before stay.
    """

    MOST_ROWS = 100_000
    MOST_SECONDS = 10.0

    def __init__(self, folder: Path) -> None:
        try:
            import pyarrow as pa
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Parquet files need the package pyarrow: {how_to_install('label')}", name="pyarrow"
            ) from error
        numbers = {"point": pa.int64(), "t": pa.int64(), "x": pa.float32(), "y": pa.float32(), "visible": pa.bool_()}
        numbers |= {"confidence": pa.float32(), "seconds_from_the_start_of_stream": pa.float64()}
        self._schema = pa.schema(list(numbers.items()))
        self.folder = folder
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        foreign = [name for name in names if not re.fullmatch(r"part-\d{6,}\.parquet|\.tritonkern-.*\.part", name)]
        if foreign:
            raise ValueError(
                f"{folder} holds other files, such as {foreign[0]}: give an empty folder or that of an earlier run"
            )
        self._open = os.open(folder, os.O_RDONLY)
        _lock(self._open, folder)
        for name in names:
            (folder / name).unlink()
        self._parts = self._count = 0
        self._waiting: list[pa.RecordBatch] = []
        self._last = time.monotonic()

    def append(self, out: StreamOutput, number: int, seconds: float) -> None:
        """The points of one frame, which has this number and time in the source."""
        import pyarrow as pa

        count = len(out.ids)
        columns: list[Any] = [out.ids, [number] * count, *out.xy.T, out.visible, out.confidence, [seconds] * count]
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._count += count
        if self._count >= self.MOST_ROWS or time.monotonic() - self._last >= self.MOST_SECONDS:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._count:
            self._parts += 1
            with atomic_path(self.folder / f"part-{self._parts:06d}.parquet") as part:
                pq.write_table(pa.Table.from_batches(self._waiting, self._schema).combine_chunks(), part)
        self._waiting, self._count = [], 0
        self._last = time.monotonic()

    def __enter__(self) -> GrowingParquet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._write()
        finally:
            os.close(self._open)


def _lock(file: int, path: Path) -> None:
    """Until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"another run is writing to {path}: wait for it, or give another path to --out") from None
