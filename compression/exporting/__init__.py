"""From a classifier to files that run without this project: written, quantized, audited, measured."""
