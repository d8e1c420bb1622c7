"""Faults in instruction data, one class of fault at a time."""
