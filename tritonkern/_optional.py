"""The message for a missing optional package. This module imports nothing."""


def how_to_install(extra: str) -> str:
    """How to install what pyproject.toml lists under `extra`, for error messages.

    The package is on no index, so the command refers to a checkout.
    """
    return f'run pip install ".[{extra}]" in a checkout of tritonkern'
