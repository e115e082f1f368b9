"""Predicts the memory and the time of a run from a few of its updates: --dry_run."""

import math
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Corpus, TrainingData
from loss import output_memory
from model import GPT
from system.devices import PRECISIONS, autocast, matmul_rate, synchronize
from system.distributed import own_part, unshard
from system.memory import library_memory, num_bytes, peak_memory, total_memory
from training.arguments import Settings
from training.checkpoint import can_copy, copy_to_cpu
from training.recipe import num_updates, tokens_per_update
from training.run import load_micro_batches
from training.trainer import MicroBatches, Trainer

# Updates are timed for so many seconds, or once.
TIMED_SECONDS = 5.0
# Bytes of a checkpoint that are written in a second, beside training that has all cores busy.
WRITING_RATE = 4e8


@dataclass
class Plan:
    """The figures of a run. Memory is in bytes of one process.

    Args:
        parts: memory by its use. `activations` are what a micro-batch keeps for its backward pass,
            `loss` is the gradient that is made together with the loss, and the buffers for that.
        peak: the most at a time, as measured, with the copy that a checkpoint is written from. The
            parts need not add up to it: with a single micro-batch in an update, gradients come
            while activations go.
        available: what this process could have in all; infinite where nobody knows.
        start: seconds of the first update, with all that is compiled for it.
        update: seconds of any other one.
        test: seconds of a batch to test on.
    """

    parts: dict[str, int]
    peak: int
    available: float
    start: float
    update: float
    test: float

    def largest_batch_size(self, batch_size: int) -> float:
        """Return how many samples fit at a time, as activations grow with their number."""
        activations = self.parts["activations"]
        room = self.available - (self.peak - activations)
        return max(0.0, room // (max(1, activations) / batch_size))


def make_plan(trainer: Trainer, data: TrainingData, libraries: int) -> Plan:
    """Take some updates and measure them. They change the weights, so no run should go on.

    Args:
        libraries: the memory in bytes that this process had before there was a model.

    Raises:
        Interrupted: when a signal has come.
    """
    device, model = trainer.device, trainer.model
    micro_batches = load_micro_batches(data, trainer.step, trainer.world)
    test_batch = next(iter(data.test_batches()[data.sources[0]]))
    with trainer.stoppable():
        start = seconds_of(device, trainer.take_step, micro_batches[:1])
        # From now on there is the state of the optimizer. The second micro-batch meets the
        # gradients of the first.
        hold_copy(trainer)
        trainer.take_step(micro_batches[:2])
        peak = peak_memory(device)
        update = time_updates(trainer, micro_batches)
        test = min(seconds_of(device, trainer.evaluate, [test_batch]) for _ in range(2))

    available = total_memory(device)
    if device.type == "cuda":
        libraries = library_memory(device)
        peak += libraries
    else:
        available /= trainer.world.local_size

    weights = list(model.parameters())
    gradient, buffers = output_memory(
        model.token_embeddings.weight, micro_batches[0][1].numel(), PRECISIONS[trainer.precision]
    )
    parts = {
        "libraries": libraries,
        "weights": sum(own_part(weight).nbytes for weight in weights),
        "gradients": sum(own_part(weight).nbytes for weight in weights if weight.requires_grad),
        "optimizer": trainer.optimizers.num_bytes,
    }
    loss = gradient + buffers
    kept = kept_memory(trainer, micro_batches[0])
    # Without a measurement, activations are the rest.
    activations = peak - sum(parts.values()) - loss if kept is None else kept - gradient
    parts |= {"activations": max(0, activations), "loss": loss}
    return Plan(parts, peak, available, start, update, test)


def hold_copy(trainer: Trainer) -> None:
    """Hold a copy of a checkpoint, as the first process does while it writes one."""
    state = unshard([trainer.model.state_dict(), trainer.optimizers.state_dict()])
    if trainer.world.is_first and can_copy(state):
        copy = copy_to_cpu(state)
        timer = threading.Timer(num_bytes(copy) / WRITING_RATE, copy.clear)
        timer.daemon = True
        timer.start()


def seconds_of(device: torch.device, function: Callable, *args) -> float:
    synchronize(device)
    start = time.perf_counter()
    function(*args)
    synchronize(device)
    return time.perf_counter() - start


def time_updates(trainer: Trainer, micro_batches: MicroBatches) -> float:
    """Return the seconds of an update, from updates of one and of two of its micro-batches."""
    ones: list[float] = []
    twos: list[float] = []

    # All processes take as many, whatever their clocks say.
    while trainer.world.max(not ones or sum(ones + twos) < TIMED_SECONDS):
        for seconds, count in ((ones, 1), (twos, 2)):
            if count <= len(micro_batches):
                part = micro_batches[:count]
                seconds.append(seconds_of(trainer.device, trainer.take_step, part))

    one = statistics.median(ones)
    # What comes once in an update, such as sending gradients, drops out of the difference.
    further = statistics.median(twos) - one if twos else 0.0
    return one + max(0.0, further) * (len(micro_batches) - 1)


def kept_memory(trainer: Trainer, micro_batch: tuple[int, Tensor, Tensor]) -> int | None:
    """Return the bytes that a forward pass keeps for its backward pass; None where unknown."""
    device, model = trainer.device, trainer.model
    if device.type == "mps" or (device.type == "cpu" and trainer.world.has_sharded_weights):
        return None

    model.train()
    _, x, y = (part.to(device) if isinstance(part, Tensor) else part for part in micro_batch)

    def forward() -> Tensor:
        with autocast(device, trainer.precision):
            return model(x, y)

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        loss = forward()
        kept = torch.cuda.memory_allocated(device) - before
    else:
        # The new profiler always writes to stderr.
        from torch.autograd.profiler_legacy import profile

        with profile(profile_memory=True) as record:
            loss = forward()

        kept = sum(event.self_cpu_memory_usage for event in record.key_averages())

    del loss
    return kept


def count_parameters(model: GPT) -> dict[str, int]:
    """Count the weights of a model by the part that they belong to, without padded rows."""
    embeddings = model.token_embeddings.weight

    def count(modules) -> int:
        return sum(weight.numel() for module in modules for weight in module.parameters())

    parts = {
        "token embeddings": model.vocabulary_size * embeddings.size(1),
        "positions": model.position_embeddings.weight.numel(),
        "attention": count(block.attention for block in model.blocks),
        "MLP": count(block.mlp for block in model.blocks),
    }
    return {**parts, "normalisation": model.num_parameters - sum(parts.values())}


def dry_run(
    settings: Settings, trainer: Trainer, corpus: Corpus, libraries: int, is_chosen: bool
) -> None:
    """Take a few updates, and print what the whole run would take: --dry_run.

    Args:
        libraries: as for make_plan.
        is_chosen: whether the precision is what `--precision=auto` takes.
    """
    num_left = num_updates(settings) - trainer.step
    plan = make_plan(trainer, corpus, libraries)
    model, precision, device = trainer.model, trainer.precision, trainer.device
    counts = [f"{name} {count:,}" for name, count in count_parameters(model).items()]
    sizes = [f"{name} {describe_bytes(size)}" for name, size in plan.parts.items() if size]
    reason = explain_precision(device) if is_chosen else "set by --precision"

    print(f"Parts:  {', '.join(counts)}")
    print(f"Chosen: {precision}, {reason}")
    print(f"Memory: {describe_bytes(plan.peak)} at the peak; {', '.join(sizes)}")
    if plan.available < math.inf:
        largest = plan.largest_batch_size(settings.batch_size)
        print(
            f"Batch:  --batch_size={largest:.0f} is the largest that fits, of"
            f" {describe_bytes(plan.available)}"
        )

    rate = tokens_per_update(settings) / plan.update
    utilization = rate * model.flops_per_token(model.block_size) / trainer.peak_rate
    print(f"Speed:  {rate:,.0f} tokens/s, {utilization:.0%} of the matrix products' rate")

    testing = plan.test * num_test_batches(settings, trainer, corpus)
    total = plan.start + num_left * plan.update + testing
    print(
        f"Time:   {describe_seconds(total)} in all: {num_left:,} updates of {plan.update:.2f} s,"
        f" {describe_seconds(testing)} of testing, {plan.start:.0f} s to start"
    )


def num_test_batches(settings: Settings, trainer: Trainer, corpus: Corpus) -> int:
    """Return how many batches the rest of the run tests on, in each process."""
    last = settings.num_epochs
    epochs = range(len(trainer.metrics) + 1, last + 1)
    num_tests = sum(epoch % settings.eval_interval == 0 or epoch == last for epoch in epochs)
    sizes = [len(windows) for windows in corpus.test_windows.values()]
    num_batches = sum(math.ceil(size / settings.batch_size) for size in sizes)
    return num_tests * math.ceil(num_batches / trainer.world.size)


def explain_precision(device: torch.device) -> str:
    """Say why `--precision=auto` takes what it takes."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"by the GPU's compute capability, {major}.{minor}"

    if device.type == "cpu":
        ratio = matmul_rate(device, "bf16") / matmul_rate(device, "fp32")
        return f"since bf16 multiplies {ratio:.1f} times as fast as fp32 here (threshold: 1.5)"

    return f"the safe choice on {device.type}"


def describe_bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def describe_seconds(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"

    return f"{seconds:.0f} seconds"
