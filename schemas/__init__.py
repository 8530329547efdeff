"""What rows, configs and runs are: the leaf that every other room imports."""
