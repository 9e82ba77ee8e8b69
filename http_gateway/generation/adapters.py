"""The LoRA adapters that requests may name, as the scheduler has told them."""

from collections.abc import Collection, Iterable, Iterator, Mapping

from quartet.runtime.adapters import LORA_OFF, NEVER_LOADED, Adapter
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import MAX_ADAPTERS, MAX_SHOWN_ADAPTERS
from quartet.runtime.shorten import short

FIELD = "lora_path"


class Adapters:
    """Which there are. A name that was unloaded is remembered, so that it is not taken for another name of the base."""

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._known: Mapping[str, Adapter] = {}
        self._unloaded: dict[str, None] = {}  # in the order of their end

    def learn(self, adapters: Iterable[Adapter]) -> None:
        """These and no others may be named from now on."""
        known = {adapter.name: adapter for adapter in adapters}
        self._unloaded |= dict.fromkeys(name for name in self._known if name not in known)
        for name in [*known, *list(self._unloaded)[:-MAX_ADAPTERS]]:
            self._unloaded.pop(name, None)
        self._known = known

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._known.values())

    def __getitem__(self, name: str) -> Adapter:
        return self._known[name]

    def __contains__(self, name: str) -> bool:
        return name in self._known

    @property
    def paths(self) -> dict[str, str]:
        """Name → path, as clients of this API know them."""
        return {adapter.name: adapter.path for adapter in self._known.values()}

    def check(self, name: str) -> None:
        """Raise RequestError for a request that names an adapter which it may not name; "" is the base."""
        if not name:
            return
        if not self.enabled:
            raise RequestError(LORA_OFF, field=FIELD)
        if name not in self._known:
            shown = ", ".join(map(short, list(self._known)[:MAX_SHOWN_ADAPTERS])) or "none"
            raise RequestError(f"{NEVER_LOADED.format(short(name))} All loaded adapters: {shown}.", field=FIELD)

    def of_model(self, model: str, base_names: Collection[str]) -> str:
        """The adapter that the `model` of an OpenAI body names: its name, or BASE:NAME. Any other model is the base.

        Raises RequestError: 404 for an adapter that was unloaded, 400 for BASE:NAME with an unknown name.
        """
        if not self.enabled or not model or model in base_names:
            return ""
        if model in self._known:
            return model
        if model in self._unloaded:
            raise not_served(model)
        base = next((name for name in base_names if model.startswith(f"{name}:")), model.partition(":")[0])
        name = model[len(base) + 1 :]
        self.check(name)
        return name


def not_served(model: str) -> RequestError:
    return RequestError(
        f"The model '{short(model)}' does not exist", Kind.NOT_FOUND, field="model", code="model_not_found"
    )
