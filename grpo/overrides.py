"""Between text and configuration: YAML, `--section.key=value`, and pydantic's errors as one line for the user."""

from __future__ import annotations

import difflib
import re
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ValidationError


class ConfigError(ValueError):
    """Bad configuration; the message is one line for the user."""


class YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, and `on` and `off` as words, as YAML 1.2 does."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:bool"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^([Tt]rue|TRUE|[Ff]alse|FALSE)$"), list("tTfF"))
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def override(content: dict[str, Any], argument: str, root: type[BaseModel]) -> None:
    """Applies one `--section.key=value` to the content of a YAML; `root` knows the sections. Raises ConfigError."""
    match = re.fullmatch(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)*)=(.*)", argument, re.DOTALL)
    if match is None or ("." not in match[1] and match[1] not in root.model_fields):
        raise ConfigError(f"argument {argument!r} is not of the form --section.key=value (or --section=null)")
    *sections, key = match[1].split(".")
    node: Any = content
    for name in sections:
        child = node.get(name)
        if isinstance(child, int | float):  # rewards.exact_match: 1.0, and now an option is set
            child = {"weight": child}
        node[name] = node = {} if child is None else child
        if not isinstance(node, dict):
            raise ConfigError(f"{argument}: {name!r} is not a section")
    try:
        node[key] = yaml.load(match[2], YamlLoader) if match[2] else ""
    except yaml.YAMLError as err:
        raise ConfigError(f"{argument}: the value is not YAML: {' '.join(str(err).split())}") from err


def one_line(err: ValidationError, root: type[BaseModel]) -> str:
    """The first error of a configuration: key, value, and what is wrong with it."""
    first = err.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        model: Any = root
        for part in first["loc"][:-1]:
            if not isinstance(part, int):  # a place in a list of sections
                model = _section_of(model.model_fields[part].annotation)
        unknown = str(first["loc"][-1])
        near = difflib.get_close_matches(unknown, list(model.model_fields), n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {'.'.join([*map(str, first['loc'][:-1]), near[0]])!r}?"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return message if "." in message.split(" ")[0] else f"{key}: {message}"
    return f"{key} is {first['input']!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _section_of(annotation: Any) -> type[BaseModel]:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    raise AssertionError(f"{annotation=} is no section")
