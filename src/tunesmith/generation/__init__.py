"""Answers from a model: decoding with a cache, sampling, log-probabilities.

The folder is not called generate: importing a module of that name would hide the function `tunesmith.generate`.
"""
