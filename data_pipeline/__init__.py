"""From files of structures to typed batches; knows no model and no process group."""
