"""Runs work in several processes that end with their parent, and yields the results in order."""

import collections
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from text.errors import DataError


class Worker:
    """What a process that works was started with."""

    work: Callable[[Any], dict]


def in_order(
    work: Callable[[Any], dict], units: Iterable, done: dict[str, dict], num_workers: int
) -> Generator[tuple[Any, dict], None, None]:
    """Yield each unit with its result, in order.

    Args:
        work: makes the result of a unit; several workers get a pickle of it each, once.
        units: what is to be done; each has a `key`. The next ones are asked for as results come.
        done: results that exist, by the keys of their units.

    Raises:
        DataError: when a worker is killed.
    """
    if num_workers == 1 or not can_share_locks():
        for unit in units:
            yield unit, done.get(unit.key) or work(unit)

        return

    pending: collections.deque[tuple[Any, dict | Future]] = collections.deque()

    def next_result() -> tuple[Any, dict]:
        unit, result = pending.popleft()
        return unit, result.result() if isinstance(result, Future) else result

    try:
        with worker_processes(num_workers, work) as pool:
            for unit in units:
                with blocked_interrupts():
                    pending.append((unit, done.get(unit.key) or pool.submit(do_unit, unit)))

                if len(pending) == 3 * num_workers:
                    yield next_result()

            while pending:
                yield next_result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenizes was killed, for lack of memory or by a damaged file. The"
            " same command goes on; lower --num_dataset_processes."
        ) from error


def can_share_locks() -> bool:
    """Tell whether processes can share locks here; print a note when they cannot."""
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        reason = f"processes cannot share locks, as in /dev/shm: {error.strerror}"
        tqdm.write(f"Note:   a single process tokenizes; {reason}", file=sys.stderr)
        return False

    return True


@contextlib.contextmanager
def worker_processes(number: int, work: Callable[[Any], dict]) -> Iterator[ProcessPoolExecutor]:
    """Start processes that end when this one ends, even by a kill, or gives up the work."""
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with (
        lifeline,
        held,
        ProcessPoolExecutor(
            number, mp_context=context, initializer=start_worker, initargs=(lifeline, work)
        ) as pool,
    ):
        try:
            yield pool
        except BaseException:
            held.close()
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Hide Ctrl-C from processes that are started here; the terminal sends it to all of them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(lifeline, work: Callable[[Any], dict]) -> None:
    """Keep the work of this process, and end it when the lifeline is closed, even by a kill."""
    Worker.work = work

    # The lock that tqdm makes by default would be reported as leaked by a process that ends so.
    tqdm.set_lock(threading.RLock())

    def wait() -> None:
        with contextlib.suppress(EOFError, OSError):
            lifeline.recv_bytes()

        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def do_unit(unit) -> dict:
    return Worker.work(unit)
