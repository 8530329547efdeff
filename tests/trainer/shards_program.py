"""`python -m tests.trainer.shards_program` in each of two processes: 4-bit layers under torch's own fully_shard.

Prints for each dtype of storage what a rank keeps, and whether what it gathers, and computes, is what was cut.
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from trainer.nf4 import NF4Linear, quantise, store_as

SHAPES = ((96, 64), (33, 50), (64, 33))


def layers() -> torch.nn.Sequential:
    """They fit together, and most are not cut evenly. One has every byte there is: as floats some are no numbers."""
    torch.manual_seed(0)
    built = torch.nn.Sequential()
    for shape in SHAPES:
        tensors = quantise(torch.randn(shape))
        built.append(NF4Linear(tensors, shape=shape, bias=torch.randn(shape[0]), dtype=torch.float32))
    every = torch.arange(256, dtype=torch.uint8).repeat(16)
    built[0].packed.data[: len(every) // 2] = every[: len(every) // 2]
    built[0].packed.data[-1024:] = 255
    return built


def compare(storage: torch.dtype) -> dict[str, object]:
    plain = layers()
    cut = copy.deepcopy(plain)
    store_as(cut, storage)
    for layer in cut:
        layer.trained = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))  # as adapters are
        fully_shard(layer)
    fully_shard(cut)
    local = [[p.to_local() for p in (layer.packed, layer.absmax)] for layer in cut]  # type: ignore[union-attr]
    found: dict[str, object] = {"bytes": [[tensor.nbytes for tensor in tensors] for tensors in local]}
    gathered, computed = [], []
    for layer, expected in zip(cut, plain, strict=True):
        assert isinstance(layer, NF4Linear)
        assert isinstance(expected, NF4Linear)
        x = torch.randn(5, layer.in_features, requires_grad=True)
        own = x.detach().clone().requires_grad_()
        output, wanted = layer(x), expected(own)
        output.sum().backward()
        wanted.sum().backward()
        assert x.grad is not None
        assert own.grad is not None
        computed.append(torch.equal(output, wanted) and torch.equal(x.grad, own.grad))
        layer.unshard()  # type: ignore[operator]
        same_bytes = torch.equal(layer.packed.view(torch.uint8), expected.packed)
        gathered.append(same_bytes and torch.equal(layer.absmax, expected.absmax))
        layer.reshard()  # type: ignore[operator]
    return found | {"gathered": gathered, "computed": computed}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {str(storage): compare(storage) for storage in (torch.uint8, torch.float32)}
    dist.destroy_process_group()
    sys.stdout.write(json.dumps(results) + "\n")
