"""What only reports ends no run: it is one note, and nothing is lost."""

import csv
import errno
import os
import types

import pytest
from faults import read

from training import metrics


def table_of(folder) -> list[str]:
    with open(folder / "metrics.csv") as file:
        return [row["epoch"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("call", [1, 2], ids=["first", "later"])
def test_table_on_a_full_disk_gets_its_rows_later(
    pre_train, small, tmp_path, monkeypatch, capsys, call
):
    """Half a row is on the disk by then."""

    class FullDisk(csv.DictWriter):
        num_calls = 0

        def writerow(self, row):
            FullDisk.num_calls += 1
            if FullDisk.num_calls == call:
                self.writer.writerow(list(row.values())[:3])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            return super().writerow(row)

    monkeypatch.setattr(metrics.csv, "DictWriter", FullDisk)

    assert pre_train.main(small()) == 0
    assert capsys.readouterr().err.count("metrics.csv was not written: No space left") == 1
    assert table_of(tmp_path) == ["1", "2", "3"]
    assert read(tmp_path / "checkpoint.pt")["position"] == 9


class Broken(types.ModuleType):
    def __getattr__(self, name):
        raise TypeError("Descriptors cannot be created directly.")


class BrokenLater:
    def __init__(self, *args, **kwargs):
        pass

    def add_scalar(self, *args):
        raise RuntimeError("broken\nlater")


def break_import(folder, monkeypatch):
    monkeypatch.setitem(metrics.sys.modules, "torch.utils.tensorboard", Broken("tensorboard"))


def break_later(folder, monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=BrokenLater)
    monkeypatch.setitem(metrics.sys.modules, "torch.utils.tensorboard", module)


def put_a_file_in_the_way(folder, monkeypatch):
    (folder / "runs").write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_import, "TensorBoard gets no metrics: Descriptors cannot be created directly."),
        (break_later, "TensorBoard gets no more metrics: broken later"),
        (put_a_file_in_the_way, "TensorBoard gets no metrics: Not a directory"),
    ],
)
def test_tensorboard_that_is_broken_ends_no_run(
    pre_train, small, tmp_path, monkeypatch, capsys, damage, message
):
    damage(tmp_path, monkeypatch)

    assert pre_train.main(small("--num_epochs=2")) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "Note" in line] == [
        f"Note:   {message}"
    ]
    assert table_of(tmp_path) == ["1", "2"]
