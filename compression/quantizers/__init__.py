"""Quantizers: a new one is a line in ``QUANTIZERS``. There are none yet."""

QUANTIZERS: dict[str, type] = {}
