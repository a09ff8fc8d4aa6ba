"""Measured curves drawn: figures and TensorBoard scalars made from rows of numbers."""
