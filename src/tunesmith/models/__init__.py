"""Models as tensors: architectures, attention inside documents, adapters, the head and what is computed from it."""
