"""The worker processes, one device in each: `python -m workers.block`, `python -m workers.console`."""
