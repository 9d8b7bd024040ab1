"""The two pages: report.html, also in a browser where there is one, and the page of `tritonkern pick`."""

import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
from clips import ColourTracker, square_clip

from tritonkern.tracking import PointTracker, PointTracks, VideoReader, read_queries, write_report
from tritonkern.tracking import report as report_module
from tritonkern.tracking.pick import pick_points

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def made(count=5, frames=8, size=(96, 64)):
    """Tracks that stand still, are ever less sure, and of which the last one jumps."""
    generator = np.random.default_rng(0)
    start = generator.uniform(8, 56, (count, 1, 2)).astype(np.float32)
    tracks = np.repeat(start, frames, axis=1)
    tracks[-1, 4:, 0] += 30
    confidence = np.repeat(np.linspace(1, 0.6, count, dtype=np.float32)[:, None], frames, axis=1)
    confidence[1, 1] = 0
    queries = np.concatenate([np.zeros((count, 1), np.float32), tracks[:, 0]], axis=1)
    return PointTracks(tracks, confidence >= 0.5, confidence, queries, 10.0, size)


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


class TestReport:
    def test_contents(self, tmp_path):
        tracks = made()
        calls = []
        write_report(tmp_path / "report.html", square_clip(), tracks, lambda *call: calls.append(call))
        assert calls == [("report", n, 8) for n in range(1, 9)]
        page = (tmp_path / "report.html").read_text()
        data = data_of(page)
        # The one that jumps, then by mean confidence.
        order = [4, 3, 1, 2, 0]
        assert data["points"] == order and data["jumps"] == [1, 0, 0, 0, 0]
        positions = np.frombuffer(base64.b64decode(data["tracks"]), "<f4").reshape(5, 8, 2)
        np.testing.assert_array_equal(positions, tracks.tracks[order])
        visible = np.frombuffer(base64.b64decode(data["visible"]), np.uint8).reshape(5, 8)
        np.testing.assert_array_equal(visible, tracks.visibility[order])
        (tmp_path / "video.mp4").write_bytes(base64.b64decode(data["video"]))
        assert len(list(VideoReader(tmp_path / "video.mp4").frames())) == 8

    def test_it_needs_no_network(self, tmp_path):
        write_report(tmp_path / "report.html", square_clip(), made())
        page = (tmp_path / "report.html").read_text()
        assert not re.search(r"https?://|//cdn|@import|url\(", page)
        assert "default-src 'none'" in page

    def test_a_large_video_becomes_smaller(self, tmp_path):
        source = np.zeros((2, 1280, 720, 3), np.uint8)
        write_report(tmp_path / "r.html", source, made(2, 2, (720, 1280)))
        (tmp_path / "v.mp4").write_bytes(base64.b64decode(data_of((tmp_path / "r.html").read_text())["video"]))
        assert VideoReader(tmp_path / "v.mp4").size == (360, 640)

    def test_a_name_cannot_add_to_the_page(self, tmp_path):
        reader = VideoReader(square_clip())
        reader.name = "<img src=x>.mp4"
        write_report(tmp_path / "r.html", reader, made())
        assert "<img src=x>" not in (tmp_path / "r.html").read_text()

    def test_many_points(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report_module, "_MOST_POINTS", 2)
        write_report(tmp_path / "r.html", square_clip(), made())
        page = (tmp_path / "r.html").read_text()
        assert data_of(page)["points"] == [4, 3] and "the worst 2 of 5 points" in page

    def test_many_frames(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report_module, "_MOST_FRAMES", 3)
        write_report(tmp_path / "r.html", square_clip(), made())
        page = (tmp_path / "r.html").read_text()
        assert data_of(page)["frames"] == 3 and "5 points, the first 3 of 8 frames" in page

    def test_another_video(self, tmp_path):
        with pytest.raises(ValueError, match="the tracks come from a video of"):
            write_report(tmp_path / "r.html", square_clip(size=(64, 64)), made())
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    @pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
    def test_in_a_browser(self, tmp_path):
        """The page draws, lists and switches points; a script of the test writes what it finds into the title."""
        tracks = PointTracker(ColourTracker(), device="cpu")(square_clip(), grid=3)
        write_report(tmp_path / "report.html", square_clip(), tracks)
        check = """<script>
const drawn = () => document.getElementById("points").getContext("2d")
  .getImageData(0, 0, $("points").width, $("points").height).data.some(value => value > 0);
video.addEventListener("loadeddata", () => {
  const found = [document.querySelectorAll("tbody tr").length, drawn()];
  $("none").click();
  found.push(drawn());
  document.querySelectorAll("tbody input")[4].click();
  found.push(drawn());
  document.querySelectorAll("tbody tr")[4].click();
  found.push(document.querySelectorAll("tr.chosen").length, video.videoWidth, video.error === null);
  document.title = JSON.stringify(found);
});
</script></body>"""
        page = (tmp_path / "report.html").read_text().replace("</body>", check)
        (tmp_path / "report.html").write_text(page)
        command = [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=8000",
            "--dump-dom",
        ]
        result = subprocess.run(
            [*command, f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
        title = re.search(r"<title>(.*?)</title>", result.stdout)[1]
        assert json.loads(title) == [9, True, False, True, 1, 96, True]


class Page:
    """`pick_points` in a thread, and requests to its page."""

    def __init__(self, path, **options):
        self.opened, self.result = threading.Event(), []
        self._thread = threading.Thread(target=self._run, args=(path, options), daemon=True)
        self._thread.start()
        assert self.opened.wait(20)

    def _run(self, path, options):
        count = pick_points(square_clip(), path, open_browser=False, announce=self._announce, **options)
        self.result.append(count)

    def _announce(self, url):
        self.host, self.port, self.secret = re.fullmatch(r"http://([\d.]+):(\d+)(/[\w-]{16,}/)", url).groups()
        self.opened.set()

    def ask(self, method, name, body=None, **headers):
        connection = http.client.HTTPConnection(self.host, int(self.port), timeout=20)
        connection.request(method, name, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def finish(self):
        self._thread.join(20)
        return self.result


class TestPick:
    def test_points_become_a_file_of_queries(self, tmp_path):
        page = Page(tmp_path / "queries.csv", frame=3)
        assert page.host == "127.0.0.1"
        status, content = page.ask("GET", page.secret)
        assert status == 200 and b'"width": 96' in content and not re.search(rb"https?://", content)
        status, content = page.ask("GET", page.secret + "frame.png")
        assert status == 200 and content.startswith(b"\x89PNG")
        assert page.ask("POST", page.secret + "points", json.dumps([[16.25, 32], [95, 0.5]]))[0] == 200
        assert page.finish() == [2]
        np.testing.assert_array_equal(read_queries(tmp_path / "queries.csv"), [[3, 16.25, 32], [3, 95, 0.5]])
        tracks = PointTracker(ColourTracker(), device="cpu")(square_clip(), queries=tmp_path / "queries.csv")
        assert tracks.visibility[:, 3].all()

    def test_what_is_refused(self, tmp_path):
        page = Page(tmp_path / "queries.csv")
        points = page.secret + "points"
        assert page.ask("GET", "/")[0] == 404
        assert page.ask("GET", "/frame.png")[0] == 404
        assert page.ask("GET", page.secret + "../../etc/passwd")[0] == 404
        assert page.ask("POST", "/points", "[[1, 1]]")[0] == 404
        # A page of another site, whose name leads to this machine.
        assert page.ask("POST", points, "[[1, 1]]", Host=f"evil.example:{page.port}")[0] == 404
        assert page.ask("POST", points, "[[1, 1]]", **{"Content-Length": "9999999"})[0] == 404
        for body in ("", "{}", "[]", "[[1]]", "[[1, NaN]]", "[[97, 1]]", "[[1, 1e999]]", "[" * 5000, '[["a", "b"]]'):
            assert page.ask("POST", points, body)[0] == 400, body
        assert not os.listdir(tmp_path)
        assert page.ask("POST", points, "[[1, 1]]")[0] == 200
        assert page.finish() == [1]

    def test_a_frame_that_does_not_exist(self, tmp_path):
        with pytest.raises(ValueError, match="frame 8 does not exist: the array `video` has 8 frames"):
            pick_points(square_clip(), tmp_path / "q.csv", frame=8, open_browser=False)
