"""The thread that writes checkpoints: what it copies, how it fails, and that nothing waits for it too early or too late."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import lm_batch, tiny_gpt

from fastlm.engine import Engine
from fastlm.train import checkpoint
from fastlm.train.saver import Saver, Snapshot, model_on


class Bench:
    """A saver of an engine, what it said, and a gate before its files."""

    def __init__(self, root: Path, dtype: torch.dtype) -> None:
        self.engine = Engine(tiny_gpt(), dtype=dtype)
        self.said: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.saver = Saver(
            root, 2, self.engine.state_dict(), self.engine.model, lambda state: self.engine.flat.views(state["param"]),
            self.export, self.said.append,
        )  # fmt: skip

    def export(self, directory: Path, model: Any) -> None:
        assert self.gate.wait(30)
        model.save_pretrained(directory)

    def begin(self, step: int) -> None:
        self.saver.begin(step, self.engine.state_dict(), {}, config={}, progress={"score": None}, versions={})


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "checkpoints", request.param)
    yield bench
    bench.gate.set()
    bench.saver.close()


def test_what_is_written_is_the_state_at_that_step(bench: Bench, tmp_path: Path) -> None:
    bench.gate.clear()
    before = {name: tensor.clone() for name, tensor in bench.engine.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in bench.engine.model.state_dict().items()}
    bench.begin(1)
    bench.engine.step([lm_batch()])  # while it is being written
    assert not torch.equal(before["param"], bench.engine.flat.param)
    assert bench.saver.knows(1) and bench.saver.saved_at is None and bench.said == []
    bench.saver.settle(wait=False)
    assert bench.said == []
    bench.gate.set()
    bench.saver.settle()
    assert bench.saver.saved_at == 1 and bench.said[0].startswith("step 1: saved ")
    path = tmp_path / "checkpoints/step-00000001"
    found = checkpoint.load(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    exported = type(bench.engine.model).from_pretrained(path).state_dict()
    assert all(torch.equal(exported[name], tensor.float()) for name, tensor in weights.items())


def test_the_next_save_waits(bench: Bench) -> None:
    bench.gate.clear()
    bench.begin(1)
    second = threading.Thread(target=bench.begin, args=(2,))
    second.start()
    second.join(0.1)
    assert second.is_alive() and bench.said == []
    bench.gate.set()
    second.join(30)
    bench.saver.settle()
    assert [line.split(": saved")[0] for line in bench.said] == ["step 1", "step 2"]


def test_a_failure_is_said_and_the_next_save_tried(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench.begin(1)
    bench.saver.settle()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        bench.begin(2)
        bench.saver.settle()
    assert "WARNING: cannot write the checkpoint of step 2" in bench.said[-1] and "step-00000001" in bench.said[-1]
    assert bench.saver.saved_at == 1 and not bench.saver.knows(2)
    bench.begin(2)
    bench.saver.settle()
    assert bench.saver.saved_at == 2
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == ["step-00000002", "step-00000001"]


def test_what_cannot_be_removed_is_an_error_of_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "prune", fail)
    bench.begin(1)
    with pytest.raises(OSError, match="Input/output error"):
        bench.saver.settle()


def test_a_model_on_other_memory(bench: Bench) -> None:
    model, flat = bench.engine.model, bench.engine.flat
    there = Snapshot({"param": flat.param})
    other = model_on(model, flat.views(there.tensors["param"]))
    assert there.nbytes == flat.param.nbytes and other.lm_head.weight is other.wte.weight
    there.tensors["param"].zero_()
    assert all(not p.any() for p in other.parameters()) and all(p.any() for p in model.parameters())
    assert all(p.data_ptr() == flat.view(flat.param, n).data_ptr() for n, p in model.named_parameters())
