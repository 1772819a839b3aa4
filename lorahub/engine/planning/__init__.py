"""What a merge will do, worked out from names and shapes alone: the plan, and what it is made by."""
