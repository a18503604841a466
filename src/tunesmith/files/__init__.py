"""What lies on disk: models, adapters, answers, run directories, and what a MODEL name means."""
