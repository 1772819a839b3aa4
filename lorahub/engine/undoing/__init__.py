"""Ways back from a merge, one file each: copies, a journal of residuals, the base's files; and what they share."""
