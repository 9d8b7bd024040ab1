"""Softmax attention on the CPU; see README.md in this folder."""
