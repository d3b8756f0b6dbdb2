"""What a compiler is told of GPUs that are not there, and plug-ins without their libraries."""

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from braeburn.errors import UserError
from braeburn.hardware.targets import parse_target
from braeburn.plan import stubs
from braeburn.plan.topologies import _description

here = pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="ELF files of x86-64"
)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A library that describes some GPUs, as XLA's plug-ins do."""
    names = ["MI250", "MI300X", "MI350X", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"]
    texts = (
        f'gpu_device_info {{ device_memory_size: {size} }}\ndevice_description_str: "{name}"'
        for size, name in enumerate(names)
    )
    path = tmp_path / "xla_rocm7" / "plugin.so"
    path.parent.mkdir()
    path.write_bytes(b"\x7fELF\0" + b"\0\0".join(text.encode() for text in texts) + b"\0")
    return path


@pytest.mark.parametrize(
    ("on", "described"),
    [
        ("mi250x:8", "MI250"),
        ("mi300x:8", "MI300X"),
        ("mi325x:8", "MI300X"),  # the same dies with more memory
        ("mi355x:8", "MI350X"),
        ("h100:8", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_the_description_of_a_gpu(on: str, described: str, plugin: Path) -> None:
    assert f'"{described}"' in _description(parse_target(on), plugin)


def test_a_gpu_that_is_not_described(plugin: Path) -> None:
    with pytest.raises(UserError, match=r"xla_rocm7 describes MI250, MI300X, .* choose one"):
        _description(parse_target("b200:8"), plugin)


@here
def test_a_stub_answers_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "libstub.so"
    names = ["hipInit", "hipGetErrorString", *(f"function{i}" for i in range(500))]
    path.write_bytes(stubs.stub("libstub.so.7", names))
    library = ctypes.CDLL(str(path))
    assert library.hipInit() == library.function0() == library.function499() == stubs.NO_DEVICE
    library.hipGetErrorString.restype = ctypes.c_char_p
    assert library.hipGetErrorString() == b"a stub stands in for this library"
    assert not hasattr(library, "function500")
    # Read back by what reads a plug-in: it has no sections, and needs nothing.
    assert stubs.wanted(path) == stubs.Wants((), ())


@here
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_is_loaded_without_those_that_it_needs(tmp_path: Path) -> None:
    def built(name: str, text: str, *options: str) -> Path:
        source, library = tmp_path / f"{name}.c", tmp_path / f"{name}.so"
        source.write_text(text)
        command = ["cc", "-shared", "-fPIC", "-o", library, source, *options]
        subprocess.run(command, check=True)
        return library

    soname = "-Wl,-soname,libgone_for_good.so.3"
    gone = built("gone", "int gone_answer(void) { return 7; }", soname)
    text = "#include <math.h>\nint gone_answer(void);\nint asked(void) { return gone_answer(); }"
    whole = built("whole", text, f"-Wl,--no-as-needed,{gone}", "-lm")
    assert "libgone_for_good.so.3" in stubs.wanted(whole).libraries
    assert "gone_answer" in stubs.wanted(whole).functions
    with pytest.raises(OSError, match="libgone_for_good"):
        ctypes.CDLL(str(whole))
    assert stubs.load(whole) == ["libgone_for_good.so.3"]
    assert ctypes.CDLL(str(whole)).asked() == stubs.NO_DEVICE
    # Nothing stands in for what is there.
    assert stubs.load(whole) == []
