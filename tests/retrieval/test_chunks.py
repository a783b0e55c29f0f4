from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metier.errors import DataError
from metier.retrieval.chunks import WORDS, read_passages, split

MARKDOWN = """# Cards

A card arrives within five days.

```python
order()

track()
```

## Lost cards

Freeze it at once.
"""


def _bare(text: str) -> str:
    return "".join(text.split())


def test_a_short_document_is_one_passage_with_its_code_whole() -> None:
    (passage,) = split(MARKDOWN, "cards.md")
    assert (passage.source, passage.line) == ("cards.md", 1)
    assert "order()\n\ntrack()" in passage.text


def test_paragraphs_are_packed_up_to_the_limit() -> None:
    paragraphs = [f"word{at} " * 49 + "end." for at in range(5)]
    passages = split("\n\n".join(paragraphs), "a.txt")
    assert [len(passage.text.split()) for passage in passages] == [100, 100, 50]
    assert [passage.line for passage in passages] == [1, 5, 9]


def test_a_heading_opens_a_passage_and_stays_with_its_text() -> None:
    text = "word " * 80 + "\n\n## Refunds\n\n" + "money " * 30
    first, second = split(text, "a.md")
    assert first.text == ("word " * 80)
    assert second.text.startswith("## Refunds\nmoney")
    assert second.line == 3


def test_an_underlined_heading_stays_with_its_text() -> None:
    text = "word " * 100 + "\n\nRefunds\n=======\n\n" + "money " * 30
    assert split(text, "a.md")[1].text.startswith("Refunds\n=======\nmoney")


def test_a_long_paragraph_is_cut_at_sentences() -> None:
    passages = split("One two three four five six seven eight nine ten. " * 30, "a.txt")
    assert len(passages) == 3
    assert all(passage.text.endswith("ten.") for passage in passages)


@pytest.mark.parametrize(
    "text", ["字" * 3000, "a" * 5000, "字。" * 2000], ids=["han", "blob", "han sentences"]
)
def test_text_without_spaces_is_cut_too(text: str) -> None:
    passages = split(text, "a.txt")
    assert "".join(passage.text for passage in passages).replace("\n", "") == text
    assert max(len(passage.text.encode()) for passage in passages) <= WORDS * 10 + 10


@given(st.text(alphabet=st.sampled_from("ab .\n#`字-="), max_size=1500))
def test_nothing_is_lost_and_no_passage_is_long(text: str) -> None:
    passages = split(text, "a.md")
    assert _bare("".join(passage.text for passage in passages)) == _bare(text)
    assert all(len(passage.text.split()) <= WORDS for passage in passages)
    assert [passage.line for passage in passages] == sorted(passage.line for passage in passages)


def test_real_documentation(data_dir: Path) -> None:
    files = sorted((data_dir / "docs_rust_book").rglob("*.md"))[:40]
    passages = read_passages(files)
    sizes = [len(passage.text.split()) for passage in passages]
    assert max(sizes) <= WORDS
    assert 60 < sum(sizes) / len(sizes) <= WORDS
    for passage in passages[:: len(passages) // 50]:
        lines = Path(passage.source).read_text().split("\n")
        below = "\n".join(lines[passage.line - 1 :])
        assert lines[passage.line - 1].strip()
        assert passage.text.split("\n")[0] in below


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b"\xff\xfe", "is not UTF-8"), (b"a\0b", "NUL"), (b" \n", "holds no text"), (None, "read")],
)
def test_unreadable_files_are_refused(tmp_path: Path, content: bytes | None, cause: str) -> None:
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=cause) as caught:
        read_passages([path])
    assert str(path) in caught.value.place
