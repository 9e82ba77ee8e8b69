"""Why the hub gave no model, and what to do about it, in one line."""

WHO = "log in with `hf auth login`, or set HF_TOKEN to a token of yours"


def explained(flag: str, name: str, revision: str | None, error: Exception) -> str:
    """`flag` named `name` and `revision`, and fetching it raised `error`."""
    import huggingface_hub  # here, for it is slow; it has been imported where there is such an error
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{name}"
    match error:
        case errors.GatedRepoError() if huggingface_hub.get_token():
            return f"{flag} {name} is gated, and your token has no access to it; accept its terms at {page} as its user"
        case errors.GatedRepoError():
            return f"{flag} {name} is gated: accept its terms at {page}, then {WHO}"
        case errors.RevisionNotFoundError():
            return (
                f"{flag} {name} has no revision {revision}; name a branch, tag or commit of it, or leave --revision out"
            )
        case errors.RepositoryNotFoundError():
            return f"{flag} {name} is no directory here, and the hub shows none to you; check the name, or {WHO}"
    return (
        f"{flag} {name} is no directory here and could not be fetched from the hub ({reason(error)}); "
        "check the name and the network, or download it and pass its directory"
    )


def reason(error: Exception) -> str:
    """The kind of failure and the first sentence of its message."""
    first = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
