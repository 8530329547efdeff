"""Checks of `sft-pipeline doctor` on what training needs: torch, GPUs or memory, and the tools of a strategy."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.distributions import is_there, problems_with
from flows.machine import Finding, ask_child, size_text
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig

CHILD_TIMEOUT_SECONDS = 180
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (7, 0)
INSTALL_TRAIN = "pip install 'sft-pipeline[train]'"


@dataclass(frozen=True, slots=True)
class Gpu:
    """What torch says of one GPU; `problem` is the error of a small computation on it, "" if that worked."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    problem: str = ""

    def about(self) -> str:
        """For people."""
        capability = ".".join(map(str, self.capability))
        return f"{self.name}, {size_text(self.total_bytes)}, compute capability {capability}"


@dataclass(frozen=True, slots=True)
class Torch:
    """torch and the GPUs that it sees."""

    version: str
    gpus: tuple[Gpu, ...] = ()


# A child: torch may break at its import, and a GPU in its first computation.
_ASK_TORCH = """
import json, torch
gpus = []
for number in range(torch.cuda.device_count()):
    properties, problem, free = torch.cuda.get_device_properties(number), "", 0
    try:
        free = torch.cuda.mem_get_info(number)[0]
        assert float((torch.ones(8, 8, device=f"cuda:{number}") @ torch.ones(8, 8, device=f"cuda:{number}")).sum()) == 512
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
    gpus.append([properties.name, [properties.major, properties.minor], properties.total_memory, free, problem])
print("FOUND", json.dumps([torch.__version__, gpus]))
"""


def ask_torch() -> Torch | str:
    """What torch sees, or the last line of why it does not start."""
    found = ask_child(_ASK_TORCH, timeout_seconds=CHILD_TIMEOUT_SECONDS)
    if isinstance(found, str):
        return found
    version, gpus = found
    return Torch(version, tuple(Gpu(name, (a, b), *rest) for name, (a, b), *rest in gpus))


def check_training(config: PipelineConfig | None) -> Iterator[Finding]:
    """Libraries, devices, memory and tools."""
    problems = problems_with("train")
    if problems:
        remedy = f"{INSTALL_TRAIN}; the data stages run without it: --until pack"
        yield Finding("fails", "training", "; ".join(problems), "what the extra 'train' names", remedy)
        return
    torch = ask_torch()
    if isinstance(torch, str):
        remedy = "install a build of torch for this machine"
        yield Finding("fails", "training", f"torch does not start: {torch}", "`import torch` works", remedy)
        return
    yield Finding("ok", "training", f"torch {torch.version}")
    yield from device_findings(torch, config)
    if config is not None:
        yield from memory_findings(torch, config)
        yield from tool_findings(torch, config)


def device_findings(torch: Torch, config: PipelineConfig | None) -> Iterator[Finding]:
    """Each GPU against the dtype that the config asks for, or their absence."""
    from trainer.rank_processes import count_processes

    model = config.model if config is not None else None
    device = model.device if model is not None else "auto"
    if device == "cpu":
        yield Finding("ok", "device", "the CPU, as model.device says")
        return
    for gpu in torch.gpus:
        yield _gpu_finding(gpu, model)
    if not torch.gpus:
        yield _no_gpu(must_have_one=device == "cuda")
    elif config and (wanted := count_processes(config, num_gpus=len(torch.gpus))) > len(torch.gpus):
        remedy = f"set train.num_processes to {len(torch.gpus)} or fewer, or leave it out"
        yield Finding("fails", "gpus", f"{len(torch.gpus)} that torch can use", f"{wanted} processes", remedy)


def _gpu_finding(gpu: Gpu, model: ModelConfig | None) -> Finding:
    dtype = model.dtype if model is not None else "auto"
    if gpu.problem:
        remedy = "install a build of torch for this GPU and driver, or set model.device: cpu"
        return Finding(
            "fails", "gpu", f"{gpu.about()}: {gpu.problem}", "a small computation succeeds", remedy
        )
    if gpu.capability >= BFLOAT16_CAPABILITY or dtype in ("float32", "float16"):
        return Finding("ok", "gpu", gpu.about())
    expected = "compute capability 8.0 or later for bfloat16"
    if dtype == "bfloat16":
        remedy = "set model.dtype to auto, or use another GPU"
        return Finding("fails", "gpu", f"{gpu.about()}; model.dtype is bfloat16", expected, remedy)
    if gpu.capability >= FLOAT16_CAPABILITY:
        remedy = "nothing to do: training is in float16, with a loss scale"
    else:
        remedy = "nothing to do: training is in float32, slower and with twice the memory"
    return Finding("warns", "gpu", gpu.about(), expected, remedy)


def _no_gpu(*, must_have_one: bool) -> Finding:
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None:
        remedy = "there is a driver: install a build of torch with CUDA, and look at CUDA_VISIBLE_DEVICES"
    else:
        remedy = (
            "use a machine with one, or a small model: a CPU trains 135 million weights at some 400 tokens/s"
        )
    if must_have_one:
        return Finding(
            "fails",
            "gpu",
            "none that torch can use",
            "one: model.device is cuda",
            f"{remedy}; or device: auto",
        )
    return Finding("warns", "gpu", "none that torch can use", "one, for all but small models", remedy)


# Memory -----------------------------------------------------------------------------------------------------


def memory_findings(torch: Torch, config: PipelineConfig) -> Iterator[Finding]:
    """The model with its optimiser against free memory: fails when the weights alone don't fit."""
    from schemas.errors import InputError
    from trainer.memory import CUDA_CONTEXT_BYTES, memory_need, read_shapes
    from trainer.memory import on_gpu as part_on_gpu
    from trainer.rank_processes import count_processes
    from trainer.support import model_architecture, model_folder

    if config.model is None:
        return
    try:
        shapes = read_shapes(model_folder(config.model.path, config.model.revision))
    except InputError:
        return  # the check of the config names it
    on_gpu = bool(torch.gpus) and config.model.device != "cpu"
    num_processes = count_processes(config, num_gpus=len(torch.gpus))
    need = memory_need(
        config,
        shapes,
        model_architecture(config),
        bytes_per_weight=_bytes_per_weight(torch, config),
        num_processes=num_processes,
    )
    need = part_on_gpu(need, config.train) if on_gpu else need
    context = CUDA_CONTEXT_BYTES if on_gpu else 0
    if on_gpu and config.train.strategy == "pipeline":
        free = sum(gpu.free_bytes - context for gpu in torch.gpus) + context
        where = f"on {len(torch.gpus)} GPUs together"
    else:
        free, where = _free_memory(torch, on_gpu=on_gpu, num_processes=num_processes)
    found = f"{size_text(free)} free {where}"
    expected = (
        f"at least {size_text(need.floor + context)} (weights {size_text(need.weights)}, what the optimiser "
        f"holds {size_text(need.states)}), about {size_text(need.likely + context)} with activations"
    )
    remedy = (
        "train.method lora, train.gradient_checkpointing: true, fewer train.bins_per_micro_step or "
        "split.max_tokens, a smaller model, or end what else uses the memory"
    )
    if free < need.floor + context:
        yield Finding("fails", "memory", found, expected, remedy)
    elif free < need.likely + context:
        yield Finding("warns", "memory", found, expected, remedy)
    else:
        yield Finding("ok", "memory", f"{found}, about {size_text(need.likely + context)} are needed")


def _bytes_per_weight(torch: Torch, config: PipelineConfig) -> int:
    assert config.model is not None
    wide = config.model.device != "cpu" and any(g.capability < FLOAT16_CAPABILITY for g in torch.gpus)
    return 4 if config.model.dtype == "float32" or (config.model.dtype == "auto" and wide) else 2


def _free_memory(torch: Torch, *, on_gpu: bool, num_processes: int) -> tuple[int, str]:
    """For one process."""
    from trainer.memory import free_machine_bytes

    if on_gpu:
        gpu = min(torch.gpus[:num_processes], key=lambda gpu: gpu.free_bytes)
        return gpu.free_bytes, f"of {size_text(gpu.total_bytes)} on {gpu.name}"
    share = f"of the machine's memory for each of {num_processes}" if num_processes > 1 else "of its memory"
    return free_machine_bytes() // num_processes, share


# Strategies -------------------------------------------------------------------------------------------------

BUILD_TOOLS = ("g++", "ninja")


def tool_findings(torch: Torch, config: PipelineConfig) -> Iterator[Finding]:
    """What the chosen strategy and base need beside torch."""
    if config.train.base != "plain":
        yield check_bitsandbytes()
    if config.train.strategy.startswith("zero"):
        yield check_deepspeed(config.train.strategy, tools=(*BUILD_TOOLS, *(("nvcc",) if torch.gpus else ())))


def check_deepspeed(strategy: str, *, tools: Sequence[str] = BUILD_TOOLS) -> Finding:
    """DeepSpeed is there; the tools with which it compiles operations at first use are on PATH.

    Missing tools only warn: what ZeRO 1 and 2 ask of DeepSpeed here compiles nothing (run without them, on CPUs).
    """
    problems = problems_with("deepspeed")
    if problems:
        remedy = "pip install 'sft-pipeline[deepspeed]', or train.strategy: ddp"
        return Finding("fails", "deepspeed", "; ".join(problems), f"DeepSpeed for {strategy}", remedy)
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if not missing:
        return Finding("ok", "deepspeed", f"with {', '.join(tools)} to compile its operations")
    remedy = (
        "apt-get install g++, pip install ninja and put the environment's bin folder on PATH, for nvcc the CUDA "
        "toolkit; or train.strategy: ddp"
    )
    expected = f"{', '.join(tools)}, with which DeepSpeed compiles operations of its own at first use"
    return Finding("warns", "deepspeed", f"not on PATH: {', '.join(missing)}", expected, remedy)


def check_bitsandbytes() -> Finding:
    """Quantised weights are bitsandbytes'."""
    if is_there("bitsandbytes"):
        return Finding("ok", "quantised base", "bitsandbytes is there")
    return Finding(
        "fails",
        "quantised base",
        "missing: bitsandbytes",
        "bitsandbytes for train.base: int8 or nf4",
        "pip install 'sft-pipeline[gpu]', or train.base: plain",
    )
