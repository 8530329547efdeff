"""What is trained, made as a job wants it: model, method, kernels and optimiser, in the order of train.py."""

import os

import torch
from transformers import PreTrainedModel

from schemas.training_config import ModelConfig
from trainer import initial_adapter
from trainer.attention import unwrapped, use_packed_attention, use_plain_attention
from trainer.compiling import compile_layers
from trainer.draws import use_bin_dropout
from trainer.dtypes import check_dtypes
from trainer.fast.check import keep_if_right
from trainer.job import Job, tell
from trainer.kernels import use_fast_kernels, use_fast_layers
from trainer.methods import METHODS, lora
from trainer.model import empty_model, enable_gradient_checkpointing, load_base_model
from trainer.model_files import check_model_folder
from trainer.noise import use_noise
from trainer.optimizers import Optimizer
from trainer.probe import check_packing
from trainer.random_weights import RandomWeights
from trainer.ranks import CPU
from trainer.start_adapter import adapter_folder, merge_into
from trainer.strategies import STRATEGIES
from trainer.weights import WeightFiles, model_without_weights


def make_deterministic(job: Job) -> None:
    """On CUDA by wish, since it costs speed. cuBLAS reads its variable when its first handle is made."""
    if job.config.train.deterministic and job.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_method(job: Job) -> None:
    """Targets, ranks and the like against names and shapes, before weights are read."""
    check = getattr(METHODS[job.config.train.method], "check", None)
    is_given = job.model.adapter is not None and job.model.adapter_use == "continue"
    if check is not None and not is_given:
        check(empty_model(job.model), job.config.train)


def load_model(job: Job) -> torch.nn.Module:
    """The model with its weights, or with stand-ins for them where the strategy fills them in later."""
    model = _without_weights(job)
    if model is None:
        model = _with_weights(job)
    if job.model.adapter is not None and job.model.adapter_use == "merge":
        merge_into(model, adapter_folder(job.model))
    if job.config.train.attention == "by_document":
        use_packed_attention(model, by_document=True)
    if job.config.train.gradient_checkpointing != "none":
        enable_gradient_checkpointing(model)
    return model


def _without_weights(job: Job) -> PreTrainedModel | None:
    """None where the weights are read at once, or can't be filled in later."""
    if STRATEGIES[job.config.train.strategy].fill is None or needs_weights(job):
        return None
    return model_without_weights(job.model, base=job.config.train.base, dtype=job.dtype)


def _with_weights(job: Job) -> PreTrainedModel:
    strategy, device = STRATEGIES[job.config.train.strategy], job.device
    if strategy.fill is not None:
        tell(job, "each process loads the whole model first: it can't be read in parts")
        device = CPU  # where there is more room; place() takes from it what this rank keeps
    return load_base_model(
        job.model, base=job.config.train.base, device=device, dtype=job.dtype, lay_out=strategy.lay_out
    )


def needs_weights(job: Job) -> bool:
    """Whether something reads the model's weights before they are laid over the processes."""
    return getattr(METHODS[job.config.train.method], "NEEDS_WEIGHTS", False) or bool(job.model.new_tokens)


def apply_method(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    trained: torch.nn.Module
    if job.model.adapter is not None and job.model.adapter_use == "continue":
        trained = lora.apply_existing(unwrapped(model), job.config.train, adapter_folder(job.model))
    elif initial_adapter.is_needed(job.config.train):
        trained = initial_adapter.apply(job, model)
    else:
        trained = METHODS[job.config.train.method].apply(model, job.config.train)
    check_dtypes(trained, job.dtype)
    if job.padded_tokens_per_bin is not None:
        use_plain_attention(trained)
    return trained


def use_draws(job: Job, model: torch.nn.Module) -> None:
    use_bin_dropout(model)
    if job.config.train.neftune_alpha:
        use_noise(model, job.config.train.neftune_alpha)


def speed_up(job: Job, model: torch.nn.Module) -> None:
    tell(job, f"computing with {use_fast_kernels(model, job.config.train, device=job.device)}")


def place(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    return STRATEGIES[job.config.train.strategy].place(model, job.device, job.ranks, job.config.train)


def fill(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    fill_in = STRATEGIES[job.config.train.strategy].fill
    if fill_in is not None:
        with weight_source(job.model) as files:
            fill_in(model, files, job.ranks)
    return model


def weight_source(model: ModelConfig) -> WeightFiles | RandomWeights:
    return RandomWeights() if model.init == "random" else WeightFiles(check_model_folder(model))


def check_layout(job: Job, model: torch.nn.Module) -> None:
    is_padded = job.padded_tokens_per_bin is not None
    check_packing(model, device=job.device, dtype=job.dtype, ranks=job.ranks, is_padded=is_padded)


def speed_up_layers(job: Job, model: torch.nn.Module) -> bool:
    """Compute decoder layers as one where that is right; whether all of them are."""
    taken = use_fast_layers(model, job.config.train, device=job.device)
    if taken is None:
        return False
    tell(job, str(taken))
    problem = keep_if_right(model, taken, device=job.device, dtype=job.dtype, ranks=job.ranks)
    if problem is not None:
        tell(job, f"decoder layers compute their own way: {problem}")
    return len(taken.layers) == taken.num_layers


def compile_rest(job: Job, model: torch.nn.Module, are_all_taken: bool) -> None:
    """Layers that are computed as one compile their pieces themselves."""
    train = job.config.train
    if not train.compile or are_all_taken:
        return
    if train.base != "plain" or train.gradient_checkpointing != "none":
        tell(job, "nothing is compiled: over bits, or recomputed, layers can't be but as one")
        return
    tell(job, compile_layers(model))


def build_optimizer(job: Job, model: torch.nn.Module) -> Optimizer:
    return STRATEGIES[job.config.train.strategy].build_optimizer(model, job.config.train, job.ranks)
