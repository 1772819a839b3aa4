"""Plans executed on live weights, in place, and the ways back."""
