"""The ways to train, one file each, and the table of them."""
