"""Adapters made from adapters, or from two checkpoints: low-rank linear algebra and what stands on it."""
