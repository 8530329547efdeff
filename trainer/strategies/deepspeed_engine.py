"""DeepSpeed's engine for all stages of ZeRO: its settings, and how it is started without compiling anything."""

import contextlib
import io
import os
import warnings
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.ranks import Ranks
from trainer.updates.adamw import torch_adamw

MAX_BUCKET_NUMBERS = 1 << 26
"""Gradients in one message. DeepSpeed allocates a buffer of this size, by default 500 million numbers."""


def start_engine(
    module: torch.nn.Module,
    trained: list[torch.nn.Parameter],
    train: TrainConfig,
    ranks: Ranks,
    settings: dict[str, Any],
) -> Any:
    """An engine with torch's AdamW over `trained`, which are parameters of `module`."""
    deepspeed = import_deepspeed(ranks.device)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory is in use
        return deepspeed.initialize(
            model=module,
            optimizer=torch_adamw(trained, train),
            config=settings,
            dist_init_required=False,
        )[0]


def engine_settings(
    trained: list[torch.nn.Parameter], train: TrainConfig, *, stage: int, device: torch.device
) -> dict[str, Any]:
    bucket = min(sum(parameter.numel() for parameter in trained), MAX_BUCKET_NUMBERS)
    bucket += bucket % 2  # it wants an even one
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    on_cpu = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if train.offload != "none":
        zero["offload_optimizer"] = on_cpu
    if train.offload == "all":
        zero["offload_param"] = on_cpu
    return {
        "train_micro_batch_size_per_gpu": 1,  # it counts samples by it, for its own log
        "gradient_accumulation_steps": 1,
        # We say with step() when the micro-steps of a step are done. The loss is divided by the whole step's weight.
        "managed_gradient_accumulation": False,
        "gradient_clipping": train.max_grad_norm,
        "bf16": {"enabled": trained[0].dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for CPUs has to be compiled first
    }


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told what it would otherwise find out by compiling programs and asking for MPI."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.ops

    # DeepSpeed 0.19 gathers by names that torch 2.13 is giving up; nobody can act on the warnings.
    warnings.filterwarnings(
        "ignore", ".*(all_gather_into|reduce_scatter)_tensor. is deprecated", FutureWarning
    )
    # It would compile its own all-reduce for CPUs, half a minute at first use, and look for a compiler for that.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
