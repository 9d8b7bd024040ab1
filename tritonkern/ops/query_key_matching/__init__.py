"""Matching by queries and keys of a transformer, and two operations beside it; see README.md in this folder."""
