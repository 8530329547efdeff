"""Tensors: shards and a plan in, checkpoints and an adapter out, without Prefect."""
