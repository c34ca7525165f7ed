"""A run's life: its folder, checkpoints, log, report and Hub repository."""
