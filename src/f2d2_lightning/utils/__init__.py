"""Random numbers, files and processes: what knows nothing of flows."""
