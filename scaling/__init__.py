"""Equivariant models, sequence parallelism, training and measurement."""
