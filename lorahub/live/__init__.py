"""Adapters on a live model without a change to its weights: added to outputs, or standing in for a parameter."""
