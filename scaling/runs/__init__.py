"""Run folders and their rows."""
