"""Fine-tuning a model with LoRA, beside Hugging Face's peft on the same base, rows and rank.

    python benchmarks/fine_tuning.py --num_steps=8

GPT-2 with 124 M parameters and random weights; rank 8 on the same layers; batches of 4 rows of the
standard library, padded to their longest. Forward, backward, clipping and AdamW. Prints tokens of
answers a second and peak memory, each measured in a process of its own: of peft once at our
precision on our batches (`peft`), and once as it comes, in float32 on rows in random order (`peft,
defaults`).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import GPT
from system.devices import (
    PRECISIONS,
    autocast,
    compile_model,
    resolve_device,
    resolve_precision,
    synchronize,
)
from system.distributed import World
from system.memory import peak_memory
from text.rows import StandardLibraryFunctions, load_examples
from text.tokenizer import gpt2_tokenizer
from trainers import make_trainer
from training.instruction_data import InstructionData
from training.lora import add_lora

BLOCK_SIZE, BATCH_SIZE, RANK, ALPHA = 512, 4, 8, 2.0


def steps(num_steps: int, is_grouped: bool) -> list:
    """Return batches of rows, of like length or as they come."""
    examples = load_examples(
        StandardLibraryFunctions(), gpt2_tokenizer(), BLOCK_SIZE, mask_input=True
    )
    batches = InstructionData(
        "stdlib", examples, BATCH_SIZE, 1, BLOCK_SIZE, padding_token=0, seed=0
    )

    if not is_grouped:
        batches.POOL = 1

    return [batches.batch(number) for number in range(num_steps)]


def ours(device: torch.device, precision: str, use_compiler: bool):
    model = GPT(50257, 1024, 768, 12, 12).to(device)
    add_lora(model, RANK, ALPHA, 0.0, PRECISIONS[precision])

    if use_compiler:
        compile_model(model, device, is_dynamic=True)

    world = World(device=device)
    trainer = make_trainer(model, model, world, precision)

    return lambda x, y: trainer.take_step([(0, x, y)])


def theirs(device: torch.device, precision: str):
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    names = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=RANK * ALPHA, target_modules=names, fan_in_fan_out=True)
    model = get_peft_model(GPT2LMHeadModel(config), lora).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        # Their labels stand at the place of the token itself.
        labels = torch.full_like(y, -100)
        labels[:, 1:] = y[:, :-1]

        with autocast(device, precision):
            loss = model(x.to(device), labels=labels.to(device)).loss

        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(args: argparse.Namespace) -> dict:
    device = resolve_device(args.device)
    precision = resolve_precision(device) if args.precision == "auto" else args.precision
    batches = steps(args.num_steps + 1, args.only != "peft, defaults")

    if args.only.startswith("ours"):
        step = ours(device, precision, args.only == "ours, compiled")
    else:
        step = theirs(device, "fp32" if args.only == "peft, defaults" else precision)

    step(*batches[0])
    rates = []

    for x, y in batches[1:]:
        synchronize(device)
        start = time.perf_counter()
        step(x, y)
        synchronize(device)
        rates.append((time.perf_counter() - start, int((y != -100).sum())))

    seconds = sum(rate for rate, _ in rates)

    return {
        "precision": precision,
        "targets_per_second": round(sum(n for _, n in rates) / seconds, 1),
        "peak_memory_gb": round(peak_memory(device) / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_steps", type=int, default=8)
    parser.add_argument("--device")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.only:
        print(json.dumps(measure(args)))
        return

    results = {}

    for name in ("ours", "ours, compiled", "peft", "peft, defaults"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--only={name}"]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[name] = json.loads(output.splitlines()[-1])

    best = max(results[name]["targets_per_second"] for name in ("ours", "ours, compiled"))

    for result in results.values():
        result["ours_is_faster_by"] = round(best / result["targets_per_second"], 2)

    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
