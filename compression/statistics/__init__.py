"""What is looked at and changes nothing: activations and summaries."""
