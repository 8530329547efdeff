"""A LoRA training as it was written in 2023: transformers and PEFT, rows padded to the longest of a batch.

Batch of 32, rank 8 on queries and values, adapters in PEFT's default float32, checkpointing of every layer, scaled
dot product attention. No sweep: it is what many still run.
"""

from typing import Any

import torch
from measuring import (
    Documents,
    Request,
    Result,
    Steps,
    device_of,
    forward_loss,
    moved,
    padded_batch,
    quantisation,
    run,
)

BATCH_ROWS = 32
RANK, ALPHA, TARGETS = 8, 16, ["q_proj", "v_proj"]


def train(request: Request) -> Result:
    if request["method"] != "lora":
        return {"left_out": f"the recipe is of LoRA, asked for is {request['method']}"}
    device = device_of(request)
    model = load_model(request, device)
    documents = Documents(request["documents"])
    num_steps = request["num_steps"]
    steps = Steps(num_warm_up=request["num_warm_up"], num_steps=num_steps, device=device)
    first_bins = documents.in_bins(0, request["bins_per_step"])
    first_loss = steps.checked(lambda: forward_loss(model, documents, first_bins, device))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=request["learning_rate"], weight_decay=0.0, fused=True)
    losses, norms = [], []
    for number in range(num_steps):
        rows = [row % len(documents) for row in range(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)]
        batch = padded_batch(documents, rows)
        steps.count(batch["labels"], sum(len(documents.document(row)[0]) for row in rows))
        loss = model(**moved(batch, device)).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.end()
    steps.losses = {number: float(loss) for number, loss in enumerate(losses, 1)}
    steps.grad_norms = {number: float(norm) for number, norm in enumerate(norms, 1)}
    return {
        "steps": steps.records(),
        "first_loss": first_loss,
        "kernel": f"batch of {BATCH_ROWS} padded, r{RANK} on {', '.join(TARGETS)}, sdpa, checkpointing, fp32 adapters",
    }


def load_model(request: Request, device: torch.device) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        device_map={"": device},
        attn_implementation="sdpa",
        **quantisation(request),
    )
    model.config.use_cache = False
    if request["base"] == "plain":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


if __name__ == "__main__":
    run(train)
