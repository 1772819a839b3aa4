"""Compiled kernels, each beside a plain-torch twin or a check that says what it computes.

``patches`` is the data that the kernels of devices take; ``merge_torch`` and ``merge_triton`` are the twins.
``merge.c`` is the CPU's, ``compiling`` makes a library of it and ``merge_c`` calls it.  ``choice`` says what runs
where.  Nothing here knows plans, adapters or models.
"""
