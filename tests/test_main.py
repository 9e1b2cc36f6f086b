"""`python -m jaxsoft` prints what is installed."""

import os
import subprocess
import sys

import jax
import jaxlib
import pytest

import jaxsoft
from jaxsoft.__main__ import installation


def run(**environment):
    command = [sys.executable, "-m", "jaxsoft"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


def test_versions_devices_and_kernels_are_those_of_this_process():
    lines = installation().splitlines()
    assert lines[:3] == [f"jaxsoft {jaxsoft.__version__}", f"jax {jax.__version__}", f"jaxlib {jaxlib.__version__}"]
    assert lines[3] == "python " + ".".join(map(str, sys.version_info[:3]))
    assert lines[4] == f"devices: {len(jax.devices())} × cpu (cpu)"
    assert lines[5:] == [str(jaxsoft.native_kernels())]


@pytest.mark.x32
def test_the_command_prints_in_any_terminal():
    result = run(JAXSOFT_NATIVE="0", JAX_PLATFORMS="cpu", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "devices: 1 ? cpu (cpu)\nnative CPU kernels: none, turned off by JAXSOFT_NATIVE=0" in result.stdout


@pytest.mark.x32
def test_a_missing_platform_is_one_line():
    result = run(JAX_PLATFORMS="nowhere")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
