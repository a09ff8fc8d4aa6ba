"""One file a model; models hold no process group."""
