"""Every optimiser beside an outside judge for ten updates, and resumed in the middle to the same bits.

Judges: torch's own optimisers, bitsandbytes, schedulefree, pytorch-optimizer; for APOLLO, whose authors' package is
not free, a loop over channels in numpy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pytest
import pytorch_optimizer
import schedulefree
import torch
from bitsandbytes.optim import AdamW8bit, Lion

from schemas.errors import RefusedError, TrainingError
from schemas.training_config import OptimizerName, TrainConfig
from trainer.optimizers import MasterOptimizer
from trainer.pieces import Piece, ReadPiece, stored_bytes
from trainer.updates import UPDATES, kahan, low_rank
from trainer.updates.parts import Weight

Parameters = Sequence[torch.nn.Parameter]
SHAPES = {
    "model.embed_tokens.weight": (80, 64),
    "model.layers.0.mlp.up_proj.weight": (96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 96),
    "model.norm.weight": (64,),
}
HIGH, WIDE = (name for name in SHAPES if "proj" in name)
NUM_STEPS = 10
SETTINGS: dict[str, Any] = {
    "max_grad_norm": 0,
    "adam_beta2": 0.99,
    "low_rank": {"rank": 8, "every_updates": 4},
}


def parameters_of(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=draws).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradient(step: int, name: str) -> torch.Tensor:
    """Of about rank 4, and smaller from step to step."""
    shape = SHAPES[name]
    draws = torch.Generator().manual_seed(100 * step + list(SHAPES).index(name))
    if len(shape) == 1:
        return torch.randn(shape, generator=draws) / (step + 1)
    left, right = (torch.randn(size, generator=draws) for size in ((shape[0], 4), (4, shape[1])))
    return (left @ right + 0.1 * torch.randn(shape, generator=draws)) / (step + 1)


def rate(step: int) -> float:
    """It rises over three steps, and falls."""
    return 1e-2 * min((step + 1) / 3, 3 / (step + 1))


def optimizer_of(name: str, parameters: dict[str, torch.nn.Parameter], **settings: Any) -> MasterOptimizer:
    return MasterOptimizer(parameters.items(), TrainConfig(optimizer=name, **SETTINGS | settings))  # type: ignore[arg-type]


def run(optimizer: MasterOptimizer, steps: range) -> None:
    for step in steps:
        for name, parameter in optimizer.parameters.items():
            parameter.grad = gradient(step, name).to(parameter.grad_dtype or parameter.dtype)
        optimizer.collect_gradients()
        optimizer.step(rate(step))


# Ten updates beside a judge ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Optimisers over some of the parameters by name, and how much weights may differ."""

    make: Callable[[dict[str, torch.nn.Parameter]], list[Any]]
    limit: float = 1e-6
    settings: dict[str, Any] = field(default_factory=dict)


def torch_adamw(parameters: Parameters, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=False)


def matrices(p: dict[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in p.values() if parameter.dim() == 2]


def others(p: dict[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in p.items() if name not in (WIDE, HIGH)]


def adamw_with_decay(p: dict[str, torch.nn.Parameter]) -> list[Any]:
    return [torch_adamw(matrices(p), 0.1), torch_adamw([p["model.norm.weight"]])]


def galore(p: dict[str, torch.nn.Parameter]) -> list[Any]:
    group = {
        "params": [p[WIDE], p[HIGH]],
        "rank": 8,
        "update_proj_gap": 1 + NUM_STEPS,  # it counts from 1
        "scale": 0.25,
        "projection_type": "std",
    }
    return [
        pytorch_optimizer.GaLore([group], betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0),
        torch_adamw(others(p)),
    ]


def muon(p: dict[str, torch.nn.Parameter]) -> list[Any]:
    hidden = torch.optim.Muon([p[WIDE], p[HIGH]], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [hidden, torch_adamw(others(p))]


def eight_bit(p: dict[str, torch.nn.Parameter]) -> list[Any]:
    return [AdamW8bit([p[WIDE], p[HIGH]], betas=(0.9, 0.99), weight_decay=0.0), torch_adamw(others(p))]


JUDGES: dict[str, Judge] = {
    "adamw": Judge(adamw_with_decay, 0.0, {"weight_decay": 0.1}),
    "adamw_8bit": Judge(eight_bit, 0.0),
    "paged_adamw_8bit": Judge(eight_bit, 0.0),
    "lion": Judge(
        lambda p: [
            Lion(matrices(p), betas=(0.9, 0.99), weight_decay=0.1),
            Lion([p["model.norm.weight"]], betas=(0.9, 0.99), weight_decay=0.0),
        ],
        settings={"weight_decay": 0.1},
    ),
    "muon": Judge(muon),
    "galore": Judge(galore, 1e-5, {"low_rank": {"rank": 8, "every_updates": NUM_STEPS}}),
}


@pytest.mark.parametrize("name", JUDGES)
def test_ten_updates_are_the_judges(name: str) -> None:
    judge, ours, theirs = JUDGES[name], parameters_of(), parameters_of()
    optimizer = optimizer_of(name, ours, **judge.settings)
    run(optimizer, range(NUM_STEPS))
    judges = judge.make(theirs)
    for step in range(NUM_STEPS):
        for parameter_name, parameter in theirs.items():
            parameter.grad = gradient(step, parameter_name)
        for each in judges:
            for group in each.param_groups:
                group["lr"] = rate(step)
            each.step()
    start = parameters_of()
    for parameter_name in SHAPES:
        difference = (ours[parameter_name] - theirs[parameter_name]).abs().max()
        moved = (theirs[parameter_name] - start[parameter_name]).abs().max()
        assert difference <= judge.limit, parameter_name
        assert moved > 1e-3, "the judge did something"


def test_eight_bits_are_near_torchs_thirty_two() -> None:
    ours, theirs = parameters_of(), parameters_of()
    run(optimizer_of("adamw_8bit", ours), range(NUM_STEPS))
    run(optimizer_of("adamw", theirs), range(NUM_STEPS))
    start = parameters_of()
    for name in SHAPES:
        moved = (theirs[name] - start[name]).norm()
        assert (ours[name] - theirs[name]).norm() < 0.05 * moved, name


def test_schedule_free_trains_and_averages_as_its_authors_package() -> None:
    ours, theirs = parameters_of(), parameters_of()
    optimizer = optimizer_of("schedule_free", ours, weight_decay=0.1)
    judge = schedulefree.AdamWScheduleFree(
        [
            {"params": matrices(theirs), "weight_decay": 0.1},
            {"params": [theirs["model.norm.weight"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        foreach=False,
    )
    judge.train()
    for step in range(NUM_STEPS):
        run(optimizer, range(step, step + 1))
        for name, parameter in theirs.items():
            parameter.grad = gradient(step, name)
        for group in judge.param_groups:
            group["lr"] = rate(step)
        judge.step()
        for name in SHAPES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)
    judge.eval()
    with optimizer.averaged():
        for name in SHAPES:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-6)


def apollo_by_channels(
    matrix: np.ndarray, gradients: list[np.ndarray], projections: list[np.ndarray]
) -> None:
    """In place. Rows are fewer than columns; AdamW's bias is corrected, as in its authors' package, at the end."""
    size = (len(projections[0]), matrix.shape[1])
    mean, square, norm_before = np.zeros(size), np.zeros(size), 0.0
    for number, (grad, projection) in enumerate(zip(gradients, projections, strict=True), start=1):
        small = projection @ grad
        mean, square = 0.9 * mean + 0.1 * small, 0.99 * square + 0.01 * small**2
        direction = mean / (np.sqrt(square) + 1e-8)
        update = grad.copy()
        for channel in range(matrix.shape[1]):
            update[:, channel] *= np.linalg.norm(direction[:, channel]) / np.linalg.norm(small[:, channel])
        norm = np.linalg.norm(update)
        if norm_before and norm > 1.01 * norm_before:
            update *= 1.01 * norm_before / norm
        norm_before = np.linalg.norm(update)
        matrix -= rate(number - 1) * np.sqrt(1 - 0.99**number) / (1 - 0.9**number) * update


def test_apollo_scales_channels_as_a_loop_over_them_does() -> None:
    parameters = parameters_of()
    optimizer = optimizer_of("apollo", parameters)
    run(optimizer, range(NUM_STEPS))
    train, start = TrainConfig(optimizer="apollo", **SETTINGS), parameters_of()
    for name in (WIDE, HIGH):
        weight = Weight(name, list(SHAPES).index(name), start[name])
        is_high = SHAPES[name][0] > SHAPES[name][1]
        gradients = [gradient(step, name) for step in range(NUM_STEPS)]
        lying = [grad.T if is_high else grad for grad in gradients]
        projections = [
            low_rank.random_projection(train, weight, number, grad).double().numpy()
            for number, grad in enumerate(lying, start=1)
        ]
        expected = start[name].detach().double().numpy().copy()
        expected = expected.T if is_high else expected
        apollo_by_channels(expected, [grad.double().numpy() for grad in lying], projections)
        found = parameters[name].detach().numpy()
        np.testing.assert_allclose(found.T if is_high else found, expected, atol=1e-5)
        assert all(projection.shape == (8, 64) for projection in projections)
        assert np.array_equal(projections[0], projections[3])
        assert not np.allclose(projections[0], projections[4])


def test_galore_projects_on_the_singular_vectors_of_the_gradient_of_every_fourth_update() -> None:
    optimizer = optimizer_of("galore", parameters_of())
    for step in range(NUM_STEPS):
        run(optimizer, range(step, step + 1))
        for name in (WIDE, HIGH):
            grad = gradient(step - step % 4, name)
            grad = grad.T if SHAPES[name][0] > SHAPES[name][1] else grad
            vectors = torch.linalg.svd(grad, full_matrices=False)[0][:, :8]
            found = kept(optimizer)["projection", name].view(64, 8)
            assert torch.equal(found, vectors), (step, name)


# 16 bits ----------------------------------------------------------------------------------------------------


def test_sixteen_bits_with_what_rounding_left_over_follow_fp32() -> None:
    parameters = parameters_of(torch.bfloat16)
    optimizer = optimizer_of("adamw_bf16", parameters, weight_decay=0.1)
    judge = {name: torch.nn.Parameter(p.detach().float()) for name, p in parameters.items()}
    run(optimizer, range(NUM_STEPS))
    run(optimizer_of("adamw", judge, weight_decay=0.1), range(NUM_STEPS))
    start = parameters_of(torch.bfloat16)
    left_over = {piece.name: piece.values for piece in optimizer.pieces() if piece.kind == "compensation"}
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.bfloat16
        exact = parameter.detach().float() + left_over[name].view(parameter.shape).float()
        moved = (judge[name] - start[name].float()).norm()
        assert (exact - judge[name]).norm() < 0.01 * moved, name
    assert {piece.values.dtype for piece in optimizer.pieces()} == {torch.bfloat16}


def test_updates_too_small_for_sixteen_bits_add_up() -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = optimizer_of("adamw_bf16", {"w": parameter})
    for _ in range(40):
        parameter.grad = torch.ones(64, 64)
        optimizer.step(2e-4)
    # Without what is left over it would have stayed at 1: the next smaller number is 0.996.
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - 40 * 2e-4, abs=2e-3)


def test_moments_in_sixteen_bits_fall_when_gradients_do() -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.bfloat16))
    optimizer = optimizer_of("adamw_bf16", {"w": parameter}, adam_beta2=0.999)
    for size in [1.0] * 50 + [0.0] * 300:
        parameter.grad = torch.full((64, 64), size)
        optimizer.step(1e-6)
    squares = next(piece.values for piece in optimizer.pieces() if piece.kind == "exp_avg_sq")
    expected = (1 - 0.999**50) * 0.999**300
    # Rounded to the nearest it would stand at 1 - 0.999^50 for ever.
    assert float(squares.float().mean()) == pytest.approx(expected, rel=0.01)


def test_rounding_by_chance_takes_a_neighbour_and_is_right_on_average() -> None:
    values = torch.tensor([1.001, -1.001, 3.3e-5, 0.0, 1.0]).repeat(20000, 1)
    found = kahan.rounded_by_chance(values, torch.Generator().manual_seed(0)).float()
    torch.testing.assert_close(found.mean(dim=0), values[0], rtol=2e-4, atol=0)
    assert ((found - values).abs() <= 2**-7 * values.abs()).all()
    assert [len(found[:, column].unique()) for column in range(5)] == [2, 2, 2, 1, 1]


def test_a_model_in_fp32_is_refused_sixteen_bits() -> None:
    with pytest.raises(RefusedError, match=r"adamw_bf16 and the model computes in float32.*set model\.dtype"):
        optimizer_of("adamw_bf16", parameters_of())


def ema_decay_of(name: str) -> float:
    """With every optimiser that does not average by itself."""
    return 0.0 if name == "schedule_free" else 0.9


# State ------------------------------------------------------------------------------------------------------


def kept(optimizer: MasterOptimizer) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.kind, piece.name): piece.values.clone() for piece in optimizer.pieces()}


def reading(state: dict[tuple[str, str], torch.Tensor]) -> ReadPiece:
    def read(kind: str, name: str, start: int, end: int) -> torch.Tensor | None:
        return state[kind, name][start:end].clone() if (kind, name) in state else None

    return read


EVERY = [
    pytest.param(name, dtype, id=f"{name} {dtype}".replace("torch.", ""))
    for name in get_args(OptimizerName)
    for dtype in (torch.float32, torch.bfloat16)
    if (name, dtype) != ("adamw_bf16", torch.float32)
]


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_a_restored_optimizer_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """After step 6: between two projections."""
    ema_decay = ema_decay_of(name)
    parameters, others = parameters_of(dtype), parameters_of(dtype)
    unbroken = optimizer_of(name, parameters, ema_decay=ema_decay, weight_decay=0.1)
    run(unbroken, range(6))
    state = kept(unbroken)
    resumed = optimizer_of(name, others, ema_decay=ema_decay, weight_decay=0.1)
    resumed.restore(reading(state), num_updates=6)
    for both in zip(parameters.values(), others.values(), strict=True):
        assert torch.equal(*both)
    run(unbroken, range(6, NUM_STEPS))
    run(resumed, range(6, NUM_STEPS))
    expected, found = kept(unbroken), kept(resumed)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key].dtype == values.dtype
        assert torch.equal(found[key], values), key
    for both in zip(parameters.values(), others.values(), strict=True):
        assert torch.equal(*both)
    assert not torch.equal(state["weight", WIDE], expected["weight", WIDE])


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_the_room_for_a_checkpoint_is_known_before_the_first_update(name: str, dtype: torch.dtype) -> None:
    optimizer = optimizer_of(name, parameters_of(dtype), ema_decay=ema_decay_of(name))
    room = optimizer.num_bytes()
    run(optimizer, range(1))
    assert room == stored_bytes(piece.values for piece in optimizer.pieces())


def test_a_checkpoint_that_lacks_a_part_of_the_state_is_refused() -> None:
    optimizer = optimizer_of("galore", parameters_of())
    run(optimizer, range(1))
    state = kept(optimizer)
    del state["projection", WIDE]
    with pytest.raises(TrainingError, match=f"0 numbers of projection of {WIDE}, expected 512"):
        optimizer_of("galore", parameters_of()).restore(reading(state), num_updates=1)
    state = kept(optimizer)
    state["projection", WIDE] = state["projection", WIDE][:8]
    with pytest.raises(TrainingError, match="holds 8 numbers of projection"):
        optimizer_of("galore", parameters_of()).restore(reading(state), num_updates=1)


def test_which_weights_an_optimizer_leaves_to_adamw() -> None:
    """Embeddings and norms; of 8 bits also what is small, of projections what is no larger than they are."""

    def with_moments(name: str, **settings: Any) -> set[str]:
        optimizer = optimizer_of(name, parameters_of(), **settings)
        run(optimizer, range(1))
        return {piece.name for piece in optimizer.pieces() if piece.kind == "exp_avg"}

    rest = {"model.embed_tokens.weight", "model.norm.weight"}
    assert with_moments("adamw_8bit") == with_moments("muon") == with_moments("galore") == rest
    assert with_moments("apollo") == rest
    assert with_moments("apollo", low_rank={"rank": 64}) == set(SHAPES)
    assert with_moments("lion") == set()


def test_every_optimizer_of_the_config_is_there() -> None:
    assert set(UPDATES) == set(get_args(OptimizerName))


# Averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moving_average_is_the_weighted_sum_of_all_weights_so_far(dtype: torch.dtype) -> None:
    """Judge: the sum written out, in float64."""
    optimizer = optimizer_of("adamw", parameters_of(dtype), ema_decay=0.6)
    seen = [optimizer.masters[WIDE].detach().double()]
    for step in range(NUM_STEPS):
        run(optimizer, range(step, step + 1))
        seen.append(optimizer.masters[WIDE].detach().double().clone())
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(1, NUM_STEPS + 1)]
    shares = [np.prod(decays[n:]) * (1 - decays[n - 1] if n else 1) for n in range(NUM_STEPS + 1)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, seen, strict=True))
    before = {name: parameter.detach().clone() for name, parameter in optimizer.parameters.items()}
    with optimizer.averaged():
        found = optimizer.parameters[WIDE].detach()
        torch.testing.assert_close(found.double(), expected.to(dtype).double(), rtol=2**-8, atol=1e-6)
        assert not torch.equal(found, before[WIDE])
    for name, parameter in optimizer.parameters.items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("settings", [{"optimizer": "schedule_free"}, {"ema_decay": 0.9}], ids=str)
def test_looking_at_the_average_changes_nothing(settings: dict[str, Any]) -> None:
    ours, theirs = parameters_of(), parameters_of()
    looking, not_looking = (
        MasterOptimizer(parameters.items(), TrainConfig(**SETTINGS | settings))
        for parameters in (ours, theirs)
    )
    for step in range(4):
        run(looking, range(step, step + 1))
        with looking.averaged():
            pass
    run(not_looking, range(4))
    for name in SHAPES:
        assert torch.equal(ours[name], theirs[name])


def test_without_an_average_the_model_keeps_its_weights() -> None:
    parameters = parameters_of()
    optimizer = optimizer_of("adamw", parameters)
    run(optimizer, range(1))
    before = parameters[WIDE].detach().clone()
    with optimizer.averaged():
        assert torch.equal(parameters[WIDE], before)


def test_a_piece_has_a_kind_that_checkpoints_know() -> None:
    from trainer.pieces import FURTHER_KINDS, KINDS, SMALL_KINDS

    seen: set[str] = set()
    for name in get_args(OptimizerName):
        optimizer = optimizer_of(name, parameters_of(torch.bfloat16), ema_decay=ema_decay_of(name))
        run(optimizer, range(1))
        pieces: list[Piece] = list(optimizer.pieces())
        seen |= {piece.kind for piece in pieces}
        for piece in pieces:
            is_whole = piece.values.numel() == np.prod(SHAPES[piece.name])
            assert is_whole or piece.kind in SMALL_KINDS
    assert seen == {*KINDS, *FURTHER_KINDS, *SMALL_KINDS}
