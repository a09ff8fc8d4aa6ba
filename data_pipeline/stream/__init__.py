"""Samples -> each rank's slices, in an order that is arithmetic."""
