"""Spellings on disk: one file a format."""
