"""Adapters beside each other: how alike they are, which spaces they share, and what gets in the way of a sum."""
