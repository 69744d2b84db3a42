"""One contestant in a process of its own: `python -m pymeta.bench.worker NAME DEVICE`.

Thread counts, XLA's flags and a core to stay on can be set only before a library starts, and two
libraries' thread pools in one process disturb each other: so each contestant has its process, and
`session.py` asks them in turn. Requests are lines of JSON on
standard input, and so are the answers on standard output:

    {"do": "prepare", "case": CASE as JSON, "data": PATH of an .npz, "folder": PATH,
     "block_threads": [N...]}
        -> {"variants": {VARIANT: {"compile_s", "note", "loss", "threads", "clock",
                                   "gradients": PATH of an .npz} or {"error": WHY}}}
    {"do": "time", "variant": VARIANT, "seconds": S}
        -> {"times": [seconds of each call], "burst": seconds a call in a burst}
    {"do": "forget"}                 -> {"variants": {}}, and the device's memory is free again
    {"do": "peak", "seconds": S}     -> {"flops": FLOP/s of one core by fused multiply-adds}
    {"do": "device"}                 -> {"facts": {...}, "peaks": {...}} of the CUDA device

A burst is measured on a device only: a CPU works while its caller waits.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pymeta.bench import contestants, devices, ours, verify
from pymeta.bench.cases import Case, Data
from pymeta.bench.contestants import Options, Prepared, Variants, on_host


def described(
    name: str, variant: str, prepared: Prepared | str, case: Case, path: Path
) -> dict[str, Any]:
    """What to answer for a variant: its numbers, in a file, and how they came about."""
    if isinstance(prepared, str):
        return {"error": prepared}
    loss, results = prepared.read(prepared.run())
    tasks = verify.sample(case)
    some = tasks if case.job == "finetune" and len(tasks) < case.tasks else None
    arrays = [on_host(result, some) for result in results]
    if case.job == "finetune" and some is None and len(arrays[0]) < case.tasks:  # a loop
        prepared.scale = case.tasks / len(arrays[0])
        prepared.note += f", {len(arrays[0])} of {case.tasks} tasks, scaled"
    np.savez(path, *arrays)
    return {
        "compile_s": prepared.compile_s,
        "note": prepared.note,
        "loss": None if loss is None else float(on_host(loss).reshape(())),
        "threads": prepared.threads,
        "clock": prepared.clock,
        "gradients": str(path),
    }


class Server:
    """Answers requests; keeps what was prepared last."""

    def __init__(self, name: str, kind: str) -> None:
        """For one contestant on one kind of device."""
        self.name, self.kind = name, kind
        self.contestant = contestants.of(kind)[name]
        self.device: devices.Device | None = None
        self.variants: Variants = {}

    def forget(self) -> dict[str, Any]:
        """Let go of what was prepared."""
        self.variants = {}
        gc.collect()
        if self.device is None:
            # JAX looks for its own device
            jax = "jax" in self.contestant.packages
            self.device = devices.make("cpu" if jax else self.kind)
        self.device.empty()
        return {"variants": {}}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Get a case ready, and answer with its numbers."""
        self.forget()
        assert self.device is not None
        case = Case.read(request["case"])
        if case.job not in self.contestant.jobs:
            return {"variants": {}}
        data = Data.load(Path(request["data"])).of(case.order())
        options = Options(block_threads=request.get("block_threads", []))
        self.variants = self.contestant.make(case, data, self.device, options)
        folder, answer = Path(request["folder"]), {}
        for i, (variant, prepared) in enumerate(self.variants.items()):
            path = folder / f"{self.name.replace(' ', '_')}_{i}.npz"
            answer[variant] = described(self.name, variant, prepared, case, path)
        return {"variants": answer}

    def time(self, request: dict[str, Any]) -> dict[str, Any]:
        """A turn of one variant."""
        gc.collect()
        prepared, seconds = self.variants[request["variant"]], request["seconds"]
        assert isinstance(prepared, Prepared)
        times = devices.timed(prepared.run, seconds, wait=prepared.wait)
        answer: dict[str, Any] = {"times": [prepared.scale * t for t in times]}
        if self.kind != "cpu":
            calls = devices.burst_length(float(np.median(times)), seconds)
            answer["burst"] = prepared.scale * prepared.burst(prepared.run, calls)
        return answer

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; {"error": ...} where it went wrong."""
        try:
            if request["do"] == "prepare":
                return self.prepare(request)
            if request["do"] == "time":
                return self.time(request)
            if request["do"] == "forget":
                return self.forget()
            if request["do"] == "device":
                device = devices.make(self.kind)
                return {
                    "facts": devices.facts(device),
                    "peaks": devices.measured_peaks(device),
                }
            return {"flops": ours.peak(request["seconds"])}
        except Exception as error:  # reported in the table; the other contestants go on
            return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not pass for an answer
    server = Server(*sys.argv[1:])
    for line in sys.stdin:
        print(json.dumps(server.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
