"""The documented shape of proof.json: what an exported model was held to, and what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from metier.config import Config

PROOF = "proof.json"


class Tie(Config):
    """A prompt whose answer goes on otherwise behind a token that rounding decides."""

    prompt: str
    """Id of the prompt."""
    token: int
    """Place of that token in the answer, from 0."""
    gap: float
    """How far the arm's likeliest token is ahead of the next there, in logits; at most `noise`."""


class Form(Config):
    """One form of the model, asked the same prompts as the arm."""

    name: Literal["merged", "reloaded", "served"]
    """merged: in memory. reloaded: the directory, by plain Transformers (and PEFT, where it is an
    adapter) in a process of its own. served: the directory, by metier over HTTP on loopback."""
    same: int
    """Prompts with the same answer: the same tokens, and of `served` the same text and count."""
    ties: tuple[Tie, ...] = ()
    """The other prompts: each differs from a tie on. Any other difference refuses the export."""
    largest_difference: float | None = None
    """Of a logit to the arm's, over the tokens of the arm's answers; None: HTTP gives none."""


class Asked(Config):
    """One prompt; its text is not kept."""

    id: str
    """Id of the row."""
    prompt_tokens: int
    """Tokens read."""
    answer_tokens: int
    """Tokens of the arm's answer, its stop token included."""
    compared_tokens: int
    """Of how many of them the logits were compared."""


class Weights(Config):
    """What became of the weights: those in the directory have the bytes of those in memory."""

    tensors: int
    """Weights and buffers of the exported model."""
    merged: int = 0
    """Layers that the adapter was merged into."""
    merge_error: float = 0.0
    """Largest deviation of a merged layer from the adapted one, as a share of what one rounding of
    its weights explains; at most 1."""
    untouched: int
    """Tensors with the bytes of the arm; all others are weights of merged layers."""


class Proof(Config):
    """What an exported model was held to, and what was found."""

    version: Literal[1] = 1
    """Version of this format."""
    task: str
    """Name of the task."""
    arm: str
    """The arm that was exported; all forms are compared with it, as it was built for the verdict.
    """
    kind: Literal["model", "adapter"]
    """A whole model, or an adapter that needs its base."""
    encoder_decoder: bool = False
    """Whether the model is an encoder that reads a prompt, and a decoder that writes an answer."""
    base: str
    """Name of the base; of a directory, without where it lay."""
    base_hash: str
    """SHA-256 over the hashes of its config and weight files."""
    template: str
    """How metier writes a chat, which the exported chat template does too."""
    source: str
    """Where the prompts are from: the task's test part, or a file."""
    prompts: tuple[Asked, ...]
    """The prompts, which had the same ids in every form."""
    left_out: int = 0
    """Prompts of the source that are empty or too long for the context."""
    stop_tokens: tuple[str, ...]
    """Tokens that end an answer."""
    max_new_tokens: int
    """Longest answer in tokens."""
    noise: float
    """Largest change of a logit of the arm when the output of each module is moved at random by one
    rounding of its number format."""
    bound: float
    """Logits may differ by this much: four times the noise."""
    largest_logit: float
    """Largest absolute logit of the arm, for comparison."""
    number_format: str
    """Of the weights: that in which the arm answers on the machine of the export."""
    weights: Weights | None = None
    """What became of the weights; None for an adapter, whose files are copied."""
    forms: tuple[Form, ...]
    """The forms of the model that were compared with the arm."""
    made: str
    """When, ISO 8601."""
    device: str
    """The kind of device on which all of it ran."""
    versions: dict[str, str]
    """Versions and hardware it was made with."""


def read_proof(directory: Path) -> Proof:
    """Read the proof of an export."""
    return Proof.model_validate_json((directory / PROOF).read_bytes())
