"""The work of models, and the memory that a training run takes."""
