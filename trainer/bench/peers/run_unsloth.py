"""Unsloth as its users run it: its own model class, its own adapters and checkpointing, TRL's trainer as it patches it.

It packs the documents of ours by itself, so a step holds other documents; they are the same over the whole run.
"""

import importlib
import os
from typing import Any

from measuring import EIGHT_BITS, Documents, Request, Result, Steps, device_of, forward_loss, quiet, run
from run_trl import LOGGED_EVERY, PADDED_ROWS, callback, counting

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MOST_ROWS_PER_BIN = 1.5
"""Its packing fills rows about as well as ours; where it switches packing off, a document is a row."""
CHECKPOINTING = {"none": False, "unsloth": "unsloth", "full": True}


def train(request: Request) -> Result:
    quiet()
    if request["method"] != "lora":
        return {"left_out": f"its benchmark knows lora, asked for is {request['method']}"}
    os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=request["folder"])
    import unsloth  # noqa: F401 - it must be imported before the libraries that it patches

    device = device_of(request)
    documents = Documents(request["documents"])
    steps = Steps(num_warm_up=request["num_warm_up"], num_steps=request["num_steps"], device=device)
    model, tokenizer = load_model(request)
    first_bins = documents.in_bins(0, request["bins_per_step"])
    first_loss = steps.checked(lambda: forward_loss(model, documents, first_bins, device))
    packing = request["variant"]["packing"]
    trainer = make_trainer(request, model, tokenizer, documents, steps, packing=packing)
    rows = "packed by itself" if packing else f"{PADDED_ROWS} rows"
    if packing and len(trainer.train_dataset) > documents.num_bins * MOST_ROWS_PER_BIN:
        trainer = make_trainer(request, model, tokenizer, documents, steps, packing=False)
        rows = f"{PADDED_ROWS} rows, since it does not pack here"
    trainer.train()
    return {
        "steps": steps.records(),
        "first_loss": first_loss,
        "kernel": f"{rows}, its own kernels, {attention()}, checkpointing {request['variant']['checkpointing']}",
    }


def attention() -> str:
    """What it computes attention with, as far as it tells."""
    try:
        dispatch = importlib.import_module("unsloth.utils.attention_dispatch")
    except ImportError:
        return "its own attention"
    kinds = {
        "HAS_FLASH_ATTENTION": "flash-attn",
        "HAS_XFORMERS": "xformers",
        "_TORCH_VARLEN_ATTN": "torch's varlen attention",
    }
    return next((kind for name, kind in kinds.items() if getattr(dispatch, name, None)), "its own attention")


def load_model(request: Request) -> tuple[Any, Any]:
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        request["model"],
        max_seq_length=request["capacity"],
        dtype=getattr(torch, request["dtype"]),
        load_in_4bit=request["base"] == "nf4",
        load_in_8bit=request["base"] in EIGHT_BITS,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=request["rank"],
        lora_alpha=request["alpha"],
        lora_dropout=0,
        bias="none",
        target_modules=PROJECTIONS,
        use_gradient_checkpointing=CHECKPOINTING[request["variant"]["checkpointing"]],
    )
    return model, tokenizer


def make_trainer(
    request: Request, model: Any, tokenizer: Any, documents: Documents, steps: Steps, *, packing: bool
) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = [documents.document(number) for number in range(len(documents))]
    columns = {
        "input_ids": [ids.tolist() for ids, _ in rows],
        "labels": [labels.tolist() for _, labels in rows],
    }
    settings = SFTConfig(
        output_dir=request["folder"],
        per_device_train_batch_size=request["bins_per_step"] if packing else PADDED_ROWS,
        gradient_accumulation_steps=1,  # Unsloth's own default is 2
        packing=packing,
        max_length=request["capacity"],
        max_steps=request["num_steps"],
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=request["dtype"] == "bfloat16",
        logging_steps=LOGGED_EVERY,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_dict(columns),
        args=settings,
        callbacks=[callback(steps)],
    )
    trainer.data_collator = counting(trainer.data_collator, steps)
    return trainer


if __name__ == "__main__":
    run(train)
