"""Accuracy and cost of a network."""
