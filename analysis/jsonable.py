"""Turn frozen dataclasses into what json.dumps takes.

The keys of an object are the names of the fields, in order. The metadata of a field can change
that. KEY gives the field another key, where files are older than the name of the field. FLAT puts
the keys of the field's own object in place of the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

from gptcore.files import Json, JsonObject

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
