"""A strict reader of HTML for tests: every element closed, in order; then searched like a tree."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Node:
    """An element with its attributes and what stands inside it."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag = tag
        self.attributes = attributes
        self.inside: list[Node | str] = []

    def __getitem__(self, name: str) -> str:
        return self.attributes[name]

    def all(self, tag: str = "", kind: str = "") -> Iterator[Node]:
        """Elements inside with this tag and class, in the order of the page."""
        for part in self.inside:
            if isinstance(part, Node):
                classes = part.attributes.get("class", "").split()
                if tag in ("", part.tag) and (not kind or kind in classes):
                    yield part
                yield from part.all(tag, kind)

    def one(self, tag: str = "", kind: str = "") -> Node:
        """The only such element."""
        (found,) = self.all(tag, kind)
        return found

    @property
    def text(self) -> str:
        """All text inside, without any markup; not style and titles of pictures."""
        return "".join(
            part if isinstance(part, str) else part.text
            for part in self.inside
            if isinstance(part, str) or part.tag not in ("style", "title", "desc")
        )

    @property
    def words(self) -> str:
        """The text with runs of white space as one space."""
        return " ".join(self.text.split())


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("document", {})]

    def _add(self, tag: str, attributes: list[tuple[str, str | None]]) -> Node:
        assert len(dict(attributes)) == len(attributes), f"an attribute of {tag} stands twice"
        node = Node(tag, {name: value or "" for name, value in attributes})
        self.open[-1].inside.append(node)
        return node

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = self._add(tag, attrs)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(node.tag == "svg" for node in self.open) or tag == "svg", f"<{tag}/> in HTML"
        self._add(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        node = self.open.pop()
        assert node.tag == tag, f"</{tag}> closes <{node.tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def read(page: str) -> Node:
    """The page as a tree; an AssertionError where an element is not closed in order."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader.open) == 1, f"never closed: {[node.tag for node in reader.open[1:]]}"
    return reader.open[0]
