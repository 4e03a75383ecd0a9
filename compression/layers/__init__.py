"""A forward pass's convolutions and linear layers, as problems of least squares."""
