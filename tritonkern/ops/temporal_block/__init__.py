"""A transformer block over time as one kernel; see README.md in this folder."""
