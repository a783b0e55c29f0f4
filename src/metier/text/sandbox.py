"""The sandbox in which chat templates run: the Jinja that model authors write for, and no more.

It gives what transformers gives to templates, and the same text. Two things differ, so that the
same chat is the same text on every day and with every version of transformers: a template that
asks for today's date is always told `TODAY`, and a content of None is handed on as None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

TODAY = datetime(2024, 7, 26)
"""What templates are told when they ask for the date: the one that Llama 3.1 writes unasked."""


@lru_cache(maxsize=32)
def compile_template(source: str) -> Callable[..., str]:
    """Make a function of a Jinja chat template: variables by name to text.

    Raises:
        jinja2.TemplateSyntaxError: it is no Jinja.

    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what is trained, for others; its content is written."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment.from_string(source).render


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)
