"""Compiled kernels, each beside a plain-torch twin or a check that says what it computes.

``patches`` and ``segments`` are the data that the kernels of devices take, for merging and for a batch over many
changes; ``merge_torch`` and ``merge_triton``, ``segmented_torch`` and ``segmented_triton`` are the twins.  ``merge.c``
is the CPU's, and ``machine.h`` what processors have words for; ``compiling`` makes a library of them and ``merge_c``
calls it.  ``choice`` says what runs where, after ``trials``.  Nothing here knows plans, adapters or models.
"""
