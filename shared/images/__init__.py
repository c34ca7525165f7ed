"""Image files to crops."""
