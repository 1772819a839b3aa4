"""Bytes on disk: headers, lazy tensors, streaming writers.  No knowledge of adapters."""
