"""DDP and DeepSpeed behind one interface, and the loss that makes their average exact."""
