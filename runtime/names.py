"""Names that clients choose: of models, adapters, users and versions of weights. They come back in answers and logs."""

from typing import Annotated

import msgspec

from quartet.runtime.limits import MAX_NAME_CHARS

FilledName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
AdapterName = FilledName
Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
# `$` matches before a final line end too, unless it is forbidden.
FilePart = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$(?!\n)")]  # of a name
Digits = Annotated[str, msgspec.Meta(max_length=9, pattern=r"^[0-9]+$(?!\n)")]  # a number, as some clients send it
