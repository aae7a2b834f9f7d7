"""Builds ``ctxfast._C`` (C++17, CPU) and ``ctxfast._C_cuda`` (CUDA C++) with pybind11; torch is not needed here.

Every source in ``csrc/cpu`` is compiled once per instruction set, each time in a namespace of its own, so
that one binary holds all of them and the choice is made when it is loaded; the sources directly in ``csrc``
are compiled once. The two modules fail independently: without one, the package installs and runs on
its PyTorch reference, and the compiler's message is kept in ``ctxfast/_build_log.json`` for ``ctxfast info``.

Environment variables
    CTXFAST_NATIVE=0          builds neither module
    CTXFAST_CUDA=0            builds no CUDA module
    CTXFAST_REQUIRE_NATIVE=1  fails the installation when the CPU module does not build
    CXX, NVCC                 compilers to use
    MAX_JOBS                  number of parallel compilations (default: number of cores)
    TORCH_CUDA_ARCH_LIST      CUDA architectures, such as "8.0;9.0a;10.0+PTX"
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Instruction sets in rising order; each one's binary runs only where the CPU has all of its features.
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3", "-mtune=generic"],
    "avx512": ["-march=x86-64-v4", "-mtune=generic", "-mprefer-vector-width=512"],
    "avx512_vnni": [
        "-march=x86-64-v4",
        "-mavx512vnni",
        "-mtune=generic",
        "-mprefer-vector-width=512",
    ],
    "avx512_bf16": [
        "-march=x86-64-v4",
        "-mavx512bf16",
        "-mavx512vnni",
        "-mtune=generic",
        "-mprefer-vector-width=512",
    ],
    "amx": [
        "-march=x86-64-v4",
        "-mavx512bf16",
        "-mavx512vnni",
        "-mamx-tile",
        "-mamx-bf16",
        "-mamx-int8",
        "-mtune=generic",
        "-mprefer-vector-width=512",
    ],
}
# The sources that an instruction set is for, where all others would be those of the one before it.
ONLY_SOURCES = {"avx512_vnni": ["linear_int8.cpp"]}
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-uninitialized",  # g++ 12 warns about its own AVX-512 header
]
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


class BuildError(Exception):
    """A module cannot be built; the message is what the user should read."""


def environment_flag(name: str, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    return default if not value else value not in ("0", "false", "no", "off")


def run_compiler(command: list[str]) -> str:
    """Runs one compiler command and returns its output."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error}") from error
    if result.returncode:
        raise BuildError(f"{shlex.join(command)}\n{result.stdout}")
    return result.stdout


def find_cxx() -> list[str]:
    chosen = os.environ.get("CXX", "").strip()
    if chosen:
        return shlex.split(chosen)
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError(
        "no C++ compiler found: none of g++, c++ and clang++ is on PATH, CXX is not set"
    )


def is_current(target: Path, command: list[str]) -> bool:
    """Whether an object file is newer than everything it was made from, by the same command."""
    stamp, dependencies = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and stamp.exists() and dependencies.exists()):
        return False
    if stamp.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime
    text = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1]
    files = [name.replace("\0", " ") for name in text.replace("\\ ", "\0").split()]
    return all(os.path.exists(name) and os.path.getmtime(name) <= made for name in files)


def compile_all(jobs: list[tuple[Path, list[str]]]) -> None:
    """Runs (object file, command) pairs in parallel, skipping what is already up to date."""

    def compile_one(job: tuple[Path, list[str]]) -> None:
        target, command = job
        if is_current(target, command):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        run_compiler(command)
        target.with_suffix(".cmd").write_text(shlex.join(command))

    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for _ in pool.map(compile_one, jobs):
            pass


def supported_instruction_sets(cxx: list[str], scratch: Path) -> list[str]:
    """The instruction sets of this machine's family that the compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    scratch.mkdir(parents=True, exist_ok=True)
    probe = scratch / "probe.cpp"
    probe.write_text("int probe() { return 0; }\n")
    known = ["baseline"]
    for name, flags in INSTRUCTION_SETS.items():
        try:
            if flags:
                run_compiler([*cxx, *flags, "-c", str(probe), "-o", str(scratch / "probe.o")])
                known.append(name)
        except BuildError:
            continue
    return known


def include_flags() -> list[str]:
    import pybind11

    directories = [pybind11.get_include(), sysconfig.get_path("include"), str(CSRC)]
    return [f"-I{directory}" for directory in directories]


def build_cpu(output: Path, scratch: Path) -> dict:
    """Builds ``ctxfast._C``; returns what the build log keeps."""
    cxx = find_cxx()
    version = run_compiler([*cxx, "--version"]).splitlines()[0]
    known = supported_instruction_sets(cxx, scratch)
    # OpenMP is compiled in but no OpenMP library is linked: its symbols resolve, when the module is
    # imported, to the one that torch has loaded, whatever that file is called.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    common = [*cxx, *CXX_FLAGS, *openmp, "-MMD", f"-I{CSRC}"]
    jobs = []
    for name in known:
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.name not in ONLY_SOURCES.get(name, [source.name]):
                continue
            target = scratch / name / f"{source.stem}.o"
            flags = [*INSTRUCTION_SETS[name], f"-DCTXFAST_ISA={name}"]
            if name != "baseline":
                flags.append(f"-DCTXFAST_ISA_{name.upper()}=1")
            jobs.append((target, [*common, *flags, "-c", str(source), "-o", str(target)]))
    have = [f"-DCTXFAST_HAVE_{name.upper()}=1" for name in known]
    for source in sorted(CSRC.glob("*.cpp")):
        if source.name.startswith("bindings_cuda"):
            continue
        flags = include_flags() if source.name.startswith("bindings") else have
        target = scratch / f"{source.stem}.o"
        jobs.append((target, [*common, *flags, "-c", str(source), "-o", str(target)]))
    compile_all(jobs)
    output.parent.mkdir(parents=True, exist_ok=True)
    objects = [str(target) for target, _ in jobs]
    shared = (
        ["-shared", "-Wl,-s"]
        if sys.platform == "linux"
        else ["-bundle", "-undefined", "dynamic_lookup"]
    )
    run_compiler([*cxx, *shared, *objects, "-o", str(output), "-lpthread"])
    return {"compiler": version, "instruction_sets": known}


def cuda_architecture_flags(nvcc: str) -> list[str]:
    """-gencode options of TORCH_CUDA_ARCH_LIST, or of those defaults that this nvcc knows."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    known = set(re.findall(r"compute_(\w+)", run_compiler([nvcc, "--list-gpu-arch"])))
    flags = []
    for entry in filter(None, (chosen or DEFAULT_CUDA_ARCHITECTURES).split(";")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must hold entries such as 8.0 or 9.0a+PTX, got {entry!r}"
            )
        number = match[1] + match[2]
        if not chosen and number not in known:
            continue
        name = number + match[3]
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{name},code=compute_{name}"]
    return flags


def build_cuda(output: Path, scratch: Path) -> dict:
    """Builds ``ctxfast._C_cuda``; returns what the build log keeps."""
    nvcc = os.environ.get("NVCC", "").strip() or shutil.which("nvcc")
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if not nvcc and home and os.access(Path(home) / "bin" / "nvcc", os.X_OK):
            nvcc = str(Path(home) / "bin" / "nvcc")
    if not nvcc:
        raise BuildError("no CUDA compiler found: nvcc is not on PATH, CUDA_HOME is not set")
    cxx = find_cxx()
    version = run_compiler([nvcc, "--version"]).strip().splitlines()[-1]
    architectures = cuda_architecture_flags(nvcc)
    # Two at a time: the last of a few large files would leave a core idle.
    device = [*architectures, "--threads=2"]
    jobs = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        target = scratch / "cuda" / f"{source.stem}.o"
        flags = ["-std=c++17", "-O3", "-lineinfo", "-MMD", f"-I{CSRC}", *device]
        host = ["-ccbin", cxx[-1], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        jobs.append((target, [nvcc, *flags, *host, "-c", str(source), "-o", str(target)]))
    for source in sorted(CSRC.glob("bindings_cuda*.cpp")):
        target = scratch / "cuda" / f"{source.stem}.o"
        flags = [*CXX_FLAGS, "-MMD", *include_flags()]
        jobs.append((target, [*cxx, *flags, "-c", str(source), "-o", str(target)]))
    compile_all(jobs)
    output.parent.mkdir(parents=True, exist_ok=True)
    objects = [str(target) for target, _ in jobs]
    link = [nvcc, "-ccbin", cxx[-1], "-shared", "-cudart", "static", "-Xlinker", "-s"]
    run_compiler([*link, *objects, "-o", str(output)])
    return {
        "compiler": version,
        "architectures": [flag for flag in architectures if flag[0] != "-"],
    }


class NativeBuild(build_ext):
    """Builds both modules, records how it went, and goes on without what failed."""

    def run(self) -> None:
        inplace, self.inplace = self.inplace, False
        # An editable installation's build_temp is new every time; what is compiled once stays.
        kept = ROOT / "build" / f"editable-{sysconfig.get_platform()}"
        scratch = (kept if self.editable_mode else Path(self.build_temp).resolve()) / "ctxfast"
        report: dict[str, dict] = {}
        built = []
        for extension, key, builder in zip(
            list(self.extensions), ("cpu", "cuda"), (build_cpu, build_cuda), strict=True
        ):
            places = [Path(self.get_ext_fullpath(extension.name))]
            if inplace:
                places.append(ROOT / self.get_ext_filename(extension.name))
            for place in places:  # a module of an earlier build must not outlive a failed one
                place.unlink(missing_ok=True)
            started = time.monotonic()
            try:
                self.check_wanted(key)
                report[key] = {"status": "built", **builder(places[0], scratch)}
                report[key]["seconds"] = round(time.monotonic() - started, 1)
                built.append(extension)
            except BuildError as error:
                skipped = str(error).startswith("switched off")
                report[key] = {"status": "skipped" if skipped else "failed", "reason": str(error)}
                if key == "cpu" and environment_flag("CTXFAST_REQUIRE_NATIVE", False):
                    raise SystemExit(f"ctxfast: the CPU module did not build\n{error}") from None
            print(f"ctxfast: {key} module {report[key]['status']}", file=sys.stderr)
        self.extensions = built
        self.inplace = inplace
        log = json.dumps(report, indent=1) + "\n"
        package = ROOT / "ctxfast" if inplace else Path(self.build_lib) / "ctxfast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_log.json").write_text(log)
        if inplace:
            self.copy_extensions_to_source()

    def check_wanted(self, key: str) -> None:
        if sys.platform not in ("linux", "darwin"):
            raise BuildError(f"switched off: there is no native module for {sys.platform}")
        if not environment_flag("CTXFAST_NATIVE", True):
            raise BuildError("switched off by CTXFAST_NATIVE=0")
        if key == "cuda" and not environment_flag("CTXFAST_CUDA", True):
            raise BuildError("switched off by CTXFAST_CUDA=0")


class CleanBuild(build_py):
    """Copies the Python files into an empty directory, so that deleted ones do not reach a wheel."""

    def run(self) -> None:
        if not getattr(self, "editable_mode", False):
            shutil.rmtree(Path(self.build_lib) / "ctxfast", ignore_errors=True)
        super().run()


setup(
    packages=[
        *find_packages(include=["ctxfast*"]),
        "ctxfast.kernels",
        "ctxfast.benchmarks",
        "ctxfast.benchmarks.peers",
        "ctxfast.benchmarks.workloads",
    ],
    package_dir={"ctxfast.kernels": "kernels", "ctxfast.benchmarks": "benchmarks"},
    package_data={"ctxfast": ["py.typed"], "ctxfast.benchmarks": ["token_lengths.json", "*.css"]},
    ext_modules=[
        Extension("ctxfast._C", sources=[], optional=True),
        Extension("ctxfast._C_cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": NativeBuild, "build_py": CleanBuild},
)
