"""The run behind train.py: set-up, data, resuming, reporting."""
