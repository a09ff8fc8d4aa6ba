"""Long convolutions, on one process or on a cyclic shard."""
