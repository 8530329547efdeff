"""Files of prompts: batches equal to transformers' own generate alone, bad lines kept, killed runs taken up again."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, GenerationConfig

from pipelines import storage
from schemas.errors import BusyError, ConfigError, InputError, LimitError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_lora, tiny_model, tiny_run, tiny_tokenizer, write_model
from trainer import answer_shares
from trainer.answer import Sampling, answer_prompts, seed_of, stop_token_ids
from trainer.answer_files import FileWork, _held
from trainer.attention import use_plain_attention
from trainer.generate import generate_file, run_generate
from trainer.load_trained import choose, load_for_generation
from trainer.model import outdated_names_allowed
from trainer.prompts import encode_prompt, printable
from trainer.train import train
from trainer.virtual_tokens import generated_positions

ROOT = Path(__file__).parent.parent.parent
WORDS = ["red", "the cat runs near", "", "0123 blue blue green", "far a far a far a far a", "dog", "cat red"]


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Batches ----------------------------------------------------------------------------------------------------


def alone(model: Any, tokenizer: Any, prompt: list[int], *, num_new: int, **settings: Any) -> list[int]:
    """What transformers itself makes of one prompt without padding."""
    own = GenerationConfig(
        max_new_tokens=num_new,
        eos_token_id=stop_token_ids(model, tokenizer),
        pad_token_id=0,
        **settings,
    )
    ids = torch.tensor([prompt])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=own)
    return [int(token) for token in found[0, len(prompt) :]]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "gemma3_text",
        *(pytest.param(name, marks=pytest.mark.stress) for name in ("qwen3", "mistral")),
    ],
)
def test_a_batch_says_token_by_token_what_transformers_says_to_each_prompt_alone(
    model_type: str, settings: dict[str, int]
) -> None:
    window = {"sliding_window": 8} if model_type in ("gemma3_text", "mistral") else {}
    model, tokenizer = tiny_model(model_type, **window).eval(), tiny_tokenizer()
    use_plain_attention(model)
    prompts = [encode_prompt(tokenizer, question(text)) for text in WORDS]
    assert len({len(prompt) for prompt in prompts}) > 4
    found = answer_prompts(model, tokenizer, prompts, Sampling(14, **settings), seeds=[0] * len(prompts))
    for prompt, answered in zip(prompts, found, strict=True):
        expected = alone(model, tokenizer, prompt, num_new=14, **settings)
        assert answered.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answered.num_tokens == len(expected)
        assert answered.is_finished == (expected[-1] == tokenizer.eos_token_id)


def test_an_adapter_answers_in_a_batch_as_alone_and_its_base_beneath_it_as_the_base() -> None:
    base, tokenizer = tiny_model().eval(), tiny_tokenizer()
    use_plain_attention(base)
    prompts = [encode_prompt(tokenizer, question(text)) for text in WORDS]
    plain = [alone(base, tokenizer, prompt, num_new=10) for prompt in prompts]
    adapted = tiny_lora(base, std=0.3).eval()
    adapted.generation_config.do_sample = True
    adapted.generation_config.temperature = 9.0
    for model, expected in ((adapted, None), (base, plain)):
        with adapted.disable_adapter() if expected else torch.no_grad():
            found = answer_prompts(model, tokenizer, prompts, Sampling(10), seeds=[0] * len(prompts))
        one_by_one = [
            answer_prompts(adapted, tokenizer, [prompt], Sampling(10), seeds=[0])[0] for prompt in prompts
        ]
        texts = [answered.text for answered in found]
        if expected is None:
            assert texts == [answered.text for answered in one_by_one]
        else:
            assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
            assert texts != [answered.text for answered in one_by_one]


def test_draws_of_a_prompt_do_not_hang_on_what_stands_beside_it() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    use_plain_attention(model)
    prompts = [encode_prompt(tokenizer, question(text)) for text in WORDS]
    sampling = Sampling(10, temperature=1.5, top_k=40, top_p=0.9)
    seeds = [seed_of(7, number) for number in range(len(prompts))]
    together = answer_prompts(model, tokenizer, prompts, sampling, seeds=seeds)
    for number in (0, 4):
        (single,) = answer_prompts(model, tokenizer, [prompts[number]], sampling, seeds=[seeds[number]])
        assert single == together[number]
    others = answer_prompts(model, tokenizer, prompts, sampling, seeds=[seed + 1 for seed in seeds])
    assert others != together


def test_draws_have_the_probabilities_that_the_settings_leave() -> None:
    """3,000 first tokens against what softmax, top_k and top_p say, by hand."""
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    use_plain_attention(model)
    prompt = encode_prompt(tokenizer, question("red"))
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].double() / 0.7
    kept = logits.topk(6)
    shares = kept.values.softmax(0)
    inside = int((shares.cumsum(0) < 0.8).sum()) + 1
    expected = (shares[:inside] / shares[:inside].sum()).tolist()
    processor = answer_module_draw(Sampling(1, temperature=0.7, top_k=6, top_p=0.8), range(3000), len(prompt))
    scores = (logits * 0.7).float().expand(3000, -1)
    drawn = Counter(processor(torch.tensor([prompt] * 3000), scores).argmax(-1).tolist())
    assert set(drawn) <= set(kept.indices[:inside].tolist())
    for token, share in zip(kept.indices[:inside].tolist(), expected, strict=True):
        deviation = (share * (1 - share) / 3000) ** 0.5
        assert abs(drawn[token] / 3000 - share) < 5 * deviation


def answer_module_draw(sampling: Sampling, seeds: Any, num_prompt: int) -> Any:
    from trainer.answer import _draws

    (processor,) = _draws(sampling, list(seeds), num_prompt, 1, torch.device("cpu"))
    return processor


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"num_beams": 2, "temperature": 1.0},
        {"top_k": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Sampling(4, **settings)


# Files ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = tiny_run(tmp_path_factory.mktemp("trained"), evaluate={"max_new_tokens": 6})
    train(config)
    return config


def work_of(config: PipelineConfig, folder: Path, *, adapter: str = "current", **settings: Any) -> FileWork:
    return FileWork(
        input_path=folder / "prompts.jsonl",
        output_path=folder / "answers.jsonl",
        choice=choose(config, adapter),
        base=choose(config, "none"),
        **{"sampling": Sampling(6), "rows_at_once": 3, "device": "cpu"} | settings,
    )


def write_prompts(folder: Path, texts: list[str]) -> None:
    lines = [json.dumps({"prompt": text, "id": f"p{number}"}) for number, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def said(config: PipelineConfig, text: str, *, adapter: str = "current") -> str:
    loaded = load_for_generation(config, adapter)
    prompts = [encode_prompt(loaded.tokenizer, question(text))]
    return answer_prompts(loaded.model, loaded.tokenizer, prompts, Sampling(6), seeds=[0])[0].text


BAD_LINES = {
    "{not json": "invalid_json",
    "[]": "not_an_object",
    "{}": "unknown_format",
    '{"prompt": 3}': "unknown_format",
    '{"messages": []}': "no_messages",
    '{"messages": ["hi"]}': "bad_value",
    '{"messages": [{"role": "robot", "content": "hi"}]}': "robot",
    '{"messages": [{"role": "assistant", "content": "hi"}]}': "asks nothing",
    '{"prompt": "' + "0" * 300 + '"}': "shorten it",
    "[" * 5000: "invalid_json",
    "\xff": "invalid_utf8",
}


def test_each_line_has_its_line_in_order_and_bad_ones_keep_their_reason(
    trained_run: PipelineConfig, tmp_path: Path
) -> None:
    chat = [*question("blue"), {"role": "assistant", "content": "green"}, *question("cat")]
    alpaca = {"instruction": "red", "input": "dog", "output": "the label"}
    good = [
        {"prompt": "red"},
        {"messages": chat},
        {"conversations": [{"from": "human", "value": "far"}, {"from": "gpt", "value": "near"}]},
        alpaca,
        {"instruction": "blue"},
    ]
    lines = [json.dumps(good[0]), "", *BAD_LINES, *map(json.dumps, good[1:])]
    (tmp_path / "prompts.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    made = generate_file(trained_run, work_of(trained_run, tmp_path))
    found = records(tmp_path)
    assert [record["line"] for record in found] == [1, *range(3, len(lines) + 1)]
    bad = [record for record in found if "error" in record]
    assert [(record["line"], record["error"]) for record in bad] == list(made.bad_lines)
    assert [record["line"] for record in bad] == list(range(3, 3 + len(BAD_LINES)))
    for record, expected in zip(bad, BAD_LINES.values(), strict=True):
        assert expected in record["error"]
    answered = [record for record in found if "error" not in record]
    asked = [question("red"), chat, question("far"), question("red\n\ndog"), question("blue")]
    assert [record["messages"][:-1] for record in answered] == asked
    assert [record.get("reference") for record in answered] == [None, None, "near", "the label", ""]
    assert answered[0]["messages"][-1]["content"] == said(trained_run, "red")
    assert answered[3]["messages"][-1]["content"] == said(trained_run, "red\n\ndog")
    assert "the label" not in json.dumps(answered[3]["messages"])
    assert made.num_answers == len(good)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["answers.jsonl", "prompts.jsonl"]


def test_before_and_after_stand_side_by_side(
    trained_run: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_prompts(tmp_path, ["red", "blue cat"])
    generate_file(trained_run, work_of(trained_run, tmp_path, before_after=True))
    for record, text in zip(records(tmp_path), ["red", "blue cat"], strict=True):
        before, after = (said(trained_run, text, adapter=name) for name in ("none", "current"))
        assert before != after
        assert (record["before"]["text"], record["after"]["text"]) == (before, after)
        assert record["messages"] == question(text)
    run_generate(
        trained_run, Sampling(6), prompts=["red"], adapter="current", before_after=True, device="cpu"
    )
    before, after = (printable(said(trained_run, "red", adapter=name)) for name in ("none", "current"))
    assert capsys.readouterr().out == f"red\n  before: {before}\n  after:  {after}\n"
    with pytest.raises(ConfigError, match="is the base model"):
        run_generate(trained_run, Sampling(6), prompts=["red"], adapter="none", before_after=True)


OTHERS: dict[str, Any] = {
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "llama-adapter": AdaptionPromptConfig(adapter_len=5, adapter_layers=2, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in ("prefix", "ia3") else pytest.mark.stress) for k in OTHERS]
)
def test_adapters_of_every_kind_say_in_a_file_what_plain_peft_says_to_each_prompt(
    trained_run: PipelineConfig, tmp_path: Path, kind: str
) -> None:
    assert trained_run.model is not None
    base = AutoModelForCausalLM.from_pretrained(trained_run.model.path)
    with outdated_names_allowed():
        model: Any = get_peft_model(base, copy.deepcopy(OTHERS[kind]), autocast_adapter_dtype=False)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float(kind == "ia3"), std=0.5)
    model.save_pretrained(tmp_path / "adapter")
    write_prompts(tmp_path, [*WORDS, "cat", "red red"])
    generate_file(
        trained_run,
        work_of(trained_run, tmp_path, adapter=str(tmp_path / "adapter"), before_after=True),
    )
    tokenizer = tiny_tokenizer()
    with outdated_names_allowed():
        fresh = AutoModelForCausalLM.from_pretrained(trained_run.model.path)
        judge: Any = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    differing = 0
    for record, text in zip(records(tmp_path), [*WORDS, "cat", "red red"], strict=True):
        prompt = torch.tensor([encode_prompt(tokenizer, question(text))])
        with generated_positions():
            found = judge.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
            )
        expected = tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
        assert record["after"]["text"] == expected
        assert record["before"]["text"] == said(trained_run, text, adapter="none")
        differing += record["before"]["text"] != expected
    assert differing > 3


def test_whole_models_are_compared_with_the_base_too(trained_run: PipelineConfig, tmp_path: Path) -> None:
    write_prompts(tmp_path, ["red"])
    whole = write_model(tmp_path / "whole", seed=3)
    generate_file(trained_run, work_of(trained_run, tmp_path, adapter=str(whole), before_after=True))
    (record,) = records(tmp_path)
    assert record["before"]["text"] == said(trained_run, "red", adapter="none")
    assert record["after"]["text"] == said(trained_run, "red", adapter=str(whole))


class KilledError(RuntimeError):
    pass


def test_a_run_that_broke_off_is_taken_up_with_the_same_lines(
    trained_run: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off after two batches, with a torn last line; on another number of rows at once."""
    texts = [f"red {'blue ' * (number % 5)}{number}" for number in range(12)]
    sampling = Sampling(6, temperature=1.0, seed=3)
    (tmp_path / "whole").mkdir()
    write_prompts(tmp_path / "whole", texts)
    generate_file(trained_run, work_of(trained_run, tmp_path / "whole", sampling=sampling))
    write_prompts(tmp_path, texts)
    batches = []
    original = answer_shares.answer_prompts

    def twice(*arguments: Any, **settings: Any) -> Any:
        if len(batches) == 2:
            raise KilledError
        batches.append(arguments)
        return original(*arguments, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(answer_shares, "answer_prompts", twice)
        with pytest.raises(KilledError):
            generate_file(trained_run, work_of(trained_run, tmp_path, sampling=sampling))
    (share,) = (tmp_path / "answers.jsonl.partial").glob("answers-*.jsonl")
    with share.open("ab") as file:
        file.write(b'{"line": 12, "te')
    assert not (tmp_path / "answers.jsonl").exists()
    with pytest.raises(ConfigError, match="of another sampling: repeat"):
        generate_file(trained_run, work_of(trained_run, tmp_path))
    made = generate_file(trained_run, work_of(trained_run, tmp_path, sampling=sampling, rows_at_once=5))
    assert made.num_taken_over == 6
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


@pytest.mark.stress
def test_two_processes_share_the_lines_and_a_killed_command_leaves_none_behind(
    trained_run: PipelineConfig, tmp_path: Path
) -> None:
    texts = [f"red {'blue ' * (number % 5)}{number}" for number in range(40)]
    write_prompts(tmp_path, texts)
    generate_file(trained_run, work_of(trained_run, tmp_path))
    expected = (tmp_path / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").unlink()
    config = tmp_path / "config.yaml"
    config.write_text(trained_run.model_dump_json(exclude_none=True))
    command = [sys.executable, "-m", "flows.cli", "generate", str(config), "--adapter", "current"]
    command += ["--prompts", str(tmp_path / "prompts.jsonl"), "--answers", str(tmp_path / "answers.jsonl")]
    command += ["--processes", "2", "--batch-size", "2"]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    folder = tmp_path / "answers.jsonl.partial"
    deadline = time.monotonic() + 300
    while not any(path.stat().st_size for path in folder.glob("answers-*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 60
    while str(tmp_path) in running_commands() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert str(tmp_path) not in running_commands()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "of an earlier run" in result.stdout
    assert (tmp_path / "answers.jsonl").read_bytes() == expected


def running_commands() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_batch_that_memory_is_too_small_for_is_halved(
    trained_run: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prompts(tmp_path, [f"red {number}" for number in range(8)])
    original, sizes = answer_shares.answer_prompts, []

    def small(model: Any, tokenizer: Any, prompts: Any, *arguments: Any, **settings: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, tokenizer, prompts, *arguments, **settings)

    monkeypatch.setattr(answer_shares, "answer_prompts", small)
    generate_file(trained_run, work_of(trained_run, tmp_path, rows_at_once=8))
    assert sizes[:3] == [8, 4, 2]
    assert len(records(tmp_path)) == 8


def test_a_file_without_a_good_line_leaves_nothing(trained_run: PipelineConfig, tmp_path: Path) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text("nonsense\n")
    with pytest.raises(LimitError, match="no line could be answered; line 1: invalid_json"):
        generate_file(trained_run, work_of(trained_run, tmp_path, adapter="none"))
    source.write_text("\n")
    with pytest.raises(LimitError, match="it is empty"):
        generate_file(trained_run, work_of(trained_run, tmp_path, adapter="none"))
    assert list(tmp_path.iterdir()) == [source]


def test_answers_never_overwrite_their_prompts_and_one_run_holds_its_folder(
    trained_run: PipelineConfig, tmp_path: Path
) -> None:
    write_prompts(tmp_path, ["red"])
    work = work_of(trained_run, tmp_path, adapter="none")
    before = work.input_path.read_bytes()
    inside = {"output_path": tmp_path / "." / "prompts.jsonl"}
    with pytest.raises(ConfigError, match="is the input as well"):
        generate_file(trained_run, FileWork(**fields_of(work) | inside))
    with pytest.raises(InputError, match="no file of prompts"):
        generate_file(trained_run, FileWork(**fields_of(work) | {"input_path": tmp_path / "absent"}))
    with _held(work.folder), pytest.raises(BusyError, match="held by another run"):
        generate_file(trained_run, work)
    assert work.input_path.read_bytes() == before


def fields_of(work: FileWork) -> dict[str, Any]:
    return {name: getattr(work, name) for name in FileWork.__dataclass_fields__}


def test_the_command_answers_prompts_and_files(
    trained_run: PipelineConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_generate(trained_run, Sampling(6), prompts=["red", "blue"], adapter="none", device="cpu")
    texts = [said(trained_run, text, adapter="none") for text in ("red", "blue")]
    assert capsys.readouterr().out == "".join(f"{printable(text)}\n" for text in texts)
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "red"}\nbad\n')
    run_generate(trained_run, Sampling(6), input_path=source, output_path=target, adapter="none")
    shown = capsys.readouterr()
    assert shown.out == f"1 answers in {target}, 1 bad lines\n"
    assert f"{source}:2: invalid_json" in shown.err
    assert storage.file_entry(target, folder=tmp_path).num_bytes > 0
    with pytest.raises(ConfigError, match="needs prompts"):
        run_generate(trained_run, Sampling(6), prompts=["red"], input_path=source)
