"""Recorded behaviour and people's comparisons."""
