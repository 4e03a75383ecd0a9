"""Statistics of a network that leave it as it is: activations and summaries."""
