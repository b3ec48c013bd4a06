"""Builds the one extension module, ``dcext._C``: our C++ (and CUDA) sources with libzstd and XXH3 inside.

Environment:
    DCEXT_CUDA: ``auto`` (default: built when torch has CUDA and a toolkit is found), ``0``, or ``1`` (required).
    DCEXT_ZSTD_DIR, DCEXT_XXHASH_DIR: source folders for builds without a network (third_party/README.md).
    MAX_JOBS: parallel compilations, by default the number of CPUs this process may use.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
sys.path.insert(0, str(ROOT / "third_party"))

import fetch  # noqa: E402  (third_party/fetch.py)


def wants_cuda() -> bool:
    """Whether the CUDA sources are built, from DCEXT_CUDA and what is installed."""
    choice = os.environ.get("DCEXT_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"DCEXT_CUDA: expected 'auto', '0' or '1', got {choice!r}")
    toolkit = cpp_extension.CUDA_HOME
    has_headers = toolkit is not None and Path(toolkit, "include", "cuda_runtime.h").is_file()
    available = torch.version.cuda is not None and has_headers
    if choice == "1" and not available:
        raise SystemExit(
            "DCEXT_CUDA=1: expected a CUDA build of torch and CUDA_HOME with include/cuda_runtime.h, got "
            f"torch.version.cuda={torch.version.cuda}, CUDA_HOME={toolkit}"
        )
    return available and choice != "0"


def max_jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


class BuildExtension(cpp_extension.BuildExtension):
    """Torch's own, which can compile neither C as C nor assembly: libzstd and XXH3 are compiled here, beside it."""

    def finalize_options(self) -> None:
        """Objects stay in ``build/temp``, also for editable installs, which would else start anew each time."""
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "temp")

    def build_extensions(self) -> None:
        zstd, xxhash = fetch.zstd_lib_dir(), fetch.xxhash_dir()
        sources = [
            path
            for part in ("common", "compress", "decompress")
            for path in sorted((zstd / part).glob("*.[cS]"))
        ]
        if os.uname().machine == "x86_64":
            sources.append(xxhash / "xxh_x86dispatch.c")
        else:
            sources = [path for path in sources if path.suffix != ".S"]
        objects = self.compile_c(sources, [zstd, xxhash])
        for extension in self.extensions:
            extension.include_dirs += [str(zstd), str(xxhash)]
            extension.extra_objects += objects
            extension.depends += objects
        super().build_extensions()

    def compile_c(self, sources: list[Path], include_dirs: list[Path]) -> list[str]:
        """Compiles the sources that are newer than their objects; returns all objects."""
        out = Path(self.build_temp).resolve() / "third_party"
        out.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-w", "-DZSTD_LEGACY_SUPPORT=0"]
        # AVX-512 multiplications would lower the clock under the entropy decoder, which costs more than they gain.
        flags += ["-DXXH_DISPATCH_AVX512=0"]
        flags += ["-DZSTDLIB_VISIBLE=", "-DZSTDERRORLIB_VISIBLE=", "-DZSTDLIB_STATIC_API="]
        flags += [f"-I{path}" for path in include_dirs]
        compiler = shlex.split(os.environ.get("CC", "cc"))

        def compile_one(source: Path) -> str:
            target = out / f"{source.parent.name}-{source.name}.o"
            if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
                partial = target.with_suffix(".partial")
                command = [*compiler, *flags, "-c", str(source), "-o", str(partial)]
                subprocess.run(command, check=True)
                partial.rename(target)
            return str(target)

        with ThreadPoolExecutor(max_jobs()) as pool:
            return list(pool.map(compile_one, sources))


def extension() -> cpp_extension.CppExtension:
    cuda = wants_cuda()
    sources = sorted(
        str(path) for path in CSRC.rglob("*.cpp") if cuda or path.name != "ops_cuda.cpp"
    )
    flags = [
        "-O3",
        "-g0",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fopenmp",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-Wno-unused-parameter"]  # torch's headers
    arguments = {
        "name": "dcext._C",
        "sources": sources,
        "include_dirs": [str(ROOT / CSRC)],
        "depends": sorted(str(path) for path in CSRC.rglob("*.h")),
        "extra_compile_args": {"cxx": flags},
        "extra_link_args": ["-fopenmp"],
        "define_macros": [("DCEXT_WITH_CUDA", "1")] if cuda else [],
    }
    if not cuda:
        return cpp_extension.CppExtension(**arguments)
    arguments["sources"] = sources + sorted(str(path) for path in CSRC.rglob("*.cu"))
    arguments["extra_compile_args"]["nvcc"] = ["-O3", "--fmad=false"]
    return cpp_extension.CUDAExtension(**arguments)


os.environ.setdefault("MAX_JOBS", str(max_jobs()))
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
