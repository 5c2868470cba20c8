"""Benchmarks of speed and safety, one command each."""
