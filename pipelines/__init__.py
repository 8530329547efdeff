"""Rows in, rows out: the stages 1-7, without torch and without Prefect."""
