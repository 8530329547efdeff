"""How many weights a method of virtual tokens trains, told from the shapes of the model's files. Light: no torch."""

from collections.abc import Mapping
from itertools import pairwise

from schemas.training_config import TrainConfig
from trainer.layer_names import num_layers

Shapes = Mapping[str, tuple[int, ...]]


def num_virtual_weights(shapes: Shapes, train: TrainConfig) -> int:
    """Of the virtual tokens, and of the network that they come out of while they are trained."""
    count, inner = train.virtual_tokens.count, train.virtual_tokens.inner_size
    hidden, layers = _hidden_size(shapes), num_layers(shapes)
    if train.method == "prompt":
        return count * hidden
    if train.method == "p_tuning":
        return count * hidden + _num_in_network(hidden, inner or hidden, inner or hidden, hidden)
    if train.method == "llama_adapter":
        return (train.virtual_tokens.layers or layers) * (count * hidden + 1)
    width = sum(_key_value_sizes(shapes)) or 2 * layers * hidden
    if inner is None:
        return count * width
    size = width // max(2 * layers, 1)
    return count * size + _num_in_network(size, inner, width)


def _num_in_network(*sizes: int) -> int:
    """Matrices and biases of linear layers, one behind the other."""
    return sum(before * after + after for before, after in pairwise(sizes))


def _hidden_size(shapes: Shapes) -> int:
    """The shorter side of the embedding."""
    embeddings = [min(shape) for name, shape in shapes.items() if "embed" in name or ".wte" in name]
    return max(embeddings, default=0)


def _key_value_sizes(shapes: Shapes) -> list[int]:
    """Of keys and values of a token in each layer: apart, or as what a fused layer has more than queries."""
    sizes = []
    for name, shape in shapes.items():
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            sizes.append(shape[0])
        if name.endswith(".qkv_proj.weight"):
            sizes.append(shape[0] - shapes[name.replace(".qkv_proj.", ".o_proj.")][1])
    return sizes
