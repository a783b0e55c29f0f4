"""Strict configs: one YAML file, dotted overrides, errors that name the field.

Every config class of the project derives from `Config`. A docstring under each field is its help.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from metier.errors import ConfigError

_MAX_BYTES = 1_000_000


class Config(BaseModel):
    """Base of every config: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file and apply ``a.b=value`` overrides.

        Raises:
            ConfigError: the file cannot be read or parsed, or a field is unknown or wrong.

        """
        return cls.parse(overridden(read_yaml(path), overrides), str(path))

    @classmethod
    def parse(cls, values: Mapping[str, Any], place: str) -> Self:
        """Validate plain values; `place` names their origin in error messages."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _explain(cls, error, place) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; duplicate keys are refused."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(
            str(path), f"is {len(raw):,} bytes long", "a config file is small; is this a data file?"
        )
    try:
        values = yaml.load(raw.decode("utf-8-sig"), Loader=_StrictLoader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise ConfigError(
            str(path), f"is not UTF-8 (byte {error.start})", "save the file as UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _yaml_error(path, error) from None
    if not isinstance(values, dict):
        raise ConfigError(
            str(path), "is not a mapping of keys to values", "write it as 'key: value' lines"
        )
    return values


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice and every alias (no expansion bombs)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not accepted", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text; quote it", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        # Escapes can write what no path, message or tokenizer takes.
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise yaml.constructor.ConstructorError(
                None, None, "a text holds NUL or a lone surrogate", node.start_mark
            )
        return value


def _yaml_error(path: Path, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    place = f"{path}:{mark.line + 1}" if mark else str(path)
    return ConfigError(place, f"is not valid YAML: {_problem(error)}", "mend this line")


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]


def overridden(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Plain values with ``a.b=value`` overrides; the values given stay as they are.

    Raises:
        ConfigError: an override has another form, or a value that cannot be read.

    """
    changed = copy.deepcopy(dict(values))
    for override in overrides:
        _apply_override(changed, override)
    return changed


def _apply_override(values: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    shown = override if len(override) <= 80 else override[:77] + "..."
    if not equals or not all(keys):
        raise ConfigError(
            f"override '{shown}'", "is not of the form key=value", "write e.g. training.epochs=3"
        )
    try:
        value = yaml.load(text, Loader=_StrictLoader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"override '{shown}'", f"has an unreadable value ({_problem(error)})", "quote the value"
        ) from None
    target = values
    for depth, key in enumerate(keys[:-1]):
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(
                f"override '{shown}'",
                f"'{'.'.join(keys[: depth + 1])}' has no fields",
                "give a field that has parts",
            )
    target[keys[-1]] = value


def _explain(model: type[BaseModel], error: ValidationError, place: str) -> ConfigError:
    """One clear message from the first of pydantic's errors, with a suggestion where possible."""
    first = error.errors(include_url=False)[0]
    location = ".".join(str(part) for part in first["loc"]) or "(top level)"
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return ConfigError(f"{place}: {location}", f"is not a known key{more}", remedy)
    if first["type"] == "missing":
        return ConfigError(f"{place}: {location}", f"is missing{more}", "add it")
    given = json.dumps(first["input"], default=str, ensure_ascii=False)
    given = given if len(given) <= 80 else given[:77] + "..."
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{place}: {location}", f"{message}{more}; got {given}", "change the value")


def _fields_at(model: type[BaseModel], path: Iterable[int | str]) -> list[str]:
    """Names of the fields of the (nested) model at a path of an error location."""
    current: Any = model
    for part in path:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _model_inside(fields[part].annotation)
    return sorted(getattr(current, "model_fields", {}))


def _model_inside(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _model_inside(argument)
        if found is not None:
            return found
    return None
