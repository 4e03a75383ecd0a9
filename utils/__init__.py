"""Floor 1: data, files, loops and measures. Nothing here knows a network by name."""
