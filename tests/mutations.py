"""Every fault with its guard taken out: the tests that hold the guard in place have to fail.

python tests/mutations.py            tries all, and writes the table of tests/README.md anew
python tests/mutations.py 17 31      tries these faults alone, and prints their lines
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "README.md"


class Mutation(NamedTuple):
    """A guard, and what is there without it.

    Args:
        fault: what happens to a user, or what a user does.
        test: a file of tests, and an expression that chooses some of them.
        guard: where it is, and what stands there.
        instead: what is put in its place.
        outcome: what happens then.
    """

    number: int
    fault: str
    test: tuple[str, str]
    file: str
    guard: str
    instead: str
    outcome: str


MUTATIONS = [
    Mutation(
        1,
        "A whole number of 0 or below",
        ("training/test_arguments", "whole_numbers"),
        "training/arguments.py",
        "lambda number: number > 0, ",
        "lambda number: True, ",
        "the run starts, and fails somewhere",
    ),
    Mutation(
        2,
        "A number that is NaN, infinite or out of range",
        ("training/test_arguments", "positive_numbers"),
        "training/arguments.py",
        "lambda number: 0 < number < math.inf",
        "lambda number: not number <= 0",
        "NaN passes every comparison",
    ),
    Mutation(
        3,
        "Heads that do not divide the dimensions",
        ("training/test_arguments", "do_not_divide"),
        "model.py",
        "if embedding_dimensions % num_attention_heads:",
        "if False:",
        "a traceback from a reshape",
    ),
    Mutation(
        4,
        "A flag that there is not, or half of one",
        ("training/test_arguments", "unknown_arguments"),
        "training/arguments.py",
        "allow_abbrev=False",
        "allow_abbrev=True",
        "`--batch` is taken for `--batch_size`",
    ),
    Mutation(
        5,
        "`--flag False`, `--flag maybe`",
        ("training/test_arguments", "booleans or no_boolean"),
        "training/arguments.py",
        "type=parse_bool",
        "type=bool",
        "False is true",
    ),
    Mutation(
        6,
        "A seed twice; a seed that is none",
        ("training/test_arguments", "seeds"),
        "training/arguments.py",
        "lambda number: 0 <= number < 2**63",
        "lambda number: True",
        "-1 is another seed than it says",
    ),
    Mutation(
        7,
        "`--top_k` above the vocabulary",
        ("inference/test_generation", "more_than_the_vocabulary"),
        "inference/sampling.py",
        "min(self.top_k, logits.size(-1))",
        "self.top_k",
        "a traceback from topk",
    ),
    Mutation(
        8,
        "Batches that do not divide by the processes, or are fewer",
        ("system/test_distributed", "fewer_batches"),
        "training/arguments.py",
        "if settings.gradient_accumulation_steps < num_processes:",
        "if False:",
        "a process waits for a batch that never comes",
    ),
    Mutation(
        9,
        "A rank of 0, or above the dimensions",
        ("training/test_lora", "rank_that_makes_no_adapter"),
        "training/lora.py",
        "    check_rank(rank, model.embedding_dimensions)\n    model",
        "    model",
        "an adapter of nothing",
    ),
    Mutation(
        10,
        "An epoch below one update",
        ("training/test_arguments", "below_one_update"),
        "pre-train.py",
        "if settings.samples_per_epoch < samples_per_update(settings):",
        "if False:",
        "a division by zero at the end of the epoch",
    ),
    Mutation(
        11,
        "`--device=cuda` without a GPU",
        ("training/test_trainer", "device_that_is_not_there"),
        "system/devices.py",
        'if kind == "cuda" and not torch.cuda.is_available():',
        "if False:",
        "PyTorch's own error, behind the preparation",
    ),
    Mutation(
        12,
        "A device that is unknown; more processes than GPUs",
        ("training/test_arguments", "unknown_devices"),
        "system/devices.py",
        'if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):',
        "if False:",
        "a traceback",
    ),
    Mutation(
        13,
        "A port that is taken",
        ("system/test_distributed", "port_that_is_taken"),
        "system/distributed.py",
        'elif "EADDRINUSE" in cause:',
        "elif False:",
        "forty words of the library, without a cure",
    ),
    Mutation(
        14,
        "Variables that contradict themselves; a process that never comes",
        ("system/test_distributed", "malformed_environment"),
        "system/distributed.py",
        "is_valid = 0 <= rank < size and",
        "is_valid = True or",
        "a wait for processes that there are not",
    ),
    Mutation(
        15,
        "Memory runs out",
        ("test_pre_train", "out_of_memory"),
        "system/memory.py",
        "return isinstance(error, types) or",
        "return False and",
        "a traceback without a cure",
    ),
    Mutation(
        16,
        "No checkpoint there, or a folder",
        ("training/test_checkpoint", "missing_file"),
        "training/checkpoint.py",
        "if not path.is_file():",
        "if False:",
        "`No such file or directory`",
    ),
    Mutation(
        17,
        "A checkpoint that is cut off",
        ("training/test_checkpoint", "truncated or empty"),
        "training/checkpoint.py",
        "        verify_checksum(path)\n",
        "",
        "not told as damaged; the previous one is not named",
    ),
    Mutation(
        18,
        "A page of HTML, zeros or tokens for a checkpoint",
        ("training/test_checkpoint", "foreign"),
        "training/checkpoint.py",
        "if magic and magic != ZIP_MAGIC[: len(magic)]:",
        "if False:",
        "it is told as damaged",
    ),
    Mutation(
        19,
        "A flipped bit",
        ("training/test_checkpoint", "flipped_bit"),
        "training/checkpoint.py",
        "        verify_checksum(path)\n",
        "",
        "weights that nobody has trained",
    ),
    Mutation(
        20,
        "Code in a checkpoint or an adapter",
        ("test_endurance", "no_payload"),
        "training/checkpoint.py",
        "weights_only=True",
        "weights_only=False",
        "it is run",
    ),
    Mutation(
        21,
        "A checkpoint of another kind",
        ("training/test_checkpoint", "another_kind"),
        "training/checkpoint.py",
        "if missing := [key for key in required if key not in state]:",
        "if missing := []:",
        "a KeyError later",
    ),
    Mutation(
        22,
        "A checkpoint of another architecture or tokenizer",
        ("test_pre_train", "resuming_another_run or another_tokenizer"),
        "training/resume.py",
        "    if refused:\n",
        "    if False:\n",
        "a shape that does not fit, in a traceback",
    ),
    Mutation(
        23,
        "A newer format; the oldest format",
        ("training/test_checkpoint", "another_kind"),
        "training/checkpoint.py",
        'if state["format_version"] > FORMAT_VERSION:',
        "if False:",
        "read as if it were this one",
    ),
    Mutation(
        24,
        "Names with `_orig_mod.` or `module.`",
        ("test_generate", "wrappers_have_prefixed"),
        "training/checkpoint.py",
        'if part not in ("_orig_mod", "module")',
        "",
        "no weight is found",
    ),
    Mutation(
        25,
        "Weights that are not finite",
        ("test_pre_train", "never_saved"),
        "training/trainer.py",
        "if self.world.max(not are_finite(self.model.parameters())):",
        "if False:",
        "a good checkpoint is followed by a bad one",
    ),
    Mutation(
        26,
        "Resuming what is finished",
        ("test_pre_train", "nothing_to_do"),
        "training/resume.py",
        'if not checkpoint or len(checkpoint["metrics"]) < settings.num_epochs:',
        "if True:",
        "the file is written again",
    ),
    Mutation(
        27,
        "Other flags on resuming",
        ("test_pre_train", "resuming_another_run or longer"),
        "training/resume.py",
        '        print(f"Changed: {text}")\n',
        "        pass\n",
        "silence",
    ),
    Mutation(
        28,
        "Data that changed since the save",
        ("test_pre_train", "changed_data"),
        "training/resume.py",
        "if list(map(nameless, saved)) != list(map(nameless, found)):",
        "if False:",
        "some text is read twice, and some never",
    ),
    Mutation(
        29,
        "Another number of processes on resuming",
        ("system/test_distributed", "another_number"),
        "training/sharding.py",
        '        self.is_begun = bool(state["state"])\n',
        "        self.is_begun = False\n",
        "the momentum is forgotten",
    ),
    Mutation(
        30,
        "An adapter of another base",
        ("test_generate", "another_model_is_refused"),
        "training/checkpoint.py",
        '    if state["base"] != base:\n',
        "    if False:\n",
        "text without sense",
    ),
    Mutation(
        31,
        "SIGKILL while saving",
        ("training/test_checkpoint", "killed_while"),
        "training/checkpoint.py",
        "with replaced(path) as file, ",
        'with open(path, "wb") as file, ',
        "no checkpoint is left",
    ),
    Mutation(
        32,
        "A full disk while saving",
        ("training/test_checkpoint", "full_disk"),
        "training/checkpoint.py",
        "previous_path(path))\n    except OSError as error:",
        "previous_path(path))\n    except ZeroDivisionError as error:",
        "a traceback",
    ),
    Mutation(
        33,
        "An output folder that is not there",
        ("test_pre_train", "folders_that_are_missing"),
        "training/outputs.py",
        "        path.parent.mkdir(parents=True, exist_ok=True)\n",
        "",
        "an error where the run might have gone on",
    ),
    Mutation(
        34,
        "An output that cannot be written",
        ("test_pre_train", "told_before_any_work"),
        "training/outputs.py",
        "        except OSError as error:\n            raise CheckpointError(\n",
        "        except ZeroDivisionError as error:\n            raise CheckpointError(\n",
        "told in other words, without a cure",
    ),
    Mutation(
        35,
        "A save that fails once",
        ("training/test_checkpoint", "save_that_failed"),
        "training/checkpoint.py",
        "        if pending:\n            pending.result()\n",
        "",
        "nobody hears of it",
    ),
    Mutation(
        36,
        "Two runs on one path",
        ("test_pre_train", "second_run"),
        "training/outputs.py",
        "Lock(lock_path(path), wait",
        "Lock(path.with_suffix(f'.{os.urandom(4).hex()}'), wait",
        "both write the same files",
    ),
    Mutation(
        37,
        "SIGTERM in the middle of an epoch",
        ("test_pre_train", "signal_saves"),
        "training/run.py",
        "            except Interrupted:\n                self.save()\n",
        "            except Interrupted:\n",
        "the updates since the last checkpoint are lost",
    ),
    Mutation(
        38,
        "SIGTERM to torchrun",
        ("system/test_torchrun", "signal_to_torchrun"),
        "system/signals.py",
        '    ECHO = 5.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0\n',
        "    ECHO = 0.0\n",
        "its echo ends the processes before they have saved",
    ),
    Mutation(
        39,
        "SIGTERM to one of several processes",
        ("system/test_distributed", "signal_to_one_process"),
        "training/trainer.py",
        "if number := self.world.max(self.stop.number or 0):",
        "if number := self.stop.number:",
        "the others wait for it",
    ),
    Mutation(
        40,
        "Ctrl-C, and again",
        ("test_pre_train", "second_signal"),
        "system/signals.py",
        "elif time.monotonic() - self.arrival >= self.ECHO:",
        "elif False:",
        "it does not leave",
    ),
    Mutation(
        41,
        "A signal while testing, saving, compiling or preparing",
        ("test_pre_train", "signal_during"),
        "training/trainer.py",
        "            self.check_signals()\n            count",
        "            count",
        "it waits for the end of the test",
    ),
    Mutation(
        42,
        "SIGKILL at any update",
        ("test_pre_train", "killed_twice and fp32"),
        "training/trainer.py",
        "            torch.manual_seed(random_seed(self.seed, number))\n",
        "",
        "dropout that depends on what was before",
    ),
    Mutation(
        43,
        "A loss that is NaN",
        ("test_pre_train", "loss_that_is_not_finite"),
        "training/trainer.py",
        "        self.check_finite(loss, norm)\n",
        "",
        "weights that are NaN",
    ),
    Mutation(
        44,
        "A gradient that is NaN with a finite loss",
        ("test_pre_train", "gradient_that_is_not_finite"),
        "training/trainer.py",
        "if math.isfinite(loss) and (math.isfinite(norm) or tolerable):",
        "if math.isfinite(loss):",
        "the update is left out, without a word",
    ),
    Mutation(
        45,
        "NaN in one of several processes",
        ("system/test_distributed", "nan_in_one_process"),
        "training/trainer.py",
        "return self.world.all_reduce(total / self.world.size), num_tokens",
        "return total, num_tokens",
        "one stops, the others wait for it",
    ),
    Mutation(
        46,
        "A batch without a target",
        ("test_model", "without_targets"),
        "loss.py",
        "count = (y >= 0).sum().clamp(min=1)",
        "count = (y >= 0).sum()",
        "a loss of NaN",
    ),
    Mutation(
        47,
        "One of several processes is killed",
        ("system/test_distributed", "dies_or_hangs"),
        "system/distributed.py",
        'return self.size > 1 and (is_remote or "gloo" in str(error))',
        "return False",
        "a traceback of the library",
    ),
    Mutation(
        48,
        "One of several processes fails",
        ("system/test_distributed", "error_of_one or error_at_the_start"),
        "system/distributed.py",
        'return self.ask_store(lambda store: store.add("failures", 1), 1) == 1',
        "return True",
        "as many messages as processes",
    ),
    Mutation(
        49,
        "One of several processes is stopped",
        ("system/test_distributed", "dies_or_hangs"),
        "system/distributed.py",
        "            if time.monotonic() > deadline:\n                raise NoAnswerError\n",
        "",
        "the others wait for ever",
    ),
    Mutation(
        50,
        "The normal end of several processes, many times",
        ("system/test_distributed", "normal_ends"),
        "system/distributed.py",
        "            self.max(0)\n            dist.destroy_process_group()\n",
        "            os._exit(self.rank)\n",
        "who is first takes the connections of the others along",
    ),
    Mutation(
        51,
        "Too little text",
        ("text/test_preparation", "too_few"),
        "text/preparation.py",
        "    if not (all(numbers) if is_split else any(numbers)):",
        "    if False:",
        "an empty test",
    ),
    Mutation(
        52,
        "A token file that is cut off, or changed",
        ("text/test_preparation", "damaged_token_files"),
        "text/token_files.py",
        "if (size := path.stat().st_size) != expected:",
        "if False:",
        "SIGBUS, or text that nobody wrote",
    ),
    Mutation(
        53,
        "Ids beyond the vocabulary; another tokenizer",
        ("text/test_preparation", "beyond_the_vocabulary or foreign_sidecars"),
        "text/token_files.py",
        "if largest > tokenizer.end_of_text:",
        "if False:",
        "a read beyond the embeddings",
    ),
    Mutation(
        54,
        "SIGKILL while preparing",
        ("text/test_preparation", "killed_preparation"),
        "text/parts.py",
        "            file.truncate(size)\n",
        "",
        "what was written last is there twice",
    ),
    Mutation(
        55,
        "Several processes prepare at once",
        ("text/test_preparation", "several_processes_at_once"),
        "system/locks.py",
        'file = open(self.path, "x")',
        'file = open(self.path, "w")',
        "all of them write the same files",
    ),
    Mutation(
        56,
        "A full disk while preparing",
        ("text/test_preparation", "full_disk"),
        "text/preparation.py",
        "    except OSError as error:\n        cure",
        "    except ZeroDivisionError as error:\n        cure",
        "a traceback",
    ),
    Mutation(
        57,
        "A network that breaks, fails or lies",
        ("text/test_hub", "fails_twice or stays_broken or cannot_be_reached"),
        "text/hub.py",
        'if found.hexdigest() != digest.partition(":")[2]:',
        "if False:",
        "damage is taken for text",
    ),
    Mutation(
        58,
        "Documents that are empty, no UTF-8, endless, or hold `<|endoftext|>`",
        ("text/test_tokenizer", "any_text_is_text"),
        "text/tokenizer.py",
        "            return self.encode(without_surrogates(text))\n",
        "            raise\n",
        "a traceback at the one character",
    ),
    Mutation(
        59,
        "A prompt that is empty, too long or no UTF-8",
        ("test_generate", "empty_prompt"),
        "generate.py",
        "        if not tokens:\n",
        "        if False:\n",
        "a traceback of an empty tensor",
    ),
    Mutation(
        60,
        "Ctrl-C at the prompt, a reader that leaves, half a character",
        ("test_generate", "leaves"),
        "generate.py",
        "    except KeyboardInterrupt:\n",
        "    except ZeroDivisionError:\n",
        "a traceback",
    ),
    Mutation(
        61,
        "A GPU that is given no number",
        ("system/test_distributed", "without_a_number"),
        "system/distributed.py",
        "if self.device.index is not None:",
        'if self.device.type == "cuda":',
        "a traceback at the start, on every GPU",
    ),
    Mutation(
        62,
        "SIGTERM to one of several processes when all have stopped",
        ("system/test_distributed", "takes_leave"),
        "training/run.py",
        "        self.world.disconnect()",
        "        pass",
        "it counts as lost: the others fail",
    ),
    Mutation(
        63,
        "Another program on the same cores",
        ("training/test_trainer", "waiting_threads"),
        "system/threads.py",
        'os.environ["GOMP_SPINCOUNT"] = "2000"',
        "pass",
        "training takes up to 18 times as long",
    ),
    Mutation(
        64,
        "A terminal that is closed, or an ssh that breaks",
        ("test_pre_train", "signal_saves"),
        "system/signals.py",
        "SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)",
        "SIGNALS = (signal.SIGTERM, signal.SIGINT)",
        "the updates since the last checkpoint are lost",
    ),
    Mutation(
        65,
        "A reader of the output that leaves, as head does",
        ("training/test_launch", "reader_of_the_output"),
        "system/streams.py",
        "except (OSError, ValueError) as error:\n            # What",
        "except ZeroDivisionError as error:\n            # What",
        "the run ends with it",
    ),
    Mutation(
        66,
        "A table or a TensorBoard that cannot be written",
        ("training/test_metrics", ""),
        "training/metrics.py",
        "        except Exception as error:\n",
        "        except ZeroDivisionError as error:\n",
        "the run ends with it",
    ),
    Mutation(
        67,
        "An error that nobody expected",
        ("training/test_launch", "nobody_expected"),
        "training/run.py",
        "                self.rescue()\n                raise\n",
        "                raise\n",
        "the updates since the last checkpoint are lost",
    ),
    Mutation(
        68,
        "A file system that cannot force a folder to the disk",
        ("system/test_files", "cannot_be_forced"),
        "system/files.py",
        "if error.errno not in (errno.EINVAL, errno.ENOTSUP):",
        "if True:",
        "nothing can be saved there",
    ),
    Mutation(
        69,
        "A container that limits memory or cores",
        ("system/test_limits", ""),
        "system/limits.py",
        'if not controllers or controller in controllers.split(","):',
        "if not controllers:",
        "more is taken than there is: the run is killed, or threads wait for their turn",
    ),
    Mutation(
        70,
        "A rank in the environment, and no place to meet",
        ("system/test_distributed", "without_a_place"),
        "system/distributed.py",
        '{"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()',
        "True",
        "a wait for processes that there are not, and messages that nobody hears",
    ),
    Mutation(
        74,
        "An adapter that learned with a system message",
        ("test_generate", "template_is_put"),
        "generate.py",
        "prompt = format_prompt(prompt, introduction=self.introduction)",
        "prompt = format_prompt(prompt)",
        "it is asked in words that it never saw",
    ),
    Mutation(
        75,
        "An exported adapter that learned with a system message",
        ("test_convert", "begins_as_the_rows"),
        "interop/transformers.py",
        '"default_introduction": introduction or INTRODUCTION',
        '"default_introduction": INTRODUCTION',
        "it is asked in words that it never saw",
    ),
    Mutation(
        76,
        "`--flag=~/x`, which no shell expands",
        ("training/test_arguments", "tilde"),
        "training/arguments.py",
        "    path = os.path.expanduser(value)\n",
        "    path = value\n",
        "a folder of the name ~ is made",
    ),
    Mutation(
        77,
        "Text in another encoding",
        ("text/test_preparation", "little_damage"),
        "text/damage.py",
        "if self.num_replaced > MAX_REPLACED * self.num_characters:",
        "if False:",
        "a model learns replacement characters",
    ),
    Mutation(
        78,
        "Most rows are malformed",
        ("text/test_sources", "cannot_be_read"),
        "text/damage.py",
        "if self.num_malformed * 2 >= max(1, self.num_rows):",
        "if False:",
        "nothing is learned, and nobody is told",
    ),
    Mutation(
        79,
        "A quote in CSV that is never closed",
        ("text/test_sources", "cannot_be_read"),
        "text/readers.py",
        "            if is_open:\n",
        "            if False:\n",
        "all rows behind it become one",
    ),
    Mutation(
        80,
        "A file with several names",
        ("text/test_sources", "several_names"),
        "text/sources.py",
        "names.setdefault(path.resolve(), path)",
        "names.setdefault(path, path)",
        "what is tested on is trained on",
    ),
    Mutation(
        81,
        "A table of something else among notes",
        ("text/test_sources", "something_else"),
        "text/sources.py",
        "except NoTextError as error:",
        "except ZeroDivisionError as error:",
        "nothing of the folder is read",
    ),
    Mutation(
        82,
        "Few files",
        ("text/test_sources", "few_files"),
        "text/sources.py",
        "if has_lone_split(files):",
        "if False:",
        "there is nothing to test on",
    ),
    Mutation(
        83,
        "Text that changed since the run began",
        ("test_pre_train", "refused_before"),
        "text/prepared.py",
        'if sidecar["train"]["sha256"] in kept and not is_open:',
        "if False:",
        "its token files are lost, and it cannot be resumed",
    ),
    Mutation(
        84,
        "Text that was touched, or moved",
        ("text/test_preparation", "touched or moved"),
        "text/prepared.py",
        'return is_like and saved["content"] == source.content()',
        "return False",
        "a run cannot be resumed, or all is prepared again",
    ),
    Mutation(
        85,
        "Text that changed and kept its size",
        ("text/test_preparation", "letter"),
        "text/prepared.py",
        'return is_like and saved["content"] == source.content()',
        "return is_like",
        "the change is never read",
    ),
    Mutation(
        86,
        "A run that writes beside its text",
        ("test_pre_train", "beside_its_text"),
        "text/sources.py",
        "return self.is_read(name) and not any(names.fullmatch(name) for names in own)",
        "return self.is_read(name)",
        "it reads what it has written, and cannot be resumed",
    ),
    Mutation(
        87,
        "The log of a run beside its text",
        ("test_pre_train", "beside_its_text"),
        "text/sources.py",
        "logs = open_logs()",
        "logs: list = []",
        "it reads what it has written, and cannot be resumed",
    ),
    Mutation(
        88,
        "A mistyped path",
        ("text/test_sources", "mistyped"),
        "text/sources.py",
        "if is_file_name(value) or (near := near_path(value)):",
        "if False:",
        "the Hub is asked for it, again and again",
    ),
    Mutation(
        89,
        "A tokenizer that gives other ids than GPT-2's",
        ("text/test_preparation", "other_ids"),
        "text/parts.py",
        "if not np.array_equal(documents[i], self.tokenizer.encode(texts[i].as_py())):",
        "if False:",
        "a model of tokens that no other tool knows",
    ),
    Mutation(
        90,
        "Letters that only one of the two tokenizers knows",
        ("text/test_tokenizer", "every_character"),
        "text/tokenizer.py",
        "for number in with_new_letters(texts):",
        "for number in ():",
        "a contraction behind them has other tokens",
    ),
    Mutation(
        91,
        "A vocabulary that has read what is tested on",
        ("text/test_vocabulary", "may_be_tested or first_document"),
        "text/vocabulary.py",
        "if place >= TEST_SHARES[-1]:",
        "if True:",
        "a test loss that is too good",
    ),
    Mutation(
        92,
        "A damaged vocabulary in a checkpoint",
        ("text/test_tokenizer", "a_damaged_vocabulary"),
        "text/tokenizer.py",
        "if tokenizer.encoding != encoding:",
        "if False:",
        "another text than the model wrote",
    ),
    Mutation(
        93,
        "A run with a vocabulary of its own is resumed without its size",
        ("test_own_vocabulary", "killed_ends_the_same"),
        "training/initial.py",
        'names = SIZES if settings.initial_checkpoint else ("vocabulary_size",)',
        "names = SIZES if settings.initial_checkpoint else ()",
        "it is refused",
    ),
    Mutation(
        94,
        "Two runs train one vocabulary at once",
        ("text/test_vocabulary", "two_runs_at_once"),
        "text/vocabulary.py",
        "return read_vocabulary(path, sources) or train_vocabulary(path, sources, size)",
        "return train_vocabulary(path, sources, size)",
        "it is made twice",
    ),
]


def main() -> None:
    chosen = set(map(int, sys.argv[1:]))
    mutations = [each for each in MUTATIONS if not chosen or each.number in chosen]
    lines, survivors = [], []

    # Each has a process of its own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, bites in zip(mutations, pool.map(attempt, mutations), strict=True):
            line = line_of(mutation)
            lines.append(line)
            print(line if bites else f"SURVIVES {line}", flush=True)

            if not bites:
                survivors.append(mutation.number)

    if not chosen and not survivors:
        head, mark, _ = TABLE.read_text().partition("<!-- python tests/mutations.py -->\n")
        head_of_table = "| # | Fault | Tests | Guard | Without it |\n|---|---|---|---|---|\n"
        TABLE.write_text(head + mark + "\n" + head_of_table + "\n".join(lines) + "\n")

    sys.exit(f"survive: {survivors}" if survivors else 0)


def line_of(mutation: Mutation) -> str:
    """Return a mutation's line of the table."""
    number, fault, (name, expression), file, guard, _, outcome = mutation
    first_line = guard.strip().splitlines()[0].strip().replace("|", "\\|")

    return (
        f'| {number} | {fault} | `{name}.py -k "{expression}"` | `{first_line}` in {file}'
        f" | {outcome} |"
    )


def attempt(mutation: Mutation) -> bool:
    """Tell whether the tests of a copy without the guard fail."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "out"))
        path = copy / mutation.file
        text = path.read_text()
        assert text.count(mutation.guard) == 1, f"{mutation.number}: the guard is not there"
        path.write_text(text.replace(mutation.guard, mutation.instead))
        return has_failures(copy, *mutation.test)


def has_failures(folder: Path, name: str, expression: str) -> bool:
    # Those side by side would clear up each other's folders.
    options = ["-x", "-n", "0", f"--basetemp={folder.parent / 'tests'}"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/{name}.py"]

    try:
        result = subprocess.run(
            [*command, "-k", expression],
            check=False,
            cwd=folder,
            capture_output=True,
            timeout=300,
            # What should have been refused at once finds no network.
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9"},
        )
    except subprocess.TimeoutExpired:
        # With the guard it does not hang.
        return True

    return result.returncode == 1


if __name__ == "__main__":
    main()
