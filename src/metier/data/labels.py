"""Labels that are spelled alike: one label written twice costs every arm answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from metier.data import prepare
from metier.errors import DataError
from metier.graders.wording import normalise
from metier.records import Example

_SHOWN = 5


def refuse_same(rows: Iterable[Example]) -> None:
    """Refuse labels that differ in white space alone: no grader tells them apart.

    Raises:
        DataError: two rows spell one label differently.

    """
    first: dict[str, Example] = {}
    for row in rows:
        other = first.setdefault(normalise(row.answer), row)
        if row.answer.strip() != other.answer.strip():
            raise DataError(
                row.source,
                f"the label {row.answer!r} differs from {other.answer!r} ({other.source}) in "
                "white space alone, which graders ignore",
                "write both the same way",
            )


def alike(labels: Iterable[str]) -> tuple[str, ...]:
    """A warning where labels differ only in case, white space or the form of signs."""
    spelled: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        spelled[prepare.normalise(label)].add(label)
    found = [sorted(names) for _, names in sorted(spelled.items()) if len(names) > 1]
    if not found:
        return ()
    shown = "; ".join(" and ".join(map(repr, names)) for names in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"labels that differ only in how they are written count as different: {shown}{more}; "
        "if they mean the same, write them the same way",
    )
