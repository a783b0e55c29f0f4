"""A Task: what good output is, in words and as a grader, and how arms are compared on it.

This is the whole of task.yaml. `metier init` writes one; every field has a default that works
except `name`, `kind` and `data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, FiniteFloat, field_validator, model_validator

from metier.config import Config

Kind = Literal["classification", "multi-label", "extraction", "expansion"]
LABELLED: tuple[Kind, ...] = ("classification", "multi-label")
"""Kinds with a closed label set."""
Turns = Literal["last", "all"]
TemplateName = Literal["plain", "question-answer", "chat"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Format = Literal[
    "auto",
    "prompt-completion",
    "question-answer",
    "text-label",
    "messages",
    "alpaca",
    "sharegpt",
    "tags",
]


@dataclass(frozen=True, slots=True)
class Tuning:
    """One way of updating a base: the single place that says what each can do (docs/methods.md).

    Attributes:
        name: how arms and reports call it.
        adapter: PEFT's name of its kind; empty where weights of the base itself are trained.
        rate: default learning rate, as a factor on LoRA's.
        reads: fields of `training` that only some ways read, and this one does.
        decays: whether weight decay pulls towards the base; else there is none.
        four_bit: whether the base is held in four bits, which takes an accelerator.

    """

    name: str
    adapter: str = "LORA"
    rate: float = 1.0
    reads: frozenset[str] = frozenset({"lora", "layers", "added_tokens"})
    decays: bool = True
    four_bit: bool = False


_VIRTUAL = frozenset({"virtual_tokens"})

TUNINGS = {
    tuning.name: tuning
    for tuning in (
        Tuning("lora"),
        Tuning("rslora"),
        Tuning("dora"),
        Tuning("pissa", decays=False),
        Tuning("ia3", "IA3", 30, frozenset({"layers"}), decays=False),
        Tuning("prompt-tuning", "PROMPT_TUNING", 30, _VIRTUAL, decays=False),
        Tuning("prefix-tuning", "PREFIX_TUNING", 30, _VIRTUAL, decays=False),
        Tuning("qlora", four_bit=True),
        Tuning("full", "", 0.15, frozenset({"layers", "added_tokens"})),
    )
}
"""Every way of updating a base, by name."""

_RAG = "+rag"
SIMPLER_METHODS = ("prompt", "few-shot", "rag", "classical")
METHODS = (*SIMPLER_METHODS, "remote", *TUNINGS, *(name + _RAG for name in TUNINGS))
HEADS = ("head", "tags")
"""Modes in which a layer of its own answers: such an arm writes no text."""
MODES = ("text", "likelihood", *HEADS)


class Columns(Config):
    """Which column of the data is what; a name that is not given is guessed from the format."""

    input: str | None = None
    """Column with the input text."""
    output: str | None = None
    """Column with the expected output or label."""
    group: str | None = None
    """Rows with the same value here never stand in two parts (a customer, a document)."""
    id: str | None = None
    """Column with a stable row id; without it the content's hash is used."""
    time: str | None = None
    """Column with the time of the row."""


class Data(Config):
    """Where the examples are."""

    file: str | None = None
    """One file that metier splits: JSONL, CSV, TSV, JSON, Parquet or CoNLL; may be compressed
    (.gz, .zst).
    `builtin:NAME` reads a built-in data set."""
    train: str | None = None
    """Official training part, when the parts are files of their own."""
    validation: str | None = None
    """Official validation part; without it, one is split off the training part."""
    test: str | None = None
    """Official test part: it is the sealed part; without it, one is split off."""
    format: Format = "auto"
    """How rows are laid out."""
    columns: Columns = Columns()
    """Names of columns."""
    documents: tuple[str, ...] = ()
    """Text files the rag arms may read besides the training examples."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.file) == bool(self.train):
            raise ValueError("give either data.file, or data.train (with validation and test)")
        if self.file and (self.validation or self.test):
            raise ValueError("data.validation and data.test go with data.train, not data.file")
        return self


class Split(Config):
    """How one file becomes training, validation and sealed test part."""

    test: Annotated[float, Field(gt=0, lt=0.9)] = 0.2
    """Share of groups in the sealed test part."""
    validation: Annotated[float, Field(gt=0, lt=0.9)] = 0.1
    """Share of groups in the validation part, on which every choice is made."""
    seed: int = 0
    """Seed of the assignment."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity of character 5-grams from which two inputs count as near-duplicates."""
    max_train: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many training examples."""
    max_validation: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many validation examples."""
    max_test: Annotated[int, Field(gt=0)] | None = None
    """Use at most this many test examples."""

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.test + self.validation >= 1:
            raise ValueError("split.test + split.validation leave nothing to train on")
        return self


class Lora(Config):
    """Low-rank adapters on all linear layers: lora, rslora, dora, pissa and qlora."""

    rank: Annotated[int, Field(gt=0, le=512)] = 16
    """Rank of the update."""
    alpha: Annotated[FiniteFloat, Field(gt=0)] = 32
    """The update is scaled by alpha / rank; for rslora by alpha / sqrt(rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""


class Training(Config):
    """How tuned arms are trained."""

    epochs: Annotated[int, Field(gt=0, le=1000)] = 10
    """At most this many passes over the training part; early stopping may end sooner."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Peak learning rate; by default by method and width of the base."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Examples per optimiser step; how they are cut into micro-batches never changes the result."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of steps in which the learning rate rises; then it falls on a cosine."""
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Decoupled weight decay of matrices, where it pulls towards the base: not for ia3, pissa,
    prompt-tuning and prefix-tuning."""
    patience: Annotated[int, Field(ge=0)] = 2
    """Stop after this many evaluations without fewer mistakes on the validation part, or as few
    and a lower loss; a head goes by its loss alone (0: never)."""
    max_length: Annotated[int, Field(gt=7)] = 1024
    """Longest example in tokens; a longer one is refused unless `too_long` says otherwise."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What to do with training examples longer than `max_length`: answers are never cut."""
    turns: Turns = "last"
    """Which answers of a conversation are learned: the last, which is what is evaluated, or all
    but those of weight 0."""
    class_weights: str | dict[str, FiniteFloat] | None = None
    """How much a label counts in the loss of a head: balanced (as if all were equally frequent),
    or a weight for some labels, 1 for the others; by default every row counts the same."""
    rehearsal: Annotated[FiniteFloat, Field(ge=0)] = 2.0
    """Weight of saying what the base says about text of its own, against forgetting (0: none)."""
    shard: bool = False
    """Keep only a part of every layer in each process that torchrun starts (FSDP2): for a base
    that is too large for one device."""
    lora: Lora = Lora()
    """Low-rank adapters: lora, rslora, dora, pissa and qlora."""
    virtual_tokens: Annotated[int, Field(gt=0, le=1000)] = 20
    """Tokens without text that prompt-tuning and prefix-tuning put before every input."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that are trained, the first is 0, -1 is the last; by default all.
    With full, embeddings and output head are then left as they are."""
    added_tokens: tuple[str, ...] = ()
    """New tokens, such as `<gene>`, which the vocabulary gets and the training learns."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    """Every tuned arm is trained once per seed; a verdict wants at least three."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("the same seed stands twice")
        return seeds

    @field_validator("class_weights")
    @classmethod
    def _weights(cls, weights: str | dict[str, float] | None) -> str | dict[str, float] | None:
        if isinstance(weights, str) and weights != "balanced":
            raise ValueError(f"'{weights}' says no weights: write balanced, or a weight by label")
        for label, weight in weights.items() if isinstance(weights, dict) else ():
            if weight <= 0:
                raise ValueError(f"'{label}' has the weight {weight:g}: it must be above 0")
        return weights

    @field_validator("added_tokens")
    @classmethod
    def _tokens(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        for token in tokens:
            if not token or any(character.isspace() for character in token):
                raise ValueError(f"'{token}' is no token: it must have characters, and no space")
        if len(set(tokens)) != len(tokens):
            raise ValueError("the same token stands twice")
        return tokens


class Forgetting(Config):
    """What the tuned model must not have forgotten, measured before and after."""

    texts: tuple[str, ...] = ()
    """General text files; by default, Python's own language reference topics."""
    pairs: tuple[str, ...] = ()
    """JSONL files with `good` and `bad` sentences; by default generated minimal pairs."""
    text_tolerance: Annotated[FiniteFloat, Field(ge=0)] = 0.05
    """Largest rise of bits per byte that is accepted, as a share of the base's."""
    skill_tolerance: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Largest fall of minimal-pair accuracy that is accepted."""


class Retrieval(Config):
    """What the few-shot and rag arms look up."""

    shots: Annotated[int, Field(gt=0, le=64)] = 5
    """Examples or passages put into a prompt."""
    index: Literal["bm25", "hybrid"] = "bm25"
    """bm25, or BM25 and MiniLM vectors fused (extra `rag`)."""


class Remote(Config):
    """Any OpenAI-compatible endpoint; the key comes from the environment and is never written."""

    base_url: str
    """Address of the API, e.g. http://127.0.0.1:8000/v1."""
    model: str
    """Name of the model there."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    input_price: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """Price of a million prompt tokens."""
    output_price: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    """Price of a million written tokens."""


class Arm(Config):
    """One arm: a method, how it answers, and over which base."""

    method: str
    mode: str = "text"
    base: str = ""

    @classmethod
    def of(cls, text: str) -> Arm:
        """Read ``method``, ``method/mode`` as written in task.yaml."""
        method, _, mode = text.partition("/")
        return cls(method=method, mode=mode or "text")

    @property
    def tuning(self) -> Tuning | None:
        """How its base is updated; None where it is not."""
        return TUNINGS.get(self.method.removesuffix(_RAG))

    @property
    def tuned(self) -> bool:
        """Whether it needs training of a language model."""
        return self.tuning is not None

    @property
    def retrieves(self) -> bool:
        """Whether passages that are looked up stand beside its inputs."""
        return self.method == "rag" or self.method.endswith(_RAG)

    @property
    def may_forget(self) -> bool:
        """Whether learning its task could cost it what else it can say: a head says nothing."""
        return self.tuned and not self.headed

    @property
    def headed(self) -> bool:
        """Whether a layer of its own answers: a class of the input, or of each token."""
        return self.mode in HEADS

    @property
    def name(self) -> str:
        """How reports call it."""
        mode = "" if self.mode == "text" else f"/{self.mode}"
        base = f"@{self.base}" if self.base else ""
        return f"{self.method}{mode}{base}"


class Task(Config):
    """The whole of task.yaml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    """Name of the task: lower-case letters, digits, dot, dash, underscore."""
    kind: Kind
    """classification (one of a closed set of labels), multi-label (any number of them), extraction
    (text or JSON fields), expansion (free text)."""
    data: Data
    """Where the examples are."""
    good: str = ""
    """What good output is, in words."""
    better: str = ""
    """What would be better still."""
    bad: str = ""
    """What bad output is."""
    instruction: str = ""
    """What prompted arms tell the model to do."""
    labels: tuple[str, ...] = ()
    """The closed label set; by default the labels of the training part."""
    base: str | Annotated[tuple[str, ...], Field(min_length=1)] = "starter"
    """One base or several: starter, a path, or a Hub name."""
    template: TemplateName = "question-answer"
    """How a chat becomes text: plain, question-answer, or the base's own chat template."""
    grader: str | dict[str, Any] = "auto"
    """What gives the scores: auto, exact, fields, token_f1, rouge_l, chrf, regex:PATTERN,
    python:FILE.py:FUNCTION, or the mapping of an OpenAI-style grader. auto: exact for
    classification, fields where answers are JSON (so of multi-label), token_f1 or rouge_l else."""
    arms: tuple[str, ...] = ()
    """Arms to compare: prompt, few-shot, rag, classical, remote; lora, rslora, dora, pissa, ia3,
    prompt-tuning, prefix-tuning, qlora, full, each also with retrieval, e.g. lora+rag. For a closed
    label set also with a mode, e.g. prompt/likelihood or full/head; for spans of the input
    lora/tags, full/tags and so on. By default all simpler ones
    that fit the kind, and lora."""
    split: Split = Split()
    """How the data is split."""
    training: Training = Training()
    """How tuned arms are trained."""
    retrieval: Retrieval = Retrieval()
    """What the few-shot and rag arms look up."""
    remote: Remote | None = None
    """Endpoint of the remote arm."""
    forgetting: Forgetting = Forgetting()
    """What must not be forgotten."""
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest answer in tokens; by default the longest training answer and a quarter more."""
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """A tuned arm must beat the best simpler arm by more than this to be worth shipping."""
    budget: Annotated[float, Field(gt=0)] = 60.0
    """Minutes the whole run may take."""
    machine_hour: Annotated[FiniteFloat, Field(ge=0)] = 0.10
    """Price of one hour of this machine, for cost per 1,000 requests."""
    currency: str = "USD"
    """Currency of all prices."""

    @field_validator("labels", "base")
    @classmethod
    def _no_name_twice(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(names, str):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"'{name}' stands twice")
        return names

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for text in arms:
            arm = Arm.of(text)
            if arm.method not in METHODS:
                names = ", ".join((*SIMPLER_METHODS, "remote", *TUNINGS))
                raise ValueError(
                    f"'{arm.method}' is no arm; choose from {names}, or one that is trained with "
                    f"{_RAG} behind it"
                )
            if arm.mode not in MODES:
                raise ValueError(f"'{arm.mode}' is no mode; choose from {', '.join(MODES)}")
        if len({Arm.of(text).name for text in arms}) != len(arms):
            raise ValueError("an arm stands twice")
        return arms

    @model_validator(mode="after")
    def _arms_fit(self) -> Self:
        for arm in self.chosen_arms():
            if self.kind not in LABELLED and (arm.method == "classical" or arm.mode == "head"):
                kinds = " or ".join(LABELLED)
                raise ValueError(f"the arm '{arm.name}' needs kind: {kinds}")
            if self.kind != "classification" and arm.mode == "likelihood":
                raise ValueError(f"the arm '{arm.name}' needs kind: classification")
            if arm.mode == "tags" and self.kind != "extraction":
                raise ValueError(f"the arm '{arm.name}' needs kind: extraction")
            if arm.mode == "likelihood" and arm.method not in ("prompt", "few-shot", "rag"):
                raise ValueError(
                    f"the arm '{arm.name}': likelihood goes with prompt, few-shot, rag"
                )
            if arm.headed and (not arm.tuned or arm.retrieves):
                heads = ", ".join(TUNINGS)
                raise ValueError(f"the arm '{arm.name}': only {heads} can carry a head")
            if arm.method == "remote" and self.remote is None:
                raise ValueError("the arm 'remote' needs the section 'remote'")
            self._can_be_trained(arm)
        if self.training.class_weights and all(a.mode != "head" for a in self.chosen_arms()):
            raise ValueError("training.class_weights are those of a head, and no arm has one")
        return self

    def _can_be_trained(self, arm: Arm) -> None:
        """Refuse what a way of tuning would otherwise leave out in silence."""
        training, tuning = self.training, arm.tuning
        if tuning is None:
            return
        for field in ("layers", "added_tokens"):
            if getattr(training, field) and field not in tuning.reads:
                fit = ", ".join(name for name, one in TUNINGS.items() if field in one.reads)
                raise ValueError(f"the arm '{arm.name}' cannot have training.{field}: {fit} can")
        if training.layers and training.added_tokens and not tuning.adapter:
            raise ValueError(
                f"the arm '{arm.name}': with training.layers the embeddings stay as they are, so "
                "training.added_tokens would not be learned"
            )

    def bases(self) -> tuple[str, ...]:
        """The bases to compare."""
        return (self.base,) if isinstance(self.base, str) else self.base

    def chosen_arms(self) -> tuple[Arm, ...]:
        """The arms to compare, for one base."""
        if self.arms:
            return tuple(Arm.of(text) for text in self.arms)
        simpler = ["prompt", "few-shot", "rag"]
        if self.kind in LABELLED:
            simpler.append("classical")
        return tuple(Arm.of(text) for text in [*simpler, "lora"])

    def reserved_tokens(self) -> int:
        """Places of a base's context that virtual tokens take in some arm."""
        virtual = any(
            "virtual_tokens" in arm.tuning.reads for arm in self.chosen_arms() if arm.tuning
        )
        return self.training.virtual_tokens if virtual else 0


def resolve(path: str, task_file: Path) -> Path:
    """A path in task.yaml is relative to the file it stands in."""
    return Path(path) if Path(path).is_absolute() else task_file.parent / path
