"""See README.md: the recurrence over time of TAPNext."""
