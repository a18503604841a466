"""How good answers are: scored by reward models, compared, judged by a language model."""
