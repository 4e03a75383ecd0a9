"""The training loop: hooks, optimizer, moving average, precision."""
