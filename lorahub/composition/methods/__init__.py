"""Composition methods, one file each: several changes to one matrix in, one change out."""
