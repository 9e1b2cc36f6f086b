"""Print the versions, devices and kernels of an installation, for a bug report or a first look.

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
    """Versions, the devices that JAX runs on by default, the CPU's kernels, and what JAX lacks: one line each."""
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
            *(f"this JAX lacks {what}: the plain formula runs in its place" for what in lacking()),
        ]
    )


def main() -> int:
    """Print it; 1 where JAX has no devices to run on."""
    try:
        text = installation()
    except RuntimeError as error:  # JAX's, for a platform that was requested and is missing
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without × shows ? for it
        sys.stdout.reconfigure(errors="replace")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
