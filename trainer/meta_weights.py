"""Weights as Meta gave LLaMA away -> a model folder that transformers loads: `sft-pipeline weights from-meta`.

Theirs is a folder of params.json, tokenizer.model and consolidated.00.pth, consolidated.01.pth, ...: the files are
the ranks of a tensor-parallel run, so each matrix lies cut in as many pieces, by rows or by columns. They are
pickles, and read in the way that takes tensors alone. One tensor after the other is put together and written.
Queries and keys change the order of their rows: Meta turns neighbouring numbers by the positions, transformers
the two halves of a head.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines import storage
from schemas.errors import ConfigError, InputError
from trainer.folders import built_aside
from trainer.meta_tokenizer import write_tokenizer
from trainer.metrics import report

MAX_FILE_BYTES = 4 * 2**30
BY_ROWS, BY_COLUMNS = 0, 1
SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
LAYER_MATRICES = {
    "attention.wq": ("self_attn.q_proj", BY_ROWS),
    "attention.wk": ("self_attn.k_proj", BY_ROWS),
    "attention.wv": ("self_attn.v_proj", BY_ROWS),
    "attention.wo": ("self_attn.o_proj", BY_COLUMNS),
    "feed_forward.w1": ("mlp.gate_proj", BY_ROWS),
    "feed_forward.w3": ("mlp.up_proj", BY_ROWS),
    "feed_forward.w2": ("mlp.down_proj", BY_COLUMNS),
}
"""Their name -> ours, and how they are cut."""
LAYER_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
COMPUTED = "rope.freqs"
"""Lies in their files and follows from params.json."""
UNREADABLE = (torch.serialization.pickle.UnpicklingError, RuntimeError, OSError, EOFError)  # type: ignore[attr-defined]
"""torch says in the words of the module that it reads with that a file holds more than tensors."""
Shard = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Params:
    """params.json."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    rope_theta: float
    use_scaled_rope: bool


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the result: where its pieces lie, how they go together, what it becomes."""

    name: str
    source: str
    cut: int | None
    """None: each piece is the whole."""
    shape: tuple[int, ...]
    num_heads: int = 0
    """Of queries and keys."""


def convert(
    folder: Path, out: Path, *, max_positions: int | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> Path:
    """Write the model folder. Raises InputError for what is missing or odd, ConfigError where `out` is in use."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already: name another folder with --out")
    params, shards = read_params(folder), read_shards(folder)
    tensors = plan(params, shards)
    dtype = shards[0]["norm.weight"].dtype
    positions = max_positions or usual_positions(params)
    report(f"{len(shards)} files, {len(tensors)} tensors, {dtype}, {positions} positions")
    with built_aside(out) as aside:
        names = write_weights(aside, tensors, shards, dtype, max_file_bytes)
        storage.write_json(aside / "config.json", config_of(params, tensors, dtype, positions))
        write_tokenizer(folder / "tokenizer.model", aside, is_newer=params.use_scaled_rope)
    report(f"wrote {out}: {len(names)} safetensors files")
    return out


def read_params(folder: Path) -> Params:
    path = folder / "params.json"
    try:
        found = json.loads(path.read_bytes())
        return Params(
            dim=int(found["dim"]),
            n_layers=int(found["n_layers"]),
            n_heads=int(found["n_heads"]),
            n_kv_heads=int(found.get("n_kv_heads") or found["n_heads"]),
            norm_eps=float(found["norm_eps"]),
            rope_theta=float(found.get("rope_theta", 10_000.0)),
            use_scaled_rope=bool(found.get("use_scaled_rope", False)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} can't be read ({type(error).__name__}: {error}); expected Meta's own folder with params.json, "
            "consolidated.*.pth and tokenizer.model"
        ) from None


def read_shards(folder: Path) -> list[Shard]:
    """The pieces by rank, left on the disk until they are copied."""
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError(f"{folder} holds no consolidated.*.pth: expected Meta's own folder")
    numbers = [path.name.split(".")[1] for path in paths]
    if numbers != [f"{number:02d}" for number in range(len(paths))]:
        raise InputError(
            f"{folder} holds {', '.join(p.name for p in paths)}: one is missing between; download it again"
        )
    return [_read_shard(path) for path in paths]


def _read_shard(path: Path) -> Shard:
    try:
        found: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is no file of tensors alone, or is damaged ({reason}); nothing else is read out of a pickle: "
            "download it again from Meta"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise InputError(
            f"{path} holds a {type(found).__name__} of other things than tensors; expected a state dict"
        )
    return found


# What becomes what --------------------------------------------------------------------------------------------


def plan(params: Params, shards: Sequence[Shard]) -> list[Tensor]:
    """All tensors of the result. Raises InputError where a piece is missing, left over or of another shape."""
    head_width = params.dim // params.n_heads
    keys = params.n_kv_heads * head_width
    inner = _whole_size(shards, "layers.0.feed_forward.w1.weight", BY_ROWS)
    vocabulary = _whole_size(shards, "output.weight", BY_ROWS)
    shapes = {
        "wq": (params.dim, params.dim),
        "wk": (keys, params.dim),
        "wv": (keys, params.dim),
        "wo": (params.dim, params.dim),
        "w1": (inner, params.dim),
        "w3": (inner, params.dim),
        "w2": (params.dim, inner),
    }
    heads = {"wq": params.n_heads, "wk": params.n_kv_heads}
    embedding = "tok_embeddings.weight"
    # The first two generations cut the embedding by columns, the third by rows.
    by_rows = embedding in shards[0] and shards[0][embedding].shape[1] == params.dim
    found = [
        Tensor(
            "model.embed_tokens.weight",
            embedding,
            BY_ROWS if by_rows else BY_COLUMNS,
            (vocabulary, params.dim),
        )
    ]
    for layer in range(params.n_layers):
        for theirs, (ours, cut) in LAYER_MATRICES.items():
            short = theirs.rpartition(".")[2]
            source, name = f"layers.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight"
            found.append(Tensor(name, source, cut, shapes[short], heads.get(short, 0)))
        for theirs, ours in LAYER_NORMS.items():
            source, name = f"layers.{layer}.{theirs}.weight", f"model.layers.{layer}.{ours}.weight"
            found.append(Tensor(name, source, None, (params.dim,)))
    found.append(Tensor("model.norm.weight", "norm.weight", None, (params.dim,)))
    found.append(Tensor("lm_head.weight", "output.weight", BY_ROWS, (vocabulary, params.dim)))
    _check_pieces(found, shards)
    return found


def _whole_size(shards: Sequence[Shard], source: str, dimension: int) -> int:
    if any(source not in shard for shard in shards):
        raise InputError(f"consolidated.*.pth hold no {source}: are they LLaMA's?")
    return sum(int(shard[source].shape[dimension]) for shard in shards)


def _check_pieces(tensors: Sequence[Tensor], shards: Sequence[Shard]) -> None:
    known = {tensor.source for tensor in tensors}
    for number, shard in enumerate(shards):
        if odd := sorted((shard.keys() - {COMPUTED}) ^ known):
            raise InputError(
                f"consolidated.{number:02d}.pth: {odd[0]} is missing or unknown, {len(odd)} such names; expected LLaMA's "
                "own tensors for the layers of params.json"
            )
    for tensor in tensors:
        pieces = [tuple(shard[tensor.source].shape) for shard in shards]
        if any(piece != _piece_shape(tensor, len(shards)) for piece in pieces):
            raise InputError(
                f"{tensor.source} lies in pieces of {pieces}, which do not make {tensor.shape} as params.json says"
            )


def _piece_shape(tensor: Tensor, num_shards: int) -> tuple[int, ...]:
    shape = list(tensor.shape)
    if tensor.cut is not None:
        shape[tensor.cut] //= num_shards
    return tuple(shape)


def put_together(tensor: Tensor, shards: Sequence[Shard]) -> torch.Tensor:
    """The whole tensor, in transformers' order of rows."""
    pieces = [shard[tensor.source] for shard in shards]
    whole = pieces[0] if tensor.cut is None else torch.cat(list(pieces), dim=tensor.cut)
    if tensor.num_heads:
        rows, columns = tensor.shape
        pairs = whole.view(tensor.num_heads, rows // tensor.num_heads // 2, 2, columns)
        whole = pairs.transpose(1, 2).reshape(rows, columns)
    return whole.contiguous()


# Writing ------------------------------------------------------------------------------------------------------


def write_weights(
    folder: Path, tensors: Sequence[Tensor], shards: Sequence[Shard], dtype: torch.dtype, max_file_bytes: int
) -> list[str]:
    """Safetensors files of at most so many bytes, and their index; returns the names of the files."""
    groups = list(_groups(tensors, dtype, max_file_bytes))
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        _write_file(folder / name, group, shards, dtype)
    sizes = sum(_num_bytes(tensor, dtype) for tensor in tensors)
    weight_map = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
    index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
    storage.write_json(folder / "model.safetensors.index.json", index)
    return names


def _groups(tensors: Sequence[Tensor], dtype: torch.dtype, max_bytes: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(_num_bytes(t, dtype) for t in [*group, tensor]) > max_bytes:
            yield group
            group = []
        group.append(tensor)
    yield group


def _write_file(path: Path, tensors: Sequence[Tensor], shards: Sequence[Shard], dtype: torch.dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _num_bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the numbers begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            whole = put_together(tensor, shards).to(dtype)
            file.write(whole.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs: it is a buffer


def _num_bytes(tensor: Tensor, dtype: torch.dtype) -> int:
    return torch.Size(tensor.shape).numel() * dtype.itemsize


def usual_positions(params: Params) -> int:
    """Their files don't say for how many positions a model was made; the generations differ in other numbers."""
    if params.use_scaled_rope:
        return 131_072
    if params.rope_theta > 10_000:
        return 8192
    return 2048 if params.norm_eps < 1e-5 else 4096


def config_of(
    params: Params, tensors: Sequence[Tensor], dtype: torch.dtype, positions: int
) -> dict[str, Any]:
    from transformers import LlamaConfig

    shapes = {tensor.name: tensor.shape for tensor in tensors}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.rope_theta}
    if params.use_scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": 32.0 if params.dim <= 3072 else 8.0,  # Llama 3.2's small models
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        vocab_size=shapes["lm_head.weight"][0],
        hidden_size=params.dim,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        rms_norm_eps=params.norm_eps,
        max_position_embeddings=positions,
        rope_parameters=rope,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    config.architectures = ["LlamaForCausalLM"]
    return json.loads(config.to_json_string())
