"""An example of a lorahub plugin: a kind in ``row_shift``, a format in ``slashed``."""
