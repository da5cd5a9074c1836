"""From YAML and `a.b=c` overrides to validated settings, with every mistake told in one line.

Knows how settings are read, checked and explained; config.py says which settings there are.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from .errors import ConfigError


class Settings(BaseModel):
    """What all groups of settings share: frozen, no unknown keys, no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Settings)


def require(ok: bool, wanted: str, **got: object) -> None:
    """In a validator: unless `ok`, reject `got`, the setting at fault first, then its opponents."""
    if not ok:
        raise PydanticCustomError("impossible", "{wanted}", {"wanted": wanted, "got": got})


def validate(
    model: type[Model], values: Mapping[str, Any], overrides: Sequence[str], source: str
) -> Model:
    """Build `model` from nested values and "section.key=value" overrides, the value in YAML.

    A section left empty takes its defaults. `source` names where the values came from, for
    errors. Raises ConfigError.
    """
    known = fields(model)
    merged = _copy(values)
    merged |= {name: {} for name in _sections(known) if name in merged and merged[name] is None}
    changed: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise ConfigError(f"command line: got {_show(override)}, wanted section.key=value")
        changed.add(key)
        _assign(merged, key, _parse_override(key, text, known.get(key)))
    try:
        return model.model_validate(merged)
    except ValidationError as failure:
        # an unknown key first: it explains a missing one
        errors = sorted(failure.errors(), key=lambda e: e["type"] != "extra_forbidden")
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        line = _explain(errors[0], merged, known, changed, source)
        raise ConfigError(line + more) from None


def fields(model: type[Settings], prefix: str = "") -> dict[str, FieldInfo]:
    """All settings by dotted key, in the order they are declared."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found |= fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def describe(model: type[Settings], width: int) -> str:
    """Every setting, by section: name, default, meaning, type; wrapped at `width` columns."""
    paragraphs = []
    section = ""
    for key, field in fields(model).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            paragraphs.append("")
        default = "required" if field.is_required() else _show(field.default)
        kind = _wanted(field).replace(" ", "\xa0")  # a type stays on one line
        line = f"  {key:<26} {default:<13} {field.description} ({kind})"
        paragraphs.append(textwrap.fill(line, width, subsequent_indent=" " * 43))
    return "\n".join(paragraphs).replace("\xa0", " ")


# --- reading ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 that takes 1e-3 for a number and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"{key} stands here again", problem_mark=mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Blocks for sections, [a, b] for lists."""


for _side in (_Loader, _Dumper):  # the dumper quotes texts that would be read back as numbers
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )

_Dumper.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=True
    ),
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`: value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of nested settings. Raises ConfigError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as failure:
        reason = getattr(failure, "strerror", None) or "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read the settings: {reason}") from None
    # ValueError: a date such as 2026-13-01; RecursionError: an anchor inside itself
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        raise ConfigError(f"{path}: not valid YAML: {_yaml_problem(failure)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {_show(values)}, wanted sections of `key: value` settings")
    return {str(key): value for key, value in values.items()}


def write_yaml(values: Mapping[str, Any]) -> str:
    """YAML that `read_yaml` reads back to equal values."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _yaml_problem(failure: Exception) -> str:
    mark = getattr(failure, "problem_mark", None)
    place = f"line {mark.line + 1}: " if mark else ""
    return place + (getattr(failure, "problem", None) or " ".join(str(failure).split()))


def _parse_override(key: str, text: str, field: FieldInfo | None) -> Any:
    """YAML, but a text setting takes its words as they stand, unless null or in quotes."""
    types = get_args(field.annotation) or (field.annotation,) if field else ()
    is_null = NoneType in types and text in ("null", "~")
    in_quotes = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if any(_bare(kind) is str for kind in types) and not (is_null or in_quotes):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as failure:
        problem = f"not valid YAML: {_yaml_problem(failure)}"
        raise ConfigError(f"command line: {key}: got {_show(text)}, {problem}") from None


def _copy(values: Any) -> Any:
    return {k: _copy(v) for k, v in values.items()} if isinstance(values, Mapping) else values


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[name] = value


# --- explaining ---------------------------------------------------------------------------------


def _explain(
    error: ErrorDetails,
    values: Mapping[str, Any],
    known: Mapping[str, FieldInfo],
    changed: set[str],
    source: str,
) -> str:
    """One line: where, which key, what was got and what is wanted."""
    kind = error["type"]
    key = ".".join(map(str, error["loc"]))
    got = {key: error["input"]}
    if (parent := key.rpartition(".")[0]) in known:  # an item of a list: speak of the list
        kind, key = "item", parent
        group, _, name = key.rpartition(".")
        got = {key: (values[group] if group else values)[name]}
    elif kind == "impossible":
        got = {f"{key}.{k}".lstrip("."): v for k, v in error["ctx"]["got"].items()}
        key = next(iter(got))
    overridden = any(
        f"{c}.".startswith(f"{k}.") or k.startswith(f"{c}.") for c in changed for k in got
    )
    start = f"{'command line' if overridden else source}: {key}"
    if kind == "extra_forbidden":
        return f"{start}: unknown key; {_nearest(key, known)}"
    wanted = _wanted(known[key]) if key in known else f"a section of {_names_in(key, known)}"
    if kind == "missing":
        return f"{start}: missing, wanted {wanted}"
    if kind == "impossible":
        wanted = error["ctx"]["wanted"]
    value, *others = [f"{k} {_show(v)}" for k, v in got.items()]
    clash = f" with {' and '.join(others)}" if others else ""
    return f"{start}: got {value.removeprefix(key + ' ')}{clash}, wanted {wanted}"


def _nearest(key: str, known: Mapping[str, FieldInfo]) -> str:
    """The known key whose last name is most like this one's, its own section first."""
    section, _, name = key.rpartition(".")
    names = {k.rpartition(".")[2]: k for k in reversed(list(known))}
    names |= {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    if not section:
        sections = {k: k for k in _sections(known)}
        names = sections if difflib.get_close_matches(name, sections, n=1) else names | sections
    for candidate in difflib.get_close_matches(name, names, n=1):
        return f"did you mean {names[candidate]}?"
    return f"known here: {_names_in(section, known)}"


def _sections(known: Mapping[str, FieldInfo]) -> set[str]:
    return {key.partition(".")[0] for key in known if "." in key}


def _names_in(section: str, known: Mapping[str, FieldInfo]) -> str:
    prefix = f"{section}." if section else ""
    return ", ".join(
        dict.fromkeys(
            k.removeprefix(prefix).partition(".")[0] for k in known if k.startswith(prefix)
        )
    )


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _limits(metadata: Sequence[Any]) -> Iterator[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "of length >="}
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _limits(item.metadata)
        for name, sign in signs.items():
            if (bound := getattr(item, name, None)) is not None:
                yield f"{sign} {'2^64' if bound == 2**64 else bound}"


def _wanted(field: FieldInfo) -> str:
    return _type_text(field.annotation, field.metadata)


def _type_text(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, e.g. "integer >= 1 or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple:
        return f"[{', '.join(_type_text(item) for item in arguments)}]"
    if NoneType in arguments:
        return f"{_type_text(arguments[0], metadata)} or null"
    names = {int: "integer", float: "number", str: "text", bool: "true|false"}
    return f"{names[annotation]} {' and '.join(_limits(metadata))}".strip()
