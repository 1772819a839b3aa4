"""Compiled kernels for devices, each beside a plain-torch twin that says what it computes.

``patches`` is the data both take; ``merge_torch`` and ``merge_triton`` are the twins; ``choice`` says which one runs
on a device.  Nothing here knows plans, adapters or models.
"""
