"""Point tracks of a video, and the pictures, files and scores that are made of them.

```python
from tritonkern.tracking import PointTracker, write_overlay

tracks = PointTracker()("video.mp4", grid=12)
tracks.save_npz("tracks.npz")
write_overlay("overlay.mp4", "video.mp4", tracks)
```
"""

from tritonkern._optional import how_to_install

try:
    import av as _av  # noqa: F401
    import PIL as _pil  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"tritonkern.tracking needs the package {error.name}: {how_to_install('track')}", name=error.name
    ) from error

from tritonkern.tracking.evaluation import evaluate
from tritonkern.tracking.metrics import tapvid_metrics
from tritonkern.tracking.overlay import draw_points, write_overlay
from tritonkern.tracking.predictor import PointTracker
from tritonkern.tracking.queries import grid_queries, read_queries
from tritonkern.tracking.report import write_report
from tritonkern.tracking.results import PointTracks
from tritonkern.tracking.stream import PointStream, StreamOutput
from tritonkern.tracking.tapvid import TapVidClip, read_tapvid
from tritonkern.tracking.video import VideoReader
from tritonkern.tracking.video_writer import VideoWriter

__all__ = [
    "PointStream",
    "PointTracker",
    "PointTracks",
    "StreamOutput",
    "TapVidClip",
    "VideoReader",
    "VideoWriter",
    "draw_points",
    "evaluate",
    "grid_queries",
    "read_queries",
    "read_tapvid",
    "tapvid_metrics",
    "write_overlay",
    "write_report",
]
