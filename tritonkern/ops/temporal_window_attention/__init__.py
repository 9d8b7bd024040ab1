"""Attention over a sliding window of frames; see README.md in this folder."""
