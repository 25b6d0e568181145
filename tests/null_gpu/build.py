"""Compile the null GPU for the installed PyTorch, once; the files are kept in a cache folder."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".pytest_cache" / "d" / "null_gpu"
CAPABILITIES = ("7.5", "8.0", "8.6", "9.0", "10.0")  # of device.c

PRELOADED = "libnullgpu.so"
DRIVER = "libcuda.so.1"
PRELOADED_SOURCES = ("counters.c", "device.c", "runtime.c", "memory.c", "libraries.c")

# Libraries of PyTorch that call NVIDIA's
CALLERS = ("libtorch_cuda.so", "libc10_cuda.so", "libtorch_python.so", "libtorch_cuda_linalg.so")
# Functions that do nothing and succeed, unless the sources define them. NCCL stays the real one.
PREFIXES = (
    "__cuda", "cuda", "cublas", "cudnn", "cufft", "cusparse", "cusolver", "curand", "nvrtc", "cufile",
)  # fmt: skip
# They need no device, and PyTorch compares the version with that of its own build
REAL = {"cudnnGetVersion", "cudnnGetCudartVersion", "cudnnGetProperty", "cublasLtGetVersion", "nvrtcVersion"}

# What driver_types.h includes of a CUDA toolkit, which nothing else needs
HOST_DEFINES = """\
#define __device_builtin__
#define __builtin_align__(n)
#define __cuda_builtin_vararg
#define CUDARTAPI
#define __inline_hint__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __host__
#define __device__
#define __location__(x)
#define __align__(n)
"""


class CannotBuild(Exception):
    """Why there is no null GPU on this machine, in one line."""


def environment(capability: str = "9.0") -> dict[str, str]:
    """Variables for a process that is to see the null GPU. Builds it if necessary.

    Raises:
        CannotBuild: a tool, or a fitting PyTorch, is missing.
    """
    assert capability in CAPABILITIES
    folder = build()
    others = os.environ.get("LD_LIBRARY_PATH", "")
    return {
        "LD_PRELOAD": str(folder / PRELOADED),
        "LD_LIBRARY_PATH": f"{folder}:{others}",
        "NULL_GPU_CAPABILITY": capability,
        "TRITON_LIBCUDA_PATH": str(folder),
        "PYTHONPATH": f"{HERE.parents[1]}:{HERE.parent}",
    }


def build() -> Path:
    """The folder with the two libraries, compiled for this PyTorch and these sources."""
    check_machine()
    folder = CACHE / f"{metadata.version('torch')}-{digest_sources()}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            work = Path(temporary) / "built"
            work.mkdir()
            compile_libraries(work)
            # Another process may have been faster
            with contextlib.suppress(OSError):
                work.rename(folder)
    return folder


def check_machine() -> None:
    """Raise CannotBuild unless this is Linux with a compiler, nm and PyTorch for CUDA 13."""
    if sys.platform != "linux":
        raise CannotBuild("the null GPU needs Linux (LD_PRELOAD)")
    if compiler() is None:
        raise CannotBuild("the null GPU needs a C compiler (cc or gcc)")
    if shutil.which("nm") is None:
        raise CannotBuild("the null GPU needs nm (binutils)")
    cuda = cuda_version()
    if cuda is None or not cuda.startswith("13."):
        raise CannotBuild(f"the null GPU needs PyTorch for CUDA 13, and this one is for {cuda or 'no CUDA'}")
    if find_headers() is None:
        raise CannotBuild("the null GPU needs driver_types.h, which comes with PyTorch's CUDA packages")


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def packages() -> Path:
    """The folder that torch, nvidia and triton are installed in, found without the seconds of an import."""
    return Path(str(metadata.distribution("torch").locate_file("")))


def cuda_version() -> str | None:
    """CUDA's version in torch/version.py."""
    values: dict = {}
    exec((packages() / "torch" / "version.py").read_text(), values)
    return values["cuda"]


def find_headers() -> Path | None:
    """The folder of driver_types.h, which holds the layout of a device's properties."""
    for pattern in ("nvidia/*/include/driver_types.h", "triton/backends/nvidia/include/driver_types.h"):
        for header in packages().glob(pattern):
            return header.parent
    return None


def digest_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "build.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def compile_libraries(folder: Path) -> None:
    """Write the two libraries into the folder."""
    headers = find_headers()
    (folder / "crt").mkdir()
    (folder / "crt" / "host_defines.h").write_text(HOST_DEFINES)
    include = [f"-I{headers}", f"-I{folder}", f"-I{HERE}"]
    sources = [str(HERE / name) for name in PRELOADED_SOURCES]
    library = str(folder / PRELOADED)

    # Compile the sources once to see what they define, and then with an empty function for everything else
    compile_shared([*include, *sources, "-o", library])
    missing = wanted_functions() - symbols(folder / PRELOADED, "--defined-only") - REAL
    empty = [f"int {name}(void) {{ return 0; }}\n" for name in sorted(missing)]
    (folder / "empty.c").write_text("".join(empty))
    compile_shared([*include, *sources, str(folder / "empty.c"), "-o", library])

    soname = f"-Wl,-soname,{DRIVER}"
    compile_shared([*include, soname, str(HERE / "driver.c"), "-o", str(folder / DRIVER)])
    (folder / "libcuda.so").symlink_to(DRIVER)  # for the linker that Triton calls


def compile_shared(arguments: list[str]) -> None:
    command = [
        compiler() or "cc",
        "-w",
        "-O1",
        "-fno-builtin",
        "-shared",
        "-fPIC",
        *arguments,
        "-ldl",
        "-pthread",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CannotBuild(f"the null GPU does not compile: {result.stderr.strip()}")


def wanted_functions() -> set[str]:
    """Functions of NVIDIA's libraries that PyTorch's libraries call."""
    wanted: set[str] = set()
    for name in CALLERS:
        library = packages() / "torch" / "lib" / name
        if library.exists():
            wanted |= symbols(library, "--undefined-only")
    return {name for name in wanted if name.startswith(PREFIXES)}


def symbols(library: Path, which: str) -> set[str]:
    """Names that a shared library defines, or that it expects from others."""
    command = ["nm", "--dynamic", "--without-symbol-versions", which, str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1] for line in lines}
