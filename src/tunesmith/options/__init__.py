"""What a user can set: every option with its type, default and help text, and how command lines and YAML files are read. No torch."""
