"""One step of a plan, computed: how a parameter is cut, what happens to rows, and how much of it is kept."""
