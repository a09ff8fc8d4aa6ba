"""Run folders and their rows, without torch: read by anybody, written by one process."""
