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
_READ = "read.json"
# What changes only how much of a source is read, or in which order.
_MIXING = {"weight", "share"}


@dataclass(frozen=True)
class Read:
    """What was found in a source.

    Attributes:
        windows: of its held-out text, the same for every base and tokenizer.
        left: UTF-8 bytes of its other text.

    """

    windows: tuple[str, ...]
    left: int


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
            self._refuse_edits(self.config.trained)

        return self.run.stage("tokenizer", inputs, make)

    def read(self, source: Source) -> Read:
        """Choose a source's held-out windows, and count its other text."""
        count = self.config.evaluation_windows
        inputs = {"source": self._inputs(source), "windows": count, "characters": _WINDOW}

        def make(directory: Path) -> None:
            self.progress.stage(f"read {source.name}")
            left = 0

            def held_out() -> Iterator[str]:
                nonlocal left
                for text, held in self._documents(source):
                    if held:
                        yield text
                    else:
                        left += len(text.encode())

            windows = sample_windows(held_out(), count)
            (directory / _READ).write_text(json.dumps({"windows": windows, "left": left}))
            self._refuse_edits([source])

        found = json.loads((self.run.stage("held-out", inputs, make) / _READ).read_text())
        return Read(tuple(found["windows"]), found["left"])

    def tokens(self, source: Source, tokenizer: Tokenizer, size: int) -> Path:
        """Token file of a source that is trained on.

        Args:
            source: the source.
            tokenizer: of the base.
            size: UTF-8 bytes of its text, for the time left.

        """
        inputs = {"tokenizer": tokenizer.fingerprint, "source": self._inputs(source)}
        name = f"{source.name}.bin"

        def make(directory: Path) -> None:
            self.progress.stage(f"tokenise {source.name} (MB)", size / 1e6)
            stream.write_tokens(
                self._told(self._texts(source)),
                tokenizer.encode_batch,
                directory / name,
                # Where the same token ends a document and opens one, it stands once.
                bos=None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id,
                eos=tokenizer.eos_id,
                vocabulary=tokenizer.vocab_size,
            )
            self._refuse_edits([source])

        return self.run.stage("tokens", inputs, make) / name

    def _refuse_edits(self, sources: Iterable[Source]) -> None:
        """A stage is named by the text as it was hashed: what was read must be that."""
        for source in sources:
            stream.refuse_edits(source, self.root, self.files[source.name])

    def _told(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self.progress.advance(len(text.encode()) / 1e6)

    def _inputs(self, source: Source) -> dict[str, Any]:
        """All that the documents of a source depend on."""
        return source.model_dump(mode="json", exclude=_MIXING) | {
            "trained": source.trained,
            "files": self.files[source.name],
        }

    def _documents(self, source: Source) -> Iterator[tuple[str, bool]]:
        """Texts, and whether each is held out; of a source that is only watched all are."""
        for document in stream.documents(source, self.root):
            yield (
                document.text,
                not source.trained or stream.is_held_out(document, source.held_out),
            )

    def _texts(self, source: Source) -> Iterator[str]:
        """What is trained on."""
        return (text for text, held_out in self._documents(source) if not held_out)

    def _sample(self, size: int) -> Iterator[str]:
        """Training documents for the tokenizer, an equal share of bytes from each source.

        Raises:
            DataError: a source has no text to train on.

        """
        for source in self.config.trained:
            share = left = size // len(self.config.trained)
            for text in self._texts(source):
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
