"""What an option is, and the fields of frozen dataclasses that declare them.

Torch-free. An option is declared once, as a field with its type, its default and what people need
to know of it:

    max_seq_length: Annotated[int, Option("tokens of an example", minimum=2)] = 4096
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NewType,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

__all__ = [
    "Duration",
    "Kind",
    "MAX_FLOAT32",
    "Option",
    "OptionSection",
    "list_options",
    "same_option",
]

Kind = Literal[
    "text", "path", "duration", "integer", "number", "boolean", "words", "texts", "numbers"
]
Duration = NewType("Duration", str)
"""A length of time as it is written, such as 3h50m; `values.parse_duration` gives its seconds."""

MAX_FLOAT32 = 3e38
"""No number of a run may be larger: what is computed in float32 would be infinite."""
_LIMITS: Mapping[str, float] = MappingProxyType(
    {"integer": 10**9, "number": MAX_FLOAT32, "numbers": MAX_FLOAT32}
)

_KINDS: Mapping[object, Kind] = MappingProxyType(
    {
        str: "text",
        Duration: "duration",
        Path: "path",
        int: "integer",
        float: "number",
        bool: "boolean",
        tuple[str, ...]: "texts",
        tuple[float, ...]: "numbers",
    }
)


class OptionSection(Protocol):
    """Be any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


@dataclass(frozen=True)
class Option:
    """Describe one option of a command line.

    Attributes:
        help: One line for people.
        choices: The words it may be; empty where any text or number goes.
        refused: Other words that people will try -> why they are refused.
        aliases: Other names that mean the same.
        minimum: Smallest number allowed, or None.
        maximum: Largest number allowed, or None.
        above: Number that the value must exceed, or None.
        limit: Number that no run can sensibly exceed, where there is no `maximum`: beyond it the
            run would end in an error of the machine, or not at all. None: that of its kind.
        shown_default: What `--help` prints as default where the default alone says too little.
        wanted: What its value must be, where kind and choices say too little.
        metavar: What stands for its value in `--help`, where the kind says too little.
        translation: What its words become in the configuration, where that is another word.
        may_repeat: Whether it may be given more than once; its values then add up.
        name: Its name without dashes, from the field's.
        kind: How its text is read, from the field's type. A tuple takes several values: `words`,
            where there are choices, separated by commas or spaces; else `texts`, as they are, or
            `numbers`.
        default: The field's; None also where `shown_default` says what decides.
        is_required: Whether the field has no default.
    """

    help: str
    _: dataclasses.KW_ONLY
    choices: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    aliases: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    limit: float | None = None
    shown_default: str | None = None
    wanted: str | None = None
    metavar: str | None = None
    translation: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    may_repeat: bool = False
    name: str = ""
    kind: Kind = "text"
    default: object = None
    is_required: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and its aliases."""
        return (self.name, *self.aliases)

    @property
    def largest(self) -> float | None:
        """The largest number it may be; None where it is no number."""
        bounds = (self.maximum, self.limit, _LIMITS.get(self.kind))
        return next((bound for bound in bounds if bound is not None), None)

    @property
    def takes_several(self) -> bool:
        """Whether it takes several values."""
        return self.kind in ("words", "texts", "numbers")

    @property
    def is_switch(self) -> bool:
        """Whether it means True where no value follows it."""
        return self.kind == "boolean" or "True" in self.choices


def list_options(section: type[OptionSection]) -> tuple[Option, ...]:
    """Return the options that a dataclass declares, those of dataclasses within it first."""
    hints = get_type_hints(section, include_extras=True)
    nested: list[Option] = []
    own: list[Option] = []
    for declared in dataclasses.fields(section):
        hint = hints[declared.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            nested += list_options(hint)
        elif get_origin(hint) is Annotated:
            own.append(_complete(declared, *get_args(hint)))
    return (*nested, *own)


def same_option(section: type[OptionSection], name: str, **changes: Any) -> Option:
    """Return an option that another dataclass declares, for one that gives it another default."""
    found = next(option for option in list_options(section) if option.name == name)
    return dataclasses.replace(found, **{"shown_default": None} | changes)


def _complete(declared: "dataclasses.Field[Any]", hint: object, option: Option) -> Option:
    kind = next(_KINDS[part] for part in _parts(hint) if part is not NoneType)
    is_required = declared.default is dataclasses.MISSING
    return dataclasses.replace(
        option,
        name=declared.name,
        kind="words" if kind == "texts" and option.choices else kind,
        default=None if is_required else declared.default,
        is_required=is_required,
    )


def _parts(hint: object) -> tuple[object, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
