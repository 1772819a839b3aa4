"""Compiled kernels, each beside a plain-torch twin or a check that says what it computes.

``patches`` is the data that the kernels of devices take; ``merge_torch`` and ``merge_triton`` are the twins.
``merge.c`` is the CPU's, and ``machine.h`` what processors have words for; ``compiling`` makes a library of them and
``merge_c`` calls it.  ``choice`` says what runs where.  Nothing here knows plans, adapters or models.
"""
