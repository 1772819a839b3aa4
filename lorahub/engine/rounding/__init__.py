"""The modes of a merge: how sums are made and rounded.  One file a mode, one table (``table``)."""
