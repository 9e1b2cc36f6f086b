"""Build Caffe's loss layers for of_caffe.py, from the source in a package of PyPI.

python build_caffe.py

The Python of an environment runs this, and the library is installed there. All of Caffe would need conda.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "brocolli-caffe==9.0.2"  # commit 9b89154 of BVLC's Caffe, with layers of others
SOURCES = (
    "blob", "common", "layer", "syncedmem", "util/io", "util/math_functions", "layers/loss_layer",
    "layers/multinomial_logistic_loss_layer", "layers/softmax_layer", "layers/softmax_loss_layer",
)  # fmt: skip
LIBRARIES = ("protobuf", "glog", "boost_thread", "boost_system", "openblas")
NEEDED = (
    "g++ protobuf-compiler libprotobuf-dev libgoogle-glog-dev libboost-thread-dev libboost-system-dev libopenblas-dev"
)


def main():
    """Fetch, unpack, compile."""
    if not (shutil.which("g++") and shutil.which("protoc")):
        sys.exit("ERROR: needs a compiler and libraries: apt install " + NEEDED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", "-d", name, PACKAGE]
        subprocess.run(fetch, check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        (source,) = (path for path in folder.iterdir() if path.is_dir())
        build(source, Path(sys.prefix) / "lib" / "libcaffe_layer.so")


def build(source, library):
    """Compile the messages and the layers to one library."""
    messages = source / "caffe" / "proto"
    messages.mkdir(parents=True)
    proto = source / "src" / "caffe" / "proto"
    subprocess.run(["protoc", "-I", proto, "--cpp_out", messages, proto / "caffe.proto"], check=True)
    files = [source / "src" / "caffe" / (name + ".cpp") for name in SOURCES]
    files += [messages / "caffe.pb.cc", Path(__file__).with_name("caffe_layer.cc")]
    options = ["-shared", "-fPIC", "-w", "-DCPU_ONLY", "-DNDEBUG", "-I", source, "-I", source / "include"]
    command = ["g++", *options, *files, "-o", library, *("-l" + name for name in LIBRARIES)]
    if subprocess.run(command).returncode:
        sys.exit("ERROR: does not compile: is all of this there? apt install " + NEEDED)


if __name__ == "__main__":
    main()
