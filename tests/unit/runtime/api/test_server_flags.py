"""The keyword arguments of `launch` and `Engine` are the flags of a server."""

import typing

from quartet.runtime.api.server_flags import ServerFlags
from tests.server_flags import kinds


def test_the_typed_keyword_arguments_are_the_flags_of_the_configuration():
    """Where this fails, `python -m tests.server_flags` writes the file anew."""
    assert typing.get_type_hints(ServerFlags) == kinds()
