"""Every recipe: it can be read and is refused nothing, is documented, fits its cards, and learns at toy size."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from flows.cli import run_command
from flows.recipe import RECIPES_FOLDER, recipe_names, recipe_text, summary
from schemas.config_file import load_config
from schemas.errors import ConfigError
from schemas.pipeline_config import PipelineConfig
from tests import recipe_runs
from tests.integration import toy
from tests.trainer.matrix_rows import read_losses
from tests.trainer.rank_groups import train_with_two_processes
from trainer.job import plan_job
from trainer.memory import CUDA_CONTEXT_BYTES, memory_need, on_gpu
from trainer.support import ONE_PROCESS, refusals
from trainer.train import train_job

ROOT = Path(__file__).parent.parent
NAMES = recipe_names()
GIB = 2**30


def as_written(name: str) -> PipelineConfig:
    return load_config(RECIPES_FOLDER / f"{name}.yaml")


def test_the_recipes_are_those_of_the_checkout() -> None:
    assert sorted(path.stem for path in (ROOT / "configs" / "recipes").iterdir()) == NAMES
    assert len(NAMES) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_it_is_and_asks_for_nothing_that_is_refused(name: str) -> None:
    config = as_written(name)
    assert [problem for problem in refusals(config) if "is not installed" not in problem] == []
    assert config.run_root.name == name
    assert re.fullmatch(r"[A-Z4-8a-z].{30,150}\.", summary(name))
    num_settings = sum(bool(line) and not line.startswith("#") for line in recipe_text(name).splitlines())
    assert num_settings <= 24, "a recipe is a short diff from the defaults"


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_stands_in_the_table_of_the_docs(name: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "recipes.md").read_text()


# What fits ----------------------------------------------------------------------------------------------------

# hidden, inner, layers, vocabulary, width of queries, of keys
SHAPES = {
    "135m": (576, 1536, 30, 49152, 576, 192),
    "7b": (4096, 11008, 32, 32000, 4096, 4096),
    "8b": (4096, 14336, 32, 128256, 4096, 1024),
    "13b": (5120, 13824, 40, 32000, 5120, 5120),
    "30b": (6656, 17920, 60, 32000, 6656, 6656),
    "32b": (5120, 25600, 64, 151936, 8192, 1024),
    "33b": (6656, 17920, 60, 32000, 6656, 6656),
    "70b": (8192, 28672, 80, 128256, 8192, 1024),
}


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, num_layers, vocabulary, queries, keys = SHAPES[size]
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found: dict[str, tuple[int, ...]] = {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(num_layers)
        for name, shape in layer.items()
    }
    return found | {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}


def architecture_of(size: str) -> dict[str, Any]:
    hidden, inner, num_layers, _, queries, keys = SHAPES[size]
    heads = {"num_attention_heads": queries // 64, "num_key_value_heads": keys // 64}
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": num_layers, **heads}


def cards_of(name: str) -> tuple[int, int]:
    """Their number and their GB."""
    *numbers, each = re.findall(r"(?<=[-x])(\d+)(?=x|gb$)", name)
    return math.prod(map(int, numbers)), int(each)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("gb")])
def test_a_recipe_fits_its_cards_by_our_own_reckoning(name: str) -> None:
    """With a twentieth left for what is not reckoned."""
    config, size = as_written(name), next(part for part in name.split("-") if part in SHAPES)
    num_cards, each_gb = cards_of(name)
    needs_fp32 = config.train.strategy.startswith("zero") and each_gb <= 16
    need = memory_need(
        config,
        shapes_of(size),
        architecture_of(size),
        bytes_per_weight=4 if needs_fp32 else 2,
        num_processes=num_cards,
    )
    one_process = config.train.strategy == "pipeline"
    on_cards = on_gpu(need, config.train).likely / (num_cards if one_process else 1) + CUDA_CONTEXT_BYTES
    assert on_cards < 0.95 * each_gb * GIB, f"{on_cards / GIB:.1f} GiB"


# Taking one ---------------------------------------------------------------------------------------------------


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["recipes"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == NAMES
    run_command(["recipes", NAMES[0]])
    assert capsys.readouterr().out == recipe_text(NAMES[0])
    with pytest.raises(
        ConfigError, match="no recipe is named 'qlora-lama-3-70b'; nearest: qlora-llama-3-70b-4x24gb"
    ):
        run_command(["recipes", "qlora-lama-3-70b"])


@pytest.mark.parametrize("name", NAMES)
def test_init_takes_a_recipe_for_the_dumps_and_the_model_that_are_there(tmp_path: Path, name: str) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=3, num_records=3)
    (tmp_path / "model").mkdir()
    out = tmp_path / "mine.yaml"
    run_command(
        [
            "init",
            str(tmp_path / "dumps"),
            "--recipe",
            name,
            "--model",
            str(tmp_path / "model"),
            "--out",
            str(out),
        ]
    )
    taken, recipe = load_config(out), as_written(name)
    assert [source.name for source in taken.sources] == ["alpaca", "sharegpt"]
    assert taken.model is not None
    assert recipe.model is not None
    assert taken.model == recipe.model.model_copy(update={"path": str(tmp_path / "model")})
    for section in ("train", "split", "pack", "holdout", "filter"):
        assert getattr(taken, section) == getattr(recipe, section)


def test_init_takes_a_recipe_as_it_is(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    run_command(["init", "--recipe", NAMES[0], "--out", str(out)])
    assert out.read_text() == recipe_text(NAMES[0])
    with pytest.raises(ConfigError, match="name a folder of dumps, a recipe with --recipe, or both"):
        run_command(["init", "--out", str(tmp_path / "other.yaml")])


# At toy size ----------------------------------------------------------------------------------------------------


def without_its_size(name: str) -> str:
    """What a recipe sets, but for the model's size: those of 7, 13 and 30 billion weights are one at toy size."""
    lines = [line for line in recipe_text(name).splitlines() if line and not line.startswith("#")]
    return re.sub(r"llama-\d+b|\d+x\d+x\d+gb|\d+x\d+gb", "", "\n".join(lines))


DIFFERENT = list({without_its_size(name): name for name in reversed(NAMES)}.values())[::-1]
IN_ONE_PROCESS = [name for name in DIFFERENT if as_written(name).train.strategy in ONE_PROCESS]
IN_SEVERAL = [name for name in DIFFERENT if name not in IN_ONE_PROCESS]
OF_EACH_STRATEGY = ["lora-llama-13b-8x11gb", "int8-lora-vicuna-7b-zero2-2x16gb", "lora-llama-7b-zero3-8x11gb"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' data and their model, made once."""
    return tmp_path_factory.mktemp("recipes")


def check_learned(config: PipelineConfig) -> None:
    losses = read_losses(config)
    assert len(losses) == recipe_runs.NUM_STEPS
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) / 5 < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_a_recipe_of_one_process_learns_in_50_steps(folder: Path, name: str) -> None:
    """All stages on data of the kind that it names, then 50 steps."""
    config = recipe_runs.toy_recipe(folder, name)
    recipe_runs.run_stages(config)
    train_job(plan_job(config))
    check_learned(config)


@pytest.mark.stress
@pytest.mark.parametrize("name", IN_SEVERAL)
def test_a_recipe_of_several_processes_learns_in_one_too(folder: Path, name: str) -> None:
    config = recipe_runs.toy_recipe(
        folder,
        name,
        {"train.strategy": "single", "train.offload": "none", "run_root": str(folder / "one" / name)},
    )
    recipe_runs.run_stages(config)
    train_job(plan_job(config))
    check_learned(config)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(OF_EACH_STRATEGY, marks=pytest.mark.stress, id="of each strategy"),
        pytest.param(IN_SEVERAL, marks=pytest.mark.hard, id="all"),
    ],
)
def test_recipes_of_several_processes_learn_in_50_steps_on_two(folder: Path, names: list[str]) -> None:
    """Under their own strategies. fp16 is fp16 here too, under fsdp2; DeepSpeed computes in fp32, as on cards without
    bf16: its accelerator for CPUs has no fp16."""
    two = {"train.num_processes": 2, "train.bins_per_step": 2}
    configs = {
        name: recipe_runs.toy_recipe(folder, name, two | {"run_root": str(folder / f"{len(names)}" / name)})
        for name in names
    }
    for config in configs.values():
        recipe_runs.run_stages(config)
    train_with_two_processes(configs, folder / "extensions")
    for config in configs.values():
        check_learned(config)
