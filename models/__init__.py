"""Classifiers: networks, quantized modules, weights, and running them from any file."""
