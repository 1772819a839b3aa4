"""A team's adapters under a manifest and a lock: which ones, at which commits, installed byte for byte."""
