"""Settings of the trainer, the evaluation and the gate."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer

from schemas.local_path import LocalPath
from schemas.section import Section

Method = Literal[
    "lora",
    "full",
    "freeze",
    "expand",
    "prefix",
    "prompt",
    "p_tuning",
    "llama_adapter",
    "ia3",
]
Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp2", "pipeline"]
BaseForm = Literal["plain", "int8", "int8_rows", "nf4"]
OptimizerName = Literal[
    "adamw",
    "adamw_bf16",
    "adamw_8bit",
    "paged_adamw_8bit",
    "lion",
    "schedule_free",
    "muon",
    "galore",
    "apollo",
]
Tracker = Literal["tensorboard", "wandb"]
LoraInit = Literal["default", "pissa", "olora", "eva", "loftq"]

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


class RopeScalingConfig(Section):
    type: Literal["linear", "dynamic", "yarn", "llama3"]
    """How positions beyond those that the model knows are brought into its range, by the names of transformers."""
    factor: float = Field(gt=1)
    """How many times as many positions."""


class ModelConfig(Section):
    path: LocalPath
    """Folder with a Hugging Face model and tokenizer, or a hub name that is in the local cache."""
    revision: str | None = None
    """Commit or tag of a hub name."""
    tokenizer: LocalPath | None = None
    """Folder or name of another tokenizer; default: the model's."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer and the embedding get. Each begins as the mean of all others and is trained, in the
    embedding and in the head. Words of letters and digits are found in all texts; others, such as <|tool|>, stand
    only where the chat template writes them. One that is there already keeps its numbers, and is trained too."""
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

    init: Literal["files", "random"] = "files"
    """random: no weight is read, they are drawn. To see whether a training fits before its model is downloaded: the
    folder needs nothing but config.json and the tokenizer. Such a model is never promoted."""
    rope_scaling: RopeScalingConfig | None = None
    """For examples longer than the model's positions. A model that is saved carries it in its config; whoever loads an
    adapter elsewhere gives the same to the base."""


class LoraConfig(Section):
    rank: int = Field(default=16, gt=0)
    """Inner size of the two matrices beside each layer: more learn more and take more memory."""
    alpha: float = Field(default=32, gt=0)
    """What the matrices add is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA), so that a high rank learns as fast as a low one."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the inputs of the matrices that is dropped in training."""
    targets: str | list[str] = "all-linear"
    """'all-linear' (all but the head), a list of ends of modules' names, or a regular expression for whole names."""
    dora: bool = False
    """Train the length of each output's weights apart from their direction (DoRA). Slower: fused layers don't compute
    it."""
    init: LoraInit = "default"
    """What the matrices begin with. default: the first random, the second 0; pissa: the leading part of the weight's
    singular values, olora: of its QR decomposition, both taken out of the base meanwhile; eva: the leading directions of
    what flows into the layer; loftq: what a quantised base has lost."""
    eva_bins: int = Field(default=16, gt=0)
    """init eva: so many bins of the training side are looked at."""
    eva_rho: float = Field(default=2.0, ge=1)
    """init eva: a layer may get up to so many times the rank, where others get less; 1: all get the same."""
    learning_rate_ratio: float = Field(default=1.0, gt=0)
    """LoRA+: the second matrix learns so many times as fast as the first one; 16 is usual, 1 is off."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole beside the matrices and saved with them, by the end of their names: lm_head,
    embed_tokens, norm. A head and an embedding that are one matrix stay one, whichever is named."""


class Ia3Config(Section):
    targets: list[str] = Field(default_factory=list)
    """Layers whose outputs are scaled, by the ends of their names; none: those of keys and values."""
    feedforward_targets: list[str] = Field(default_factory=list)
    """Layers whose inputs are scaled; none: the last one of each MLP."""


class LionConfig(Section):
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the mean of earlier gradients in the sign that a step follows."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of that mean."""


class MuonConfig(Section):
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the mean of gradients."""
    newton_schulz_steps: int = Field(default=5, gt=0, lt=100)
    """Products that bring its singular values near 1."""


class LowRankConfig(Section):
    rank: int = Field(default=128, gt=0)
    """Inner size of the projection; matrices whose shorter side is no longer are left to AdamW."""
    every_updates: int = Field(default=200, gt=0)
    """A new projection each so many updates."""
    scale: float | None = Field(default=None, gt=0)
    """The projected update is multiplied by it. Default: 0.25 for galore, 1 for apollo."""


class FreezeConfig(Section):
    last_layers: int = Field(default=0, ge=0)
    """Train so many decoder layers, counted from the end."""
    parameters: list[str] = Field(default_factory=list)
    """Train the parameters whose whole names match one of these regular expressions, such as '.*norm.*'."""
    head: bool = False
    """Train the LM head. Where it is one matrix with the embedding, this and `embeddings` name the same."""
    embeddings: bool = False
    """Train the token embedding."""


class ExpandConfig(Section):
    new_layers: int = Field(default=4, gt=0)
    """Layers that are added, evenly among those that are there: no more than these."""


class VirtualTokensConfig(Section):
    """Of the methods prefix, prompt, p_tuning and llama_adapter."""

    count: int = Field(default=32, gt=0)
    """How many stand before each document; of llama_adapter, in each of its layers."""
    inner_size: int | None = Field(default=None, gt=0)
    """Of the small network that they come out of while they are trained: prefix has one where this is set, p_tuning
    always; its default is the model's hidden size."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """How method prompt begins: with embeddings of tokens drawn from the vocabulary, or with normal noise."""
    layers: int | None = Field(default=None, gt=0)
    """llama_adapter: in how many layers, counted from the head; default: in all."""


class TrainConfig(Section):
    method: Method = "lora"
    """What is trained. lora: small matrices beside the frozen weights; full: all weights; freeze: some of the weights;
    expand: layers that are added, and change nothing at first; and virtual tokens before each document, prefix: as keys
    and values of each layer, prompt: as embeddings, p_tuning: as embeddings out of a small network, llama_adapter:
    beside the attention of each layer, behind a gate; ia3: vectors that scale keys, values and what the MLPs compute."""
    lora: LoraConfig = LoraConfig()
    freeze: FreezeConfig = FreezeConfig()
    """method freeze: what is trained, all of these together."""
    expand: ExpandConfig = ExpandConfig()
    """method expand."""
    ia3: Ia3Config = Ia3Config()
    """method ia3."""
    virtual_tokens: VirtualTokensConfig = VirtualTokensConfig()
    """methods prefix, prompt, p_tuning and llama_adapter."""
    batches: Literal["auto", "packed", "unpacked"] = "auto"
    """How the documents of a bin are laid out. packed: one after the other in one row; unpacked: each in a row of its
    own, padded to the longest of a batch of at most as many tokens as a bin has; auto: unpacked for virtual tokens,
    else packed. The loss is the same."""
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
    optimizer: OptimizerName = "adamw"
    """How weights change by their gradients. adamw: torch's, fused on GPUs; adamw_bf16: bfloat16 weights and moments,
    and what rounding leaves over; adamw_8bit, paged_adamw_8bit: bitsandbytes'; lion; schedule_free: AdamW whose average
    is the model; muon, galore, apollo: for whole matrices (docs/optimizers.md)."""
    lion: LionConfig = LionConfig()
    muon: MuonConfig = MuonConfig()
    low_rank: LowRankConfig = LowRankConfig()
    """Of galore and apollo."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Keep an average of the trained weights, which is validated and saved in their place: each update leaves so much
    of it, fewer of the first ones. 0 is off; 0.999 is usual."""
    learning_rate: float = Field(default=2e-4, gt=0)
    """The highest, after the warm-up. For method full a tenth of the default is usual."""
    schedule: Literal["constant", "linear", "cosine", "wsd", "step"] = "cosine"
    """How the learning rate falls from the end of the warm-up to the last step. wsd: it stays, and falls at the end;
    step: it is multiplied by a factor now and then."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of the steps after the warm-up in which it falls, first fast, by 1 - the root of what is done."""
    step_decay_steps: int | None = Field(default=None, gt=0)
    """step: steps between two falls; default: those of an epoch."""
    step_decay_factor: float = Field(default=0.85, gt=0, le=1)
    """step: what it is multiplied by."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Default: warmup_share of all steps."""
    warmup_share: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    min_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Where all but constant end, as a share of learning_rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Each step shrinks the trained weights by learning rate x this."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients; for schedule_free, the share of the average in the weights that compute."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of that mean."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is spread over the whole vocabulary; validation does without. 0.1 is usual."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on the embeddings in training (NEFTune): uniform, up to this over the root of a document's length x the
    hidden size. 5 is usual, 0 is off."""
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
    """layers: decoder layers with LoRA computed as one, of the families and settings that can be; auto: this on GPUs,
    with compile, or where memory settings need it, else LoRA layers fused and, on CUDA with liger-kernel installed, its
    kernels; plain: the libraries' own."""
    attention: Literal["auto", "by_document"] = "auto"
    """auto: the variable-length kernel from compute capability 8.0 on, in 16 bits; by_document: as on older cards and
    CPUs, torch's plain attention on one document after the other."""
    compile: bool = False
    """torch.compile of the decoder layers: minutes at the start, then faster steps. It needs a C++ compiler."""
    compile_cache: LocalPath | None = None
    """Folder that keeps compiled programs for later trainings; default: the libraries' own, in the temporary folder and
    in the user's home."""
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
    best_metric: Literal["validation_loss", "validation_bits_per_byte", "validation_token_accuracy"] = (
        "validation_bits_per_byte"
    )
    """What the best validation, and early stopping, go by: the lowest, of token accuracy the highest."""
    early_stopping_evaluations: int = Field(default=0, ge=0)
    """Stop after so many validations in a row that are no better than the best one; 0: never."""
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Loss on the validation side every so many steps; 0: only at the end."""
    trackers: list[Tracker] = Field(default=["tensorboard"])
    """Where the numbers of each step go beside metrics.jsonl. wandb: a folder for `wandb sync`, never a network."""
    max_nonfinite_steps: int = Field(default=3, ge=0)
    """Skipped steps (loss or gradient not finite) before training gives up."""
    max_loss_spike: float = Field(default=0.0, ge=0)
    """Skip a step whose loss is more than so many times the median of the last 64 steps; 0 is off."""
    max_grad_spike: float = Field(default=0.0, ge=0)
    """The same for the gradient norm before clipping."""
    max_spike_steps: int = Field(default=10, ge=0)
    """Steps skipped so before training gives up."""


class EvaluateConfig(Section):
    split: Literal["validation", "test"] = "test"
    """Which held-out side the report and the gate use."""
    questions: list[str] = Field(default_factory=list)
    """Prompts answered greedily by the base model and by the candidate, for people to read."""
    max_new_tokens: int = Field(default=96, gt=0)
    """Longest answer."""


class PromoteConfig(Section):
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided level of the paired bootstrap's lower bound."""
    bootstrap_samples: int = Field(default=2000, gt=0)
    """Draws of the bootstrap."""
    seed: int = 0
    """Of those draws."""
    max_source_regression: float = Field(default=0.02, ge=0)
    """A source's bits per byte may grow by at most this share."""
