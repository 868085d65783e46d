"""Turn frozen dataclasses into what json.dumps takes, and back.

The keys of an object are the names of the fields, in order. The metadata of a field can change
that. KEY gives the field another key, where files are older than the name of the field. FLAT puts
the keys of the field's own object in place of the field.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from gptcore.files import Json, JsonObject

Kind = TypeVar("Kind")

KEY = "json_key"
FLAT = {"json_flat": True}


def to_json(value: object) -> Json:
    """Turn dataclasses, mappings and sequences into dicts and lists, at every depth."""
    if is_dataclass(value):
        found: JsonObject = {}
        for field in fields(value):
            part = to_json(getattr(value, field.name))
            if FLAT.items() <= field.metadata.items():
                found |= part
            else:
                found[field.metadata.get(KEY, field.name)] = part
        return found
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(one) for one in value]
    return value


def from_json(kind: type[Kind], stored: Json) -> Kind:
    """Read what to_json made of a dataclass without FLAT fields.

    Args:
        kind: the dataclass.
        stored: what a file holds, which may be anything.

    Raises:
        ValueError: the file holds something else. The message says where.
    """
    read: Kind = _read(kind, stored, kind.__name__)
    return read


def _read(kind: Any, stored: Json, where: str) -> Any:
    """Read a value of any kind that a field may have."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        kind = types.NoneType if stored is None else inner[0]
        return _read(kind, stored, where)
    if origin is tuple and isinstance(stored, list):
        return tuple(_read(inner[0], one, f"{where}[{i}]") for i, one in enumerate(stored))
    if origin is Mapping and isinstance(stored, dict):
        return {key: _read(inner[1], one, f"{where}.{key}") for key, one in stored.items()}
    if is_dataclass(kind) and isinstance(stored, dict):
        names = {entry.metadata.get(KEY, entry.name): entry for entry in fields(kind)}
        needed = {key for key, entry in names.items() if _has_no_default(entry)}
        if not needed <= stored.keys() <= names.keys():
            raise ValueError(f"{where} takes {', '.join(names)}, not {', '.join(stored)}")
        hints, make = get_type_hints(kind), cast(Callable[..., Any], kind)
        return make(
            **{
                names[key].name: _read(hints[names[key].name], value, f"{where}.{key}")
                for key, value in stored.items()
            }
        )
    if kind is float and type(stored) is int and abs(stored) < 2**53:
        return float(stored)
    if type(stored) is kind and (kind is not float or math.isfinite(stored)):
        return stored
    raise ValueError(f"{where} is not of the type {kind}")


def _has_no_default(entry: Any) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING
