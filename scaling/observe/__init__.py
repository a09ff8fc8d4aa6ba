"""Metrics and their views."""
