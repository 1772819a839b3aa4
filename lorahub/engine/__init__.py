"""Adapter and base to weights: plan, merge, undo, stream."""
