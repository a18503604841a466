"""What is made of finished runs: figures and pages. Nothing here imports torch, no training module imports this."""
