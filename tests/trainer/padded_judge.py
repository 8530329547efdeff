"""What judges padded rows: the library's own forward pass with a mask over the padding, and all logits."""

from typing import Any

import torch
import torch.nn.functional as F

from tests.trainer.tiny_models import Document, random_documents

DOCUMENTS = random_documents([29, 40, 7, 18], seed=3)


def judged_loss(model: Any, documents: list[Document]) -> torch.Tensor:
    """Weighted sum of the trained tokens' losses. A PEFT model puts its virtual tokens before each row."""
    width = max(len(document.ids) for document in documents)
    ids, mask = torch.zeros(2, len(documents), width, dtype=torch.long)
    weights = torch.zeros(len(documents), width)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        mask[row, : len(document.ids)] = 1
        for start, end, weight in document.spans:
            weights[row, max(start, 1) : end] = weight
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -width:-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of each trained parameter, by its name."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
