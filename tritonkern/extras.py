"""What to say where an optional package is missing; imports nothing itself."""


def how_to_install(extra: str) -> str:
    """For error messages: the way to what pyproject.toml lists under `extra`. The package is on no index."""
    return f'run pip install ".[{extra}]" in a checkout of tritonkern'
