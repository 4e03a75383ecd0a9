"""Compression schedules: one YAML says what happens to a network and when."""
