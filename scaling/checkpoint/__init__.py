"""Checkpoints that know neither the number of ranks nor the engine."""
