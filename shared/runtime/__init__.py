"""Processes, disks and signals: the machine under a run."""
