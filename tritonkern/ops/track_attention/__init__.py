"""Cross-attention between point tracks and a feature map, near each other in space; see README.md in this folder."""
