"""Quantized modules, and how a network is rebuilt with them."""
