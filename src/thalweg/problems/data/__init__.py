"""Data sets: readers and settings."""
