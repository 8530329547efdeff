"""Prefect and the command line: they start and watch, and compute nothing."""
