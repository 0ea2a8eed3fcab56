"""Choose the chat template of a run: the tokenizer's own, a file, or a shipped training template.

Training templates (`templates/*.jinja`) write every answer of a conversation alike, as the model's
own template writes the last one, and mark what is generated. They are for training: where the
tokenizer's own template prompts in the same way, it is the one that is saved with the model, so
that who serves it gets what the model was published with. Where the tokenizer has none, or one that
prompts otherwise, the training template is saved, without its marks, which other programs may not
read. A file that the user names is both: training sees it, and it is saved as it is.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megablocks_utils.checkpoint.foreign_code import ForeignCode
from megablocks_utils.errors import ConfigurationError, DataError
from megablocks_utils.training.data.chat_template import (
    GENERATION_TAG,
    RENDERING_LIMIT_S,
    Message,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChosenTemplate", "choose_chat_template", "list_training_templates"]

Template = str | dict[str, str] | None

_FOLDER = Path(__file__).parent / "templates"
_SUFFIX = ".jinja"
_PLAIN_TAGS = {"generation": "if true", "endgeneration": "endif"}
_PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is it?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
)


@dataclass(frozen=True)
class ChosenTemplate:
    """Hold the chat templates of a run.

    Attributes:
        tokenizer: that has them; None where the model has none.
        training: what conversations are rendered with.
        saved: what the tokenizer is saved with.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    training: Template
    saved: Template

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Give the tokenizer the template of training within, and the saved one afterwards."""
        if self.tokenizer is None:
            yield
            return
        self.tokenizer.chat_template = self.training
        try:
            yield
        finally:
            self.tokenizer.chat_template = self.saved


def list_training_templates() -> list[str]:
    """Return the names of the shipped training templates."""
    return sorted(path.stem for path in _FOLDER.glob(f"*{_SUFFIX}"))


def choose_chat_template(
    name: str | None, tokenizer: "PreTrainedTokenizerBase | None"
) -> ChosenTemplate:
    """Return the chat template that an option names.

    Args:
        name: a `.jinja` file, the name of a training template, or that of one of the tokenizer's
            own, where it has several; None for the tokenizer's own.
        tokenizer: of the model.

    Raises:
        ConfigurationError: nothing has that name, or the file cannot be used.
    """
    own: Template = None if tokenizer is None else tokenizer.chat_template
    if name is None:
        return ChosenTemplate(tokenizer, own, own)
    if tokenizer is None:
        raise _wrong(f"chat_template is {name}, but the model has no tokenizer to use it with")
    if name.endswith(_SUFFIX):
        template = _read(Path(name))
        _check_syntax(name, template)
        return ChosenTemplate(tokenizer, template, template)
    if isinstance(own, dict) and name in own:
        return ChosenTemplate(tokenizer, own[name], {**own, "default": own[name]})
    if name not in list_training_templates():
        known = ", ".join(list_training_templates())
        raise _wrong(
            f"chat_template is {name}, but it must be a {_SUFFIX} file or one of the training "
            f"templates: {known}"
        )
    template = _read(_FOLDER / f"{name}{_SUFFIX}")
    saved = own if _prompts_alike(tokenizer, template) else _without_marks(template)
    return ChosenTemplate(tokenizer, template, saved)


def _wrong(sentence: str) -> ConfigurationError:
    return ConfigurationError(f"{sentence}.", parameters=("chat_template",))


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise _wrong(f"chat_template is {path}, but there is no such file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise _wrong(f"chat_template is {path}, which cannot be read ({reason})") from error
    except UnicodeDecodeError as error:
        raise _wrong(f"chat_template is {path}, which is no UTF-8 text") from error


def _check_syntax(name: str, template: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def wrong(reason: str) -> ConfigurationError:
        return _wrong(f"chat_template is {name}, which is no chat template: {reason}")

    if not template.strip():
        raise wrong("it is empty")
    with ForeignCode(wrong, limit_s=RENDERING_LIMIT_S):
        try:
            _compile_jinja_template(template)
        except TemplateSyntaxError as error:
            raise wrong(f"line {error.lineno}: {error.message}") from error


def _prompts_alike(tokenizer: "PreTrainedTokenizerBase", template: str) -> bool:
    """Say whether the tokenizer's own template asks for an answer as another one does."""
    if not tokenizer.chat_template:
        return False
    return all(
        _prompt(tokenizer, None, messages) == _prompt(tokenizer, template, messages)
        for messages in _PROBES
    )


def _prompt(
    tokenizer: "PreTrainedTokenizerBase", template: str | None, messages: Sequence[Message]
) -> str | None:
    """Return the prompt for an answer; None if the template refuses the messages."""
    try:
        with ForeignCode(DataError, limit_s=RENDERING_LIMIT_S):
            return str(
                tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
    except DataError:
        return None


def _without_marks(template: str) -> str:
    return GENERATION_TAG.sub(lambda m: f"{{%{m[1]} {_PLAIN_TAGS[m[2]]} {m[3]}%}}", template)
