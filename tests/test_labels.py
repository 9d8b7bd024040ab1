"""`tritonkern label`: manifests, folders of labels, processes that are killed, and what other programs read."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from clips import ColourTracker, square_clip, write_clip
from typer.testing import CliRunner

from tritonkern.cli import app
from tritonkern.tracking import PointTracker

pa = pytest.importorskip("pyarrow", reason="labels need pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from tritonkern.tracking import labels  # noqa: E402
from tritonkern.tracking.label_workers import label_in_processes  # noqa: E402
from tritonkern.tracking.labels import Clip, LabelFolder, LabelOptions, label_clip, read_manifest  # noqa: E402


class Watched:
    """Notes each clip in a file when it starts; sleeps, kills its own process or waits where the name says so."""

    def __init__(self, log):
        self.log, self.tracker = Path(log), PointTracker(ColourTracker(), device="cpu")

    def __call__(self, reader, **options):
        name = Path(reader.name).stem
        with open(self.log, "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        starts = self.log.read_text().split().count(name)
        if name.startswith("dies") or (name.startswith("once") and starts == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(30 if name.startswith("waits") and starts == 1 else 0)
        return self.tracker(reader, **options)


@dataclass(frozen=True)
class Options(LabelOptions):
    log: str = ""

    def tracker(self):
        return Watched(self.log)


def started(options):
    log = Path(options.log)
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def options(tmp_path):
    return Options(grid=2, log=str(tmp_path / "log"))


@pytest.fixture
def videos(tmp_path):
    """Makes clips of the same video by their names; "broken" is no video."""

    def make(*names):
        source = write_clip(tmp_path / "source.mp4", square_clip(3))
        clips = []
        for name in names:
            path = tmp_path / f"{name}.mp4"
            path.write_bytes(b"no video" if name == "broken" else source.read_bytes())
            clips.append(Clip(name, path.name, ""))
        return clips

    return make


def rows_of(folder):
    """By id, and how often each is there."""
    tables = [pq.read_table(path) for path in sorted(Path(folder).glob("*.parquet"))]
    rows = pa.concat_tables(tables).to_pylist() if tables else []
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def run(clips, out, options, workers=1):
    with LabelFolder(out, options) as folder:
        todo = [clip for clip in clips if clip.id not in folder.done]
        label_in_processes(todo, Path(options.log).parent, folder, options, workers)
        return folder.finish()


def test_label_clip_is_what_the_tracker_says(tmp_path, videos, options):
    (clip,) = videos("a")
    tracker = PointTracker(ColourTracker(), device="cpu")
    expected = tracker(tmp_path / "a.mp4", grid=2)
    table = label_clip(tracker, clip, tmp_path, options)
    assert table.schema == labels.SCHEMA
    (row,) = table.to_pylist()
    assert (row["id"], row["video"], row["queries"], row["error"]) == ("a", "a.mp4", None, None)
    assert (row["fps"], row["width"], row["height"], row["frames"]) == (10, 96, 64, 3)
    np.testing.assert_array_equal(np.stack([row["x"], row["y"]], -1), expected.tracks)
    np.testing.assert_array_equal(row["visible"], expected.visibility)
    np.testing.assert_array_equal(np.float32(row["confidence"]), expected.confidence)
    np.testing.assert_array_equal(np.stack([row[f"query_{x}"] for x in "txy"], -1), expected.queries)


def test_queries_of_a_clip(tmp_path, videos, options):
    (clip,) = videos("a")
    (tmp_path / "points.csv").write_text("t,x,y\n1,20,32\n")
    tracker = PointTracker(ColourTracker(), device="cpu")
    (row,) = label_clip(tracker, clip._replace(queries="points.csv"), tmp_path, options).to_pylist()
    assert (row["query_t"], row["query_x"], row["query_y"], len(row["x"])) == ([1], [20], [32], 1)
    (tmp_path / "points.csv").write_text("t,x,y\n1,200,32\n")
    (row,) = label_clip(tracker, clip._replace(queries="points.csv"), tmp_path, options).to_pylist()
    assert "line 2" in row["error"] and row["x"] is None


def test_errors_of_the_device_are_raised(tmp_path, videos, options):
    (clip,) = videos("a")
    for error in (RuntimeError("the device is gone"), OSError(errno.ENOSPC, "the disk is full")):

        class Broken(ColourTracker):
            def features(self, video, error=error):
                raise error

        with pytest.raises(type(error), match="the d"):
            label_clip(PointTracker(Broken(), device="cpu"), clip, tmp_path, options)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest(tmp_path, videos, kind):
    videos("a", "b")
    (tmp_path / "points.csv").write_text("0,1,1\n")
    columns = {"note": [1, 2], "id": ["007", "x"], "video": ["a.mp4", "b.mp4"], "queries": ["", "points.csv"]}
    path = tmp_path / f"manifest.{kind}"
    if kind == "csv":
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.table(columns | {"queries": [None, "points.csv"]}), path)
    assert read_manifest(path) == [Clip("007", "a.mp4", ""), Clip("x", "b.mp4", "points.csv")]
    (tmp_path / "short.csv").write_text("video\na.mp4\n")
    assert read_manifest(tmp_path / "short.csv") == [Clip("a.mp4", "a.mp4", "")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.csv", None, "none.csv does not exist"),
        ("m.txt", "video\n", "neither .csv nor .parquet"),
        ("m.csv", "file\na.mp4\n", "must have a column video, got the columns file"),
        ("m.csv", "video\n", "has no clip"),
        ("m.csv", "id,video\n1,a.mp4\n1,a.mp4\n", "rows 1 and 2 have the same id '1'"),
        ("m.csv", "id,video\n,a.mp4\n", "row 1: id is empty"),
        ("m.csv", "video\na.mp4\ngone.mp4\n", "names 1 files that do not exist, first .*gone.mp4"),
        ("m.csv", "video,queries\na.mp4,gone.csv\n", "first .*gone.csv"),
        ("m.csv", "a,b\n1\n", "is not a readable .csv file"),
        ("m.parquet", "no parquet", "is not a readable .parquet file"),
    ],
)
def test_bad_manifests(tmp_path, videos, name, text, message):
    videos("a")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_manifest(tmp_path / name)


def test_ids_of_a_parquet_manifest_are_text(tmp_path):
    pq.write_table(pa.table({"id": [1], "video": ["a.mp4"]}), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="column id must be text, got int64"):
        read_manifest(tmp_path / "m.parquet")


class TestFolder:
    def fill(self, folder, *names):
        for name in names:
            clip = Clip(name, f"{name}.mp4", "")
            pq.write_table(labels.error_row(clip, "none"), folder.clip_path(clip))
            folder.add(clip)

    def test_an_interrupted_run_can_be_read(self, tmp_path, options):
        with pytest.raises(KeyboardInterrupt), LabelFolder(tmp_path / "out", options) as folder:
            self.fill(folder, "a", "b")
            raise KeyboardInterrupt
        assert set(rows_of(tmp_path / "out")) == {"a", "b"}
        with LabelFolder(tmp_path / "out", options) as folder:
            assert folder.done == {"a", "b"}

    def test_one_row_group_per_clip(self, tmp_path, options, monkeypatch):
        monkeypatch.setattr(labels, "CLIPS_PER_FILE", 3)
        with LabelFolder(tmp_path / "out", options) as folder:
            self.fill(folder, *"abcd")
            assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["tracks-00000.parquet"]
            assert folder.done == set("abcd")
            assert folder.finish() == 4
        files = [pq.ParquetFile(path).metadata for path in sorted((tmp_path / "out").glob("*.parquet"))]
        assert [(file.num_rows, file.num_row_groups) for file in files] == [(3, 3), (1, 1)]
        assert sorted(path.name for path in (tmp_path / "out").iterdir())[:2] == ["_lock", "_settings.json"]

    def test_what_a_kill_leaves(self, tmp_path, options):
        """A file that is cut off, a hidden one, and one that was merged but not removed."""
        with LabelFolder(tmp_path / "out", options) as folder:
            self.fill(folder, "a", "b")
            left = folder.clip_path(Clip("a", "", "")).read_bytes()
            folder.merge()
            folder.clip_path(Clip("a", "", "")).write_bytes(left)
            folder.clip_path(Clip("c", "", "")).write_bytes(left[: len(left) // 2])
            (folder.unmerged_folder / "of-another-writer.parquet").write_bytes(left)
            (folder.unmerged_folder / ".tritonkern-1-0.part").write_bytes(left)
        with LabelFolder(tmp_path / "out", options) as folder:
            assert folder.done == {"a", "b"}
            assert list(folder.unmerged_folder.iterdir()) == []
            # Of a process of this run
            (folder.unmerged_folder / ".tritonkern-1-0.part").write_bytes(left)
            folder.finish()
        assert set(rows_of(tmp_path / "out")) == {"a", "b"}

    def test_refused(self, tmp_path, options):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").touch()
        with (
            pytest.raises(ValueError, match="holds other files, such as notes.txt"),
            LabelFolder(tmp_path / "full", options),
        ):
            pass
        (tmp_path / "full" / "notes.txt").rename(tmp_path / "full" / "tracks-00000.parquet")
        with (
            pytest.raises(ValueError, match="holds other files, such as tracks-0"),
            LabelFolder(tmp_path / "full", options),
        ):
            pass
        out = tmp_path / "out"
        with LabelFolder(out, options):
            with pytest.raises(ValueError, match="another run is writing"), LabelFolder(out, options):
                pass
        with pytest.raises(ValueError, match="grid=2, and this call has grid=3"), LabelFolder(out, Options(grid=3)):
            pass


@pytest.mark.slow
class TestProcesses:
    def test_two_workers(self, tmp_path, videos, options):
        clips = videos("a", "broken", "c", "once", "dies", "f")
        assert run(clips, tmp_path / "out", options, workers=2) == 2
        rows = rows_of(tmp_path / "out")
        assert set(rows) == {clip.id for clip in clips}
        assert {name for name, row in rows.items() if row["error"]} == {"broken", "dies"}
        assert "ended twice" in rows["dies"]["error"]
        assert rows["a"]["x"] == rows["c"]["x"] == rows["once"]["x"]
        # Only what was under way in a process that died was started again.
        assert sorted(started(options)) == sorted(["a", "c", "f", "once", "once", "dies", "dies"])
        assert run(clips, tmp_path / "out", options, workers=2) == 2  # nothing is left to do
        assert len(started(options)) == 7

    def test_a_killed_driver(self, tmp_path, videos, options):
        clips = videos("a", "b", "waits", "d")
        program = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_labels as t\n"
            f"clips = [t.Clip(*row) for row in {[tuple(clip) for clip in clips]!r}]\n"
            f"t.run(clips, {str(tmp_path / 'out')!r}, t.Options(grid=2, log={options.log!r}))"
        )
        driver = subprocess.Popen([sys.executable, "-c", program])
        try:
            for _ in range(600):
                if "waits" in started(options):
                    break
                time.sleep(0.1)
            worker = int(Path(options.log).read_text().split()[-1])
        finally:
            driver.kill()
            driver.wait()
        for _ in range(100):  # its worker ends as well
            with contextlib.suppress(OSError):
                if Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
                    time.sleep(0.1)
                    continue
            break
        else:
            raise AssertionError("the worker of a killed driver lives on")
        assert rows_of(tmp_path / "out") == {}
        run(clips, tmp_path / "out", options)
        assert set(rows_of(tmp_path / "out")) == {"a", "b", "waits", "d"}
        assert started(options) == ["a", "b", "waits", "waits", "d"]

    def test_command(self, tmp_path, videos):
        videos("a", "broken")
        (tmp_path / "m.csv").write_text("id,video\none,a.mp4\ntwo,broken.mp4\n")
        command = ["label", str(tmp_path / "m.csv"), "--out", str(tmp_path / "out"), "--grid", "2", "--max-frames", "2"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "2 clips, of which 0 were done before; rows with an error: 1" in result.output
        rows = rows_of(tmp_path / "out")
        assert rows["one"]["frames"] == 2 and "broken.mp4" in rows["two"]["error"]
        assert json.loads((tmp_path / "out" / "_settings.json").read_text())["model"] == "nano"
        assert "of which 2 were done before" in CliRunner().invoke(app, command).output
        result = CliRunner().invoke(app, [*command[:-3], "3"])
        assert result.exit_code == 2 and "grid=2, and this call has grid=3" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.csv"], "gone.csv does not exist"),
        (["m.csv", "--workers", "0"], "not a whole number of 1 or more"),
        (["m.csv", "--model", "none"], "none"),
    ],
)
def test_wrong_commands(tmp_path, videos, monkeypatch, arguments, message):
    videos("a")
    (tmp_path / "m.csv").write_text("video\na.mp4\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["label", "--out", "out", *arguments])
    assert result.exit_code == 2 and message in result.output
    assert not (tmp_path / "out").exists()


def test_other_programs(tmp_path, videos, options):
    """pandas, DuckDB and Polars, those that are installed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_unmerged").mkdir()
    tracker = PointTracker(ColourTracker(), device="cpu")
    with pq.ParquetWriter(tmp_path / "out" / "tracks-00000.parquet", labels.SCHEMA) as writer:
        for clip in videos("a", "broken"):
            writer.write_table(label_clip(tracker, clip, tmp_path, options))
    found = []
    with contextlib.suppress(ModuleNotFoundError):
        import pandas

        frame = pandas.read_parquet(tmp_path / "out")
        assert np.stack(frame.x[0]).shape == (4, 3) and "broken.mp4" in frame.error[1]
        found.append("pandas")
    with contextlib.suppress(ModuleNotFoundError):
        import duckdb

        rows = duckdb.sql(f"SELECT id, unnest(x) AS x FROM '{tmp_path}/out/*.parquet' WHERE error IS NULL").fetchall()
        assert [(name, len(x)) for name, x in rows] == [("a", 3)] * 4
        found.append("duckdb")
    with contextlib.suppress(ModuleNotFoundError):
        import polars

        assert polars.read_parquet(f"{tmp_path}/out/*.parquet").explode("x").height == 5
        found.append("polars")
    if not found:
        pytest.skip("none of pandas, DuckDB and Polars is installed")
