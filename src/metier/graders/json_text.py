"""JSON in answers."""

from __future__ import annotations

import json
import re
from typing import Any

_FENCE = re.compile(r"```[a-zA-Z]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)


class NotJson(Exception):  # noqa: N818 - caught by graders, never shown as an error
    """The text is not JSON; the message says where and why."""


def parse(text: str) -> Any:
    """The JSON value that the whole text is, one Markdown code fence around it allowed.

    Raises:
        NotJson: it is not JSON (RFC 8259: no NaN, nothing after the value).

    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise NotJson("it is nested too deeply") from None
    except ValueError as error:
        raise NotJson(str(error)) from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
