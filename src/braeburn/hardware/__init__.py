"""Accelerators: the catalogue, the targets that runs are planned for, their links and tori."""
