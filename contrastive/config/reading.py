"""Read a recipe from YAML, apply `key.path=value` overrides, write a resolved recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from contrastive.config.block import DEFAULT_KINDS
from contrastive.config.combinations import LENGTHS
from contrastive.config.overrides import override_value
from contrastive.config.problems import check
from contrastive.config.recipe import Config
from contrastive.config.shipped import find_recipes
from contrastive.errors import UserError

# YAML 1.2's core schema. PyYAML follows 1.1: 1e-3 is text there, 010 eight, 1:30 ninety and `no` false.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}

_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' is given twice", key.start_mark)
            seen.add(key.value)
            key.tag = _TEXT  # a key is text, whatever it looks like
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _list(dumper: _Dumper, value: Sequence[Any]) -> yaml.Node:
    nested = any(isinstance(item, (dict, list, tuple)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=not nested)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_implicit_resolver(_MERGE, re.compile("^<<$"), ["<"])
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _first)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe, a file or the name of one that comes along, and apply overrides such as `optim.lr=3e-4`.

    A value may contain `=`. Where its key takes text it is taken as it stands, else as YAML, see `override_value`.
    A `~` at the start of a path is the home folder, here and in the file. An override that chooses another `kind` of
    a block drops the recipe's other keys of that block; one that sets a length of `train` drops its other length.
    `run.dir` is `runs/` and the recipe's name unless it is given.

    Raises `UserError`: the file cannot be read (one line), or all of its problems, one line each.
    """
    path = Path(path)
    if not path.exists():
        path = find_recipes().get(path.as_posix(), path)
    data = _read(path)
    problems = _apply(data, overrides)
    run = data.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("dir", f"runs/{path.stem}")
    config, found = check(data)
    problems += found
    if config is None or problems:
        if len(problems) == 1:
            raise UserError(f"recipe {path}: {problems[0]}")
        raise UserError("\n  ".join([f"recipe {path}: {len(problems)} problems", *problems]))
    return config


def dump_yaml(config: Config) -> str:
    """The whole recipe, defaults included, as ASCII that `load_config` reads back to an equal one."""
    return yaml.dump(
        _kind_first(config.model_dump(by_alias=True)),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=False,
    )


def _kind_first(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_kind_first(item) for item in value]
    if not isinstance(value, dict):
        return value
    block = {"kind": value["kind"], **value} if "kind" in value else value
    return {key: _kind_first(inner) for key, inner in block.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"recipe {path}: no such file; `contrastive recipes list` names those that come along"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read: {error.strerror}") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML: {_one_line(error)}") from None
    if data is None:
        raise UserError(f"recipe {path}: the file is empty")
    if not isinstance(data, dict):
        raise UserError(f"recipe {path}: expected blocks such as `data:`, found {type(data).__name__}")
    return data


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    text = str(getattr(error, "problem", None) or error).splitlines()[0]
    return f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark else text


def _apply(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write the overrides into `data`; the lines of those that cannot be."""
    problems: list[str] = []
    values: dict[str, Any] = {}  # the last one wins
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(f"override '{override}': expected key.path=value, as in optim.lr=3e-4")
            continue
        try:
            value = override_value(key, text, _Loader)
        except yaml.YAMLError as error:
            problems.append(f"override '{override}': the value is not YAML: {_one_line(error)}")
            continue
        except ValueError as error:
            problems.append(f"override '{override}': {error}")
            continue
        values.pop(key, None)
        values[key] = value
    _reset_other_kinds(data, values)
    if any(values.get(f"train.{name}") is not None for name in LENGTHS) and isinstance(data.get("train"), dict):
        for name in LENGTHS:
            data["train"].pop(name, None)
    for key, value in values.items():
        *parents, last = key.split(".")
        block, walked = data, ""
        for name in parents:
            walked = f"{walked}.{name}".lstrip(".")
            if block.get(name) is None:
                block[name] = {}
            block = block[name]
            if not isinstance(block, dict):
                problems.append(f"override '{key}': {walked} is a value, not a block of keys")
                break
        else:
            block[last] = value
    return problems


def _reset_other_kinds(data: dict[str, Any], values: dict[str, Any]) -> None:
    kinds = {key.removesuffix(".kind"): kind for key, kind in values.items() if key.endswith(".kind")}
    for path in sorted(kinds, key=lambda path: path.count(".")):  # a block before the blocks inside it
        *parents, last = path.split(".")
        outer: Any = data
        for name in parents:
            outer = outer.get(name) if isinstance(outer, dict) else None
        block = outer.get(last) if isinstance(outer, dict) else None
        if isinstance(block, dict) and block.get("kind", DEFAULT_KINDS.get(path)) != kinds[path]:
            outer[last] = {"kind": kinds[path]}
