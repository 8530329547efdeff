"""Model and tokenizer from a local folder or the local hub cache: safetensors only, no remote code, no network."""

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from pipelines.built_in_templates import template_for
from pipelines.hub_cache import model_folder
from pipelines.tokenizer_files import add_new_tokens
from schemas.errors import ConfigError, InputError, RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import BaseForm, ModelConfig
from trainer import int8_rows, nf4
from trainer.attention import use_packed_attention
from trainer.dtypes import cast, is_scale_vector, resolve_dtype
from trainer.model_files import check_model_folder, refuse_remote_code
from trainer.rope import scale_rope

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LayOut = Callable[[torch.nn.Module, torch.device, BaseForm], dict[str, torch.device]]


def load_base_model(
    model: ModelConfig,
    *,
    base: BaseForm = "plain",
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    lay_out: LayOut | None = None,
) -> PreTrainedModel:
    """The model with packed attention, all weights from safetensors; device and dtype default to the config's.

    With base int8 or int8_rows its linear layers, but for the head, are held in 8 bits, with nf4 in 4: each is
    quantised on the device as it is read, so the whole of them is never there. `lay_out` says which module goes to which of several
    devices. Raises InputError when a weight is missing or only pickles are there, RefusedError when the architecture
    can't be trained packed.
    """
    folder = check_model_folder(model)
    device = device if device is not None else resolve_device(model)
    dtype = dtype if dtype is not None else resolve_dtype(model, device)
    if model.init == "random":
        return _with_new_rows(_drawn_model(model, base=base, device=device, dtype=dtype), model)
    result: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=read_config(model),
        dtype=dtype,
        device_map=_device_map(model, device, dtype, base, lay_out),
        **_quantisation(folder, base),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    loaded: PreTrainedModel = result[0]
    report: dict[str, Any] = result[1]
    lost = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
    if lost:
        raise InputError(
            f"{folder}: {len(lost)} weights of {type(loaded).__name__} are missing or of another shape, "
            f"first {lost[0]}; they would be random: use a complete model folder"
        )
    if lay_out is not None:
        remove_hook_from_submodules(loaded)  # they bring inputs to modules, but not what the loss needs back
    if base == "nf4":
        nf4.take_over(loaded, dtype)
    if base == "int8_rows":
        int8_rows.take_over(loaded, dtype)
    if base != "plain":
        cast(loaded, dtype)
    use_packed_attention(loaded)
    return _with_new_rows(loaded, model)


def _with_new_rows(loaded: PreTrainedModel, model: ModelConfig) -> PreTrainedModel:
    if model.new_tokens:
        from trainer.new_tokens import add_rows

        tokenizer = _read_tokenizer(model)
        num_known = len(tokenizer)
        add_new_tokens(tokenizer, model)
        ids = [tokenizer.convert_tokens_to_ids(token) for token in model.new_tokens]
        add_rows(loaded, ids, num_known=num_known)  # type: ignore[arg-type]  # each is one token
    return loaded


def read_config(model: ModelConfig) -> Any:
    """The model's config as the settings want it."""
    folder = model_folder(model.path, model.revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if model.rope_scaling is not None:
        scale_rope(config, model.rope_scaling)
    return config


def _drawn_model(
    model: ModelConfig, *, base: BaseForm, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    from trainer.random_weights import fill_randomly
    from trainer.weights import model_without_weights

    drawn = model_without_weights(model, base=base, dtype=dtype)
    assert drawn is not None, "no file has to fit"
    fill_randomly(drawn, device, dtype)
    return drawn


def _device_map(
    model: ModelConfig, device: torch.device, dtype: torch.dtype, base: BaseForm, lay_out: LayOut | None
) -> dict[str, torch.device] | None:
    if lay_out is not None:
        return lay_out(empty_model(model, dtype), device, base)
    return {"": device} if device.type != "cpu" or base != "plain" else None


def empty_model(model: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Names and shapes of a model, on the meta device: no weight is read, and none takes memory."""
    with torch.device("meta"):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(read_config(model), dtype=dtype)
    return empty


def _quantisation(folder: Path, base: BaseForm) -> dict[str, Any]:
    if base in ("int8", "int8_rows"):
        # Each product casts its inputs to fp16 to quantise them, as the method does, and says so each time.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # A folder that is quantised already says itself how; support.py has seen that it is the form of `base`.
    if base == "plain" or "quantization_config" in json.loads((folder / "config.json").read_bytes()):
        return {}
    if base in ("int8", "int8_rows"):
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


@contextmanager
def without_outliers(model: torch.nn.Module) -> Iterator[None]:
    """For exact comparisons over an int8 base; does nothing to others.

    LLM.int8 computes input columns with a large number in some row apart from the rest, in 16 bits. So what a
    token computes hangs, within the noise of 8 bits, on the other documents in its micro-batch.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    layers: list[Any] = []
    if bitsandbytes is not None:
        layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear8bitLt)]
    thresholds = [layer.state.threshold for layer in layers]
    try:
        for layer in layers:
            layer.state.threshold = 0.0
        yield
    finally:
        for layer, threshold in zip(layers, thresholds, strict=True):
            layer.state.threshold = threshold


def as_saved(model: ModelConfig, folder: Path) -> ModelConfig:
    """A whole model in `folder`, taken as it is: what the settings change in the base stands in its own files."""
    own: dict[str, Any] = {
        "path": str(folder),
        "revision": None,
        "init": "files",
        "rope_scaling": None,
        "new_tokens": [],
    }
    return model.model_copy(update=own)


def load_adapter(model: PreTrainedModel, folder: Path) -> "PeftModel":
    """A trained adapter over a loaded base model, for evaluation: nothing is trainable."""
    from peft import PeftModel

    from trainer.dora import compute_in_float32

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not an adapter: {name} is missing; train first")
    before = {id(parameter) for parameter in model.parameters()}
    with outdated_names_allowed():
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=False)
    # PEFT upcasts what it adds: it would compute in fp32 what was trained in the model's own dtype.
    for name, parameter in adapted.named_parameters():
        if id(parameter) not in before and not is_scale_vector(name):
            parameter.data = parameter.data.to(model.dtype)
    compute_in_float32(adapted)
    return adapted


@contextmanager
def outdated_names_allowed() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 for a property under its old name; nobody can act on the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass, layer by layer."""
    # transformers 5.23 has the first name and warns at the second, 5.17 has the second alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the reentrant variant loses the gradient behind a frozen embedding


def load_tokenizer(config: PipelineConfig) -> "PreTrainedTokenizerBase":
    """The tokenizer that made the shards, with the chat template of split.chat_template where one is named."""
    tokenizer = _read_tokenizer(needed_model(config))
    add_new_tokens(tokenizer, needed_model(config))
    if config.split.chat_template is not None:
        tokenizer.chat_template = template_for(config.split.chat_template, tokenizer)
    return tokenizer


def _read_tokenizer(model: ModelConfig) -> "PreTrainedTokenizerBase":
    name = model.tokenizer if model.tokenizer is not None else model.path
    folder = model_folder(name, model.revision if model.tokenizer is None else None)
    refuse_remote_code(folder, ("tokenizer_config.json",))
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no readable tokenizer: {' '.join(str(error).split())}") from error
    return tokenizer


def needed_model(config: PipelineConfig) -> ModelConfig:
    """Raises ConfigError when the config names no model."""
    if config.model is None:
        raise ConfigError("the config has no section model: add model.path, a folder or a cached hub name")
    return config.model


def resolve_device(model: ModelConfig) -> torch.device:
    """Raises RefusedError when CUDA is asked for and absent."""
    if model.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("model.device is cuda but torch sees no CUDA device; use device: auto or cpu")
    if model.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
