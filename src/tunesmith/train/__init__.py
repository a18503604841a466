"""One training: its options resolved, its model, its losses, its step, its loop, its checkpoints."""
