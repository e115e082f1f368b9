"""Remembers the signals that ask a run to end until it can save."""

import os
import signal
import threading
import time


class Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopSignal:
    """Remember SIGTERM, SIGINT or SIGHUP while this context is open; a second one ends the process.

    SIGHUP comes when a terminal is closed, or its connection breaks; nohup has it ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    # Seconds in which further signals are the first one once more: a cluster that ends a job sends
    # it to torchrun and to its processes, and torchrun sends it to these again.
    ECHO = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.number = None
        self.previous = {number: signal.signal(number, self.handle) for number in heard_signals()}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.number is None:
            self.number, self.arrival = number, time.monotonic()
        elif time.monotonic() - self.arrival >= self.ECHO:
            os._exit(128 + number)


def heard_signals() -> list[signal.Signals]:
    """Return the signals that are to be remembered here: only the main thread can ask for them."""
    if threading.current_thread() is not threading.main_thread():
        return []

    is_deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [each for each in StopSignal.SIGNALS if not (is_deaf and each == signal.SIGHUP)]
