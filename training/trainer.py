"""What the training scripts share: device and precision, the pass over an epoch, evaluation.

Axes of the tensors: B samples, T tokens.
"""

import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from system.devices import autocast, first_that_fits
from system.distributed import World, are_finite, clip_gradients, spread_like
from training.metrics import SOURCE_LOSS, perplexity
from training.optimizers import Optimizers, Schedule

# The part of a process in an update: numbered micro-batches of token ids and targets, int64 (B, T).
# Targets below 0 have no loss.
Step = list[tuple[int, Tensor, Tensor]]


class TrainingError(Exception):
    """What ends a run early; the message is one line for the user."""


class Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


# --- Training and evaluation ---


class StopSignal:
    """Remember SIGTERM or SIGINT until it suits; the second one ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # Seconds in which further signals are the first one once more: a cluster that ends a job sends
    # it to torchrun and to its processes, and torchrun sends it to these again.
    ECHO = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "StopSignal":
        self.number = None
        self.previous = {number: signal.signal(number, self.handle) for number in self.SIGNALS}

        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, _) -> None:
        if self.number is None:
            self.number, self.came = number, time.monotonic()
        elif time.monotonic() - self.came >= self.ECHO:
            os._exit(128 + number)


@dataclass
class Trainer:
    """All that a resumed run needs, and the moves that change it.

    Every process of a run has one, and makes the same moves at the same time.

    Args:
        model: returns the mean loss per target in nats from ids and targets.
        network: what learns: the model, or what World.prepare has made of it.
        schedule: learning rate by the number of the step.
        precision: bf16, fp16 or fp32.
        seed: with the number of a micro-batch it decides every random number.
    """

    model: nn.Module
    network: nn.Module
    optimizers: Optimizers
    schedule: Schedule
    world: World
    precision: str
    seed: int
    max_gradient_norm: float
    # Operations a second of all devices' matrix products; the metrics give the share of it.
    peak_rate: float

    step: int = 0
    tokens: int = 0
    # One dictionary an epoch, as in the metrics file.
    metrics: list[dict] = field(default_factory=list)
    # Sums over the steps of the epoch that is under way.
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    num_steps: int = 0
    seconds: float = 0.0
    is_rehearsed: bool = False

    def __post_init__(self):
        # MKL picks its kernel of exp at the first call. When several threads make that call at
        # once, one of them can get a coarse kernel for it (off by 1e-4, in one run of a hundred on
        # a busy machine), and the run is not the same twice. So the first call is made here.
        torch.zeros(1).exp()

        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def device(self) -> torch.device:
        return self.world.device

    def train_epoch(
        self, load_step: Callable[[int], Step], last_step: int, stop: StopSignal
    ) -> None:
        """Take the steps that the epoch still lacks, up to but not with last_step.

        Args:
            load_step: returns the micro-batches of a step by its number.

        Raises:
            Interrupted: when a signal has come; finished steps stand, the running one is dropped.
            TrainingError: when the loss or the gradient is not finite; the weights are as before.
        """
        self.model.train()
        description = f"Epoch {len(self.metrics) + 1}"
        steps = range(self.step, last_step)
        started = before = time.perf_counter()
        tokens_before = self.tokens

        with self.progress(steps, description, "step") as progress:
            for step in prefetch(load_step, steps, self.device):
                if not self.is_rehearsed:
                    self.rehearse(step)

                loss, norm = self.take_step(step, stop)

                self.loss_sum += loss
                self.norm_sum += norm if math.isfinite(norm) else 0.0
                self.num_steps += 1

                now = time.perf_counter()
                self.seconds += now - before
                before = now

                rate = (self.tokens - tokens_before) / (now - started)
                progress.set_postfix_str(f"loss {loss:.3f}, {rate:,.0f} tokens/s", refresh=False)
                progress.update()

    def progress(self, items: Iterable, description: str, unit: str) -> tqdm:
        # None: where standard error is a terminal. In a log every redrawn bar would stay.
        is_silent = None if self.world.is_first else True

        return tqdm(items, desc=description, unit=unit, leave=False, disable=is_silent)

    def rehearse(self, step: Step) -> None:
        """Let the processes send gradients of zero.

        By the order in which the first ones come the others are bundled. Without a rehearsal a run
        that is resumed would add them up in another order than one that was not interrupted.
        """
        if self.network is not self.model:
            _, x, y = step[0]
            x, y = x.to(self.device), torch.full_like(y, -1, device=self.device)

            with autocast(self.device, self.precision):
                loss = self.network(x, y)

            loss.backward()
            self.optimizers.zero_grad()

        self.is_rehearsed = True

    def take_step(self, step: Step, stop: StopSignal) -> tuple[float, float]:
        """Update the weights once from all micro-batches; return loss and gradient norm."""
        loss, num_tokens = self.accumulate_gradient(step, stop)

        self.optimizers.unscale(self.scaler)
        norm = clip_gradients(self.model, self.max_gradient_norm)
        # The only wait for the device in a step.
        loss, norm = torch.stack([loss, norm]).tolist()
        self.check_finite(loss, norm)

        if math.isfinite(norm):
            self.optimizers.step(self.scaler, self.schedule(self.step), self.step)
            self.scaler.update()
        else:
            # An overflow that one process alone has seen is one of all.
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

        self.optimizers.zero_grad()
        self.step += 1
        self.tokens += num_tokens

        return loss, norm

    def accumulate_gradient(self, step: Step, stop: StopSignal) -> tuple[Tensor, int]:
        """Add up the gradient of the mean loss over all targets of an update, of all processes.

        Returns:
            That loss, and the number of tokens that were read.
        """
        counts = [int((y >= 0).sum()) for _, _, y in step]
        # A micro-batch without targets is there for company alone.
        sizes = [x.numel() for (_, x, _), count in zip(step, counts, strict=True) if count]
        num_targets, num_tokens = self.world.sum(sum(counts), sum(sizes))
        # Gradients are averaged over processes, and here they are to be added up.
        scale = self.world.size / max(1, num_targets)
        total = torch.zeros((), device=self.device)

        for index, ((number, x, y), count) in enumerate(zip(step, counts, strict=True)):
            try:
                self.check(stop)
            except Interrupted:
                self.model.zero_grad(set_to_none=True)
                raise

            torch.manual_seed(random_seed(self.seed, number))

            x, y = (part.to(self.device, non_blocking=True) for part in (x, y))

            with self.world.postpone_reduction(self.network, index == len(step) - 1):
                with autocast(self.device, self.precision):
                    loss = self.network(x, y) * (count * scale)

                self.scaler.scale(loss).backward()

            total += loss.detach()

        return self.world.reduce(total / self.world.size), num_tokens

    def check(self, stop: StopSignal) -> None:
        """Raise Interrupted, in all processes at once, when a signal has come to one of them."""
        if number := self.world.max(stop.number or 0):
            raise Interrupted(number)

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise TrainingError unless loss and gradient may reach the optimizers."""
        # In fp16 an overflowing gradient is normal: the scaler skips the step and scales less.
        tolerable = self.scaler.is_enabled() and self.scaler.get_scale() > 1.0

        if math.isfinite(loss) and (math.isfinite(norm) or tolerable):
            return

        self.model.zero_grad(set_to_none=True)

        raise TrainingError(
            f"Loss {loss} and gradient norm {norm} in epoch {len(self.metrics) + 1}, step"
            f" {self.step}; the weights were not changed. Go on with --resume and a lower"
            " --learning_rate, or with --precision=fp32."
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], stop: StopSignal) -> float:
        """Return the mean loss in nats per target; no state of training changes.

        Raises:
            Interrupted: when a signal has come.
        """
        self.model.eval()
        total, num_targets = torch.zeros((), device=self.device), 0

        for (x, y), is_own in self.progress(self.world.share(batches), "Testing", "batch"):
            self.check(stop)
            count = int((y >= 0).sum()) if is_own else 0
            x, y = x.to(self.device), y.to(self.device)

            # Compiled code is for training: a test would have it compiled once more.
            with torch.compiler.set_stance("force_eager"), autocast(self.device, self.precision):
                total += self.model(x, y) * count

            num_targets += count

        return self.world.reduce(total).item() / self.world.sum(num_targets)[0]

    def fitting_batch_size(self, batch_size: int) -> int | None:
        """Return the largest proper divisor of a batch size that memory holds; None without any.

        It is found by trying, with windows of full length. No other process takes part.
        """
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        # Before the first step the optimizers have nothing; later two numbers a weight at most.
        state = () if self.step else [torch.empty_like(w) for w in weights for _ in range(2)]

        def attempt(size: int) -> None:
            x = torch.zeros(size, self.model.block_size, dtype=torch.int64, device=self.device)

            with torch.compiler.set_stance("force_eager"), autocast(self.device, self.precision):
                loss = self.model(x, x)

            # Unlike backward, it wakes nothing that would wait for other processes.
            torch.autograd.grad(loss, weights)

        divisors = [size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0]
        size = first_that_fits(divisors, attempt, self.device)
        del state

        return size

    def finish_epoch(
        self, test_loss: float | None, flops: float, source_losses: dict[str, float]
    ) -> dict:
        """Close the epoch that is under way and return its row of the metrics file.

        Args:
            flops: the operations that training on one token takes.
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
            "mfu": rate * flops / self.peak_rate,
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

    def state_dict(self) -> dict:
        """Return all that a resumed run needs beside the weights: tensors, strings and numbers.

        Complete on the first process alone.

        Raises:
            TrainingError: when a weight is not finite, and so nothing that a run should resume.
        """
        if self.world.max(not are_finite(self.model.parameters())):
            raise TrainingError(
                f"A weight is not a finite number after update {self.step}; earlier checkpoints"
                " are untouched. Go on with --resume and a lower --learning_rate."
            )

        return {
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
            TrainingError: when the optimizers are not those of this run.
        """
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


def load_share(
    numbers: Iterable[int], load: Callable[[int], tuple[Tensor, Tensor]], world: World
) -> Step:
    """Load those micro-batches of an update that are this process's part of it.

    All processes get as many; what only fills up has no targets.

    Args:
        load: returns token ids and targets of a micro-batch by its number.
    """
    step = []

    for number, is_own in world.share(numbers):
        x, y = load(number)
        step.append((number, x, y if is_own else torch.full_like(y, -1)))

    return step


def random_seed(*key: int) -> int:
    """Derive a seed from numbers: equal keys give equal seeds, others unrelated ones."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1


def prefetch(
    load_step: Callable[[int], Step], steps: Iterable[int], device: torch.device
) -> Iterator[Step]:
    """Yield the micro-batches of each step, loading the next while the last is worked on."""

    def load(number: int) -> Step:
        step = load_step(number)

        if device.type != "cuda":
            return step

        return [(m, x.pin_memory(), y.pin_memory()) for m, x, y in step]

    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = None

        for number in steps:
            upcoming = pool.submit(load, number)

            if pending is not None:
                yield pending.result()

            pending = upcoming

        if pending is not None:
            yield pending.result()


@torch.no_grad()
def load_weights(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Copy weights over those of a model, which are all there, and no others.

    Raises:
        TrainingError: unless names and shapes of both are the same.
    """
    missing = sorted(expected.keys() - given.keys())
    foreign = sorted(given.keys() - expected.keys())

    if missing or foreign:
        raise TrainingError(
            f"The checkpoint does not fit the model: missing {', '.join(missing[:3]) or 'nothing'},"
            f" unknown {', '.join(foreign[:3]) or 'nothing'}."
        )

    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise TrainingError(
                f"The checkpoint does not fit the model: {name} has shape"
                f" {tuple(given[name].shape)}, {tuple(tensor.shape)} is needed."
            )

    for name, tensor in expected.items():
        tensor.copy_(spread_like(given[name], tensor))
