"""Settings of what is read: sources of training data, and benchmarks that must not be among it."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from schemas.conversation import Role
from schemas.local_path import SourcePath
from schemas.section import Section

FormatName = Literal[
    "auto",
    "sharegpt",
    "alpaca",
    "messages",
    "prompt",
    "preference",
    "kto",
    "oasst",
    "chatgpt",
    "moss",
    "dialogue",
    "text",
    "document",
    "custom",
]


EncodingName = Literal[
    "auto",
    "utf-8",
    "utf-16-le",
    "utf-16-be",
    "cp1252",
    "iso8859-1",
    "iso8859-15",
    "cp1250",
    "cp1251",
    "koi8-r",
    "gb18030",
    "big5",
    "shift_jis",
    "euc-jp",
    "euc-kr",
]


class FieldPaths(Section):
    """Where things stand in records of a shape of their own: keys joined by dots, numbers count in lists."""

    messages: str = ""
    """Path of the list of turns, such as data.turns."""
    role: str = "role"
    """Path inside a turn of who speaks."""
    content: str = "content"
    """Path inside a turn of what is said."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """Names of speakers beside the usual ones: {customer: user, agent: assistant}."""
    prompt: list[str] = Field(default_factory=list)
    """In place of messages: paths of the question's parts, which are joined by blank lines."""
    answer: str = ""
    """In place of messages: path of the answer, such as answers.0.text."""
    system: str = ""
    """Path of a system text."""
    id: str = ""
    """Path of the record's own id."""
    date: str = ""
    """Path of its date."""
    model: str = ""
    """Path of the name of the model that answered."""

    @model_validator(mode="after")
    def _turns_or_a_round(self) -> "FieldPaths":
        if bool(self.messages) == bool(self.prompt or self.answer) or bool(self.prompt) != bool(self.answer):
            raise ValueError("name either messages, or prompt and answer")
        return self


class IdentityConfig(Section):
    name: str = Field(min_length=1)
    """What the model is called."""
    maker: str = Field(min_length=1)
    """Who made it."""
    languages: list[Literal["en", "de", "fr", "es", "it", "pt", "ru", "zh", "ja", "ko"]] = Field(
        default=["en"], min_length=1
    )
    """In which languages it is asked and answers."""
    others: list[str] | None = None
    """Names that are not its own (are you X? no); default: well-known assistants."""


def checked_columns(columns: list[str], container: str) -> list[str]:
    """Names of the columns of CSV files, none empty, none twice."""
    if columns and container not in ("auto", "csv"):
        raise ValueError(
            f"columns name those of CSV files, and container is {container}: leave one of them out"
        )
    if (
        worst := next((name for name in columns if not name.strip() or columns.count(name) > 1), None)
    ) is not None:
        raise ValueError(f"columns has {worst!r}: name each column once, none of them empty")
    return columns


def checked_name(name: str) -> str:
    """The name of a source or benchmark, which becomes part of ids and of the names of counts."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r}: use letters, digits, '.', '_' and '-'")
    return name


class SourceConfig(Section):
    name: str
    """Short name of this source; part of every row id, so keep it when files move."""
    path: SourcePath = ""
    """A file, a folder or a glob, relative to the config file, or a URL such as s3://... or hf://datasets/OWNER/NAME."""
    container: Literal["auto", "json", "csv", "keyed", "text", "text_lines"] = "auto"
    """How records lie in a file: auto looks at its bytes; text: a file is one document; text_lines: each line is."""
    columns: list[str] = Field(default_factory=list)
    """Names of the columns of CSV files without a first row of names; a first row of just these names is one."""
    encoding: EncodingName = "auto"
    """How text is written: auto knows UTF-8, UTF-16 and UTF-32; name any other. A byte order mark outdoes it."""
    format: FormatName = "auto"
    """auto looks at each record; custom reads it by fields; text makes rounds of a plain text, document trains it as it is."""
    fields: FieldPaths | None = None
    """Where things stand in a record, with format: custom."""
    tree_paths: Literal["all", "best"] = "all"
    """Of trees (oasst, chatgpt): all paths from the root to a leaf, or the best-ranked or shown one."""
    assistant_side: str = ""
    """Of chats between people: first, second or a speaker's name becomes the assistant; empty drops them."""
    text_chars: int = Field(default=4000, ge=100)
    """Of plain texts and papers: about how many characters a round has."""
    answers: Literal["auto", "html", "text"] = "auto"
    """Whether assistant turns are HTML; auto looks at each answer. User turns are always plain text."""
    set: Literal["any", "train"] = "any"
    """train: rows of this source are never held out."""
    identity: IdentityConfig | None = None
    """In place of a path: chats that teach the model its own name; never held out, never near-duplicates."""

    @field_validator("name")
    @classmethod
    def _name_is_a_word(cls, name: str) -> str:
        return checked_name(name)

    @model_validator(mode="after")
    def _reads_or_makes(self) -> "SourceConfig":
        if bool(self.path) == (self.identity is not None):
            raise ValueError(f"source {self.name!r}: name either a path, or an identity to make chats of")
        return self

    @model_validator(mode="after")
    def _columns_are_of_csv(self) -> "SourceConfig":
        checked_columns(self.columns, self.container)
        return self

    @model_validator(mode="after")
    def _custom_has_fields(self) -> "SourceConfig":
        if (self.format == "custom") != (self.fields is not None):
            raise ValueError("format: custom and fields belong together: name both or none")
        return self


class BenchmarkConfig(Section):
    name: str
    """Short name, for reasons and reports."""
    path: SourcePath
    """A file, a folder or a glob of the benchmark, in any container that sources may have; or a URL."""
    container: Literal["auto", "json", "csv", "keyed", "text", "text_lines"] = "auto"
    """How records lie in a file, as for sources; a document or a line of text is a record with the field text."""
    columns: list[str] = Field(default_factory=list)
    """Names of the columns of CSV files without a first row of names, as for sources."""
    encoding: EncodingName = "auto"
    """How text is written, as for sources."""
    question: list[str] = Field(default_factory=list)
    """Paths of the question's parts, such as [question, choices.0], which are joined by blank lines."""
    answer: list[str] = Field(default_factory=list)
    """Paths of the answer's parts; answers with fewer than dedup.leak_words words are not looked for."""

    @field_validator("name")
    @classmethod
    def _name_is_a_word(cls, name: str) -> str:
        return checked_name(name)

    @model_validator(mode="after")
    def _columns_are_of_csv(self) -> "BenchmarkConfig":
        checked_columns(self.columns, self.container)
        return self

    @model_validator(mode="after")
    def _names_a_field(self) -> "BenchmarkConfig":
        if not self.question and not self.answer:
            raise ValueError(
                f"benchmark {self.name!r}: name the paths of its question, of its answer or of both"
            )
        return self

    def as_source(self) -> SourceConfig:
        """Its files are found and read as a source's are."""
        return SourceConfig(
            name=self.name,
            path=self.path,
            container=self.container,
            columns=self.columns,
            encoding=self.encoding,
        )
