"""One run: the `trivit` command, configuration, Trainer assembly, callbacks and checkpoints."""
