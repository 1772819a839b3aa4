"""Storages: how quantised modules keep their weights, read as numbers and written back; one library a file."""
