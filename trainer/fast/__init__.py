"""Decoder layers computed as one: their forward and backward passes written out.

taking.py      which layers of a model can be, taking them over, giving them back
layer.py       a layer's passes, and what is kept between them
products.py    the linear products of a layer, adapters included
pointwise.py   norms, rotations and activations, which torch.compile makes one kernel each
triton_*.py    the same by hand for GPUs; cross entropy, copies of adapters, weights out of their bits
offload.py     checkpoints that wait in the CPU's memory
"""
