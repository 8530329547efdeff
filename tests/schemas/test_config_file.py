"""A config file is read whole, or every mistake in it is named."""

from pathlib import Path

import pytest

from schemas.config_file import load_config
from schemas.errors import ConfigError

GOOD = """
run_root: runs/toy
sources:
  - {name: chats, path: dumps/*.json}
train:
  learning_rate: 1e-4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_numbers_and_words_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD.replace("{name: chats,", "{name: no,")))
    assert config.train.learning_rate == 1e-4
    assert config.sources[0].name == "no"


def test_relative_paths_are_taken_from_the_config_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD.replace("runs/toy", "../toy")))
    assert config.run_root == tmp_path.parent / "toy"
    assert config.sources[0].path == str(tmp_path / "dumps/*.json")


@pytest.mark.parametrize(
    ("overrides", "steps", "targets"),
    [
        (["train.max_steps=5", "train.lora.targets=[q_proj, v_proj]"], 5, ["q_proj", "v_proj"]),
        ({"train.max_steps": 5, "train.lora.targets": ["q_proj", "v_proj"]}, 5, ["q_proj", "v_proj"]),
    ],
)
def test_overrides_reach_any_depth(tmp_path: Path, overrides: object, steps: int, targets: list[str]) -> None:
    config = load_config(write(tmp_path, GOOD), overrides)  # type: ignore[arg-type]
    assert config.train.max_steps == steps
    assert config.train.lora.targets == targets


def test_an_override_reaches_into_the_list_of_sources(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD), ["sources.0.format=alpaca"]).sources[0].format == "alpaca"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (GOOD + "  learning_rat: 1", [], "did you mean 'train.learning_rate'?"),
        (GOOD + "trian: {}", [], "did you mean 'train'?"),
        (GOOD, ["train.steps=5"], "did you mean 'train.max_steps'?"),
        (GOOD, ["train.lora.rnak=4"], "did you mean 'train.lora.rank'?"),
        (GOOD + "  epochs: two", [], "'train.epochs' is 'two'"),
        (GOOD + "  learning_rate: 2", [], "duplicate"),
        ("run_root: x", [], "'sources' is missing"),
        ("- a\n- b", [], "expected keys"),
        ("a: &x 1\nb: *x", [], "aliases"),
        (GOOD.replace("name: chats", "name: a/b"), [], "'a/b'"),
        (GOOD, ["train.max_steps"], "expected section.key=value"),
        (GOOD, ["train.epochs.x=1"], "should be a valid integer"),
        (GOOD, ["pack.weights.chat=2"], "pack.weights names 'chat', no such source; sources are chats"),
        (GOOD, ["sources.7.format=alpaca"], "not a number below 1"),
        (
            GOOD + "  x: 'never closed",
            [],
            "not valid YAML: found unexpected end of stream, line 7, column 19",
        ),
        (GOOD, ["engine.secret_env.HF TOKEN=hf-token"], "'engine.secret_env.HF TOKEN.[key]': expected"),
        (GOOD, ["engine.secret_env.HF_TOKEN=hf_s3cr3t"], "'engine.secret_env.HF_TOKEN': expected"),
    ],
)
def test_a_mistake_is_refused_with_what_to_do(
    tmp_path: Path, text: str, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), overrides)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "s3cr3t" not in str(error.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, GOOD + "  epoch: 1\nclaen: {}"))
    assert "train.epochs" in str(error.value)
    assert "'clean'" in str(error.value)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sft-pipeline init"):
        load_config(tmp_path / "none.yaml")


SECRET = "s3cr3t/Wit@h"
URL = f"https://me:{SECRET}@host.example/a.json?token={SECRET}"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (GOOD.replace("dumps/*.json", f'"{URL}"'), [], "'sources.0.path' is 'https://***@"),
        (GOOD, {"sources.0.path": URL}, "'sources.0.path' is 'https://***@"),
        (GOOD, [f"sources.0.path={URL}"], "'sources.0.path' is 'https://***@"),
        (GOOD, [f"{URL}"], "'https://***@"),
        (GOOD, {"sources": URL}, "'sources' is 'https://***@"),
        (GOOD, {"sources": [{"name": "chats", "pth": URL}]}, "did you mean 'sources.0.path'?"),
        (GOOD, {"model.path": URL}, "'model.path' is 'https://***@"),
        (GOOD, {"model.path": "m", "model.tokenizer": URL}, "'model.tokenizer' is 'https://***@"),
        (GOOD, {"split.chat_template": URL}, "'split.chat_template' is 'https://***@"),
        (GOOD, {"run_root": URL}, "'run_root' is 'https://***@"),
        (GOOD + f"  x: [{URL}", [], "not valid YAML"),
        (GOOD + f"  x: {URL}\n  x: {URL}", [], "duplicate"),
        (GOOD + f"  long: [{'x ' * 20}{URL}", [], "not valid YAML"),
    ],
)
def test_a_url_is_no_path_and_its_password_is_in_no_message(
    tmp_path: Path, text: str, overrides: dict[str, object] | list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text), overrides)
    assert said in str(error.value)
    assert not any(part in str(error.value) for part in ("s3cr", "t/Wi", "me:"))


def test_a_config_file_that_is_a_url_is_told_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"no config file at https:/\*\*\*@"):
        load_config(Path(URL))
