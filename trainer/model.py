"""Model and tokenizer from a local folder or the local hub cache: safetensors only, no remote code, no network."""

import functools
import hashlib
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
from pipelines.tokenizer_files import add_new_tokens
from schemas.errors import ConfigError, InputError, RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import BaseForm, ModelConfig
from trainer import int8_rows, nf4
from trainer.attention import unwrapped, use_packed_attention
from trainer.rope import scale_rope
from trainer.support import model_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

LayOut = Callable[[torch.nn.Module, torch.device, BaseForm], dict[str, torch.device]]

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (7, 0)
"""Compute capabilities from which on tensor cores multiply in that precision."""


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
        _cast(loaded, dtype)
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


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """From a quantised folder transformers takes norms, biases and the head in the dtype that they have there."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not _is_own_dtype(
            model, name
        ):
            parameter.data = parameter.data.to(dtype)


def check_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """PEFT and bitsandbytes make fp32 of adapters, norms or the head here and there: slower, and no mistake shows.

    Raises TrainingError when a parameter computes in another dtype, unless its family asks for fp32 itself.
    """
    causal_lm = unwrapped(model)
    for name, parameter in model.named_parameters():
        is_floating = parameter.is_floating_point()
        if is_floating and parameter.dtype != dtype and not _is_own_dtype(causal_lm, name):
            raise TrainingError(f"{name} is {parameter.dtype}, expected {dtype}: report this")


def _is_own_dtype(model: Any, name: str) -> bool:
    """Quantised bytes, their scales, and what a model's family computes in fp32 whatever the rest does."""
    in_fp32 = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    is_own = name.endswith((".packed", ".absmax", ".rows", ".scales")) or is_scale_vector(name)
    return is_own or any(part in in_fp32 for part in name.split("."))


def is_scale_vector(name: str) -> bool:
    """A parameter of IA3 or a magnitude of DoRA, held in fp32: near 1, bf16 knows steps of 1/128 alone."""
    return ".ia3_l." in name or ".lora_magnitude_vector." in name


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
    _refuse_remote_code(folder, ("tokenizer_config.json",))
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


def resolve_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it, float16 where only that has tensor cores, else float32.

    Raises RefusedError where bfloat16 was asked for and is emulated.
    """
    capability = _compute_capability(device) if device.type == "cuda" else BFLOAT16_CAPABILITY
    if model.dtype == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        raise RefusedError(
            f"model.dtype is bfloat16 but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability}, below 8.0; use dtype: float16 (from 7.0 on) or float32"
        )
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if capability >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    return torch.float16 if capability >= FLOAT16_CAPABILITY else torch.float32


def _compute_capability(device: torch.device) -> tuple[int, int]:
    # torch.cuda.is_bf16_supported() says yes below 8.0 too, through emulation.
    return torch.cuda.get_device_capability(device)


# The folder -------------------------------------------------------------------------------------------------


def check_model_folder(model: ModelConfig) -> Path:
    """The model's folder, once it holds a config and every safetensors file that is needed. Raises InputError."""
    folder = model_folder(model.path, model.revision)
    _refuse_remote_code(folder, ("config.json",))
    if model.init == "files":
        weight_files(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights. Raises InputError when one is missing."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / WEIGHTS_INDEX_NAME
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt*")
        )
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
        raise InputError(
            f"{folder}: found {found}; expected {WEIGHTS_NAME} or {WEIGHTS_INDEX_NAME}: save the model with "
            "save_pretrained of a recent transformers"
        )
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} of {len(names)} weight files is missing; download it again")
    return [folder / name for name in names]


def _refuse_remote_code(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = folder / name
        settings: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        unsafe = sorted(key for key in settings if key == "auto_map" or key.endswith("_internal"))
        if unsafe:
            raise InputError(
                f"{path} has {unsafe[0]!r}, which makes transformers run code from the model's folder; "
                "use a model that transformers knows itself"
            )


# Identity ---------------------------------------------------------------------------------------------------

FULLY_READ_BYTES = 256 * 2**20
NUM_SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_BYTES = 64 * 2**10


def base_digest(model: ModelConfig) -> str:
    """Of the model as the settings have it: drawn weights hang on its config alone."""
    folder = check_model_folder(model)
    return model_digest(folder) if model.init == "files" else _digest(_states([folder / "config.json"]))


def model_digest(folder: Path) -> str:
    """32 hex digits over config.json and the weights; computed once per process and file state.

    Files up to 256 MiB are read whole. Of larger ones the size, the header and 256 evenly spaced blocks count:
    it names a model (another fine-tune differs all over), it does not prove that no bit has flipped.
    """
    return _digest(_states([folder / "config.json", *weight_files(folder)]))


def _states(files: list[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@functools.cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, num_bytes, _ in files:
        digest.update(f"{path.name}:{num_bytes}:".encode())
        with path.open("rb") as file:
            for first, count in _blocks(num_bytes):
                file.seek(first)
                digest.update(file.read(count))
    return digest.hexdigest()


def _blocks(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= FULLY_READ_BYTES:
        step = 1 << 24
        return [(first, step) for first in range(0, num_bytes, step)]
    last = num_bytes - SAMPLED_BLOCK_BYTES
    spaced = [last * block // NUM_SAMPLED_BLOCKS for block in range(1, NUM_SAMPLED_BLOCKS + 1)]
    return [(0, 1 << 20), *((first, SAMPLED_BLOCK_BYTES) for first in spaced)]
