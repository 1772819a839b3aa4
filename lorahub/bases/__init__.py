"""What a base looks like, and where deltas land in it."""
