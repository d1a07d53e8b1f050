"""Turn pydantic's findings into lines that name the key as the user wrote it, the value and the remedy."""

from __future__ import annotations

import copy
import difflib
import json
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from contrastive.config.block import fields_of, models_in
from contrastive.config.losses import LIST, ONE
from contrastive.config.recipe import Config

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a block of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "{expected}",
    "model_attributes_type": "a block of keys",
    "model_type": "a block of keys",
    "string_too_short": "text that is not empty",
    "string_type": "text (in quotes if it looks like something else)",
    "tuple_type": "a list",
    "union_tag_not_found": "a block of keys",
}
# What other trainers have, by their names, and this one does in another way or not at all.
_ACCUMULATION = "Gradients of parts of a batch are not those of the whole: train.chunk gives these, in as little memory"
_OFFLOAD = "All stays on the device; train.sharding, train.chunk and train.gradient_checkpointing save memory there"
_ELSEWHERE = {
    **dict.fromkeys(("accumulate", "accumulation", "accum_freq", "gradient_accumulation_steps"), _ACCUMULATION),
    **dict.fromkeys(("offload", "cpu_offload", "offload_params"), _OFFLOAD),
}
_UNKNOWN_PATH = "?"  # stands in for a required text while the other rules are tried


def check(data: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The recipe, or None and one line for every problem.

    A value that is wrong by itself is set aside and the rest is checked again, so that impossible
    combinations of other keys come out in the same round.
    """
    data = copy.deepcopy(data)
    for block in ("data", "train"):  # a block that is not there misses its own keys, nothing else
        data.setdefault(block, {})
    lines: dict[str, None] = {}  # an ordered set
    damaged: list[str] = []
    while True:
        try:
            config = Config.model_validate(data)
        except ValidationError as error:
            repaired = False
            for found in error.errors(include_url=False):
                if found["type"] == "combinations":
                    for keys, line in found["ctx"]["found"]:
                        if not any(_related(key, other) for key in keys for other in damaged):
                            lines[line] = None
                    return None, list(lines)
                place = _Place(found["loc"])
                line, touched = _describe(found, place)
                follows = found["type"] in ("missing", "too_short") and any(_related(place.path, p) for p in damaged)
                if not follows:
                    lines[line] = None
                    damaged += touched
                repaired = _set_aside(data, place.keys, found["type"]) or repaired
            if not repaired:
                return None, list(lines)
        else:
            return (None if lines else config), list(lines)


class _Place:
    """Where an error is: the keys as written (without pydantic's tags of kinds), the field, its owner."""

    def __init__(self, loc: tuple[int | str, ...]) -> None:
        self.keys: list[int | str] = []
        self.owner: type[BaseModel] | None = None
        self.field: FieldInfo | None = None
        models: list[type[BaseModel]] = [Config]
        for element in loc:
            if len(models) > 1 and element in (ONE, LIST):
                continue
            if len(models) > 1 and not isinstance(element, int):  # a union: the tag of the chosen kind
                models = [m for m in models if m.model_fields["kind"].default == element]
                continue
            self.keys.append(element)
            if isinstance(element, int) or not models:
                continue
            self.owner = models[0]
            self.field = fields_of(self.owner).get(element)
            models = models_in(self.field.annotation) if self.field else []

    @property
    def path(self) -> str:
        text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in self.keys)
        return text.lstrip(".")

    def sibling(self, key: str) -> str:
        return ".".join([*self.path.split(".")[:-1], key])


def _describe(found: Any, place: _Place) -> tuple[str, list[str]]:
    """The line, and the paths that no further rule should complain about."""
    kind, context, path = found["type"], found.get("ctx", {}), place.path
    value = f"(value {_show(found['input'])})"
    if kind == "extra_forbidden":
        hint, meant = _nearest_key(place)
        return f"{path}: unknown key {value}. {hint}", [path, meant] if meant else [path]
    if kind == "union_tag_invalid":
        kinds = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
        given = context["tag"]
        hint = _did_you_mean(given, kinds) or f"Valid: {', '.join(kinds)}"
        return f'{path}.kind: unknown kind (value "{given}"). {hint}', [path]
    if kind == "missing" and isinstance(place.keys[-1], int):  # a list of fixed length
        kind, path, value = "too_short", path.rpartition("[")[0], ""
    if kind in ("too_short", "too_long"):
        items = get_args(place.field.annotation) if place.field else ()
        open_ended = ... in items or any(... in get_args(part) for item in items for part in (item, *get_args(item)))
        expected = "a list that is not empty" if open_ended else f"a list of {len(items)} values"
        return f"{path}: expected {expected} {value}".rstrip(), [path]
    if kind == "missing":
        text = place.field.description if place.field and place.field.description else "a block of keys"
        return f"{path}: missing; expected {text}", [path]
    if kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**{k: _number(v) for k, v in context.items()})
        if place.field and type(None) in get_args(place.field.annotation):
            expected += " or null"
        if kind == "literal_error" and place.owner and "kind" in place.owner.model_fields and place.keys[-1] != "kind":
            expected += f" for kind {place.owner.model_fields['kind'].default}"
        return f"{path}: expected {expected} {value}", [path]
    return f"{path}: {found['msg']} {value}", [path]


def _nearest_key(place: _Place) -> tuple[str, str | None]:
    """A hint for an unknown key, and the path that was probably meant."""
    assert place.owner is not None
    key, valid = str(place.keys[-1]), list(fields_of(place.owner))
    if key in _ELSEWHERE:
        return _ELSEWHERE[key], None
    close = difflib.get_close_matches(key, valid, n=1)
    if close:
        return f"Did you mean '{close[0]}'?", place.sibling(close[0])
    elsewhere = [(path, kind) for path, kind in _all_keys(Config) if path.split(".")[-1] == key]
    for path, kind in elsewhere:
        if kind and path == place.path:
            return f"Only kind {kind} has it", None
    if elsewhere:
        return f"Did you mean '{elsewhere[0][0]}'?", elsewhere[0][0]
    return f"Valid: {', '.join(valid)}", None


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str | None]]:
    """Every path of a recipe, in every kind of every block, with the kind of its block."""
    kind = model.model_fields["kind"].default if "kind" in model.model_fields else None
    found: list[tuple[str, str | None]] = []
    for name, field in fields_of(model).items():
        found.append((prefix + name, kind))
        for inner in models_in(field.annotation):
            found += _all_keys(inner, f"{prefix}{name}.")
    return found


def _did_you_mean(given: str, valid: list[str]) -> str | None:
    close = difflib.get_close_matches(given, valid, n=1)
    return f"Did you mean '{close[0]}'?" if close else None


def _related(a: str, b: str) -> bool:
    """Whether one path is the other, or a block around it."""
    return a == b or a.startswith((f"{b}.", f"{b}[")) or b.startswith((f"{a}.", f"{a}["))


def _set_aside(data: dict[str, Any], keys: list[int | str], kind: str) -> bool:
    """Take the wrong value out of `data`, or put a missing one in; whether anything changed."""
    listed = next((i for i, key in enumerate(keys) if isinstance(key, int)), None)
    *parents, last = keys[:listed]  # one wrong item sets its whole list aside
    block: Any = data
    for key in parents:
        block = block[key]
    if kind == "missing" and listed is None:
        block[last] = _UNKNOWN_PATH if parents else {}
        return True
    if last not in block:
        return False
    del block[last]
    return True


def _number(value: Any) -> Any:
    return f"{value:g}" if isinstance(value, float) else value


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
