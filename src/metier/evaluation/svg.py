"""Inline SVG, built as a tree so that every text and attribute is escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, tostring

if TYPE_CHECKING:
    from markupsafe import Markup


def element(tag: str, text: str = "", **attributes: object) -> Element:
    """An element; `class_` is written `class`, other underscores become hyphens, None is left out.

    No XML namespace: in an HTML page the parser gives `svg` its namespace.
    """
    named = {
        name.rstrip("_").replace("_", "-"): f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
    made = Element(tag, named)
    made.text = text or None
    return made


def add(parent: Element, tag: str, text: str = "", **attributes: object) -> Element:
    """Append a new element to `parent` and return it."""
    made = element(tag, text, **attributes)
    parent.append(made)
    return made


def share(place: float) -> str:
    """A place between 0 and 1 as a percentage of the picture's width."""
    return f"{place * 100:.3f}%"


def markup(svg: Element) -> Markup:
    """The text of a tree, which templates must not escape a second time."""
    from markupsafe import Markup

    return Markup(tostring(svg, encoding="unicode"))  # noqa: S704
