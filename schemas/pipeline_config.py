"""Settings of the data stages. Field descriptions are the reference that docs and `init` print."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from schemas.conversation import Role
from schemas.local_path import LocalPath, refuse_url
from schemas.section import Section
from schemas.source_config import BenchmarkConfig, SourceConfig
from schemas.training_config import EvaluateConfig, ModelConfig, PromoteConfig, TrainConfig

VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
BlockName = Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]


BUILT_IN_TEMPLATES = (
    "alpaca",
    "chatml",
    "gemma",
    "llama-3",
    "mistral",
    "phi",
    "plain",
    "vicuna-v1.1",
    "zephyr",
)
"""Chat templates that split.chat_template may name."""


class MergeConfig(Section):
    max_record_bytes: int = Field(default=64 * 2**20, gt=0)
    """A longer record is dropped as record_too_large, unparsed."""
    part_bytes: int = Field(default=2**20, gt=0)
    """Aimed size of the raw bytes of a part; borders are content-defined. A change to a file costs one or two parts."""
    max_decompressed_ratio: int = Field(default=200, gt=0)
    """A compressed file that grows by more than this factor is refused as a bomb."""


class CleanConfig(Section):
    converter: Literal["html-to-markdown", "markdownify"] = "html-to-markdown"
    """Which library writes the Markdown, behind the same pre-pass."""
    images: Literal["keep", "alt", "drop"] = "drop"
    """Pictures in answers: as Markdown, as their alt text, or not at all."""
    citations: Literal["keep", "drop"] = "drop"
    """Pills with the names of sources inside sentences: as links, or not at all."""
    unfinished: Literal["keep", "drop"] = "drop"
    """Answers whose markup says that they were cut off while being written."""
    ftfy: bool = False
    """Repair text that was decoded with the wrong encoding (â€™ for ’), outside code; needs the extra `text`."""
    unescape: bool = False
    """Take out back-slashes that an earlier cleaner left in names (`my\\_var`), where nobody else can have written them."""
    chinese: Literal["keep", "simplified"] = "keep"
    """simplified: traditional characters of Chinese text, outside code, become simplified ones; needs the extra `text`."""
    redact: list[Literal["email", "phone", "ip", "card", "iban", "key"]] = Field(default_factory=list)
    """Personal data and secrets to replace, outside code, also in reasoning and tool calls: [EMAIL_1] is the same address
    throughout a chat."""
    redact_code: bool = False
    """Replace them in code too; without it, API keys that stay in code are counted as api_keys_kept."""
    max_message_bytes: int = Field(default=2 * 2**20, gt=0)
    """A longer HTML answer is dropped as html_too_large."""
    max_chat_bytes: int = Field(default=8 * 2**20, gt=0)
    """A chat with more HTML in all its answers is dropped as html_too_large. The worst page of 2 MB takes 3 s, with
    markdownify 8 s, so this bounds the time of a record."""
    max_depth: int = Field(default=256, gt=0)
    """HTML nested deeper is dropped as html_too_deep: converters lose or crash on it."""


def names_function(name: str) -> bool:
    """Whether `name` is written as package.module:function, not as a path."""
    module, _, function = name.partition(":")
    return all(part.isidentifier() for part in [*module.split("."), function])


LanguageCode = Annotated[str, Field(pattern=r"^([a-z]{2,3}|zh-Han[st])$")]
Share = Annotated[float, Field(ge=0, le=1)]
KeepOrDrop = Literal["keep", "drop"]
KeepCutDrop = Literal["keep", "cut", "drop"]


class FilterConfig(Section):
    keep_languages: list[LanguageCode] = Field(default_factory=list)
    """ISO 639-1 codes, zh-Hans or zh-Hant; empty keeps all. A chat stays if its main language is in the list."""
    skip_languages: list[LanguageCode] = Field(default_factory=list)
    """Codes of languages whose chats are dropped."""
    min_language_share: float = Field(default=0.5, ge=0, le=1)
    """Share of letters the main language must have before keep/skip may judge by it."""
    foreign_rounds: KeepCutDrop = "keep"
    """Rounds with a turn in a language that is not kept or is skipped: left in, cut out, or their chats dropped."""
    mixed_chats: KeepCutDrop = "keep"
    """Chats in more than one language: kept, freed of the rounds with a turn in another than the main one, or dropped."""
    keep_models: list[str] = Field(default_factory=list)
    """Names of models whose chats stay, with * and ?; "" stands for chats that name no model. Empty keeps all."""
    skip_models: list[str] = Field(default_factory=list)
    """Names of models whose chats are dropped, with * and ?."""
    min_chars: int = Field(default=1, ge=0)
    """Fewest characters of all assistant turns together."""
    max_chars: int = Field(default=4_000_000, gt=0)
    """Most characters of a chat."""
    min_answer_chars: int = Field(default=0, ge=0)
    """Fewest characters of every assistant turn; tool calls don't count as turns."""
    max_answer_chars: int = Field(default=0, ge=0)
    """Most characters of every assistant turn; 0 is off."""
    min_tokens: int = Field(default=0, ge=0)
    """Fewest tokens of a chat's texts by the tokenizer of `model`, its template not counted; 0 is off."""
    max_tokens: int = Field(default=0, ge=0)
    """Most tokens of a chat's texts by the tokenizer of `model`, its template not counted; 0 is off."""
    min_turns: int = Field(default=0, ge=0)
    """Fewest messages of a chat, the system message not counted."""
    max_turns: int = Field(default=10_000, gt=0)
    """Most messages of a chat, the system message not counted."""
    first_round_only: bool = False
    """Cut every chat behind its first round: one question and what answers it."""
    alternation: Literal["repair", "drop"] = "repair"
    """Wrong role order: repaired as the next three say, or the chat is dropped."""
    same_role: Literal["merge", "last", "drop"] = "merge"
    """Neighbours of one role: joined by a blank line, only the last one kept, or the chat dropped."""
    leading_answers: Literal["cut", "drop"] = "cut"
    """Answers before the first question: cut off, or the chat dropped."""
    trailing_questions: Literal["cut", "drop"] = "cut"
    """Questions behind the last answer: cut off, or the chat dropped."""
    error_replies: KeepCutDrop = "cut"
    """Short answers that are a server's error or rate limit. cut ends the chat before the question to them."""
    refusals: KeepCutDrop = "keep"
    """Answers that begin by declining, in twelve languages."""
    ai_disclaimers: KeepCutDrop = "keep"
    """Answers with "as an AI language model, I", in twelve languages."""
    unfinished_answers: KeepCutDrop = "keep"
    """Answers whose text breaks off: in a code block, after a comma, in a long line without an end of sentence."""
    echoes: KeepCutDrop = "keep"
    """Answers that are the question again."""
    placeholders: KeepCutDrop = "keep"
    """Questions and answers with a {{name}} that nobody filled in, outside of code."""
    broken_numbering: KeepOrDrop = "drop"
    """Answers with lists numbered 1. 1. 1., as exports leave them that lost the numbers."""
    max_digit_run: int = Field(default=0, ge=0)
    """Drop chats with one digit repeated more often than this; 0 is off."""
    max_character_run: int = Field(default=0, ge=0)
    """Drop chats with another character repeated more often than this in an answer's prose; 0 is off."""
    max_repeated_line_share: Share = 1
    """Largest share of lines of an answer's prose that stood before in it; 1 is off."""
    max_repeated_ngram_share: Share = 1
    """Largest share of an answer's words (characters in Chinese, Japanese, Thai) in stretches of eight that stood before in
    it; 1 is off."""
    max_symbol_share: Share = 1
    """Largest share of signs that are neither letters nor digits in the prose of the answers; 1 is off."""
    max_digit_share: Share = 1
    """Largest share of digits in the prose of the answers; 1 is off."""
    max_code_share: Share = 1
    """Largest share of code in the characters of the answers; 1 is off."""
    blocked_words: list[str] = Field(default_factory=list)
    """Words and phrases whose chats are dropped: whole words, in prose, upper or lower case."""
    blocked_words_in: Literal["all", "answers"] = "all"
    """Whether questions and system messages are searched, too."""
    quality: LocalPath = ""
    """A score of the chat: `package.module:function` (a chat in, a number out), or the path of a fastText model."""
    quality_label: str = "__label__hq"
    """The model's label whose probability is the score."""
    min_quality: float = 0.5
    """Chats with a lower score are dropped as low_quality; every score stands in meta."""


class DedupConfig(Section):
    exact: bool = True
    """A chat that is there twice, word for word, is kept once."""
    branches: bool = True
    """A chat that another one repeats and extends is dropped in favour of the longer one."""
    near: bool = True
    """A chat that is nearly another one is dropped in favour of the longer one."""
    near_threshold: float = Field(default=0.8, gt=0, le=1)
    """Jaccard similarity of word 3-grams from which two chats count as one."""
    source_rank: list[str] = Field(default_factory=list)
    """Names of sources, the best first; the others come last. Of two chats the longer one survives, else the one with
    the later date, else the one of the better source, else the one with the lower id."""
    leaks: Literal["drop", "report"] = "drop"
    """Chats that hold a question or an answer of `benchmarks`: dropped and reported, or only reported."""
    leak_words: int = Field(default=8, ge=3, le=50)
    """Words in a row that a chat and a benchmark must share; a shorter question must be a whole user turn."""
    leak_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a question's or an answer's words that must stand in such runs in one turn."""
    caps: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Source name: most rows of it that stay; the others are dropped as over_cap, after dedup, by their ids."""


class HoldoutConfig(Section):
    validation: float = Field(default=0.02, ge=0, lt=0.5)
    """Share of chats for the loss during training."""
    test: float = Field(default=0.02, ge=0, lt=0.5)
    """Share of chats for the promotion gate."""
    seed: int = 0
    """Another seed draws other sides, for first user turns that have none yet."""
    near_threshold: float = Field(default=0.8, gt=0, le=1)
    """A new row this similar to a held-out row goes to its side."""


class SplitConfig(Section):
    max_tokens: int = Field(default=2048, gt=8)
    """Longest example, in tokens of the rendered chat."""
    overlong_round: Literal["drop", "cut"] = "drop"
    """What happens to a single round that is longer than max_tokens: left out, or cut inside at paragraphs."""
    repeat_system: bool = True
    """Each piece of a cut chat starts with the chat's system message."""
    overlap_rounds: int = Field(default=0, ge=0)
    """How many rounds before it a later piece of a cut chat begins with, as context that is not trained."""
    train_on: list[Role | Literal["last"]] = Field(default=["assistant"], min_length=1)
    """Roles whose turns are trained, or last: the last assistant turn alone. A message's own weight or train: false
    counts too."""
    train_reasoning: bool = True
    """Whether the reasoning of trained turns is trained."""
    train_tool_calls: bool = True
    """Whether the tool calls of trained turns are trained."""
    prompt_weight: float = Field(default=0, ge=0, le=1000)
    """Weight of the texts of all other turns in the loss, without what the template writes around them."""
    reasoning: Literal["keep", "drop"] = "keep"
    """drop takes reasoning out of the data, for templates that can't write it."""
    system: Literal["keep", "merge_into_user", "drop"] = "keep"
    """System prompts stay, go into the user turn that follows them, or are left out, for templates that refuse them."""
    chat_template: LocalPath | None = None
    """In place of the tokenizer's own template: a Jinja file, or alpaca, chatml, gemma, llama-3, mistral, phi, plain,
    vicuna-v1.1 or zephyr."""
    shard_rows: int = Field(default=8192, gt=0)
    """Rows in a record batch of the shards."""
    max_straddle_share: float = Field(default=0.001, ge=0, le=1)
    """Refuse when more spans than this begin or end inside a token."""
    max_untrained_share: float = Field(default=0.05, ge=0, le=1)
    """Refuse when more rows than this have nothing to train."""

    @field_validator("train_on", mode="before")
    @classmethod
    def _one_role_is_a_list(cls, roles: object) -> object:
        return [roles] if isinstance(roles, str) else roles

    @field_validator("train_on")
    @classmethod
    def _last_stands_alone(cls, roles: list[str]) -> list[str]:
        if "last" in roles and len(roles) > 1:
            raise ValueError("last stands alone: it is the last assistant turn and no other")
        return roles


class PackConfig(Section):
    mode: Literal["packed", "unpacked", "token_budget"] = "packed"
    """packed: bins as full as can be; unpacked: a bin for each example; token_budget: examples of like length, as many
    as would fit into capacity when each is padded to the longest."""
    capacity: int | None = Field(default=None, gt=8)
    """Tokens in a bin; default: split.max_tokens."""
    seed: int = 0
    """Another seed gives another order of the bins."""
    weights: dict[str, Annotated[float, Field(ge=0, le=1000)]] = Field(default_factory=dict)
    """Source name: how often each of its training examples stands in an epoch. 3 is thrice; 0.2 is a fifth of them, another
    fifth in the next epoch; default 1."""
    temperature: float = Field(default=1.0, ge=1, le=100)
    """Above 1, small sources stand more often in an epoch and large ones less: with T their shares are as their weighted
    numbers of examples to the power 1/T. The epoch keeps its length."""
    order: Literal["shuffled", "length", "source", "score"] = "shuffled"
    """Of the bins of an epoch: shuffled; short examples first; as the sources and their files have them; or low scores
    first, see score."""
    score: str = "quality"
    """With order: score, the number in the meta of each row to order by."""
    descending: bool = False
    """Turns an order around: long examples or high scores first."""
    documents: Literal["blocks", "window"] = "blocks"
    """Of sources with format: document. blocks: joined and cut into bins of exactly capacity tokens; window: in each epoch
    another stretch of window_tokens tokens of each document."""
    window_tokens: int | None = Field(default=None, gt=8)
    """With documents: window; default: the capacity."""


class EngineConfig(Section):
    workers: int = Field(default=0, ge=0)
    """Worker processes; 0 takes the number of cores, 1 works in this process."""
    lock_wait_seconds: float = Field(default=30, ge=0)
    """How long a new run waits for one that holds the run root."""
    max_drop_share: float = Field(default=1.0, ge=0, le=1)
    """Fail when a stage drops a larger share of its rows."""
    min_free_gib: float = Field(default=0.5, ge=0)
    """Fail before a stage starts when less disk is free."""
    keep_downloads: bool = True
    """Leave copies of sources behind URLs in the run root, and fetch a file again only when its ETag is another."""
    secret_env: dict[VariableName, BlockName] = Field(default_factory=dict)
    """Variables for the trainer, each with the Prefect Secret block that has its value: {HF_TOKEN: hf-token}. One
    that is set already where the run works is taken as it is."""


class PipelineConfig(Section):
    """The whole config file."""

    run_root: Path
    """Folder of everything that a run writes; relative to the config file."""
    sources: list[SourceConfig] = Field(min_length=1)
    benchmarks: list[BenchmarkConfig] = Field(default_factory=list)
    """Questions and answers that must not be trained on; see dedup.leaks."""
    earlier_runs: list[LocalPath] = Field(default_factory=list)
    """Run roots whose rows must not be taken again: their duplicates, beginnings and near-duplicates are dropped."""
    merge: MergeConfig = MergeConfig()
    clean: CleanConfig = CleanConfig()
    filter: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    holdout: HoldoutConfig = HoldoutConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig | None = None
    """Needed from stage 6 on: its tokenizer makes the shards."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("run_root", mode="before")
    @classmethod
    def _run_root_is_here(cls, run_root: object) -> object:
        return refuse_url(run_root) if isinstance(run_root, str) else run_root

    @field_validator("sources", "benchmarks")
    @classmethod
    def _names_are_unique(
        cls, named: list[SourceConfig] | list[BenchmarkConfig], info: ValidationInfo
    ) -> list[SourceConfig] | list[BenchmarkConfig]:
        names = [one.name for one in named]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two {info.field_name} are named {twice[0]!r}: give each its own name")
        return named

    @model_validator(mode="after")
    def _weights_and_caps_name_sources(self) -> "PipelineConfig":
        names = [source.name for source in self.sources]
        for key, named in (
            ("pack.weights", self.pack.weights),
            ("dedup.caps", self.dedup.caps),
            ("dedup.source_rank", self.dedup.source_rank),
        ):
            for name in named:
                if name not in names:
                    raise ValueError(f"{key} names {name!r}, no such source; sources are {', '.join(names)}")
        return self
