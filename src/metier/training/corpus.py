"""The corpus of a pre-training as stages of its run: tokenizer, tokens, held-out windows."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from metier import runs
from metier.data import stream
from metier.data.stream import Source
from metier.errors import DataError
from metier.progress import Progress
from metier.text import bpe
from metier.text.tokenizer import Tokenizer
from metier.text.windows import cut
from metier.training.pretrain_config import PretrainConfig, Shape

_WINDOW = 1600
"""Characters of a held-out window, at most."""
# What changes only how much of a source is read, or in which order.
_MIXING = {"weight", "share"}


@dataclass(frozen=True)
class Corpus:
    """The sources of a recipe on this machine.

    Attributes:
        run: where its stages are kept.
        config: the recipe.
        root: directory that the sources' paths start from.
        files: by source, the SHA-256 of its files by path: changed text makes new stages.
        progress: is told every stage.

    """

    run: runs.Run
    config: PretrainConfig
    root: Path
    files: Mapping[str, Mapping[str, str]]
    progress: Progress

    @classmethod
    def of(cls, run: runs.Run, config: PretrainConfig, root: Path, progress: Progress) -> Corpus:
        """Hash the files.

        Raises:
            DataError: a path matches no file.

        """
        progress.stage("hash the corpus")
        files = {source.name: stream.file_hashes(source, root) for source in config.sources}
        return cls(run, config, root, files, progress)

    def tokenizer(self, shape: Shape) -> Path:
        """Directory of a tokenizer trained on the sources."""
        inputs = {
            "sources": [self._inputs(source) for source in self.config.trained],
            "vocabulary": shape.vocabulary,
            "bytes": shape.tokenizer_bytes,
        }

        def make(directory: Path) -> None:
            self.progress.stage("train tokenizer")
            bpe.train_bpe(self._sample(shape.tokenizer_bytes), shape.vocabulary, directory)

        return self.run.stage("tokenizer", inputs, make)

    def tokens(self, tokenizer: Tokenizer) -> list[Path]:
        """A token file of each source that is trained on."""
        return [self._tokens(source, tokenizer) for source in self.config.trained]

    def _tokens(self, source: Source, tokenizer: Tokenizer) -> Path:
        inputs = {"tokenizer": tokenizer.fingerprint, "source": self._inputs(source)}
        name = f"{source.name}.bin"

        def make(directory: Path) -> None:
            self.progress.stage(f"tokenise {source.name}")
            stream.write_tokens(
                self._texts(source, held_out=False),
                tokenizer.encode_batch,
                directory / name,
                # Where the same token ends a document and opens one, it stands once.
                bos=None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id,
                eos=tokenizer.eos_id,
                vocabulary=tokenizer.vocab_size,
            )

        return self.run.stage("tokens", inputs, make) / name

    def held_out(self, source: Source) -> list[str]:
        """Windows of a source's held-out text, the same for every base and tokenizer."""
        count = self.config.evaluation_windows
        inputs = {"source": self._inputs(source), "windows": count, "characters": _WINDOW}

        def make(directory: Path) -> None:
            self.progress.stage(f"choose held-out windows of {source.name}")
            chosen = sample_windows(self._texts(source, held_out=True), count)
            (directory / "windows.json").write_text(json.dumps(chosen))

        directory = self.run.stage("held-out", inputs, make)
        found: list[str] = json.loads((directory / "windows.json").read_text())
        return found

    def _inputs(self, source: Source) -> dict[str, Any]:
        """All that the documents of a source depend on."""
        return source.model_dump(mode="json", exclude=_MIXING) | {
            "trained": source.trained,
            "files": self.files[source.name],
        }

    def _texts(self, source: Source, *, held_out: bool) -> Iterator[str]:
        share = source.held_out if source.trained else 1.0
        for document in stream.documents(source, self.root):
            if (share == 1.0 or stream.is_held_out(document, share)) == held_out:
                yield document.text

    def _sample(self, size: int) -> Iterator[str]:
        """Training documents for the tokenizer, an equal share of bytes from each source.

        Raises:
            DataError: a source has no text to train on.

        """
        for source in self.config.trained:
            share = left = size // len(self.config.trained)
            for text in self._texts(source, held_out=False):
                yield text
                left -= len(text.encode())
                if left <= 0:
                    break
            if left == share:
                raise DataError(
                    f"source '{source.name}'",
                    "has no text to train on: its files are empty, or all documents are held out",
                    "give more documents, or a smaller held_out",
                )


def sample_windows(texts: Iterable[str], count: int) -> list[str]:
    """At most `count` windows of a stream of documents, in constant memory.

    Those with the smallest hashes are kept, which is a random choice without repetition that
    depends on nothing but the text, and changes little when documents come or go.
    """
    kept: list[tuple[int, str]] = []  # the largest hash first
    for text in texts:
        for window in cut(text, _WINDOW):
            rank = -int.from_bytes(sha256(window.encode()).digest())
            if window.strip() and (rank, window) not in kept:
                heapq.heappush(kept, (rank, window))
                if len(kept) > count:
                    heapq.heappop(kept)
    return [window for _, window in sorted(kept, reverse=True)]
