"""The lock between processes: one holds it, the dead hold nothing."""

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import CONTEXT
from system import locks
from system.locks import HeldError, Lock


def refuse_to_wait(holder: str) -> None:
    raise AssertionError(f"waits for {holder}")


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()

    return process.pid


def write_lock(path: Path, **changes) -> dict:
    holder = {
        "host": locks.host_name(),
        "process": os.getppid(),
        "started": locks.start_of(os.getppid()),
        "token": "theirs",
        **changes,
    }
    path.write_text(json.dumps(holder))

    return holder


def test_the_lock_is_there_while_it_is_held_and_no_longer(tmp_path):
    path = tmp_path / "lock"

    with Lock(path, on_wait=refuse_to_wait):
        assert json.loads(path.read_text())["process"] == os.getpid()

    assert not list(tmp_path.iterdir())


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), Lock(tmp_path / "lock", on_wait=refuse_to_wait):
        raise KeyError

    assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_written_is_not_left_half_written(tmp_path, monkeypatch):
    def fill_the_disk(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "missing" / "lock")

    monkeypatch.setattr(locks.json, "dump", fill_the_disk)

    with pytest.raises(OSError, match="No space"):
        Lock(tmp_path / "lock")

    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_just_given_back_is_not_removed(tmp_path, monkeypatch):
    """Between two looks at it another process may have taken it."""
    path, removed = tmp_path / "lock", []
    real = Lock.create
    answers = iter([False])
    monkeypatch.setattr(Lock, "create", lambda self: next(answers, None) is None and real(self))
    monkeypatch.setattr(locks, "remove", lambda *args: removed.append(args))

    with Lock(path):
        pass

    assert not removed


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"process": dead_process()}, id="the process is dead"),
        pytest.param({"process": os.getpid(), "started": None}, id="its number is ours"),
        pytest.param({"started": "1"}, id="its number is another's"),
    ],
)
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, changes):
    write_lock(tmp_path / "lock", **changes)

    with Lock(tmp_path / "lock", on_wait=refuse_to_wait):
        pass

    assert not list(tmp_path.iterdir())


def test_a_process_that_has_ended_holds_nothing_though_nobody_asked_how(tmp_path):
    """As where the first process of a container waits for none."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = locks.start_of(process.pid)
    write_lock(tmp_path / "lock", process=process.pid, started=started)
    process.stdin.close()

    while locks.start_of(process.pid) == started:
        pass

    with Lock(tmp_path / "lock", on_wait=refuse_to_wait):
        pass

    process.wait()


def test_a_process_whose_name_is_no_text_has_a_start():
    """Linux takes any bytes as a name."""
    name = r"open('/proc/self/comm', 'wb').write(b'\xff) (')"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{name}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()

    assert int(locks.start_of(process.pid)) >= int(locks.start_of(os.getpid()))

    process.communicate()


def test_a_process_that_died_while_it_took_a_lock_over_stops_nobody(tmp_path):
    write_lock(tmp_path / "lock", process=dead_process())
    write_lock(tmp_path / "lock.breaking", process=dead_process())

    with Lock(tmp_path / "lock", on_wait=refuse_to_wait):
        pass

    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_being_written_is_not_taken_for_the_broken_one_before_it(tmp_path):
    """Two processes have watched the same broken lock; the first has just taken it over."""
    path = tmp_path / "lock"
    path.touch()
    os.utime(path, ns=(1, 1))
    found = locks.look(path)
    path.unlink()
    path.touch()
    locks.remove(path, found)

    assert list(tmp_path.iterdir()) == [path]


def count_up(path: Path, counter: Path, barrier, num_turns: int) -> None:
    locks.POLL = 0.001
    barrier.wait()

    for _ in range(num_turns):
        with Lock(path):
            number = int(counter.read_text())
            time.sleep(0)
            counter.write_text(str(number + 1))


@pytest.mark.parametrize("is_stale", [False, True])
def test_one_process_at_a_time(tmp_path, is_stale):
    """Read, add one, write: an update is lost as soon as two processes are in at once."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    if is_stale:
        write_lock(tmp_path / "lock", process=dead_process())

    barrier = CONTEXT.Barrier(6)
    arguments = (tmp_path / "lock", counter, barrier, 20)
    processes = [CONTEXT.Process(target=count_up, args=arguments) for _ in range(6)]

    for process in processes:
        process.start()

    for process in processes:
        process.join(timeout=60)

    assert [process.exitcode for process in processes] == [0] * 6
    assert counter.read_text() == "120"


def test_a_holder_on_another_machine_is_believed_while_it_shows_life(tmp_path, monkeypatch):
    """Its process number means nothing here, so that only its silence tells of its death."""
    path = tmp_path / "lock"
    holder = write_lock(path, host="another machine", process=dead_process())
    monkeypatch.setattr(locks, "POLL", 0.001)
    clock = iter(range(10**6))
    monkeypatch.setattr(locks.time, "monotonic", lambda: next(clock))
    beats = 0

    def beat(_) -> None:
        nonlocal beats
        beats += 1

        if beats < 100:
            os.utime(path, ns=(beats, beats))

        assert beats < 100 + locks.PATIENCE + 5

    monkeypatch.setattr(locks.time, "sleep", beat)
    told = []

    with Lock(path, on_wait=told.append):
        assert json.loads(path.read_text()) != holder

    assert beats >= 100 + locks.PATIENCE - 5
    assert told == [f"process {holder['process']} on another machine"]


@pytest.mark.parametrize("host", ["", "another machine"])
def test_who_will_not_wait_is_told_when_the_holder_lives(tmp_path, monkeypatch, host):
    """A holder of this machine is known to live, another one from its first sign of life on."""
    path = tmp_path / "lock"
    holder = write_lock(path, **({"host": host} if host else {}))
    polls = []

    def poll(_) -> None:
        polls.append(None)

        if len(polls) == 5:
            os.utime(path, ns=(1, 1))

    monkeypatch.setattr(locks.time, "sleep", poll)

    with pytest.raises(HeldError, match=f"^process {holder['process']} on"):
        Lock(path, wait=False)

    assert len(polls) == (5 if host else 0)
    assert json.loads(path.read_text()) == holder


def test_a_holder_on_this_machine_that_is_stopped_is_waited_for(tmp_path, monkeypatch):
    """It is silent, but not dead: it will go on as the holder that it is."""
    monkeypatch.setattr(locks, "PATIENCE", 0)
    monkeypatch.setattr(locks, "POLL", 0.001)
    path = tmp_path / "lock"
    holder = write_lock(path)
    polls = []

    def poll(_) -> None:
        polls.append(json.loads(path.read_text()))

        if len(polls) == 50:
            path.unlink()

    monkeypatch.setattr(locks.time, "sleep", poll)

    with Lock(path):
        assert polls == [holder] * 50


def test_who_has_lost_the_lock_can_tell(tmp_path):
    with Lock(tmp_path / "lock", on_wait=refuse_to_wait) as lock:
        assert lock.is_held()
        # Nobody has taken what was deleted.
        (tmp_path / "lock").unlink()
        assert lock.is_held()
        write_lock(tmp_path / "lock")
        assert not lock.is_held()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "{}", '{"host": "a"}', '{"host": 1, "process": 1}', "no JSON"],
)
def test_a_lock_that_is_none_is_taken_over_once_it_is_old(tmp_path, monkeypatch, content):
    clock = itertools.count()
    monkeypatch.setattr(locks, "PATIENCE", 1)
    monkeypatch.setattr(locks, "POLL", 0)
    monkeypatch.setattr(locks.time, "monotonic", lambda: next(clock))
    (tmp_path / "lock").write_text(content)
    told = []

    with Lock(tmp_path / "lock", on_wait=told.append):
        assert told == ["another process"]


def test_a_holder_shows_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.001)
    path = tmp_path / "lock"

    with Lock(path, on_wait=refuse_to_wait):
        os.utime(path, ns=(0, 0))

        while not path.stat().st_mtime_ns:
            pass


def test_a_holder_that_was_taken_for_dead_leaves_the_new_lock_alone(tmp_path):
    path = tmp_path / "lock"

    with Lock(path, on_wait=refuse_to_wait):
        theirs = write_lock(path)

    assert json.loads(path.read_text()) == theirs


def test_a_process_killed_while_it_held_the_lock(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(locks.__file__).parent.parent)!r})
from pathlib import Path
import signal
from system import locks
with locks.Lock(Path({str(tmp_path / "lock")!r})):
    print("held", flush=True)
    signal.pause()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()

    with Lock(tmp_path / "lock", on_wait=refuse_to_wait):
        pass
