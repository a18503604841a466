"""The 2023 report that this project started from: what is taken from its runs, its claims, figures and tables."""
