"""Ways to place a model on devices, one file each."""
