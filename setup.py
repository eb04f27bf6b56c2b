"""Builds qgm_ext._cpu always and qgm_ext._cuda where nvcc is found. No torch is needed to build.

Environment:
    QGM_CUDA: "auto" (default: build _cuda if nvcc is found), "0" (never), "1" (required: no nvcc is an error).
    QGM_CUDA_ARCHS: architectures such as "80;90"; default: the first of each generation from 7.5 up
        that this nvcc knows, and PTX; its code runs on the rest of the generation.
    CUDA_HOME or CUDACXX: where nvcc is, if it is not on PATH or in /usr/local/cuda.
    MAX_JOBS: compilers to run side by side (default: one per core).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent.resolve()
GENERATED = Path("build") / "generated"
OLDEST_CUDA_ARCH = 75

# Bits must not depend on what the compiler may contract or re-associate (architecture: same bits everywhere).
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]


def rule_headers() -> list[Path]:
    """The headers of csrc/rules that define rules: all but the contract itself."""
    return sorted(path for path in Path("csrc/rules").glob("*.h") if path.stem != "rule")


def write_if_changed(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def instantiate_rules(backend: str, suffix: str) -> list[str]:
    """One source file per rule header and backend, so that rules compile in parallel."""
    return [
        write_if_changed(
            GENERATED / f"{backend}_{header.stem}{suffix}",
            f'#include "{backend}/registry.h"\n#include "rules/{header.name}"\n'
            f"[[maybe_unused]] static const bool registered =\n"
            f"    qgm::{backend}::register_rules(qgm::rules::{header.stem}::Rules{{}});\n",
        )
        for header in rule_headers()
    ]


def headers() -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob("*.*h"))


def cpu_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "qgm_ext._cpu",
        ["csrc/cpu/binding.cpp", "csrc/cpu/relay.cpp", *instantiate_rules("cpu", ".cpp")],
        include_dirs=["csrc"],
        depends=headers(),
        cxx_std=17,
        extra_compile_args=[*CXX_FLAGS, "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def wants_cuda() -> str | None:
    """The nvcc to build _cuda with, or None to leave it out."""
    choice = os.environ.get("QGM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"QGM_CUDA must be auto, 0 or 1, got {choice!r}")
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        sys.exit("QGM_CUDA=1, but nvcc was not found: install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
    return nvcc


def gencode_flags(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = sorted({int(arch) for arch in re.findall(r"sm_(\d+)\b", listed)})
    chosen = [int(arch.replace(".", "")) for arch in re.split(r"[;, ]+", os.environ.get("QGM_CUDA_ARCHS", "")) if arch]
    if unknown := sorted(set(chosen) - set(known)):
        sys.exit(f"QGM_CUDA_ARCHS: {unknown} not known to {nvcc}, which has {known}")
    # One architecture of each generation: its code runs on the later ones of the generation too (8.0 on 8.6 and 8.9).
    by_generation = {arch // 10: arch for arch in sorted(known, reverse=True) if arch >= OLDEST_CUDA_ARCH}
    archs = sorted(chosen or by_generation.values())
    # One PTX for all from 8.0 up: it is compiled once, it is what tests/cuda runs, and newer GPUs load it too.
    virtual = {arch: 80 if arch >= 80 else arch for arch in archs}
    flags = [f"-gencode=arch=compute_{virtual[arch]},code=sm_{arch}" for arch in archs]
    newest = virtual[archs[-1]]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def compression_flags(nvcc: str) -> list[str]:
    """Smallest code for many architectures; nvcc before 12.8 has its own way only."""
    help_text = subprocess.run([nvcc, "--help"], capture_output=True, text=True, check=True).stdout
    return ["--compress-mode=size"] if "--compress-mode" in help_text else []


def toolkit_of(nvcc: str) -> Path:
    """The toolkit that nvcc takes its own headers from; nvcc on PATH may be a script that starts another."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr + plan.stdout, re.MULTILINE)
    return Path(top[1].strip() if top else Path(nvcc).parent.parent).resolve()


def cuda_extension(nvcc: str) -> Pybind11Extension:
    toolkit = toolkit_of(nvcc)
    return Pybind11Extension(
        "qgm_ext._cuda",
        ["csrc/cuda/binding.cpp", *sorted(map(str, Path("csrc/cuda").glob("*.cu"))), *instantiate_rules("cuda", ".cu")],
        include_dirs=["csrc", str(toolkit / "include")],
        depends=headers(),
        cxx_std=17,
        extra_compile_args=CXX_FLAGS,
        library_dirs=[str(toolkit / "lib64"), str(toolkit / "lib")],
        # The static runtime: importing _cuda needs no driver and no CUDA of a certain version.
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_link_args=["-Wl,--strip-all"],  # the names of host functions alone are a megabyte
    )


class BuildExtension(build_ext):
    """build_ext that says what is missing, and hands .cu files to nvcc."""

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_cxx[0] if hasattr(self.compiler, "compiler_cxx") else "c++"
        if shutil.which(os.environ.get("CXX", compiler).split()[0]) is None:
            sys.exit(
                f"qgm_ext needs a C++17 compiler and found none ({compiler!r} is not on PATH).\n"
                "Install one and run pip again:  Debian/Ubuntu: apt-get install g++   Fedora: dnf install gcc-c++   "
                "Arch: pacman -S gcc   conda: conda install cxx-compiler"
            )
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            sys.exit(
                "qgm_ext needs the Python headers, and Python.h was not found.\n"
                "Install them and run pip again:  Debian/Ubuntu: apt-get install python3-dev   "
                "Fedora: dnf install python3-devel"
            )
        super().build_extensions()

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda_sources = [source for source in ext.sources if source.endswith(".cu")]
        if cuda_sources:
            ext.sources = [source for source in ext.sources if source not in cuda_sources]
            ext.extra_objects = self.compile_cuda(cuda_sources, ext)
        super().build_extension(ext)

    def compile_cuda(self, sources: list[str], ext: Pybind11Extension) -> list[str]:
        nvcc = wants_cuda()
        assert nvcc is not None, "the extension exists only where nvcc does"
        includes = [f"-I{directory}" for directory in ext.include_dirs]
        targets = [*gencode_flags(nvcc), *compression_flags(nvcc)]
        command = [nvcc, *NVCC_FLAGS, *targets, *includes, "-Xcompiler", "-fPIC,-ffp-contract=off"]
        newest_header = max(Path(path).stat().st_mtime for path in ext.depends)

        def compile_one(source: str) -> str:
            target = Path(self.build_temp) / f"{Path(source).stem}.cuda.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.stat().st_mtime < max(newest_header, Path(source).stat().st_mtime):
                subprocess.run([*command, "-c", source, "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            return list(pool.map(compile_one, sources))


os.chdir(ROOT)
extensions = [cpu_extension()]
if (nvcc := wants_cuda()) and Path("csrc/cuda/binding.cpp").exists():
    extensions.append(cuda_extension(nvcc))
ParallelCompile("MAX_JOBS").install()
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
