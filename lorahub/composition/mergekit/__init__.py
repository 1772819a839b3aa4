"""mergekit's configurations of adapters as recipes."""
