"""Mixing over time by depthwise convolutions; see README.md in this folder."""
