"""Ways to choose what is trained, one file each."""
