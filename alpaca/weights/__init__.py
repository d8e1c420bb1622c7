"""Tensors into and out of folders, and the difference of two models."""
