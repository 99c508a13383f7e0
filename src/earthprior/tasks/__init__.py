"""Pretext tasks, one per file."""
