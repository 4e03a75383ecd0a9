"""Logs, reports and figures of a run."""
