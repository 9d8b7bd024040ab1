"""One room an operation. `tritonkern.functional` is the way in; each room's README.md explains what it computes."""
