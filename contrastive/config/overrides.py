"""The value of an override: text as it stands where the key takes text, YAML where it does not."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from contrastive.config.block import fields_of, models_in
from contrastive.config.recipe import Config

NULLS = ("", "null", "Null", "NULL")


def override_value(key: str, text: str, loader: Any) -> Any:
    """What `text`, right of the equals sign, says for `key`.

    Text is taken as it stands, `#` and all; in quotes it is what a recipe's quotes say. ``null`` is null where the key
    allows it. Where the key does not take text, the value is YAML.

    Raises:
        ValueError: it could mean two things; the text says which.
        yaml.YAMLError: it is no YAML.
    """
    types_of_key = [_leaves(field) for field in _fields_at(key)]
    if not types_of_key or not all(_takes_text(leaves, text) for leaves in types_of_key):
        if _has_comment(text, loader):
            raise ValueError("'#' begins a comment in it; leave the comment out, or put text with '#' in quotes")
        return yaml.load(text, Loader=loader)
    if _quoted(text, loader):
        return yaml.load(text, Loader=loader)
    if text in NULLS and all(type(None) in leaves for leaves in types_of_key):
        return None
    if text != text.strip():
        raise ValueError("the value begins or ends with a blank; leave it out, or put the value in quotes")
    if text == "~":
        raise ValueError("~ is null in a recipe and the home folder in a shell; write null, or the folder's whole path")
    return text


def _fields_at(key: str) -> list[Any]:
    """The annotations of a key, one for each kind of its blocks; none where a recipe has no such key."""
    models: list[type[BaseModel]] = [Config]
    found: list[Any] = []
    for name in key.split("."):
        found = [fields_of(model)[name].annotation for model in models if name in fields_of(model)]
        models = list(dict.fromkeys(inner for annotation in found for inner in models_in(annotation)))
    return found


def _leaves(annotation: Any) -> list[Any]:
    """The alternatives of a type."""
    if get_origin(annotation) is Annotated:
        return _leaves(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [leaf for part in get_args(annotation) for leaf in _leaves(part)]
    return [annotation]


def _takes_text(leaves: list[Any], text: str) -> bool:
    """Whether text is the only thing that the key takes, beside null and what begins with a bracket."""
    others = [leaf for leaf in leaves if leaf not in (str, type(None))]
    if str not in leaves or not all(get_origin(leaf) in (dict, tuple) for leaf in others):
        return False
    return not (others and text.lstrip().startswith(("{", "[")))


def _quoted(text: str, loader: Any) -> bool:
    """Whether all of it is one text in quotes."""
    if text[:1] not in ("'", '"'):
        return False
    try:
        tokens = [token for token in yaml.scan(text, Loader=loader) if isinstance(token, yaml.ScalarToken)]
    except yaml.YAMLError:
        return False
    return len(tokens) == 1 and tokens[0].start_mark.index == 0 and tokens[0].end_mark.index == len(text)


def _has_comment(text: str, loader: Any) -> bool:
    end = 0
    for token in yaml.scan(text, Loader=loader):
        if "#" in text[end : token.start_mark.index]:
            return True
        end = token.end_mark.index
    return "#" in text[end:]
