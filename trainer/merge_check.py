"""Whether a merged model is the model that was trained: both are asked about the same places of the same texts.

Logits differ by rounding where the merge is right. One that was merged into other weights than it learned beside is
off by as much as those differ: half a percent of the logits' spread against several.
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGE_FOLDERS
from schemas.training_config import BaseForm
from trainer.attention import unwrapped, use_plain_attention
from trainer.load_trained import load_with_adapter
from trainer.model import as_saved, load_base_model, load_tokenizer, needed_model
from trainer.prompts import encode_prompt
from trainer.shard_reader import ShardReader

NUM_TEXTS, MAX_TOKENS = 4, 64
LIMITS: dict[BaseForm, float] = {"plain": 0.05, "nf4": 0.05, "int8": 0.1}
"""Of Difference.relative. LLM.int8 rounds activations too, which no merged model does: 3 to 5 % on tiny models."""
QUESTION = "What is the difference between a bridge and a tunnel? Answer in two sentences."


@dataclass(frozen=True, slots=True)
class Difference:
    """Between the logits of two models, each place of a text shifted to mean 0, which changes no probability."""

    num_places: int
    relative: float
    """Root of the mean square of the differences, as a share of the logits' own."""
    largest: float
    divergence: float
    """Kullback-Leibler, from the trained model to the merged one: nats a token."""
    same_token: float
    """Share of the places where both find the same token likeliest."""

    def line(self) -> str:
        """For people."""
        return (
            f"logits of {self.num_places} places differ by {self.relative:.2%} of their spread, at most {self.largest:.4f}; "
            f"{self.divergence:.2e} nats a token, the same likeliest token in {self.same_token:.1%}"
        )

    def facts(self) -> dict[str, float]:
        return asdict(self)


def merge_difference(
    config: PipelineConfig, adapter: Path, merged: Path, *, device: torch.device, dtype: torch.dtype
) -> Difference:
    """Base and adapter as they were trained against the merged folder; one of them in memory at a time."""
    texts = check_texts(config)
    settings = needed_model(config)
    trained = _logits(load_with_adapter(config, adapter, device=device), texts)
    gc.collect()
    whole = load_base_model(as_saved(settings, merged), device=device, dtype=dtype)
    return difference(trained, _logits(whole, texts))


def check_difference(found: Difference, limit: float) -> None:
    """Raises LimitError."""
    if not found.relative <= limit:
        raise LimitError(
            f"the merged model is not the trained one: {found.line()}; at most {limit:.2%} is allowed. Export the adapter, "
            "or raise --max-difference"
        )


def check_texts(config: PipelineConfig) -> list[list[int]]:
    """Token ids: the beginnings of the first training examples where there are some, else of questions."""
    folder = config.run_root / STAGE_FOLDERS["split"]
    if (folder / "manifest.json").is_file():
        reader = ShardReader(folder, "train")
        rows = range(min(NUM_TEXTS, reader.num_rows))
        return [reader.example(row).input_ids[:MAX_TOKENS].tolist() for row in rows]
    tokenizer = load_tokenizer(config)
    questions = [*config.evaluate.questions[: NUM_TEXTS - 1], QUESTION]
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}])[:MAX_TOKENS] for text in questions]


def difference(trained: torch.Tensor, merged: torch.Tensor) -> Difference:
    """Of logits [places, vocabulary]."""
    ours, theirs = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (merged, trained))
    off = ours - theirs
    log_shares = theirs.log_softmax(-1)
    divergence = (log_shares.exp() * (log_shares - ours.log_softmax(-1))).sum(-1).mean()
    return Difference(
        num_places=len(ours),
        relative=float(off.square().mean().sqrt() / theirs.square().mean().sqrt()),
        largest=float(off.abs().max()),
        divergence=float(divergence),
        same_token=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
    )


@torch.inference_mode()
def _logits(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    use_plain_attention(model)
    model.eval()
    device = unwrapped(model).device
    found = [model(input_ids=torch.tensor([text], device=device)).logits[0].float().cpu() for text in texts]
    return torch.cat(found)
