"""TRL's SFTTrainer on the bins of ours: packed rows whose documents attend to themselves alone, or padded rows.

The attention "varlen" is torch's own kernel for variable lengths, handed to transformers here: where no flash-attn is
installed TRL would run packed rows through a mask of all tokens by all tokens.
"""

import functools
import inspect
from typing import Any

import torch
from measuring import (
    Documents,
    Request,
    Result,
    Steps,
    device_of,
    forward_loss,
    quantisation,
    quiet,
    run,
)

PADDED_ROWS = 32
LOGGED_EVERY = 10


def train(request: Request) -> Result:
    quiet()
    reason = cannot_run(request)
    if reason:
        return {"left_out": reason}
    device = device_of(request)
    documents = Documents(request["documents"])
    steps = Steps(num_warm_up=request["num_warm_up"], num_steps=request["num_steps"], device=device)
    model = load_model(request, device)
    trainer = make_trainer(request, model, documents, steps)
    first_loss = None
    if not request["variant"]["packing"]:
        first_bins = documents.in_bins(0, request["bins_per_step"])
        first_loss = steps.checked(lambda: forward_loss(trainer.model, documents, first_bins, device))
    trainer.train()
    micro_steps = request["variant"]["micro_steps"]
    return {
        "steps": steps.records(batches_per_step=micro_steps),
        "first_loss": first_loss if first_loss is not None else steps.losses[1],
        "kernel": kernel(request["variant"]),
    }


def cannot_run(request: Request) -> str | None:
    """Why what is asked for is not possible; None where it is."""
    variant = request["variant"]
    if request["method"] not in ("lora", "full"):
        return f"its benchmark knows lora and full, asked for is {request['method']}"
    if device_of(request).type != "cuda" and (variant["liger"] or variant["attention"] != "sdpa"):
        return "needs a GPU"
    return None


def kernel(variant: dict[str, Any]) -> str:
    rows = "packed" if variant["packing"] else f"{PADDED_ROWS} rows padded"
    words = [
        rows,
        variant["attention"],
        f"{variant['adapters']} adapters",
        f"checkpointing {variant['checkpointing']}",
    ]
    words += ["Liger"] * variant["liger"] + ["torch.compile"] * variant["compile"]
    if variant["micro_steps"] > 1:
        words.append(f"{variant['micro_steps']} micro-steps")
    return ", ".join(words)


# The model --------------------------------------------------------------------------------------------------


def load_model(request: Request, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    attention = request["variant"]["attention"]
    if attention == "varlen":
        register_varlen()
    model = AutoModelForCausalLM.from_pretrained(
        request["model"],
        dtype=getattr(torch, request["dtype"]),
        device_map={"": device},
        attn_implementation=attention,
        **quantisation(request),
    )
    model.config.use_cache = False
    return with_adapters(request, model) if request["method"] == "lora" else model


def with_adapters(request: Request, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if request["base"] != "plain":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=False
        )  # SFTConfig switches checkpointing on
    lora = LoraConfig(
        r=request["rank"],
        lora_alpha=request["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    in_float32 = request["variant"]["adapters"] == "float32"
    return get_peft_model(model, lora, autocast_adapter_dtype=in_float32)


def register_varlen() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("varlen", varlen_attention)
    AttentionMaskInterface.register("varlen", lambda *arguments, **options: None)


def varlen_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """One row of documents: [1, heads, tokens, head] each. TRL's collator tells the borders."""
    from torch.nn.attention import varlen

    kernel: Any = varlen.varlen_attn  # its parameters have changed from version to version
    known = inspect.signature(kernel).parameters
    flags: dict[str, Any] = {"window_size": (-1, 0), "is_causal": True, "scale": scaling, "enable_gqa": True}
    if "window_size" in known:
        del flags["is_causal"]  # torch 2.10 has the one, later ones have the other
    flags = {name: value for name, value in flags.items() if name in known}
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    if key.shape[1] != query.shape[1] and "enable_gqa" not in known and not takes_fewer_key_heads(kernel):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    borders, longest = cu_seq_lens_q, max_length_q
    attended = kernel(query, key, value, borders, borders, longest, longest, **flags)
    return attended[None], None


@functools.cache
def takes_fewer_key_heads(kernel: Any) -> bool:
    """A version without a flag for grouped queries may compute them all the same: tried once, gradients too."""
    query, key = (torch.ones(16, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2))
    query, key = query.requires_grad_(), key.requires_grad_()
    borders = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
    try:
        with torch.enable_grad():
            kernel(query, key, key, borders, borders, 16, 16).float().sum().backward()
    except RuntimeError:
        return False
    return key.grad is not None and key.grad.shape == key.shape


# The trainer ------------------------------------------------------------------------------------------------


def make_trainer(request: Request, model: Any, documents: Documents, steps: Steps) -> Any:
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
            rows: Any = self.train_dataset if train_dataset is None else train_dataset
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(
        model=model,
        args=settings(request),
        train_dataset=rows_of(request, documents),
        processing_class=AutoTokenizer.from_pretrained(request["model"]),
        callbacks=[callback(steps)],
    )
    trainer.data_collator = counting(trainer.data_collator, steps)
    return trainer


def settings(request: Request) -> Any:
    from trl import SFTConfig

    variant = request["variant"]
    checkpointing = variant["checkpointing"]
    rows = request["bins_per_step"] // variant["micro_steps"] if variant["packing"] else PADDED_ROWS
    return SFTConfig(
        output_dir=request["folder"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=variant["micro_steps"],
        max_steps=request["num_steps"],
        padding_free=variant["packing"],
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=request["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=request["dtype"] == "bfloat16" and variant["adapters"] == "float32",
        use_cpu=device_of(request).type == "cpu",
        gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs={"use_reentrant": False, "selective": checkpointing == "selective"},
        use_liger_kernel=variant["liger"],
        torch_compile=variant["compile"],
        logging_steps=LOGGED_EVERY,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def rows_of(request: Request, documents: Documents) -> Any:
    import datasets

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    if request["variant"]["packing"]:
        columns["seq_lengths"] = []
        for number in range(documents.num_bins):
            for column, values in zip(columns.values(), documents.packed(number), strict=True):
                column.append(list(values))
    else:
        for number in range(len(documents)):
            for column, values in zip(columns.values(), documents.document(number), strict=True):
                column.append(list(values))
    return datasets.Dataset.from_dict(columns)


def counting(collator: Any, steps: Steps) -> Any:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = collator(rows)
        steps.count(batch["labels"], sum(len(row["input_ids"]) for row in rows))
        return batch

    return collate


def callback(steps: Steps) -> Any:
    from transformers import TrainerCallback

    class Noting(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            steps.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
            if logs and "loss" in logs:
                steps.losses[state.global_step] = float(logs["loss"])
                steps.grad_norms[state.global_step] = float(logs["grad_norm"])

    return Noting()


if __name__ == "__main__":
    run(train)
