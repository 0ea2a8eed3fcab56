"""Files of options: YAML in, with the line of every key; YAML out. Torch-free.

A file is read as text, not as Python values: what stands there gets the same checks as a word of
the command line. So `save_strategy: no` is the word "no", though YAML 1.1 takes it for False, and
`learning_rate: 1e-5` is a number, though YAML 1.1 takes it for a text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from megablocks_utils.config.option import Option
from megablocks_utils.errors import ConfigurationError

__all__ = ["FileEntry", "format_options_file", "read_options_file"]

_BOOLEANS = {"yes": "True", "no": "False", "on": "True", "off": "False"}
_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "timestamp")}
_ONE_LINE = 1 << 30
_BOOLEAN, _NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class FileEntry:
    """Hold one key of a file of options.

    Attributes:
        place: File and line.
        key: As it is written.
        scalars: Each value as YAML's tag and its text.
        is_null: Whether the value is null or left out.
    """

    place: str
    key: str
    scalars: tuple[tuple[str, str], ...]
    is_null: bool = False

    def texts(self, option: Option | None) -> tuple[str, ...]:
        """Return the values as words for an option; None: one of Hugging Face's TrainingArguments.

        YAML's booleans become True and False where the option is a boolean. Elsewhere they are
        what is written there.
        """
        if option is not None and not option.is_switch:
            return tuple(text for _, text in self.scalars)
        # Hugging Face reads yes and no itself, and some of its options have the word "no".
        words = _BOOLEANS if option else {"on": "True", "off": "False"}
        return tuple(
            words.get(text.lower(), text) if tag == _BOOLEAN else text for tag, text in self.scalars
        )


def read_options_file(path: str) -> list[FileEntry]:
    """Read a mapping of option names to values; null and lists included, nothing nested.

    Raises:
        ConfigurationError: with file and line, for what cannot be read as such a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigurationError(
            f"--config is {path}, but it cannot be read ({error.strerror}); it must be a YAML file "
            "of options."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--config is {path}, but that is no text in UTF-8.") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path} is nested too deeply; it must be name: value.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(_describe_fault(path, error)) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigurationError(
            f"{_place(path, root)}: no option, but every line must be name: value."
        )
    return list(_read_entries(path, root))


def format_options_file(values: Mapping[str, object]) -> str:
    """Return options by name as YAML that `read_options_file` reads back to the same words."""
    return "".join(_format_line(name, value) for name, value in values.items())


def _format_line(name: str, value: object) -> str:
    if isinstance(value, tuple):
        items = yaml.safe_dump(
            list(value), default_flow_style=True, allow_unicode=True, width=_ONE_LINE
        )
        return f"{name}: {items}"
    return str(yaml.safe_dump({name: value}, allow_unicode=True, width=_ONE_LINE))


def _read_entries(path: str, root: yaml.MappingNode) -> Iterator[FileEntry]:
    for key, value in root.value:
        place = _place(path, key)
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigurationError(f"{place}: a name must be one word.")
        if isinstance(value, yaml.ScalarNode) and value.tag == _NULL:
            yield FileEntry(place, key.value, (), is_null=True)
            continue
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for item in items:
            if not isinstance(item, yaml.ScalarNode) or item.tag not in {*_SCALARS, _BOOLEAN}:
                raise ConfigurationError(
                    f"{_place(path, item)}: {key.value} must be a value or a list of values, with "
                    "nothing nested in it."
                )
        yield FileEntry(place, key.value, tuple((item.tag, item.value) for item in items))


def _place(path: str, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _describe_fault(path: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = path if mark is None else f"{path}:{mark.line + 1}"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is damaged"
    return f"{place}: not valid YAML ({problem})."
