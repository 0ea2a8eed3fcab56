"""Tell a full or failing disk by what libraries written in Rust raise for it."""

import os
import re
from types import TracebackType

__all__ = ["DiskErrorsAsOSErrors"]

_OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


class DiskErrorsAsOSErrors:
    """Raise an OSError where tokenizers 0.23 and safetensors 0.8 raise an error of their own.

    A context manager. That of tokenizers is a plain `Exception`, whose text alone holds the
    system's number.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        match = None if isinstance(error, OSError) else _OS_ERROR.search(str(error))
        if match is not None:
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
