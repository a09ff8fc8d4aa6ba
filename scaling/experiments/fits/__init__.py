"""Power laws of measured sweeps, with intervals."""
