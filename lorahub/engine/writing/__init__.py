"""Plans executed from disk to disk, or in the files themselves."""
