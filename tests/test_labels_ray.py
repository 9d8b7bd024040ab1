"""Labelling with Ray Data: an actor and the driver are killed, and nothing is lost, doubled or computed again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_labels import Options, options, rows_of, started, videos  # noqa: F401

ray = pytest.importorskip("ray", reason="the extra ray is not installed")

from tritonkern.integrations.ray import label_with_ray  # noqa: E402
from tritonkern.tracking.labels import LabelFolder, read_manifest  # noqa: E402

_DRIVER = """
import os, sys
sys.path.insert(0, {tests!r})
os.environ["PYTHONPATH"] = os.pathsep.join([{tests!r}, {root!r}])
from test_labels_ray import label
from test_labels import Options
print(label({manifest!r}, {out!r}, Options(grid=2, log={log!r})))
"""


def label(manifest, out, options):  # noqa: F811
    with LabelFolder(out, options) as folder:
        label_with_ray(manifest, folder, options)
        return folder.finish()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_kills(tmp_path, videos, options, kind):  # noqa: F811
    names = ["a", "b", "once", "broken", "waits", "f"]
    clips = videos(*names)
    manifest = tmp_path / "m.csv"
    manifest.write_text("id,video\n" + "".join(f"{clip.id},{clip.video}\n" for clip in clips))
    if kind == "parquet":
        import pyarrow.csv
        import pyarrow.parquet

        table = pyarrow.csv.read_csv(manifest)
        manifest = tmp_path / "m.parquet"
        pyarrow.parquet.write_table(table, manifest)
    assert len(read_manifest(manifest)) == len(names)
    out, tests = tmp_path / "out", Path(__file__).parent
    values = dict(tests=str(tests), root=str(tests.parent), manifest=str(manifest), out=str(out), log=options.log)
    command = [sys.executable, "-c", _DRIVER.format(**values)]
    driver = subprocess.Popen(command, start_new_session=True)
    try:
        # "once" kills its actor, whose clip another actor takes; "waits" is under way when the driver is killed.
        deadline = time.time() + 120
        while "waits" not in started(options) or len(list((out / "_unmerged").glob("*.parquet"))) < 4:
            assert time.time() < deadline and driver.poll() is None, started(options)
            time.sleep(0.2)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)  # and the daemons of its cluster
        driver.wait()
    assert rows_of(out) == {}
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert again.stdout.split()[-1] == "1"
    rows = rows_of(out)
    assert set(rows) == set(names)
    assert {name for name, row in rows.items() if row["error"]} == {"broken"}
    assert sorted(started(options)) == sorted(["a", "b", "once", "once", "waits", "waits", "f"])
