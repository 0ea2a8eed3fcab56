"""The library names parameters, a command the options they come from."""

import pytest

from megablocks_utils.errors import ConfigurationError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("ep_size is 3, but ep_size 2 works.", "--ep_size is 3, but --ep_size 2 works."),
        ("kernel (source) is x.", "--kernel (--model_name_or_path) is x."),
        ("source is /tmp/source/a, not source.", "--model_name_or_path is /tmp/source/a, not "
         "--model_name_or_path."),
        ("resource and --kernel and my_kernel stay.", "resource and --kernel and my_kernel stay."),
    ],
)  # fmt: skip
def test_parameters_become_options(message, shown):
    error = ConfigurationError(message, parameters=("ep_size", "kernel", "source"))
    assert error.as_options({"source": "model_name_or_path"}) == shown
    assert str(error) == message
