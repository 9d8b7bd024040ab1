"""`tritonkern doctor`: the state of the installation. It needs the standard library only, and survives a broken one."""

import sys
from importlib import metadata

_PACKAGES = ("tritonkern", "torch", "triton", "numpy", "einops", "av", "pillow", "safetensors", "typer", "rich")


def doctor() -> None:
    """Show which backends each operation has on this machine, why one is missing, and what to do."""
    sys.stdout.write(f"{_backends()}\n\npython {sys.version.split()[0]}\n")
    for package in _PACKAGES:
        sys.stdout.write(f"{package} {version(package)}\n")


def _backends() -> str:
    try:
        from tritonkern.ops._backends import report

        return report()
    # Whatever is broken must not keep the rest of the page from the user, who runs this command because of it.
    except Exception as error:
        return f"the backends cannot be listed: {type(error).__name__}: {' '.join(str(error).split())}"


def version(package: str) -> str:
    """The installed version of `package`, or what is wrong with it."""
    try:
        return metadata.version(package)
    except Exception as error:
        missing = isinstance(error, metadata.PackageNotFoundError)
        return "not installed" if missing else f"damaged ({type(error).__name__}: {error})"
