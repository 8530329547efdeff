"""Inputs of decoder layers that wait in the CPU's memory for the backward pass.

Copies run beside the GPU's work, out as soon as a layer has its input, back one layer ahead of its use. The memory is
pinned once and used again in each step. On a CPU they are plain copies.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from schemas.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Ticket:
    """What `take` gives back a tensor for. `turn` counts how often this place was used."""

    place: int
    turn: int


@dataclass(slots=True, eq=False)
class _Place:
    memory: torch.Tensor | None = None
    shape: tuple[int, ...] = ()
    turn: int = 0
    coming: torch.Tensor | None = None
    """Already on its way back."""
    has_come: Any = None


@dataclass(slots=True, eq=False)
class CheckpointOffload:
    """A place for each layer. Between forward and backward pass a place holds one tensor."""

    device: torch.device
    places: dict[int, _Place] = field(default_factory=dict)
    stream: Any = None

    def put(self, number: int, tensor: torch.Tensor) -> Ticket:
        place = self.places.setdefault(number, _Place())
        place.turn += 1
        place.shape, place.coming = tuple(tensor.shape), None
        memory = self._memory(place, tensor)
        if not tensor.is_cuda:
            memory.copy_(tensor)
            return Ticket(number, place.turn)
        stream = self._stream()
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            memory.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return Ticket(number, place.turn)

    def take(self, ticket: Ticket) -> torch.Tensor:
        """The tensor, and the one of the layer before sets out."""
        place = self.places[ticket.place]
        if place.turn != ticket.turn:
            raise TrainingError(
                f"the checkpoint of layer {ticket.place} was overwritten before its backward pass: two forward passes "
                "before one backward pass can't be offloaded; set train.offload_checkpoints to false"
            )
        self._send_back(ticket.place)
        self._send_back(ticket.place - 1)
        tensor, place.coming = place.coming, None
        assert tensor is not None, "sent back above"
        if tensor.is_cuda:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(place.has_come)
            tensor.record_stream(current)
        return tensor

    def _memory(self, place: _Place, tensor: torch.Tensor) -> torch.Tensor:
        """Of the place, large enough; it grows by whole allocations and never shrinks."""
        if (
            place.memory is None
            or place.memory.numel() < tensor.numel()
            or place.memory.dtype != tensor.dtype
        ):
            place.memory = torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return place.memory[: tensor.numel()].view(tensor.shape)

    def _send_back(self, number: int) -> None:
        place = self.places.get(number)
        if place is None or place.memory is None or place.coming is not None:
            return
        size = torch.Size(place.shape).numel()
        memory = place.memory[:size].view(place.shape)
        if self.device.type != "cuda":
            place.coming = memory.clone()
            return
        stream = self._stream()
        with torch.cuda.stream(stream):
            place.coming = memory.to(self.device, non_blocking=True)
            place.has_come = stream.record_event()

    def _stream(self) -> Any:
        if self.stream is None:
            self.stream = torch.cuda.Stream(self.device)
        return self.stream
