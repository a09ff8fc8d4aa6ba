"""Measured curves."""
