"""Elastic constants; `run` is where to begin."""
