"""What `sft-pipeline bench train` runs in processes of their own: made data and weights, our training, the peers."""
