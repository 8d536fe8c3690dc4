"""Ctrl-C and SIGTERM: the first asks the loop to stop after its step, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["Interrupts"]

_SHOW_CURSOR = b"\x1b[?25h"


class Interrupts:
    """``with Interrupts() as interrupts:`` and then poll ``interrupts.received``.

    After the first signal the system's default action is back in place, so a second one ends the process even
    in the middle of a long call into a kernel. That is safe: checkpoints are renamed into place when whole.
    Outside the main thread Python allows no handlers; nothing is ever received there.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # os.write, because a print here may meet itself inside a print that the signal interrupted.
        cursor = _SHOW_CURSOR if os.isatty(2) else b""
        name = self.received.name.encode()
        os.write(2, cursor + b"\n" + name + b": finishing this step, then saving; once more stops at once\n")
