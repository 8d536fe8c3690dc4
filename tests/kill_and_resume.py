"""Kills a training run with SIGKILL at random moments, resumes it, compares it with one that was left alone.

    python tests/kill_and_resume.py --kills 20

Every life of the run is a process of its own, forked from this one after its imports so that a life costs
no start-up. It is killed after a random time, which falls into the reading of the data, a step, a validation
or a save; saves are frequent, and slow if asked, so many kills hit one while the steps go on. When the run
has reached its end it must equal the undisturbed one bit for bit: every tensor of the last checkpoint, the
exported model, and every step's numbers, each step once. Runs are started until the kills are used up.
Exit status 1 on any difference.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# One thread: a process may fork safely as long as no thread pool has been started.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TIMINGS = ("seconds", "tokens_per_second")


def command(run: Path, options: argparse.Namespace) -> list[str]:
    text = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
    return [
        "train", "--preset", "tiny", "--out", str(run), "--data", str(text), "--tokenizer", "bytes",
        "--seq-len", "32", "--batch-size", "2", "--grad-accum", "2", "--n-embd", "32", "--n-layer", "1",
        "--dropout", "0.1", "--steps", str(options.steps), "--warmup", "5", "--save-every", "2",
        "--eval-every", "5", "--eval-batches", "1", "--log-every", "3", "--sample-tokens", "0", "--no-audit",
        "--dtype", options.dtype, "--device", "cpu",
    ]  # fmt: skip


def start(run: Path, options: argparse.Namespace) -> int:
    """Starts or resumes the run in a new process and returns its id."""
    arguments = command(run, options)
    if (run / "config.json").exists():
        arguments = ["train", "--out", str(run), "--resume"]
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        from fastlm.cli import main
        from fastlm.train import checkpoint

        checkpoint.write_tensors = slowed(checkpoint.write_tensors, options.slow_writes)
        with open(run.with_suffix(".log"), "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            status = main(arguments)
            sys.stdout.flush()
    finally:
        os._exit(status)


def slowed(write: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """A write that takes so much longer, half of it with its file half written."""

    def slow(path: Path, tensors: Any) -> Any:
        if seconds:
            part = dict(list(tensors.items())[:2])
            write(path, part)
            time.sleep(seconds / 2)
            path.unlink()
            time.sleep(seconds / 2)
        return write(path, tensors)

    return slow


def wait(child: int, run: Path) -> float:
    """Waits for a life to end by itself; returns its seconds."""
    began = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        print(run.with_suffix(".log").read_text()[-3000:])
        raise SystemExit(f"a run ended with status {status}")
    return time.monotonic() - began


def kill_after(child: int, seconds: float) -> bool:
    """Kills a life unless it ends before; returns whether it was killed."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(left, 0.002))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def records(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def last_record(run: Path) -> int:
    """The last step of which there is a whole record; -1 if there is none."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else -1


def compare(run: Path, reference: Path, steps: int) -> list[str]:
    """What differs between two finished runs."""
    differences = []
    last = f"checkpoints/step-{steps:08d}"
    for name in (f"{last}/state.safetensors", f"{last}/model.safetensors", "model/model.safetensors"):
        if (run / name).read_bytes() != (reference / name).read_bytes():
            differences.append(f"{name} differs")
    mine, theirs = records(run), records(reference)
    if [line["step"] for line in mine] != list(range(steps + 1)):
        differences.append(f"metrics.jsonl has steps {[line['step'] for line in mine]}")
    differences += [f"metrics differ: {a} and {b}" for a, b in zip(mine, theirs, strict=False) if a != b]
    return differences


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--slow-writes", type=float, default=0.0, help="seconds that each checkpoint takes longer")
    parser.add_argument("--keep", action="store_true", help="keep the runs")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    dice = random.Random(seed)
    directory = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    os.environ.setdefault("FASTLM_CACHE", str(directory / "cache"))
    print(f"{options.kills} kills, seed {seed}, {options.dtype}, in {directory}", flush=True)

    # Imports only: nothing here may compute before the forks.
    for name in ("fastlm.train.loop", "torch.utils.tensorboard", "matplotlib.figure"):
        importlib.import_module(name)

    reference = directory / "reference"
    whole = wait(start(reference, options), reference)
    print(f"undisturbed: {whole:.1f} s", flush=True)

    kills = in_save = beside = resumes = runs = 0
    failed = False
    while kills < options.kills:
        runs += 1
        run = directory / f"run-{runs}"
        alive = True
        while alive and kills < options.kills:
            resumes += (run / "checkpoints").is_dir()
            alive = kill_after(start(run, options), dice.uniform(0, whole / 2))
            if alive:
                kills += 1
                halves = list((run / "checkpoints").glob(".unfinished-step*"))
                in_save += bool(halves)
                went_on = any(last_record(run) > int(half.name.split("-")[2]) for half in halves)
                beside += went_on
                newest = max((p.name for p in (run / "checkpoints").glob("step-*")), default="no checkpoint")
                print(f"kill {kills}: {newest}{', in the middle of a save' if halves else ''}"
                      f"{', steps later' if went_on else ''}", flush=True)  # fmt: skip
        if alive:
            wait(start(run, options), run)
        differences = compare(run, reference, options.steps)
        failed |= bool(differences)
        print(f"run {runs}: {'; '.join(differences) or 'bitwise equal to the undisturbed one'}", flush=True)
    print(f"{kills} kills, {in_save} of them in the middle of a save, {beside} with steps recorded since it began, "
          f"{resumes} resumes, {runs} runs")  # fmt: skip
    if not options.keep and not failed:
        shutil.rmtree(directory)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
