"""Weights found with a few examples: optimisers, trials, and the controls that say what a result is worth."""
