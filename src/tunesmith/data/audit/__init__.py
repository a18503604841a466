"""A data set looked over before any training."""
