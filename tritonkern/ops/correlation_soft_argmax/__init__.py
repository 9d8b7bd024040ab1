"""Correlation with every cell of a feature map, its statistics, and the soft-argmax around its peak."""
