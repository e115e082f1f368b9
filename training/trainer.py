"""Updates the weights and evaluates the model; holds the state that a run resumes from.

Axes of the tensors: B samples, T tokens.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import TrainingData
from model import GPT
from system.devices import autocast
from system.distributed import (
    LostProcessError,
    NoAnswerError,
    World,
    are_finite,
    clip_gradients,
    shard_like,
)
from system.signals import Interrupted, StopSignal
from training.metrics import SOURCE_LOSS, perplexity
from training.optimizers import Optimizers, Schedule

# One process's micro-batches of an update: their numbers, token ids and targets, int64 (B, T).
# Targets below 0 have no loss.
MicroBatches = list[tuple[int, Tensor, Tensor]]


class TrainingError(Exception):
    """Training cannot continue; the message is one line for the user."""


@dataclass
class Trainer:
    """The complete state of training, and the methods that change it.

    Every process of a run has one, and calls the same methods in the same order.

    Args:
        model: returns the mean loss per target in nats from ids and targets.
        network: the model as World.wrap returns it: plain, in DDP or in FSDP.
        schedule: the learning rate by the number of the update.
        precision: bf16, fp16 or fp32.
        seed: every random number is a function of it and the number of a micro-batch.
        peak_rate: operations a second of all devices' matrix products.
        trained: the key under which a checkpoint holds the trained weights.
    """

    model: GPT
    network: nn.Module
    optimizers: Optimizers
    schedule: Schedule
    world: World
    precision: str
    seed: int
    max_gradient_norm: float
    peak_rate: float
    trained: str = "model"

    step: int = 0
    tokens: int = 0
    # One dictionary an epoch, as in the metrics file.
    metrics: list[dict] = field(default_factory=list)
    # Sums over the updates of the current epoch.
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    num_steps: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        # MKL picks its kernel of exp at the first call. When several threads make that call at
        # once, one of them can get a coarse kernel (off by 1e-4, in one run of a hundred on a busy
        # machine), and the run cannot be reproduced. So make the first call here.
        torch.zeros(1).exp()

        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.stop = StopSignal()
        self.has_bucket_order = False
        # Whether some weights may be new and others not.
        self.is_updating = False
        self.last_loss = math.nan

    @property
    def device(self) -> torch.device:
        return self.world.device

    # --- An update ---

    def update(self, batches: MicroBatches) -> None:
        """Update the weights once, and count the update in the current epoch.

        Raises:
            Interrupted: when a signal has come; the weights are as before.
            TrainingError: when the loss or the gradient is not finite; the weights are as before.
        """
        self.model.train()
        if not self.has_bucket_order:
            self.fix_bucket_order(batches)

        loss, norm = self.take_step(batches)
        self.last_loss = loss
        self.loss_sum += loss
        self.norm_sum += norm if math.isfinite(norm) else 0.0
        self.num_steps += 1

    def fix_bucket_order(self, batches: MicroBatches) -> None:
        """Run one backward pass with zero gradients, so DDP settles the order of its buckets.

        DDP rebuilds its buckets after the first backward pass. Without this a resumed run would add
        gradients in another order than an undisturbed one.
        """
        if self.network is not self.model:
            _, x, y = batches[0]
            x, y = x.to(self.device), torch.full_like(y, -1, device=self.device)
            with autocast(self.device, self.precision):
                loss = self.network(x, y)

            loss.backward()
            self.optimizers.zero_grad()

        self.has_bucket_order = True

    def take_step(self, batches: MicroBatches) -> tuple[float, float]:
        """Update the weights once from all micro-batches; return loss and gradient norm."""
        loss, num_tokens = self.accumulate_gradient(batches)

        self.optimizers.unscale(self.scaler)
        norm = clip_gradients(self.model, self.max_gradient_norm)
        # The only wait for the device in an update.
        loss, norm = torch.stack([loss, norm]).tolist()
        self.check_finite(loss, norm)
        self.is_updating = True
        if math.isfinite(norm):
            self.optimizers.step(self.schedule(self.step), self.step)
            self.scaler.update()
        else:
            # One process may have overflowed alone: all scales go down together.
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

        self.optimizers.zero_grad()
        self.step += 1
        self.tokens += num_tokens
        self.is_updating = False
        return loss, norm

    def accumulate_gradient(self, batches: MicroBatches) -> tuple[Tensor, int]:
        """Accumulate the gradient of the mean loss over all targets of an update, of all processes.

        Returns:
            The mean loss, and the number of tokens in the update.
        """
        counts = [int((y >= 0).sum()) for _, _, y in batches]
        # A micro-batch without targets only fills up, and another process trains on it.
        sizes = [x.numel() for (_, x, _), count in zip(batches, counts, strict=True) if count]
        num_targets, num_tokens = self.world.sum(sum(counts), sum(sizes))
        # DDP and FSDP average gradients over processes; multiplied by world.size they are sums.
        scale = self.world.size / max(1, num_targets)
        total = torch.zeros((), device=self.device)
        for index, ((number, x, y), count) in enumerate(zip(batches, counts, strict=True)):
            try:
                self.check_signals()
            except Interrupted:
                self.model.zero_grad(set_to_none=True)
                raise

            torch.manual_seed(random_seed(self.seed, number))
            x, y = (part.to(self.device, non_blocking=True) for part in (x, y))
            with self.world.no_sync(self.network, is_last=index == len(batches) - 1):
                with autocast(self.device, self.precision):
                    loss = self.network(x, y) * (count * scale)

                self.scaler.scale(loss).backward()

            total += loss.detach()

        return self.world.all_reduce(total / self.world.size), num_tokens

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise TrainingError unless loss and gradient may reach the optimizers."""
        # In fp16 an overflowing gradient is normal: the scaler skips the step and scales less.
        tolerable = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0
        if math.isfinite(loss) and (math.isfinite(norm) or tolerable):
            return

        self.model.zero_grad(set_to_none=True)
        raise TrainingError(
            f"Loss {loss} and gradient norm {norm} in epoch {len(self.metrics) + 1}, step"
            f" {self.step}; the weights were not changed. Continue with --resume and a lower"
            " --learning_rate, or with --precision=fp32."
        )

    # --- Signals and lost processes ---

    def check_signals(self) -> None:
        """Raise Interrupted, in all processes at once, when a signal has come to one of them."""
        if number := self.world.max(self.stop.number or 0):
            raise Interrupted(number)

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Hold signals back, and turn the errors of a lost process into LostProcessError.

        Raises:
            LostProcessError: without a message when this process is to end, too.
        """
        with self.stop:
            try:
                yield
            except (RuntimeError, NoAnswerError) as error:
                if not self.world.is_lost_process(error):
                    raise

                message = self.world.describe_lost_process(lambda: self.stop.number is not None)
                raise LostProcessError(message) from error

    # --- Evaluation ---

    def test(self, data: TrainingData) -> dict[str, float]:
        """Return the mean test loss of each source, in nats per target."""
        return {name: self.evaluate(batches) for name, batches in data.test_batches().items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """Return the mean loss in nats per target; no state of training changes.

        Raises:
            Interrupted: when a signal has come.
        """
        self.model.eval()
        total, num_targets = torch.zeros((), device=self.device), 0
        for (x, y), is_own in self.progress(self.world.shard(batches), "Testing", "batch"):
            self.check_signals()
            count = int((y >= 0).sum()) if is_own else 0
            x, y = x.to(self.device), y.to(self.device)

            # Eager, as a test would compile everything once more.
            with torch.compiler.set_stance("force_eager"), autocast(self.device, self.precision):
                total += self.model(x, y) * count

            num_targets += count

        return self.world.all_reduce(total).item() / self.world.sum(num_targets)[0]

    def progress(self, items: Iterable, description: str, unit: str) -> tqdm:
        """Return a progress bar, on the first process and on a terminal only."""
        is_silent = None if self.world.is_first else True
        return tqdm(items, desc=description, unit=unit, leave=False, disable=is_silent)

    # --- Metrics, and the state that a run resumes from ---

    def finish_epoch(
        self, test_loss: float | None, flops_per_token: float, source_losses: dict[str, float]
    ) -> dict:
        """Close the current epoch and return its row of the metrics.

        Args:
            flops_per_token: the operations that training on one token takes.
            source_losses: the test losses that test_loss is the mean of, by source.
        """
        last = self.metrics[-1] if self.metrics else {"tokens": 0, "seconds": 0.0}
        rate = (self.tokens - last["tokens"]) / self.seconds
        row = {
            "epoch": len(self.metrics) + 1,
            "step": self.step,
            "tokens": self.tokens,
            "train_loss": self.loss_sum / self.num_steps,
            "test_loss": test_loss,
            "perplexity": None if test_loss is None else perplexity(test_loss),
            "gradient_norm": self.norm_sum / self.num_steps,
            "learning_rate": self.schedule(self.step - 1),
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token / self.peak_rate,
            "seconds": self.seconds + last["seconds"],
            **{SOURCE_LOSS + name: loss for name, loss in source_losses.items()},
        }

        self.metrics.append(row)
        self.loss_sum = self.norm_sum = self.seconds = 0.0
        self.num_steps = 0
        return row

    @property
    def best_test_loss(self) -> float:
        losses = [row["test_loss"] for row in self.metrics if row["test_loss"] is not None]
        return min(losses, default=math.inf)

    def trained_weights(self) -> dict[str, Tensor]:
        """Return the weights that are trained by their names: all, or those of an adapter."""
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict:
        """Return all that a resumed run needs: tensors, strings and numbers.

        Tensors may be sharded, and the state of the optimizers is complete on the first process.

        Raises:
            TrainingError: when a weight is not finite, and so nothing that a run should resume.
        """
        if self.world.max(not are_finite(self.model.parameters())):
            raise TrainingError(
                f"A weight is not a finite number after update {self.step}; earlier checkpoints"
                " are untouched. Continue with --resume and a lower --learning_rate."
            )

        return {
            self.trained: self.trained_weights(),
            "optimizer": self.optimizers.state_dict(),
            "scaler": self.scaler.state_dict(),
            "position": self.step,
            "tokens": self.tokens,
            "seed": self.seed,
            "precision": self.precision,
            "metrics": self.metrics,
            "epoch": [self.loss_sum, self.norm_sum, self.num_steps, self.seconds],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go back to where state_dict was taken; state may live on any device.

        Raises:
            TrainingError: when weights or optimizers are not those of this run.
        """
        load_weights(self.trained_weights(), state[self.trained])
        try:
            self.optimizers.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise TrainingError("The checkpoint comes from another --optimizer.") from error

        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

        self.step = state["position"]
        self.tokens = state["tokens"]
        self.metrics = state["metrics"]
        self.loss_sum, self.norm_sum, self.num_steps, self.seconds = state["epoch"]


def random_seed(*key: int) -> int:
    """Derive a seed from numbers: equal keys give equal seeds, others unrelated ones."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


@torch.no_grad()
def load_weights(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Copy given weights into those of a model.

    Raises:
        TrainingError: unless names and shapes of both are the same.
    """
    shapes = {name: tuple(weight.shape) for name, weight in given.items()}
    needed = {name: tuple(weight.shape) for name, weight in expected.items()}
    if names := sorted({name for name, _ in shapes.items() ^ needed.items()}):
        name = names[0]
        raise TrainingError(
            f"The checkpoint does not fit the model: shape {shapes.get(name)} for {name},"
            f" {needed.get(name)} is needed; {len(names)} weights differ."
        )

    for name, tensor in expected.items():
        tensor.copy_(shard_like(given[name], tensor))
