"""Print the versions, devices and kernels of an installation, for instance for a bug report.

python -m jaxsoft
"""

import io
import platform
import sys
from collections import Counter
from importlib.metadata import version

import jax

import jaxsoft
from jaxsoft._jax_internals import lacking


def installation() -> str:
    """Versions, JAX's default devices, whether the CPU kernels are in use, and what JAX lacks: one line each."""
    versions = {
        "jaxsoft": jaxsoft.__version__,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
    }
    devices = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    return "\n".join(
        [
            *(f"{name} {version}" for name, version in versions.items()),
            f"devices: {', '.join(f'{count} × {kind}' for kind, count in devices.items())}",
            str(jaxsoft.native_kernels()),
            *(f"this JAX lacks {what}: the plain formula runs instead" for what in lacking()),
        ]
    )


def main() -> int:
    """Print the installation; return 1 if JAX has no devices to run on."""
    try:
        text = installation()
    except RuntimeError as error:  # from JAX, if a requested platform is missing
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show × shows ? instead
        sys.stdout.reconfigure(errors="replace")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
