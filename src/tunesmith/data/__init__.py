"""Rows of text to batches of tokens: files, dialogues, tokenizers, packing, preference pairs, prompts."""
