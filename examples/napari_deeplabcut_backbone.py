"""tritonkern's packaged tracker as a backbone of napari-deeplabcut's tracking plugin: runs on a CPU, downloads nothing.

`python examples/napari_deeplabcut_backbone.py` opens napari with "tritonkern nano" beside "Cotracker 3" in the list of
tracking methods. Or `import` this file before the plugin is opened. It needs napari-deeplabcut 0.4 and tritonkern.

The plugin's class for CoTracker3 calls whatever has the signature of CoTracker's predictors, so that the model is all
that another backbone must bring: its queries, frame ranges, backward tracking and labels stay as they are.
"""

import torch
from napari_deeplabcut.tracking.core.models import Cotracker3, register_backbone

from tritonkern.tracking import PointTracker

NAME = "tritonkern nano"


@register_backbone(NAME)
class TritonkernNano(Cotracker3):
    name = NAME
    info_text = (
        "A small tracker for CPUs and GPUs (Apache-2.0), packaged with its weights.\n"
        "It sees frames at 256x256 pixels: things that are a few pixels wide there cannot be followed."
    )

    def auto_set_device(self) -> str:
        """Not MPS, for which tritonkern has no kernels."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def load_model(self, device: str) -> torch.nn.Module:
        return PointTracker("nano", device=device).as_predictor()


if __name__ == "__main__":
    import napari

    napari.Viewer()
    napari.run()
