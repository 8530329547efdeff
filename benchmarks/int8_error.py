"""Errors of 8-bit linear layers on what really flows through a model.

    make demo-model
    OMP_NUM_THREADS=2 python benchmarks/int8_error.py --model .cache/models/smollm2-135m-instruct

Each linear layer of the model gets the inputs that it has in a forward pass over some texts, and its outputs are compared
with those of its unquantised weight in fp64: norm of the difference over the norm, of outputs and of the gradients that go
back to its inputs for a random incoming gradient. int8_rows: int8 weights, products in bf16. LLM.int8: bitsandbytes' layer
with its default threshold. bf16: the unquantised weight, for comparison. Then the mean loss of the whole model
over the texts with each.
"""

import argparse
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.int8_rows import Int8RowsLinear, quantise

TEXTS = ("README.md", "docs/training.md", "trainer/train.py")
Build = Callable[[torch.nn.Linear], torch.nn.Module]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast", UserWarning)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    rows = texts(options.model, options.tokens)
    errors = errors_of_layers(model, inputs_of_layers(model, rows))
    losses = {name: mean_loss(with_layers(model, build), rows) for name, build in FORMS.items()}
    print("| layers | outputs, mean | outputs, worst layer | input gradients, mean | loss of the model |")
    print("|---|---|---|---|---|")
    for name, found in errors.items():
        outputs, gradients = (torch.tensor(column) for column in zip(*found, strict=True))
        print(
            f"| {name} | {outputs.mean():.3%} | {outputs.max():.3%} | {gradients.mean():.3%} | {losses[name]:.4f} |"
        )
    ours, theirs = (errors[name] for name in ("int8_rows", "LLM.int8"))
    better = sum(mine[0] < yours[0] for mine, yours in zip(ours, theirs, strict=True))
    print(f"\nint8_rows has the smaller output error in {better} of {len(ours)} layers")


def texts(model: Path, num_tokens: int) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    root = Path(__file__).parent.parent
    return [
        torch.tensor(tokenizer((root / name).read_text())["input_ids"][:num_tokens])[None] for name in TEXTS
    ]


def linear_layers(model: Any) -> dict[str, torch.nn.Linear]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }


@torch.no_grad()
def inputs_of_layers(model: Any, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = defaultdict(list)
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0][0]))
        for name, layer in linear_layers(model).items()
    ]
    for row in rows:
        model(input_ids=row)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def errors_of_layers(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, list[tuple[float, float]]]:
    """Of outputs and of input gradients, a pair for each layer."""
    errors: dict[str, list[tuple[float, float]]] = defaultdict(list)
    draws = torch.Generator().manual_seed(0)
    for name, layer in linear_layers(model).items():
        x, weight = inputs[name], layer.weight.detach().double()
        gradient = torch.randn(len(x), len(weight), generator=draws).to(x.dtype)
        exact = x.double() @ weight.T, gradient.double() @ weight
        for form, build in FORMS.items():
            leaf = x.clone().requires_grad_()
            output = build(layer)(leaf)
            (of_input,) = torch.autograd.grad(output, leaf, gradient)
            errors[form].append((relative(output, exact[0]), relative(of_input, exact[1])))
    return errors


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


def with_layers(model: Any, build: Build) -> Any:
    changed = copy.deepcopy(model)
    for name, layer in linear_layers(changed).items():
        changed.set_submodule(name, build(layer))
    return changed


@torch.no_grad()
def mean_loss(model: Any, rows: list[torch.Tensor]) -> float:
    return sum(float(model(input_ids=row, labels=row).loss) for row in rows) / len(rows)


def rows_layer(layer: torch.nn.Linear) -> torch.nn.Module:
    rows, scales = quantise(layer.weight.detach())
    return Int8RowsLinear(rows, scales, bias=layer.bias, dtype=layer.weight.dtype)


def bitsandbytes_layer(layer: torch.nn.Linear) -> torch.nn.Module:
    theirs = bitsandbytes.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=6.0,
    )
    theirs.load_state_dict({name: tensor.half() for name, tensor in layer.state_dict().items()})
    # While it trains on a CPU it leaves the activations as they are, which is not what it does on a GPU.
    return theirs.to("cpu").eval()


FORMS: dict[str, Build] = {
    "bf16": lambda layer: layer,
    "int8_rows": rows_layer,
    "LLM.int8": bitsandbytes_layer,
}

if __name__ == "__main__":
    main()
