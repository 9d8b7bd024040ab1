"""Residual sum and LayerNorm in one pass; see README.md in this folder."""
