"""Clusters: a job's options, its script, its place in the queue."""
