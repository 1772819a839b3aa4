"""How a parameter changes: one file a kind."""
