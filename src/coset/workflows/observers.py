"""What long work tells of itself, and how it is stopped."""

from collections.abc import Callable

Observer = Callable[[int, str], bool]
"""Told how many structures are done and what comes next; returns True to stop before it."""

Step = Callable[[str], None]
"""Told what is done next with one structure; raises to stop before it."""
