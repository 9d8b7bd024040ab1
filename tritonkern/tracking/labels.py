"""Tracks of many videos: a manifest in, Parquet files with one row group per clip out, and runs that can be killed.

A folder of labels holds `tracks-00000.parquet`, `tracks-00001.parquet`, ... with up to `CLIPS_PER_FILE` clips each,
which appear complete under their names. A clip that is finished is first a file of its own in `_unmerged`; these files
are put together in passing and at the end. Programs that read the folder leave out names that begin with an underscore.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tritonkern._optional import how_to_install
from tritonkern.files import atomic_path
from tritonkern.tracking.predictor import VISIBLE, PointTracker
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.video import VideoReader

try:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"labels are Parquet files, which need the package pyarrow: {how_to_install('label')}", name="pyarrow"
    ) from error

CLIPS_PER_FILE = 1000
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
_TEXT = ("id", "video", "queries")
_PER_FRAME = {"x": pa.float32(), "y": pa.float32(), "visible": pa.bool_(), "confidence": pa.float32()}
SCHEMA = pa.schema(
    [(name, pa.string()) for name in (*_TEXT, "error")]
    + [("fps", pa.float64()), ("width", pa.int32()), ("height", pa.int32()), ("frames", pa.int32())]
    + [("query_t", pa.list_(pa.int32())), ("query_x", pa.list_(pa.float32())), ("query_y", pa.list_(pa.float32()))]
    + [(name, pa.list_(pa.list_(kind))) for name, kind in _PER_FRAME.items()]
)
"""Columns of the labels. `id`, `video` and `queries` are those of the manifest; `error` is null where the clip was
tracked, and all that follows is null where it was not. `x[n][t]` is point n in frame t, in pixels as in `PointTracks`.
"""


class Clip(NamedTuple):
    """A row of a manifest, as it is written there."""

    id: str
    video: str
    queries: str
    """Path of a file of queries, or empty for a grid."""


@dataclass(frozen=True)
class LabelOptions:
    """How every clip is tracked: the arguments of `PointTracker`, of its call and of `VideoReader`."""

    model: str = "nano"
    weights: tuple[str, ...] = ()
    device: str | None = None
    grid: int | None = None
    max_frames: int | None = None
    stride: int = 1
    min_confidence: float = VISIBLE

    def tracker(self) -> PointTracker:
        return PointTracker(self.model, list(self.weights) or None, self.device)


def manifest_columns(path: str | PathLike[str]) -> tuple[list[str], pa.Table]:
    """The text columns that a manifest has, and these columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no CSV or Parquet file with a text column `video`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .csv or .parquet file with a column video")
    try:
        if path.suffix.lower() == ".csv":
            table = pa.csv.read_csv(path, convert_options=csv_options())
        elif path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        else:
            raise ValueError(f"{path} is neither .csv nor .parquet: write a manifest as one of them")
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file: {error}") from error
    names = [name for name in _TEXT if name in table.column_names]
    if "video" not in names:
        raise ValueError(f"{path} must have a column video, got the columns {', '.join(table.column_names)}")
    for name in names:
        kind = table.schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise ValueError(f"{path}: column {name} must be text, got {kind}; convert it to strings")
    return names, table.select(names)


def csv_options() -> pa.csv.ConvertOptions:
    """Text columns stay text: an id 007 is not the number 7."""
    return pa.csv.ConvertOptions(column_types={name: pa.string() for name in _TEXT})


def read_manifest(path: str | PathLike[str]) -> list[Clip]:
    """The clips of a manifest: a CSV or Parquet file with the columns `video`, and if wanted `id` and `queries`.

    `video` and `queries` are paths, absolute or from the folder of the manifest. Without a column `id` the path of the
    video identifies a clip. Other columns are ignored.

    Raises:
        FileNotFoundError: the manifest, or a file that it names, does not exist.
        ValueError: the file is damaged or empty, a column is missing or no text, an id is missing or there twice.
    """
    names, table = manifest_columns(path)
    columns = {name: table[name].to_pylist() for name in names}
    videos = columns["video"]
    rows = zip(columns.get("id", videos), videos, columns.get("queries", [None] * len(videos)), strict=True)
    clips = [Clip(id, video, queries or "") for id, video, queries in rows]
    if not clips:
        raise ValueError(f"{path} has no clip: give at least one row")
    lines: dict[str, int] = {}
    for line, clip in enumerate(clips, start=1):
        if not clip.id or not clip.video:
            raise ValueError(f"{path}, row {line}: {'video' if not clip.video else 'id'} is empty")
        if (first := lines.setdefault(clip.id, line)) != line:
            raise ValueError(f"{path}, rows {first} and {line} have the same id {clip.id!r}: ids must be unique")
    base = Path(path).parent
    named = (name for clip in clips for name in (clip.video, clip.queries) if name)
    missing = [name for name in named if not os.path.exists(base / name)]
    if missing:
        raise FileNotFoundError(
            f"{path} names {len(missing)} files that do not exist, first {base / missing[0]}; paths are relative to "
            "the folder of the manifest"
        )
    return clips


def label_clip(tracker: PointTracker, clip: Clip, base: Path, options: LabelOptions) -> pa.Table:
    """The row of one clip, whose paths are relative to `base`.

    A video or a file of queries that cannot be used gives a row with `error`. Other errors, such as those of a device
    or a full disk, would be the same for every clip, and are raised.
    """
    try:
        result = tracker(
            VideoReader(base / clip.video, options.stride),
            grid=None if clip.queries else options.grid,
            queries=base / clip.queries if clip.queries else None,
            max_frames=options.max_frames,
            min_confidence=options.min_confidence,
        )
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "OutOfMemoryError":
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            raise
        return error_row(clip, str(error) or type(error).__name__)
    return _table(clip, None, result)


def error_row(clip: Clip, error: str) -> pa.Table:
    """The row of a clip that could not be tracked."""
    return _table(clip, error, None)


def _table(clip: Clip, error: str | None, result: PointTracks | None) -> pa.Table:
    columns: dict[str, Any] = {**clip._asdict(), "queries": clip.queries or None, "error": error}
    if result is not None:
        columns |= {"fps": result.fps, "width": result.size[0], "height": result.size[1]}
        columns |= {"frames": result.visibility.shape[1]}
        columns |= {f"query_{name}": result.queries[:, axis] for axis, name in enumerate("txy")}
        columns |= {"x": _nested(result.tracks[..., 0]), "y": _nested(result.tracks[..., 1])}
        columns |= {"visible": _nested(result.visibility), "confidence": _nested(result.confidence)}
    cells = [columns.get(field.name) for field in SCHEMA]
    arrays = [
        cell if isinstance(cell, pa.Array) else pa.array([cell], field.type)
        for cell, field in zip(cells, SCHEMA, strict=True)
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _nested(values: np.ndarray) -> pa.Array:
    """`[N, T]` as one cell, a list of N lists."""
    count, frames = values.shape
    rows = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * frames, pa.array(values.ravel()))
    return pa.ListArray.from_arrays(np.array([0, count], dtype=np.int32), rows)


class LabelFolder:
    """A folder of labels, locked while it is open, with what an earlier run left in it.

    Args:
        folder: made if it does not exist; otherwise it must hold nothing but an earlier run.
        options: those of an earlier run must be the same, except for the device.

    Raises:
        ValueError: the folder holds other files, was made with other options, or another run is writing to it.
    """

    def __init__(self, folder: str | PathLike[str], options: LabelOptions) -> None:
        self.folder = Path(folder)
        self.unmerged_folder = self.folder / "_unmerged"
        self.checkpoint_folder = self.folder / "_checkpoint"
        self._settings = {name: value for name, value in asdict(options).items() if name != "device"}
        self._settings["weights"] = list(options.weights)
        self._merged: set[str] = set()
        self._unmerged: dict[str, Path] = {}

    def __enter__(self) -> LabelFolder:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_contents()
        self._lock = open(self.folder / "_lock", "w")
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run is writing to {self.folder}: wait for it, or give another folder"
                ) from None
            self._check_settings()
            self.unmerged_folder.mkdir(exist_ok=True)
            self._remove_parts()
            for path in self._files():
                self._merged.update(pq.read_table(path, columns=["id"])["id"].to_pylist())
            self.scan()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                self.merge()  # so that what is finished can be read
        finally:
            self._lock.close()

    @property
    def done(self) -> set[str]:
        """Ids of the finished clips."""
        return self._merged | self._unmerged.keys()

    def clip_path(self, clip: Clip) -> Path:
        """Where the row of a finished clip is written."""
        return self.unmerged_folder / f"{hashlib.sha256(clip.id.encode()).hexdigest()[:32]}.parquet"

    def add(self, clip: Clip) -> None:
        """Take note of a clip whose file is complete."""
        self._unmerged[clip.id] = self.clip_path(clip)
        if len(self._unmerged) >= CLIPS_PER_FILE:
            self.merge()

    def scan(self) -> None:
        """Find the files of finished clips; those of other writers may be cut off or there twice, and are removed."""
        self._unmerged = {}
        for path in sorted(self.unmerged_folder.glob("*.parquet")):
            try:
                (clip,) = pq.read_table(path, columns=["id"])["id"].to_pylist()
            except (pa.ArrowInvalid, OSError, ValueError):
                clip = None
            if clip is None or clip in self._merged or clip in self._unmerged:
                path.unlink()
            else:
                self._unmerged[clip] = path

    def merge(self) -> None:
        """Put the files of single clips together, one row group per clip."""
        while self._unmerged:
            part_of = dict(list(self._unmerged.items())[:CLIPS_PER_FILE])
            numbers = [int(path.stem.removeprefix("tracks-")) for path in self._files()]
            target = self.folder / f"tracks-{max(numbers, default=-1) + 1:05d}.parquet"
            with atomic_path(target) as part, pq.ParquetWriter(part, SCHEMA) as writer:
                for path in part_of.values():
                    writer.write_table(pq.read_table(path))
            self._merged.update(part_of)
            for clip, path in part_of.items():
                path.unlink()
                del self._unmerged[clip]

    def finish(self) -> int:
        """Merge what is left and return how many clips of the folder have an error."""
        self.merge()
        self._remove_parts()
        self.unmerged_folder.rmdir()
        shutil.rmtree(self.checkpoint_folder, ignore_errors=True)
        errors = (pq.read_table(path, columns=["error"])["error"] for path in self._files())
        return sum(len(column) - column.null_count for column in errors)

    def _remove_parts(self) -> None:
        """Remove what processes that were killed while they wrote have left."""
        for folder in (self.folder, self.unmerged_folder):
            for part in folder.glob(".tritonkern-*.part"):
                part.unlink()

    def _files(self) -> Iterable[Path]:
        return sorted(self.folder.glob("tracks-*.parquet"))

    def _check_contents(self) -> None:
        own = re.compile(r"tracks-\d{5,}\.parquet|_lock|_settings\.json|_unmerged|_checkpoint|\.tritonkern-.*\.part")
        names = sorted(path.name for path in self.folder.iterdir())
        foreign = [name for name in names if not own.fullmatch(name)]
        if not foreign and names and "_lock" not in names:
            foreign = names
        if foreign:
            raise ValueError(
                f"{self.folder} holds other files, such as {foreign[0]}: give an empty folder or that of an earlier run"
            )

    def _check_settings(self) -> None:
        path = self.folder / "_settings.json"
        if not path.exists():
            with atomic_path(path) as part:
                part.write_text(json.dumps(self._settings, indent=1) + "\n")
        before = json.loads(path.read_text())
        differing = [name for name in self._settings if self._settings[name] != before.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{self.folder} was made with {name}={before.get(name)}, and this call has {name}="
                f"{self._settings[name]}: give the same options, or another folder"
            )
