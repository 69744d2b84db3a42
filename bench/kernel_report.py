"""What ptxas made of the CUDA kernels: registers, shared memory, stack, spills and code, each.

    nvcc ... -Xptxas -v -c csrc/cuda/kernels.cu -o kernels.o 2> kernels.log
    python bench/kernel_report.py kernels.o --log kernels.log

    python bench/kernel_report.py pymeta/_native*.so --json kernels.json

Needs no GPU. Two sources, which complete each other where both are given:

    --log FILE    what `nvcc -Xptxas -v` printed: all but the code's size. Spills stand here alone.
    FILE          a cubin, an object file or a built extension, which `cuobjdump` takes apart: all
                  but spills. Their room is part of the stack.

A kernel's registers hold for the functions it calls; functions that ptxas kept apart have spills
of their own, which count as the kernel's. Static shared memory is that of the kernel's own
variables; what the system takes besides (1,024 bytes from sm_90 on) is not in it.

Exits with 1 where a kernel stores more bytes to spilled registers than `--fail-on-spills` allows,
with 2 where there is nothing to report or nothing is known of spills that are to be judged.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


@dataclass
class Kernel:
    """One kernel on one architecture; None is for what no source told."""

    arch: str
    symbol: str
    name: str = ""
    registers: int | None = None
    static_shared_bytes: int | None = None
    stack_bytes: int | None = None
    spill_store_bytes: int | None = None  # of the kernel and the functions it calls
    spill_load_bytes: int | None = None
    code_bytes: int | None = None


Kernels = dict[tuple[str, str], Kernel]  # by architecture and symbol


class Unusable(Exception):
    """A file or a program that does not give what is needed; the message says which."""


# ---- what ptxas says ----------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\S+)' for '(?P<arch>\w+)'")
_PROPERTIES = re.compile(r"Function properties for '?(?P<symbol>[^\s']+)")
_SPILLS = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_CUMULATIVE = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


def read_log(text: str) -> Kernels:
    """The kernels in the output of `ptxas -v`.

    The functions that a kernel calls come behind it, and before the next kernel.
    """
    kernels: Kernels = {}
    kernel = None
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            kernel = Kernel(found["arch"], found["symbol"], spill_store_bytes=0, spill_load_bytes=0)
            kernels[kernel.arch, kernel.symbol] = kernel
        elif kernel is None:
            continue
        elif found := _SPILLS.search(line):
            if kernel.stack_bytes is None:
                kernel.stack_bytes = int(found["stack"])
            kernel.spill_store_bytes += int(found["stores"])
            kernel.spill_load_bytes += int(found["loads"])
        elif found := _USED.search(line):
            kernel.registers = int(found["registers"])
            shared, stack = _SHARED.search(line), _CUMULATIVE.search(line)
            kernel.static_shared_bytes = int(shared[1]) if shared else 0
            if stack:
                kernel.stack_bytes = int(stack[1])
    return kernels


# ---- what lies in a file ------------------------------------------------------------------------

_ARCH = re.compile(r"^arch = (\w+)", re.MULTILINE)
_ARCH_OF_CUBIN = re.compile(r"^64-bit ELF: .*\bsm=(\d+)", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
# A line of a table of sections: index, offset, size, entry size, alignment (hexadecimal), type, ...
_CODE = re.compile(r"^ *\w+ +\w+ +([0-9a-f]+) +\w+ +\w+ +PROGBITS .*\s\.text\.(\S+)$", re.MULTILINE)
_RESERVED = 1024  # shared memory of each block that the system takes from sm_90 on


def program(name: str) -> str:
    """Where a program of the CUDA toolkit is: on the PATH, or beside nvcc's usual place."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise Unusable(f"{name} is neither on the PATH nor in /usr/local/cuda/bin")
    return found


def output_of(*command: str) -> str:
    """What a program prints; Unusable where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unusable(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def read_usage(text: str, arch: str) -> Kernels:
    """The kernels of one architecture in the output of `cuobjdump -res-usage`."""
    kernels: Kernels = {}
    for symbol, registers, stack, shared in _USAGE.findall(text):
        own = int(shared)
        if int(re.sub(r"\D", "", arch)) >= 90 and own >= _RESERVED:
            own -= _RESERVED
        kernels[arch, symbol] = Kernel(
            arch,
            symbol,
            registers=int(registers),
            static_shared_bytes=own,
            stack_bytes=int(stack),
        )
    return kernels


def by_architecture(text: str, whole: str | None) -> list[tuple[str, str]]:
    """(architecture, what cuobjdump says of it) in turn; `whole` is that of a cubin."""
    if whole is not None:
        return [(whole, text)]
    _, *parts = _ARCH.split(text)
    return list(zip(parts[::2], parts[1::2], strict=True))


def read_file(path: Path) -> Kernels:
    """The kernels of a cubin, an object file, a library or a program."""
    if not path.is_file():
        raise Unusable(f"{path}: no such file")
    usage = output_of(program("cuobjdump"), "-res-usage", str(path))
    elf = output_of(program("cuobjdump"), "-elf", str(path))
    cubin = None if _ARCH.search(usage) else _ARCH_OF_CUBIN.search(elf)
    arch = f"sm_{cubin[1]}" if cubin else None
    kernels: Kernels = {}
    for name, said in by_architecture(usage, arch):
        kernels |= read_usage(said, name)
    for name, said in by_architecture(elf, arch):
        for size, symbol in _CODE.findall(said):
            if (name, symbol) in kernels:
                kernels[name, symbol].code_bytes = int(size, 16)
    return kernels


# ---- together -----------------------------------------------------------------------------------


def merge(several: Iterable[Kernels]) -> list[Kernel]:
    """One list; of what two sources tell, the first one's word."""
    whole: Kernels = {}
    for kernels in several:
        for key, kernel in kernels.items():
            known = whole.setdefault(key, kernel)
            for field in fields(Kernel):
                if getattr(known, field.name) is None:
                    setattr(known, field.name, getattr(kernel, field.name))
    return [whole[key] for key in sorted(whole)]


def demangle(kernels: list[Kernel]) -> None:
    """Give each kernel its name in C++, without return type and arguments; its symbol at worst."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    symbols = [kernel.symbol for kernel in kernels]
    names = symbols
    if tool and symbols:
        done = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True)
        lines = done.stdout.splitlines()
        names = lines if len(lines) == len(symbols) else symbols
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = short(name)


_NAMELESS = re.compile(r"(?:\(anonymous namespace\)|_GLOBAL__N_\w+|\(anonymous\)|<unnamed>)::")


def short(name: str) -> str:
    """A demangled name without return type, parameters and all but the last namespace.

    That one says for which real type a kernel was compiled.
    """
    name = _NAMELESS.sub("", name)
    name = re.sub(r"\([\w:]+\)(\d+)", r"\1", name)  # an enumerator as a template's argument
    head = name.partition("(")[0]
    begins, depth = [0], 0
    for place, letter in enumerate(head):
        depth += (letter == "<") - (letter == ">")
        if depth == 0 and letter == " ":
            begins = [place + 1]
        elif depth == 0 and head.startswith("::", place):
            begins.append(place + 2)
    return head[begins[-2 if len(begins) > 1 else -1] :]


def table(kernels: list[Kernel]) -> str:
    """A Markdown table."""
    rows = [
        "| kernel | arch | registers | static shared | stack | spill stores | spill loads | code |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for k in kernels:
        numbers = (
            *(k.registers, k.static_shared_bytes, k.stack_bytes),
            *(k.spill_store_bytes, k.spill_load_bytes, k.code_bytes),
        )
        cells = ("-" if n is None else f"{n:,}" for n in numbers)
        rows.append(f"| `{k.name}` | {k.arch} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", "Shared memory, stack, spills and code in bytes."])


def spilling(kernels: list[Kernel], allowed: int) -> list[str]:
    """The kernels that spill more than `allowed` bytes, in words; Unusable where none tells."""
    unknown = [k.name for k in kernels if k.spill_store_bytes is None]
    if unknown:
        raise Unusable(f"nothing is known of the spills of {', '.join(unknown)}: give a --log")
    return [
        f"{k.name} ({k.arch}) stores {k.spill_store_bytes:,} bytes to spilled registers, "
        f"allowed are {allowed:,}"
        for k in kernels
        if k.spill_store_bytes > allowed
    ]


def collect(files: Iterable[Path], logs: Iterable[Path]) -> list[Kernel]:
    """All kernels of the files and logs, with their names."""
    kernels = merge([*(read_log(log.read_text()) for log in logs), *map(read_file, files)])
    if not kernels:
        raise Unusable("no CUDA kernels found")
    demangle(kernels)
    return kernels


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    head, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--log", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--fail-on-spills", type=int, metavar="BYTES", help="allowed in a kernel")
    given = parser.parse_args(arguments)
    try:
        kernels = collect(given.files, given.log)
        print(table(kernels))
        if given.json:
            given.json.write_text(json.dumps([asdict(k) for k in kernels], indent=1) + "\n")
        wrong = [] if given.fail_on_spills is None else spilling(kernels, given.fail_on_spills)
    except (Unusable, OSError) as error:
        print(f"kernel_report: {error}", file=sys.stderr)
        return 2
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
