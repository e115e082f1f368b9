"""How a script ends."""

from training import checkpoint, trainer


def test_checkpoint_that_cannot_be_written_is_a_note_beside_what_ended_the_run(
    small, error_of, monkeypatch
):
    """Whatever has failed: not all that PyTorch raises is an error of the disk."""

    def save_checkpoint(*args):
        raise RuntimeError("no archive")

    def take_step(self, *args):
        if self.step == 4:
            raise OSError(5, "Input/output error")

        return real(self, *args)

    real = trainer.Trainer.take_step
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(trainer.Trainer, "take_step", take_step)

    assert error_of(small()) == (1, "error: [Errno 5] Input/output error")
