"""What a training will take before it runs: memory counted, time from a probe or a card."""
