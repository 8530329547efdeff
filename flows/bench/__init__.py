"""`sft-pipeline bench`: ours and other trainers on the same tokens of this machine, each in fresh processes."""
