"""One file a command: each reads from top to bottom."""
