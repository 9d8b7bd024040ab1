"""Points chosen by clicking into a frame: a page of the standard library's server, on the loopback address only."""

import io
import json
import math
import secrets
import threading
import webbrowser
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from itertools import islice
from os import PathLike
from typing import Any

import numpy as np
from PIL import Image

from tritonkern.files import atomic_path
from tritonkern.tracking.video import VideoReader, VideoSource

_MOST_BYTES = 1 << 20


def pick_points(
    video: VideoSource | VideoReader,
    path: str | PathLike[str],
    *,
    frame: int = 0,
    port: int = 0,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> int:
    """Serve a page with frame `frame` of `video` until its user saves the points, then write them to `path`.

    The file has lines t,x,y for `read_queries`: `frame`, and pixels of the video. The server listens on 127.0.0.1 only;
    the address of the page contains a secret, without which nothing is served.

    Args:
        port: of the page; 0 takes a free one.
        open_browser: open the page in the user's browser.
        announce: called with the address of the page once it can be opened.

    Returns:
        The number of points.

    Raises:
        ValueError: the video does not have this frame.
    """
    reader = video if isinstance(video, VideoReader) else VideoReader(video)
    picture = next(islice(reader.frames(frame + 1), frame, None), None)
    if picture is None:
        raise ValueError(f"frame {frame} does not exist: {reader.name} has {reader.count_frames(frame + 1)} frames")
    server = _Server(picture, float(reader.pixel_aspect), port)
    with server:
        url = f"http://127.0.0.1:{server.server_address[1]}/{server.secret}/"
        announce(url)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            if open_browser:
                webbrowser.open(url)
            server.saved.wait()
        finally:
            server.shutdown()
    lines = "".join(f"{frame},{x:.3f},{y:.3f}\n" for x, y in server.points)
    with atomic_path(path) as part:
        part.write_text("t,x,y\n" + lines)
    return len(server.points)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, picture: np.ndarray, pixel_aspect: float, port: int) -> None:
        self.secret = secrets.token_urlsafe(16)
        self.saved = threading.Event()
        self.points: list[tuple[float, float]] = []
        self.size = (picture.shape[1], picture.shape[0])
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG", compress_level=1)
        page = (resources.files("tritonkern.tracking") / "pick.html").read_text(encoding="utf-8")
        settings = {"width": self.size[0], "height": self.size[1], "aspect": pixel_aspect}
        self.pages: dict[str | None, tuple[str, bytes]] = {
            "": ("text/html; charset=utf-8", page.replace("{{settings}}", json.dumps(settings)).encode()),
            "frame.png": ("image/png", file.getvalue()),
        }
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        name = self._name()
        if name not in self.server.pages:
            self.send_error(404)
            return
        self._answer(200, *self.server.pages[name])

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self._name() != "points" or not length.isdecimal() or int(length) > _MOST_BYTES:
            self.send_error(404)
            return
        try:
            points = _read_points(self.rfile.read(int(length)), self.server.size)
        except ValueError as error:
            self._answer(400, "text/plain; charset=utf-8", str(error).encode())
            return
        self.server.points = points
        self._answer(
            200, "text/plain; charset=utf-8", f"{len(points)} points are saved. You can close this page.".encode()
        )
        self.server.saved.set()

    def _name(self) -> str | None:
        """What is asked for below the secret; None without it, and for requests that another host name led here."""
        port = self.server.server_address[1]
        prefix = f"/{self.server.secret}/"
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}") or not self.path.startswith(
            prefix
        ):
            return None
        return self.path[len(prefix) :]

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are of no interest to the user."""


def _read_points(content: bytes, size: tuple[int, int]) -> list[tuple[float, float]]:
    """The points of a JSON list `[[x, y], ...]`, all inside a frame of `size`."""
    try:
        points = [(float(x), float(y)) for x, y in json.loads(content)]
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("the points must be a list of pairs x, y") from error
    if not points:
        raise ValueError("there is no point: click into the picture first")
    if not all(math.isfinite(x + y) and 0 <= x <= size[0] and 0 <= y <= size[1] for x, y in points):
        raise ValueError(f"the points must be inside the frame of {size[0]}x{size[1]}")
    return points
