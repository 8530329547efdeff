"""torch.compile of the decoder layers, one like the other: what is compiled for the first serves all.

Attention stays outside. It knows the documents' borders as numbers, so that a compiler would make a program for each
set of them; what is compiled is all before it in a layer and all after it. Row lengths that differ are one program:
the compiler gives up the first length when it meets a second one.
"""

import warnings

import torch
from transformers import AttentionInterface

from trainer.attention import PACKED_ATTENTION, PACKED_BY_DOCUMENT
from trainer.decoder_layers import decoder_layers

BACKEND = "inductor"
MAX_PROGRAMS = 32
"""Of one piece of code; beyond it torch goes on uncompiled, and says it in its log alone."""


def compiler_backend() -> str:
    """Make torch's compiler ready for a model."""
    torch.compiler.reset()  # what another model of this process has left would count against the limit of programs
    # Input with a gradient or without, of one length or any, in training or validation: each is a program.
    torch._dynamo.config.recompile_limit = MAX_PROGRAMS
    # Of what torch's own tracing does to autograd functions and between two parts; nobody can act on that.
    warnings.filterwarnings("ignore", ".*autograd.function.Function.*instantiated", DeprecationWarning)
    warnings.filterwarnings("ignore", ".*grad attribute of a Tensor that is not a leaf", UserWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    return BACKEND


def compile_layers(model: torch.nn.Module) -> str:
    """Compile in place, at first use. Parameters and their names stay as they are. Returns words for people."""
    backend = compiler_backend()
    registered = AttentionInterface()
    for name in (PACKED_ATTENTION, PACKED_BY_DOCUMENT):
        AttentionInterface.register(name, torch.compiler.disable(registered[name]))
    _, layers = decoder_layers(model)
    for layer in layers:
        layer.compile(backend=backend)
    return f"{len(layers)} layers are compiled but for their attention; the first steps take minutes"
