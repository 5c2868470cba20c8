"""Environments: tasks, vector environments, perturbations, rendering."""
