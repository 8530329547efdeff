"""torch.compile of the decoder layers, one like the other: what is compiled for the first serves all.

Attention stays outside. It knows the documents' borders as numbers, so that a compiler would make a program for each
set of them; what is compiled is all before it in a layer and all after it. Row lengths that differ are one program:
the compiler gives up the first length when it meets a second one.
"""

import torch
from transformers import AttentionInterface

from trainer.attention import PACKED_ATTENTION, PACKED_BY_DOCUMENT
from trainer.strategies.pipeline import decoder_layers

BACKEND = "inductor"


def compile_layers(model: torch.nn.Module) -> str:
    """Compile in place, at first use. Parameters and their names stay as they are. Returns words for people."""
    registered = AttentionInterface()
    for name in (PACKED_ATTENTION, PACKED_BY_DOCUMENT):
        AttentionInterface.register(name, torch.compiler.disable(registered[name]))
    _, layers = decoder_layers(model)
    for layer in layers:
        layer.compile(backend=BACKEND)
    return f"{len(layers)} layers are compiled but for their attention; the first steps take minutes"
