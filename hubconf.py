"""Entry points of `torch.hub`: trackers with the signature of CoTracker's predictors.

```python
tracker = torch.hub.load("path/to/a/checkout", "tritonkern_tracker", source="local")
tracks, visibility = tracker(video, grid_size=10)  # video [B, T, 3, H, W] in 0..255
```
"""

dependencies = ["torch", "numpy", "einops", "av", "PIL", "safetensors"]


def tritonkern_tracker(model="nano", weights=None, device=None):
    """A `tritonkern.tracking.PointTracker` as a predictor (`PointTracker.as_predictor`).

    Args:
        model: a name known to `tritonkern.models.build_model`.
        weights: checkpoint for a model that ships without weights.
        device: "cpu" or "cuda"; None takes the GPU where there is one.
    """
    from tritonkern.tracking import PointTracker

    return PointTracker(model, weights, device).as_predictor()
