"""Measurements that leave rows."""
