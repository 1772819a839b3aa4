"""A recipe's rules as numbers: by depth, pattern, block and component; names only."""
