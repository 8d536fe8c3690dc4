"""Builds the native kernels in csrc/ with ninja; everything else about the package is in pyproject.toml.

Each variant of the CPU backend is an extension module of its own, made from the same sources with other
flags, so that no inline function compiled for a newer chip can be linked into the baseline. What was built,
what was not and why goes into fastlm/_build.json, which `fastlm info` prints. A machine without a compiler
gets the package without native kernels; a compiler that fails on our sources is an error.

Environment: CXX; NVCC or CUDA_HOME; FASTLM_CUDA=0|1|auto (auto: build when nvcc is found);
FASTLM_CPU_ISAS=portable,avx2,... builds only those (portable is always built); MAX_JOBS.
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
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WINDOWS, APPLE = sys.platform == "win32", sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Everything but NaN and the order of operations may be optimised; both are promised to callers.
COMMON = (
    "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
ISA_FLAGS = {
    "portable": "-march=x86-64" if X86 else "",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16 -mprefer-vector-width=512",
}
CUDA_ARCHS = ("80", "90", "100")
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace")


def find_program(given: str | None, candidates: list[str]) -> str | None:
    """The program that the user named, and no other, or else the first candidate there is."""
    for name in [shlex.split(given)[0]] if given else candidates:
        if path := shutil.which(name):
            return path
    return None


def switch(name: str, allowed: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in allowed:
        sys.exit(f"fastlm: {name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    candidates = [*(str(Path(h) / "bin" / "nvcc") for h in homes if h), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return find_program(os.environ.get("NVCC"), candidates)


def nvcc_command(nvcc: str) -> list[str]:
    """nvcc and the host compiler that the user named, if it is a bare program."""
    given = shlex.split(os.environ.get("CXX", ""))
    host = find_program(given[0], []) if len(given) == 1 else None
    return [nvcc, "-ccbin", host] if host else [nvcc]


class Plan:
    """What can be built here, and for each module that cannot, why."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}
        self.cpu: dict[str, str] = {}  # module -> flags of its instruction set
        self.cuda_archs: list[str] = []
        self.openmp = False
        self.openmp_missing = ""
        cuda = switch("FASTLM_CUDA", ("0", "1", "auto"), "auto")
        self.cxx = find_program(os.environ.get("CXX"), ["c++", "g++", "clang++"])
        self.cxx_flags = [
            *shlex.split(os.environ.get("CXX", ""))[1:],
            *shlex.split(os.environ.get("CXXFLAGS", "")),
        ]
        self.nvcc = find_nvcc()
        obstacle = self.obstacle()
        self.plan_cpu(obstacle)
        self.plan_cuda(cuda, obstacle)

    def obstacle(self) -> str:
        if WINDOWS:
            return "native kernels need GCC or clang and are not built on Windows"
        if self.cxx is None:
            asked = f" (CXX={os.environ['CXX']})" if os.environ.get("CXX") else " (tried c++, g++, clang++)"
            return f"no C++ compiler was found at install{asked}"
        if not self.compiles(["-std=c++17"], "#include <variant>\nint main() { return 0; }"):
            return f"the C++ compiler {Path(self.cxx).name} cannot build a C++17 program"
        include = sysconfig.get_paths()["include"]
        if not (Path(include) / "Python.h").exists():
            return "Python's headers (Python.h) were not found at install; Debian has them in python3-dev"
        return ""

    def compiles(self, flags: list[str], source: str) -> bool:
        assert self.cxx
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.cpp"
            path.write_text(source + "\n")
            command = [self.cxx, *self.cxx_flags, str(path), "-o", str(path.with_suffix("")), *flags]
            return run(command).returncode == 0

    def plan_cpu(self, obstacle: str) -> None:
        isas = list(ISA_FLAGS) if X86 else ["portable"]
        setting = os.environ.get("FASTLM_CPU_ISAS", "")
        wanted = [w.strip() for w in setting.split(",") if w.strip()]
        if unknown := set(wanted) - set(isas):
            sys.exit(f"fastlm: FASTLM_CPU_ISAS may name {', '.join(isas)}; got {', '.join(sorted(unknown))}")
        for isa in isas:
            module, flags = f"_cpu_{isa}", ISA_FLAGS[isa]
            if obstacle:
                self.skipped[module] = obstacle
            elif wanted and isa not in wanted and isa != "portable":
                self.skipped[module] = f"left out by FASTLM_CPU_ISAS={setting} at install"
            elif flags and not self.compiles(shlex.split(flags), "int main() { return 0; }"):
                self.skipped[module] = f"the C++ compiler {Path(self.cxx or '').name} does not know {flags}"
            else:
                self.cpu[module] = flags
        if obstacle:
            return
        probe = "#include <omp.h>\nint main() { return omp_get_max_threads() > 0 ? 0 : 1; }"
        if APPLE:
            self.openmp_missing = "torch brings its own libomp here, and a second one ends the process: one thread"
        elif self.compiles(["-fopenmp"], probe):
            self.openmp = True
        else:
            self.openmp_missing = f"{Path(self.cxx or '').name} has no OpenMP: CPU kernels run on one thread"

    def plan_cuda(self, cuda: str, obstacle: str) -> None:
        reason = ""
        if cuda == "0":
            reason = "left out by FASTLM_CUDA=0 at install"
        elif obstacle:
            reason = obstacle
        elif self.nvcc is None:
            reason = "nvcc was not found at install (PATH, CUDA_HOME and /usr/local/cuda were searched)"
        elif not list((ROOT / "csrc" / "cuda").glob("*.cu")):
            reason = "csrc/cuda holds no kernels"
        if not reason:
            assert self.nvcc
            known = re.findall(r"sm_(\d+)", run([self.nvcc, "--list-gpu-code"]).stdout)
            self.cuda_archs = [a for a in CUDA_ARCHS if a in known]
            if not self.cuda_archs:
                reason = f"nvcc knows none of {', '.join('sm_' + a for a in CUDA_ARCHS)}"
        if reason and cuda == "1":
            sys.exit(f"fastlm: FASTLM_CUDA=1 was asked for, but {reason}")
        if reason:
            self.skipped["_cuda"] = reason

    @property
    def modules(self) -> list[str]:
        return [*self.cpu, *(["_cuda"] if self.cuda_archs else [])]

    def record(self) -> dict[str, object]:
        """The contents of _build.json: versions and flags, no path of this machine."""
        cxx = re.search(r".+", run([self.cxx, "--version"]).stdout) if self.cxx else None
        nvcc = re.search(r"release ([\d.]+)", run([self.nvcc, "--version"]).stdout) if self.nvcc else None
        return {
            "built": {m: self.cpu[m] if m in self.cpu else self.arch_names() for m in self.modules},
            "skipped": self.skipped,
            "flags": COMMON,
            "compiler": cxx[0] if cxx else "",
            "nvcc": nvcc[1] if nvcc else "",
            "openmp": self.openmp,
            "openmp_missing": self.openmp_missing,
            "python": platform.python_version(),
        }

    def arch_names(self) -> str:
        return " ".join(f"sm_{a}" for a in self.cuda_archs)


def escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_rules(plan: Plan) -> list[str]:
    """How C++ and CUDA are compiled and linked."""
    cxx = " ".join(map(shlex.quote, [plan.cxx or "", *plan.cxx_flags]))
    unique = "-fno-gnu-unique" if plan.compiles(["-fno-gnu-unique"], "int main() {}") else ""
    shared = "-bundle -undefined dynamic_lookup" if APPLE else "-shared -Wl,-Bsymbolic -Wl,--as-needed"
    nvcc = shlex.join(nvcc_command(plan.nvcc or ""))
    archs = [f"-gencode arch=compute_{a},code=sm_{a}" for a in plan.cuda_archs]
    if archs:  # and PTX of the newest, for GPUs to come
        archs.append(f"-gencode arch=compute_{plan.cuda_archs[-1]},code=compute_{plan.cuda_archs[-1]}")
    compiled = ["  depfile = $out.d", "  deps = gcc", "  description = $out"]
    return [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {COMMON} {unique} $flags -Icsrc -c $in -o $out",
        *compiled,
        "rule nvcc",
        f"  command = {nvcc} -MMD -MF $out.d {shlex.join(NVCC_FLAGS)} --threads 2 {' '.join(archs)}"
        " -Icsrc -c $in -o $out",
        *compiled,
        "rule link",
        f"  command = {cxx} {shared} -o $out $in {'-fopenmp' if plan.openmp else ''}",
        "  description = $out",
        "rule link_cuda",
        f"  command = {nvcc} -shared -nodlink -cudart static"
        " -Xlinker -Bsymbolic,--exclude-libs,ALL -o $out $in",
        "  description = $out",
    ]


def write_ninja(plan: Plan, folder: Path, suffix: str) -> Path:
    """A build.ninja, with every path of ours relative to the source tree."""
    import pybind11

    includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
    # Headers that live outside the tree must not leave their path in what is built.
    maps = [f"-ffile-prefix-map={d}=include{i}" for i, d in enumerate(includes)]
    lines = ["ninja_required_version = 1.5", f"builddir = {escape(str(folder))}", *ninja_rules(plan)]

    def compile(source: str, target: Path, flags: str = "") -> str:
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        out = escape(str(target / f"{Path(source).name}.o"))
        lines.extend([f"build {out}: {rule} {escape(source)}", f"  flags = {flags}"])
        return out

    # The binding is shared by all, so it runs on any chip.
    system = " ".join([*(f"-isystem {shlex.quote(d)}" for d in includes), *map(shlex.quote, maps)])
    binding = compile("csrc/module.cpp", folder, f"{ISA_FLAGS['portable']} {system}")
    openmp = "-fopenmp" if plan.openmp else "-Wno-unknown-pragmas"
    for module in plan.modules:
        cuda = module == "_cuda"
        isa = plan.cpu.get(module, "")
        label = plan.arch_names() if cuda else f"{module.removeprefix('_cpu_')} {isa}".strip()
        defines = f"-DFASTLM_MODULE={module} '-DFASTLM_BUILD=\"{label}\"'"
        objects = [binding, compile("csrc/init.cpp", folder / module, defines)]
        for source in sorted((ROOT / "csrc").glob("cuda/*.cu" if cuda else "cpu/*.cpp")):
            relative = source.relative_to(ROOT).as_posix()
            objects.append(compile(relative, folder / module, f"{isa} {openmp}"))
        target = escape(str(folder / f"{module}{suffix}"))
        lines.append(f"build {target}: {'link_cuda' if cuda else 'link'} {' '.join(objects)}")
    path = ROOT / folder / "build.ninja"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return path.relative_to(ROOT)


def run_ninja(file: Path) -> None:
    try:
        import ninja

        program = str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        program = shutil.which("ninja") or sys.exit("fastlm: ninja was not found; pip install ninja")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([program, "-f", str(file), *jobs], cwd=ROOT)
    if done.returncode:
        sys.exit(
            "fastlm: the native kernels failed to compile, see above; FASTLM_CUDA=0 leaves out the CUDA ones"
        )


class Build(build):
    # Also with nothing to compile: build_ext writes the record that says why.
    sub_commands = [("build_py", None), ("build_ext", None)]


class BuildExt(build_ext):
    def target(self) -> Path:
        return ROOT / "fastlm" if self.inplace or self.editable_mode else Path(self.build_lib) / "fastlm"

    def suffix(self) -> str:
        return sysconfig.get_config_var("EXT_SUFFIX")

    def run(self) -> None:
        target = self.target()
        target.mkdir(parents=True, exist_ok=True)
        if PLAN.modules:
            folder = Path("build") / "native" / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
            run_ninja(write_ninja(PLAN, folder, self.suffix()))
            for module in PLAN.modules:
                name = module + self.suffix()
                # A new file, never written in place: a running process may have the old one mapped.
                shutil.copy2(ROOT / folder / name, target / f"{name}.new")
                os.replace(target / f"{name}.new", target / name)
        for module in PLAN.skipped:
            (target / (module + self.suffix())).unlink(missing_ok=True)
        (target / "_build.json").write_text(json.dumps(PLAN.record(), indent=2) + "\n")
        for line in self.summary():
            print(f"fastlm: {line}", file=sys.stderr)

    def summary(self) -> list[str]:
        lines = [f"built fastlm.{m}" for m in PLAN.modules]
        lines += [f"fastlm.{m} was NOT built: {why}" for m, why in PLAN.skipped.items()]
        if not PLAN.cpu:
            lines.append("the reference and Triton backends work without native kernels")
        if PLAN.openmp_missing:
            lines.append(PLAN.openmp_missing)
        return lines

    def get_outputs(self) -> list[str]:
        names = [m + self.suffix() for m in PLAN.modules] + ["_build.json"]
        return [str(self.target() / n) for n in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":  # `fastlm kernels compile` imports how CUDA is compiled
    PLAN = Plan()
    setup(
        cmdclass={"build": Build, "build_ext": BuildExt},
        # Named here so that the wheel is tagged for this platform; write_ninja knows how they are made.
        ext_modules=[Extension(f"fastlm.{m}", []) for m in PLAN.modules],
    )
