"""Support vectors of points times the features around them, per frame; see README.md in this folder."""
