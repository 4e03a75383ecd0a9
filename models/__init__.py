"""Floor 2: whatever classifies an image, from its source code or from a file."""
