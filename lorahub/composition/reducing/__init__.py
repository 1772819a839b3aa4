"""Adapters out of checkpoints and of smaller rank: extract and resize."""
