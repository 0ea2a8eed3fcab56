"""Tell a full or failing disk by what libraries written in Rust raise for it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["disk_errors_as_os_errors"]

_OS_ERROR = re.compile(r"\(os error ([0-9]+)\)")


@contextmanager
def disk_errors_as_os_errors() -> Iterator[None]:
    """Raise an OSError where tokenizers 0.23 and safetensors 0.8 raise an error of their own.

    That of tokenizers is a plain `Exception`, whose text alone holds the system's number.
    """
    try:
        yield
    except Exception as error:
        match = _OS_ERROR.search(str(error))
        if isinstance(error, OSError) or match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
