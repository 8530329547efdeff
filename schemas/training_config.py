"""Settings of the trainer, the evaluation and the gate."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from schemas.local_path import LocalPath

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "pipeline"]
BaseForm = Literal["plain", "int8", "int8_rows", "nf4"]
Tracker = Literal["tensorboard", "wandb"]

_BOOLS_OF_CHECKPOINTING = {"none": False, "full": True}


def _checkpointing_of(value: Any) -> Any:
    return {False: "none", True: "full"}[value] if isinstance(value, bool) else value


def _checkpointing_as_it_was(value: str) -> bool | str:
    return _BOOLS_OF_CHECKPOINTING.get(value, value)


Checkpointing = Annotated[
    Literal["none", "selective", "full"],
    BeforeValidator(_checkpointing_of, json_schema_input_type=Literal["none", "selective", "full"] | bool),
    PlainSerializer(_checkpointing_as_it_was, return_type=bool | str),
]
"""Also true and false, as which none and full are written: what was written before has the same key."""


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(_Section):
    path: LocalPath
    """Folder with a Hugging Face model and tokenizer, or a hub name that is in the local cache."""
    revision: str | None = None
    """Commit or tag of a hub name."""
    tokenizer: LocalPath | None = None
    """Folder or name of another tokenizer; default: the model's."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What weights and activations compute in; what is trained adds up in float32 all the same. auto: bfloat16 from
    compute capability 8.0 on, and on CPUs; float16, with a loss scale, from 7.0 on; else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where torch sees one."""
    adapter: LocalPath | None = None
    """Folder of a LoRA adapter over this model that training starts from."""
    adapter_use: Literal["continue", "merge"] = "continue"
    """continue: its weights are trained on, with its rank and targets; merge: it is added into the base and a fresh
    adapter is trained over that, and both are saved as one."""


class LoraConfig(_Section):
    rank: int = Field(default=16, gt=0)
    """Inner size of the two matrices beside each layer: more learn more and take more memory."""
    alpha: float = Field(default=32, gt=0)
    """What the matrices add is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of the matrices that is dropped in training."""
    targets: str | list[str] = "all-linear"
    """'all-linear', or names of modules."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole beside the matrices and saved with them, by the end of their names: lm_head,
    embed_tokens, norm. A head and an embedding that are one matrix stay one, whichever is named."""


class TrainConfig(_Section):
    method: Literal["lora", "full"] = "lora"
    """What is trained: small matrices beside the frozen weights, or all weights."""
    lora: LoraConfig = LoraConfig()
    base: BaseForm = "plain"
    """In what form the frozen weights are held. int8: bitsandbytes' LLM.int8, half the memory of bfloat16; int8_rows:
    the same weights, multiplied in 16 bits: faster and closer to the unquantised model; nf4: its 4-bit floats, as in
    QLoRA, a bit more than a quarter."""
    strategy: Strategy = "single"
    """How the work is laid over devices. ddp: each holds everything; zero1, zero2: DeepSpeed, each holds a part of
    the optimiser, with zero2 of the gradients, with zero3 of all weights too; fsdp2: each holds a part of all that is
    trained, and of the frozen weights where train.shard_base says so; pipeline: one process, layers lie on all GPUs."""
    shard_base: Literal["auto", "always", "never"] = "auto"
    """fsdp2: whether frozen weights are cut over the ranks too; auto: only where they would take over half of the free
    memory of a device. Whole ones are faster."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the CPU's memory for its turn. optimizer: masters, moments and their update; all: the weights
    too."""
    num_processes: int | None = Field(default=None, gt=0)
    """Default: one per visible GPU where the strategy is for several devices, else 1."""
    rank_timeout_seconds: float = Field(default=1800.0, gt=0)
    """Several processes: one that does not go on for so long is named and ends the training."""
    epochs: int = Field(default=1, gt=0)
    """Passes over the training side; pack.weights says how often a source stands in one."""
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimiser steps."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop before the step that would pass this many tokens (padding not counted)."""
    bins_per_step: int = Field(default=8, gt=0)
    """Bins of the packing plan in one optimiser step, over all micro-steps."""
    bins_per_micro_step: int = Field(default=1, gt=0)
    """Bins in memory at once; changes speed and memory, never the result."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest, after the warm-up. For method full a tenth of the default is usual."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls from the end of the warm-up to the last step."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Default: warmup_share of all steps."""
    warmup_share: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    min_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of learning_rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Each step shrinks the trained weights by learning rate x this."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of that mean."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 is off."""
    gradient_checkpointing: Checkpointing = "none"
    """Recompute activations in the backward pass: less memory, slower. selective: what is cheap for its size; full, or
    true: all but the input of each layer."""
    offload_checkpoints: bool = False
    """With gradient_checkpointing full, the inputs of the layers wait in the CPU's memory: for very long rows."""
    mlp_tokens_at_once: int | None = Field(default=None, gt=0)
    """Compute the MLP of a layer over so many tokens at a time, and again in the backward pass: for very long rows."""
    kernels: Literal["auto", "layers", "plain"] = "auto"
    """layers: decoder layers with LoRA computed as one, of the families and settings that can be; auto: this with
    compile, or where memory settings need it, else LoRA layers fused and, on CUDA with liger-kernel installed, its
    kernels; plain: the libraries' own."""
    attention: Literal["auto", "by_document"] = "auto"
    """auto: the variable-length kernel from compute capability 8.0 on, in 16 bits; by_document: as on older cards and
    CPUs, torch's plain attention on one document after the other."""
    compile: bool = False
    """torch.compile of the decoder layers: minutes at the start, then faster steps. It needs a C++ compiler."""
    deterministic: bool = False
    """CUDA only: bit-equal resume, slower. On CPU it always is."""
    seed: int = 0
    """Of fresh adapter weights and of dropout."""
    checkpoint_every_steps: int = Field(default=100, gt=0)
    """A killed training goes on from the last one."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Older ones are removed, but for the best one where keep_best is on."""
    keep_best: bool = False
    """Publish the weights of the best validation in place of the last ones."""
    best_metric: Literal["validation_loss", "validation_bits_per_byte"] = "validation_bits_per_byte"
    """What the best validation, and early stopping, go by: the lowest."""
    early_stopping_evaluations: int = Field(default=0, ge=0)
    """Stop after so many validations in a row that are no better than the best one; 0: never."""
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Loss on the validation side every so many steps; 0: only at the end."""
    trackers: list[Tracker] = ["tensorboard"]
    """Where the numbers of each step go beside metrics.jsonl. wandb: a folder for `wandb sync`, never a network."""
    max_nonfinite_steps: int = Field(default=3, ge=0)
    """Skipped steps (loss or gradient not finite) before training gives up."""
    max_loss_spike: float = Field(default=0.0, ge=0)
    """Skip a step whose loss is more than so many times the median of the last 64 steps; 0 is off."""
    max_grad_spike: float = Field(default=0.0, ge=0)
    """The same for the gradient norm before clipping."""
    max_spike_steps: int = Field(default=10, ge=0)
    """Steps skipped so before training gives up."""


class EvaluateConfig(_Section):
    split: Literal["validation", "test"] = "test"
    """Which held-out side the report and the gate use."""
    questions: list[str] = Field(default_factory=list)
    """Prompts answered greedily by the base model and by the candidate, for people to read."""
    max_new_tokens: int = Field(default=96, gt=0)
    """Longest answer."""


class PromoteConfig(_Section):
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided level of the paired bootstrap's lower bound."""
    bootstrap_samples: int = Field(default=2000, gt=0)
    """Draws of the bootstrap."""
    seed: int = 0
    """Of those draws."""
    max_source_regression: float = Field(default=0.02, ge=0)
    """A source's bits per byte may grow by at most this share."""
