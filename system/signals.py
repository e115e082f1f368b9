"""Remembers the signals that ask a run to end until it can save."""

import os
import signal
import time


class Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopSignal:
    """Remember SIGTERM or SIGINT while this context is open; a second one ends the process."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # Seconds in which further signals are the first one once more: a cluster that ends a job sends
    # it to torchrun and to its processes, and torchrun sends it to these again.
    ECHO = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __init__(self):
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.number = None
        self.previous = {number: signal.signal(number, self.handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.number is None:
            self.number, self.arrival = number, time.monotonic()
        elif time.monotonic() - self.arrival >= self.ECHO:
            os._exit(128 + number)
