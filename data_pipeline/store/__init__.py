"""Chains <-> zarr."""
