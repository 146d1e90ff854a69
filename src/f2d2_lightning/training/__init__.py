"""What modules, data and callbacks share about a Trainer's run."""
