"""Supports of points times the features around them, frame by frame; see README.md in this folder."""
