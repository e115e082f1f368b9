"""Files on file systems that can do less than others."""

import errno
import os
import stat

import pytest

from system.files import new_folder, replaced


@pytest.fixture
def refused_sync(monkeypatch):
    """Return a function after which no folder can be forced to the disk."""

    def refuse(number: int) -> None:
        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))

            real(descriptor)

        real = os.fsync
        monkeypatch.setattr(os, "fsync", fsync)

    return refuse


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folder_that_cannot_be_forced_to_the_disk_is_written(tmp_path, refused_sync, number):
    """As on CIFS, and on many file systems of FUSE."""
    refused_sync(number)
    with replaced(tmp_path / "file", "w") as file:
        file.write("whole")

    with new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("whole")

    assert (tmp_path / "file").read_text() == "whole"
    assert (tmp_path / "folder" / "file").read_text() == "whole"


def test_disk_that_fails_is_told(tmp_path, refused_sync):
    refused_sync(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), replaced(tmp_path / "file"):
        pass


def test_a_run_and_its_conversion_end_there(
    pre_train, small, convert, tmp_path, refused_sync, capsys
):
    refused_sync(errno.EINVAL)
    dataset = f"--dataset_path={tmp_path / 'dataset'}"
    assert pre_train.main(small("--num_epochs=1", dataset)) == 0

    capsys.readouterr()
    convert("--to_hugging_face=exported", f"--checkpoint_path={tmp_path / 'checkpoint.pt'}")
    assert (tmp_path / "exported" / "config.json").exists()
