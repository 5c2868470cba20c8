"""Reward models of preferences that somebody has already given: fit, score, ask."""
