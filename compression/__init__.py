"""Floor 3: what changes a model, and the training run that does it."""
