"""Pre-train a masked autoencoder: `python pretrain.py`.

What goes in: unlabelled images. What comes out: a run folder with the settings (config.json), a
row an epoch (log.csv), the weights (checkpoint.pt; at the end also weights.pt, in half precision),
reconstructions of the same test images as training goes on, and the curves.

Read from the bottom: `main` is the story. Above it, in the order that it uses them:

    settings      flags, recipes, what they resolve to
    machine       processes, device, precision, compilation, memory
    optimisation  MAE, appendix A.1: AdamW, linear warm-up, half-cycle cosine; Muon
    run folder    start, go on, save an epoch

`finetune.py` uses the same pieces. Several processes: `torchrun --nproc-per-node 8 pretrain.py`.
"""
import argparse
import contextlib
import copy
import csv
import ctypes
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import mae
import visualize
from data import BadInput

try:
    import fcntl
    import resource
except ImportError:             # on Windows: no lock on run folders, no memory in the log
    fcntl = resource = None


# ------------------------------------------------------------------------------ settings

MODELS = {
    "full": dict(patch_size=2, dim=192, depth=12, heads=3),     # ViT-Tiny
    "laptop": dict(patch_size=4, dim=128, depth=6, heads=4),
}
RECIPES = {
    "full": dict(
        MODELS["full"], decoder_dim=192, decoder_depth=4, decoder_heads=3, mask_ratio=0.75,
        norm_pix_loss=False, epochs=2000, warmup_epochs=200, batch_size=4096, base_lr=1.5e-4,
        optimizer="adamw", weight_decay=0.05, augment="none", picture_every=50),
    "laptop": dict(
        MODELS["laptop"], decoder_dim=64, decoder_depth=1, decoder_heads=2, mask_ratio=0.75,
        norm_pix_loss=False, epochs=3, warmup_epochs=0.375, batch_size=64, base_lr=1e-2,
        optimizer="muon", weight_decay=0.05, augment="crop", picture_every=1),
}
TEST_IMAGES = 1000      # the first ones, for the test loss
PICTURED = 12           # the first ones of these, for the reconstructions
BENCHMARK_SECONDS = 15  # at least
FREE_SECONDS = 0.1      # a checkpoint written in this time is written after every epoch


def add_flag(parser: data.Parser, recipes: dict, flag: str, text: str, **kwargs) -> None:
    """A flag whose default is the recipe's; the help says which that is."""
    name = flag.removeprefix("--").replace("-", "_")
    values = [f"{recipe}: {values[name]}" for recipe, values in recipes.items() if name in values]
    text += f" ({', '.join(values)})" if values else ""
    parser.add_argument(flag, help=text.replace("%", "%%"), **kwargs)


def add_common_flags(parser: data.Parser, recipes: dict) -> None:
    """The flags that pretrain.py and finetune.py share."""
    def flag(name: str, text: str, **kwargs) -> None:
        add_flag(parser, recipes, name, text, **kwargs)

    positive, switch = data.number(int, 1, 10**6), argparse.BooleanOptionalAction
    flag("--recipe", "set of defaults; any flag given by hand wins (auto: full on CUDA, else "
         "laptop)", choices=["auto", *recipes])
    flag("--dataset", "auto is CIFAR-10 where it is or can be downloaded, else the drawn shapes "
         "(auto)", choices=["auto", *data.SOURCES])
    flag("--data-dir", "folder of the data sets' folders (data)", metavar="DIR")
    flag("--limit", "use the first N training images only (all)", type=positive, metavar="N")
    flag("--validation", "test on the last N training images and train on the others, for choosing "
         "settings (0: the test images)", type=data.number(int, 0, 10**6), metavar="N")
    flag("--epochs", "passes over the training images", type=positive, metavar="N")
    flag("--warmup-epochs", "epochs in which the learning rate rises from 0; if not given, "
         "scaled with --epochs",
         type=data.number(float, 0), metavar="N")
    flag("--batch-size", "images per optimizer step, over all processes", type=positive,
         metavar="N")
    flag("--micro-batch-size", "images at once in one process; their gradients add up to those of "
         "the batch (what fits in memory)", type=positive, metavar="N")
    flag("--base-lr", "learning rate for a batch of 256; the one used is LR x batch size / 256",
         type=data.number(float, 0, open_ends=True), metavar="LR")
    flag("--optimizer", "muon: orthogonalized steps for the matrices of the blocks, AdamW for the "
         "rest", choices=["adamw", "muon"])
    flag("--weight-decay", "on weight matrices only", type=data.number(float, 0),
         metavar="W")
    flag("--patch-size", "side of a patch in pixels", type=positive, metavar="P")
    flag("--dim", "width of the encoder", type=positive, metavar="D")
    flag("--depth", "blocks of the encoder", type=positive, metavar="N")
    flag("--heads", "attention heads of the encoder", type=positive, metavar="N")
    flag("--augment", "flip: mirrored or not; crop: flips, and shifts by up to 4 pixels",
         choices=["none", "flip", "crop"])
    flag("--seed", "of weights, order, augmentation and masks (0)",
         type=data.number(int, 0, 2**32 - 1), metavar="S")
    flag("--device", "(auto: cuda, else mps, else cpu)", choices=["auto", "cpu", "cuda", "mps"])
    flag("--precision", "bf16 runs matrix products in bfloat16 (auto: bf16 where the processor "
         "multiplies it in hardware)", choices=["auto", "fp32", "bf16"])
    flag("--compile", "compile the model with torch.compile (auto: on CUDA)", action=switch)
    flag("--out", "run folder (runs/KIND-DATASET-RECIPE; the program prints which)",
         metavar="RUN", type=Path)
    flag("--resume", "go on with the run in --out, with its own settings", action="store_const",
         const=True)
    flag("--benchmark", "print this machine's speed with these settings and write nothing",
         action="store_const", const=True)


def make_parser() -> data.Parser:
    parser = data.Parser(allow_abbrev=False, description="Pre-train a masked autoencoder. Defaults "
                         "are in parentheses, per recipe where they differ.")
    add_common_flags(parser, RECIPES)
    positive = data.number(int, 1, 10**6)

    def flag(name: str, text: str, **kwargs) -> None:
        add_flag(parser, RECIPES, name, text, **kwargs)

    flag("--mask-ratio", "part of the patches that is hidden, between 0 and 1", metavar="R",
         type=data.number(float, 0, 1, open_ends=True))
    flag("--norm-pix-loss", "predict each patch normalised by its own mean and deviation",
         action=argparse.BooleanOptionalAction)
    flag("--decoder-dim", "width of the decoder", type=positive, metavar="D")
    flag("--decoder-depth", "blocks of the decoder", type=positive, metavar="N")
    flag("--decoder-heads", "attention heads of the decoder", type=positive, metavar="N")
    flag("--picture-every", "draw reconstructions every N epochs, and after the first and the last",
         type=positive, metavar="N")
    return parser


def parse_flags(parser: data.Parser, argv: list[str] | None) -> dict:
    """The flags that were given by hand. Raises BadInput."""
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    if given.get("resume") and "out" not in given:
        raise BadInput("--resume needs --out RUN, the run to go on with")
    if given.get("benchmark") and "out" in given and not given.get("resume"):
        raise BadInput("--out does nothing with --benchmark: leave it out")
    return given


NOT_KEPT = {"out", "resume", "benchmark", "device", "compile", "recipe", "precision"}
MAY_CHANGE = {"out", "resume", "benchmark", "device", "precision", "compile", "data_dir",
              "micro_batch_size", "picture_every"}  # where and how a run runs, not what it learns


def spell(name: str, value) -> str:
    """A flag as it was given."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def resolve_settings(given: dict, recipes: dict, machine: "Machine") -> argparse.Namespace:
    """The recipe's values, and over them those given by hand. Raises BadInput."""
    recipe = given.get("recipe", "auto")
    if recipe == "auto":
        recipe = "full" if machine.device.type == "cuda" else "laptop"
    common = dict(dataset="auto", data_dir="data", limit=None, validation=0,
                  micro_batch_size=None, seed=0)
    chosen = {name: value for name, value in given.items() if name not in NOT_KEPT}
    settings = argparse.Namespace(**{**common, **recipes[recipe], **chosen})
    settings.recipe, settings.precision = recipe, machine.precision
    if "warmup_epochs" not in given:                        # the same share of the epochs
        settings.warmup_epochs *= settings.epochs / recipes[recipe]["epochs"]
    settings.command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if settings.warmup_epochs > settings.epochs:
        raise BadInput(f"--warmup-epochs {settings.warmup_epochs} is longer than --epochs "
                       f"{settings.epochs}")
    return settings


def resumed_settings(checkpoint: dict, given: dict) -> argparse.Namespace:
    """The run's own settings. Raises BadInput where a flag contradicts them."""
    settings = argparse.Namespace(**{"validation": 0, **checkpoint["settings"]})    # not in older
    epoch = checkpoint["epoch"]
    before = settings.epochs, learning_rate(settings, epoch)
    for name, value in given.items():
        own = getattr(settings, name, None)
        raised = name == "epochs" and value > own
        if value in (own, "auto") or name in MAY_CHANGE and not hasattr(settings, name):
            continue
        if not raised and name not in MAY_CHANGE:
            raise BadInput(f"{spell(name, value)} contradicts the run in {given['out']}, which has "
                           f"{'none' if own is None else own}: leave the flag out, or start "
                           "another run with another --out")
        setattr(settings, name, value)
    if settings.epochs > before[0] and data.is_main_process():
        print(f"schedule: the cosine now ends after epoch {settings.epochs} instead of {before[0]};"
              f" the learning rate after epoch {epoch} is {learning_rate(settings, epoch):.3g} "
              f"instead of {before[1]:.3g}")
    return settings


# ------------------------------------------------------------------------------ machine


@dataclass(frozen=True)
class Machine:
    """Where a program runs: this process, its device, how it computes."""
    device: torch.device
    precision: str              # "fp32" or "bf16"
    compile: bool
    rank: int = 0               # of this process
    local_rank: int = 0         # of this process among those on its computer
    processes: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that downloads, writes and prints."""
        return self.rank == 0

    def autocast(self):
        """Matrix products in bfloat16; weights, LayerNorms and losses stay in float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def eager(self):
        """Run the model as it is written, not as compiled: for batches of other sizes."""
        return (torch.compiler.set_stance("force_eager") if self.compile
                else contextlib.nullcontext())

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a global batch: (B, ...) -> (B / processes, ...)."""
        return batch.tensor_split(self.processes)[self.rank % self.processes]

    def describe(self) -> str:
        name = (torch.cuda.get_device_name() if self.device.type == "cuda"
                else f"{torch.get_num_threads()} threads")
        return (f"{self.device.type} ({name}), {self.precision}, "
                f"{'compiled' if self.compile else 'not compiled'}"
                + (f", {self.processes} processes" if self.processes > 1 else ""))


def multiplies_bf16(device: str) -> bool:
    """Whether the processor has matrix products in bfloat16 (on x86 AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()   # not in older torch
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def missing_to_compile(device: str) -> str:
    """What torch.compile would look for in vain: a compiler, Python's headers, Triton; or ""."""
    if device == "cuda":                                    # see triton.runtime.build
        variable, usual = "CC", ["gcc", "clang"]
    else:                                                   # see torch._inductor.config.cpp.cxx
        variable, usual = "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    compilers = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, compilers)):
        return f"a compiler ({' or '.join(compilers)})"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists():
        return "Python.h (a package like python3-dev)"
    return "triton" if device == "cuda" and not importlib.util.find_spec("triton") else ""


@contextlib.contextmanager
def on_machine(given: dict):
    """Find the device, join the other processes where torchrun started several; yield a Machine.

    Raises BadInput where the device is not there or cannot do what was asked for.
    """
    rank, local_rank, processes = 0, 0, 1
    if "LOCAL_RANK" in os.environ:                          # set by torchrun
        rank, local_rank, processes = (int(os.environ[name])
                                       for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    name = given.get("device", "auto")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(device for device in there if there[device])
    if not there[name]:
        raise BadInput(f"--device {name}: torch finds no such device here; leave the flag out to "
                       "use what there is")
    precision = given.get("precision", "auto")
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(name) else "fp32"
    elif precision == "bf16" and not multiplies_bf16(name):
        if name != "cpu":
            raise BadInput(f"--precision bf16: this {name} device cannot; use fp32")
        if rank == 0:
            print("note: this processor has no products in bfloat16; --precision fp32 is faster",
                  file=sys.stderr)
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise BadInput(f"process {local_rank + 1} on this machine finds "
                       f"{torch.cuda.device_count()} GPUs: start as many processes as GPUs")
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    missing = missing_to_compile(name)
    if given.get("compile") and missing:
        raise BadInput(f"--compile needs {missing}: install it, or leave the flag out")
    if name == "cuda" and missing and "compile" not in given and rank == 0:
        print(f"note: without {missing} the model is not compiled, which costs speed",
              file=sys.stderr)
    compiled = given.get("compile", name == "cuda" and not missing)
    keep_freed_memory()
    if local_rank == 0:         # it may be downloading or writing; the others can die at once
        stop_on_sigterm()
    if processes > 1:                                       # the main process may download for long
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=1),
                                device_id=device if name == "cuda" else None)
    yield Machine(device, precision, compiled, rank, local_rank, processes)
    if processes > 1:                                       # after an error nobody would answer
        dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of any size instead of returning them to the system, which
    would have to hand them out and clear them again at every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # another C library: as it is
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # malloc.h
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def stop_on_sigterm() -> None:
    """SIGTERM stops a program as Ctrl-C does."""
    def stop(*_):
        interrupt = KeyboardInterrupt()
        interrupt.sigterm = True
        raise interrupt
    signal.signal(signal.SIGTERM, stop)


def fit_micro_batch(settings: argparse.Namespace, machine: Machine, tokens_width: int) -> int:
    """How many images a process computes at once: what was asked for, else what memory allows.

    tokens_width: tokens x width, summed over the blocks, of one image. Backpropagation keeps
    about 20 numbers for each. Raises BadInput where the batch cannot be divided so.
    """
    batch, micro = settings.batch_size, settings.micro_batch_size
    if batch % machine.processes:
        raise BadInput(f"--batch-size {batch} cannot be shared by {machine.processes} processes: "
                       "make it a multiple")
    local = batch // machine.processes
    if micro is None:
        bytes_per_image = tokens_width * 20 * (2 if machine.precision == "bf16" else 4)
        budget = 0.6 * torch.cuda.mem_get_info()[0] if machine.device.type == "cuda" else 1e9
        micro = max(size for size in range(1, local + 1)
                    if local % size == 0 and (size == 1 or size * bytes_per_image <= budget))
    if local % micro:
        raise BadInput(f"--micro-batch-size {micro} does not divide the {local} images that each "
                       "process has of a batch")
    return micro


def peak_memory_mb(device: torch.device) -> int:
    """The most memory used so far, in MiB: the GPU's on CUDA, else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024          # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


# ------------------------------------------------------------------------------ optimisation


def learning_rate(settings: argparse.Namespace, epoch: float) -> float:
    """Linear warm-up, then half a cosine to zero (MAE, appendix A.1), after `epoch` epochs, which
    may be a fraction."""
    peak = settings.base_lr * settings.batch_size / 256     # the linear scaling rule
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs,
                                                      1e-9)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, (n, r, c) -> the same shape, by products alone.

    Each step (Newton-Schulz; Jordan et al. 2024) takes a singular value s to 3.4445 s - 4.775 s^3
    + 2.0315 s^5, which lifts small ones fast and leaves those near 1 between 0.68 and 1.15. That is
    s times a factor of s^2, so all steps can be taken on the small square matrix of the s^2.
    """
    if matrices.shape[1] > matrices.shape[2]:               # the square matrix is the smaller one
        return orthogonalize(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)     # no s is above 1
    gram = x @ x.mT                                         # (n, r, r)
    factors = identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        factors = factor @ factors
        gram = factor @ gram @ factor
    return factors @ x                                      # (n, r, c)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon): a matrix
    moves equally far in all directions, not only in the few that dominate its gradient.

    For the weight matrices inside a network. An orthogonal (r, c) matrix has entries of about
    1 / sqrt(max(r, c)), so a weight moves by about STEP * lr, as far as with AdamW, which Liu et
    al. 2025 (arXiv 2502.16982, section 2.2) found at 0.2 to 0.4. Queries, keys and values share
    one matrix. torch.optim.Muon computes in bfloat16 and matrix by matrix, slow on most CPUs.
    """
    STEP = 0.4

    def __init__(self, groups: list[dict], momentum: float = 0.95) -> None:
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        by_shape = {}                                       # those of one shape go together
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append((matrix, group))
        for shape, members in by_shape.items():
            directions = orthogonalize(torch.stack(
                [self.average(matrix, group["momentum"]) for matrix, group in members]))
            for (matrix, group), direction in zip(members, directions):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(direction, alpha=self.STEP * group["lr"] * max(shape) ** 0.5)

    def average(self, matrix: Tensor, momentum: float) -> Tensor:
        """Nesterov momentum: the running average of its gradients, blended with the latest."""
        if "average" not in self.state[matrix]:
            self.state[matrix]["average"] = torch.zeros_like(matrix)
        average = self.state[matrix]["average"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def make_optimizers(model: nn.Module, settings: argparse.Namespace, betas: tuple[float, float],
                    lr_scale=lambda name: 1.0) -> list[torch.optim.Optimizer]:
    """AdamW, and where the settings say so Muon for the matrices inside the blocks.

    No weight decay on biases and LayerNorms (1 dimension) or tokens and position embeddings (3),
    only on matrices (2) and the patch embedding (4). lr_scale(name) is what a parameter's learning
    rate is multiplied by.
    """
    of_adamw, of_muon = {}, {}                              # (decay, scale) -> parameters
    for name, parameter in model.named_parameters():
        in_block = "blocks." in name and parameter.ndim == 2
        groups = of_muon if settings.optimizer == "muon" and in_block else of_adamw
        decay = settings.weight_decay if parameter.ndim in (2, 4) else 0.0
        groups.setdefault((decay, lr_scale(name)), []).append(parameter)
    adamw, muon = ([{"params": parameters, "weight_decay": decay, "lr_scale": scale}
                    for (decay, scale), parameters in groups.items()]
                   for groups in (of_adamw, of_muon))
    optimizers = [torch.optim.AdamW(adamw, lr=0.0, betas=betas, fused=True)]
    return optimizers + [Muon(muon)] if muon else optimizers


def prepare_model(model: nn.Module, machine: Machine) -> nn.Module:
    """Move the model to its device and compile it where that was asked for; wrapped so that
    gradients are shared, if there are several processes."""
    model.to(machine.device)
    if machine.compile:
        model.compile()
    return DistributedDataParallel(model) if machine.processes > 1 else model


def gradient(model: nn.Module, objective, batch: tuple[Tensor, ...], micro: int,
             machine: Machine) -> Tensor:
    """Add up the gradient of one batch, micro-batch by micro-batch.

    batch: tensors (B, ...), this process's part. objective(model, *micro_batch) returns a loss
    and what to log, (S,). Returns the mean of the latter over the batch. Several processes
    exchange gradients in the last backward pass alone.
    """
    parts = list(zip(*(tensor.split(micro) for tensor in batch)))
    logged = 0
    for i, part in enumerate(parts):
        wait = machine.processes > 1 and i < len(parts) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            with machine.autocast():
                loss, stats = objective(model, *part)
            (loss / len(parts)).backward()
        logged = logged + stats.detach() / len(parts)
    return logged


def train_epoch(model: nn.Module, objective, batches, steps: int, optimizers, epoch: int,
                micro: int, settings: argparse.Namespace, machine: Machine) -> list[float]:
    """One epoch; the mean of what `objective` logs.

    batches yields global batches. epoch counts from 1. The host waits for the device only
    to show progress. Raises BadInput where the loss is not finite.
    """
    model.train()
    logged, shown = [], time.monotonic()
    for step, batch in enumerate(batches):
        lr = learning_rate(settings, epoch - 1 + (step + 0.5) / steps)   # mid-step
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = lr * group["lr_scale"]
        logged.append(gradient(model, objective, tuple(map(machine.part, batch)), micro, machine))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        if machine.main and progress_is_due(shown) and step + 1 < steps:
            shown = time.monotonic()
            show_progress(f"epoch {epoch}/{settings.epochs}  step {step + 1}/{steps}  "
                          f"loss {logged[-1][0]:.4f}")
    logged = machine.sum(torch.stack(logged)) / machine.processes   # (steps, S)
    finite = logged.isfinite().all(dim=1)
    if not finite.all():
        step = int(finite.long().argmin())                  # the first that is not
        lr = learning_rate(settings, epoch - 1 + (step + 0.5) / steps)
        raise BadInput(f"the loss is no longer finite in epoch {epoch}, step {step + 1}, at "
                       f"learning rate {lr:.3g}; {DIVERGED}")
    return logged.mean(dim=0).tolist()


DIVERGED = ("the last checkpoint is kept: lower --base-lr or lengthen --warmup-epochs in a new "
            "run")


def progress_is_due(shown: float) -> bool:
    """Twice a second on a terminal, twice a minute in a file; shown: the last time.monotonic()."""
    return time.monotonic() - shown > (0.5 if sys.stderr.isatty() else 30)


def show_progress(text: str) -> None:
    """A line that the next one replaces on a terminal, and a line of its own in a file."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:<100}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)


def with_progress(text: str, parts: list, machine: Machine):
    """Yield the parts one by one, and show how many are done."""
    shown = time.monotonic()
    for done, part in enumerate(parts, start=1):
        yield part
        if machine.main and progress_is_due(shown) and done < len(parts):
            shown = time.monotonic()
            show_progress(f"{text} {done / len(parts):.0%}")


def shorten_steps(settings: argparse.Namespace, given: dict, machine: Machine) -> None:
    """For a benchmark: a step of 4096 images takes minutes on a CPU, and one of 256, where no
    other size was asked for, tells as much."""
    if machine.device.type == "cpu" and not given.keys() & {"batch_size", "micro_batch_size"}:
        settings.batch_size = min(settings.batch_size, 256)


def run_benchmark(model: nn.Module, objective, epoch_batches, optimizers, micro: int,
                  settings: argparse.Namespace, machine: Machine) -> None:
    """Print images/s, TFLOP/s and memory of whole training steps on real batches."""
    plain = getattr(model, "module", model)
    one_image = [tensor[:1] for tensor in next(epoch_batches(1))]
    plain.eval()                                            # one image is no batch to normalise
    with machine.eager(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(plain, *one_image)[0].backward()          # attention as plain products: counted
    plain.zero_grad()
    flop = counter.get_total_flops()
    steps = 10 if machine.device.type == "cuda" else max(1, 256 // settings.batch_size)
    seconds = []
    while len(seconds) < 6 or sum(seconds[1:]) < BENCHMARK_SECONDS:     # the first one warms up
        start = time.perf_counter()
        batches = itertools.islice(itertools.cycle(epoch_batches(1)), steps)
        train_epoch(model, objective, batches, steps, optimizers, 1, micro, settings, machine)
        took = torch.tensor(time.perf_counter() - start, device=machine.device)
        seconds.append(machine.sum(took).item() / machine.processes)
    speed = steps * settings.batch_size / statistics.median(seconds[1:])
    if machine.main:
        print(f"speed      {speed:,.1f} images/s (median of {len(seconds) - 1} timings of {steps} "
              f"steps of {settings.batch_size} images)\n"
              f"arithmetic {speed * flop / 1e12:.3g} TFLOP/s ({flop / 1e9:.3g} GFLOP an image, "
              f"forward and backward)\n"
              f"memory     {peak_memory_mb(machine.device):,} MiB at the peak")


# ------------------------------------------------------------------------------ run folder


def holds_run(out: Path) -> bool:
    return any((out / name).exists() for name in ("checkpoint.pt", "weights.pt", "log.csv",
                                                  "config.json"))


def resuming(out: Path, program: str) -> str:
    return f"python {program} --out {shlex.quote(str(out))} --resume"


def check_free(out: Path, program: str) -> None:
    """Raises BadInput where the folder for a new run holds one."""
    if holds_run(out):
        raise BadInput(f"{out} already holds a run: go on with `{resuming(out, program)}`, or give "
                       "another folder with --out")


@contextlib.contextmanager
def run_folder(out: Path, program: str, resumed: bool, machine: Machine):
    """Around all that writes to a run's folder: no other program writes to it, it holds no other
    run, and an interruption says how to go on. Raises BadInput."""
    with locked(out) if machine.main else contextlib.nullcontext():
        if machine.main and not resumed:
            check_free(out, program)
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.args = (f"Go on with: {resuming(out, program)}",)
            raise


@contextlib.contextmanager
def locked(folder: Path):
    """Make a folder and keep other programs out of it, until the end of this one at the latest.
    Raises BadInput where another one is in it."""
    if fcntl is None:                                       # on Windows: unguarded
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BadInput(f"another program is writing to {folder}: wait for it, or give another "
                       "folder with --out") from None
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}; give another folder with "
                       "--out") from None
    try:
        yield
    finally:
        os.close(handle)


def load_run(out: Path, kind: str) -> dict:
    """The checkpoint to go on with. Raises BadInput."""
    if not holds_run(out):
        raise BadInput(f"--resume: {out} holds no run; name the run with --out, or start one "
                       "without --resume")
    checkpoint = data.load_checkpoint(out / "checkpoint.pt", kind)
    if not isinstance(checkpoint.get("optimizer"), list):
        raise BadInput(f"{out / 'checkpoint.pt'} holds weights alone: the run cannot be resumed")
    return checkpoint


def write_config(out: Path, settings: argparse.Namespace, machine: Machine, micro: int) -> None:
    """config.json: everything needed to repeat the run."""
    git = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
                         capture_output=True, text=True) if shutil.which("git") else None
    config = {
        "settings": vars(settings),
        "machine": {"device": machine.describe(), "processor": platform.processor()
                    or platform.machine(), "cores": os.cpu_count(), "processes": machine.processes,
                    "micro_batch_size": micro},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__, "pillow": PIL.__version__},
        "commit": git.stdout.strip() or None if git else None,
    }
    data.write_file(out / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def write_log(out: Path, log: list[dict]) -> None:
    """log.csv, whole. The checkpoint holds the rows too: a resumed run takes them from there."""
    if log:
        text = io.StringIO()
        writer = csv.DictWriter(text, log[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
        data.write_file(out / "log.csv", text.getvalue().encode())


@dataclass
class Pace:
    """When a checkpoint is due: after every epoch; but if writing one takes more than
    FREE_SECONDS, not before 20 times as long have passed since the last."""
    seconds: float = 0.0        # that the last one took
    end: float = -math.inf      # of the last one, by time.monotonic()

    def is_due(self) -> bool:
        wait = 20 * self.seconds if self.seconds > FREE_SECONDS else 0
        return time.monotonic() - self.end >= wait

    @contextlib.contextmanager
    def timed(self):
        start = time.monotonic()
        yield
        self.end = time.monotonic()
        self.seconds = self.end - start


def save_epoch(out: Path, kind: str, settings: argparse.Namespace, model: nn.Module, optimizers,
               log: list[dict], pace: Pace, **more) -> None:
    """The log and, where it is due, the checkpoint after as many epochs as the log has rows;
    after the last epoch also the weights alone, in half precision, to keep and share."""
    if log and not (out / "config.json").exists():
        raise BadInput(f"{out} was deleted or emptied while its run went on: start another one")
    common = dict(kind=kind, settings=vars(settings), epoch=len(log), log=log)
    state = model.state_dict()
    if pace.is_due() or len(log) == settings.epochs:
        with pace.timed():
            states = [optimizer.state_dict() for optimizer in optimizers]
            data.save_checkpoint(out / "checkpoint.pt",
                                 dict(common, model=state, optimizer=states, **more))
    write_log(out, log)
    if len(log) == settings.epochs:
        half = {name: value.half() for name, value in state.items()}
        data.save_checkpoint(out / "weights.pt", dict(common, model=half))


def begin_run(out: Path, save, log: list[dict], settings: argparse.Namespace, machine: Machine,
              micro: int) -> None:
    """All that a run's folder holds before its first epoch, or before it goes on. save(), the
    first time that it is called, writes the checkpoint and the log."""
    if not log:
        save()                                              # first what a resumed run needs
    write_config(out, settings, machine, micro)
    tidy_run(out, len(log))
    if log:
        save()


def restore(optimizers, checkpoint: dict | None) -> list[dict]:
    """Load the optimizers' states from a checkpoint, if there is one; return its log."""
    if not checkpoint:
        return []
    for optimizer, state in zip(optimizers, checkpoint["optimizer"], strict=True):
        optimizer.load_state_dict(state)
    return checkpoint["log"]


def tidy_run(out: Path, epoch: int) -> None:
    """Delete what a stopped run wrote after its last checkpoint."""
    (out / "weights.pt").unlink(missing_ok=True)
    if epoch == 0:                                          # else it is written anew
        (out / "log.csv").unlink(missing_ok=True)
    for folder in (out, out / "reconstructions"):
        for part in folder.glob(".*.part"):
            part.unlink(missing_ok=True)
    for picture in (out / "reconstructions").glob("epoch-*.png"):
        number = picture.stem.removeprefix("epoch-")
        if number.isdecimal() and int(number) > epoch:
            picture.unlink(missing_ok=True)


def log_row(epoch: int, values: dict, lr: float, seconds: float, images_per_second: float,
            machine: Machine) -> dict:
    """A row of log.csv; the last three columns are measured, the others fixed by the seed.

    seconds: since the row before, images_per_second: in training alone. Raises BadInput where a
    loss is not finite.
    """
    if not all(map(math.isfinite, values.values())):
        raise BadInput(f"the test loss is not finite after epoch {epoch}; {DIVERGED}")
    return {"epoch": epoch, **{name: float(f"{value:.7g}") for name, value in values.items()},
            "lr": float(f"{lr:.7g}"), "seconds": round(seconds, 2),
            "images_per_second": round(images_per_second, 1),
            "peak_memory_mb": peak_memory_mb(machine.device)}


def draw_log(out: Path, dataset: data.Dataset, log: list[dict]) -> None:
    title = visualize.title_of(dataset.name)
    picture = visualize.draw_curves({out.resolve().name: log}, caption=title)
    visualize.save_png(picture, out / "curves.png")


def time_left(log: list[dict], epochs: int) -> timedelta:
    """For the epochs to come, at the pace of the last ones."""
    pace = statistics.median(row["seconds"] for row in log[-5:])
    return timedelta(seconds=round(pace * (epochs - len(log))))


# ------------------------------------------------------------------------------ the program


def load_data(settings: argparse.Namespace, machine: Machine) -> data.Dataset:
    """The data set on the device. Only the main process downloads, and where there are several
    machines the first process of each. Raises BadInput."""
    turn = 0 if machine.main else 1 if machine.local_rank == 0 else 2
    for now in range(3):
        if now == turn:
            dataset = data.load_dataset(settings.dataset, settings.data_dir)
        if machine.processes > 1:
            name = [dataset.name if machine.main else None]
            dist.broadcast_object_list(name)
            settings.dataset = name[0]                      # what "auto" turned out to be
            dist.barrier()
    settings.dataset = dataset.name
    images = [len(dataset.train_images), len(dataset.test_images)]
    if getattr(settings, "images", images) != images:
        raise BadInput(f"{settings.data_dir} holds {images[0]} + {images[1]} images, the run was "
                       f"made with {settings.images[0]} + {settings.images[1]}: name the folder of "
                       "its data set with --data-dir")
    settings.images = images
    if settings.validation:
        dataset = dataset.hold_out(settings.validation)
    if settings.limit:
        dataset = dataset.first(settings.limit)
    return dataset.to(machine.device)


def tested_on(settings: argparse.Namespace) -> str:
    """What the images of the test losses and accuracies are called."""
    return "validation" if settings.validation else "test"


def count_tokens_width(model: mae.MAEViT, settings: argparse.Namespace) -> int:
    """Tokens x width, summed over the blocks of encoder and decoder: the size of an image's
    activations."""
    N = model.encoder.num_patches
    K = model.shuffle.count_visible(N)
    return ((1 + K) * settings.dim * settings.depth
            + (1 + N) * settings.decoder_dim * settings.decoder_depth)


def build(kind: str, settings: argparse.Namespace) -> nn.Module:
    """The model, its weights fixed by the seed. Raises BadInput where sizes do not fit."""
    torch.manual_seed(settings.seed)
    try:
        return mae.build_model(kind, vars(settings))
    except ValueError as error:
        flags = "--patch-size, --dim, --heads, --mask-ratio"
        flags += ", --decoder-heads" if kind == "pretrain" else ""
        raise BadInput(f"{error}: see {flags}") from None


def masked_loss(model: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 (B, 3, H, W), (B, N) -> the loss, and what to log: the loss."""
    loss, _, _ = model(data.scale(images), noise)
    return loss, loss[None]


def epoch_batches(dataset: data.Dataset, settings: argparse.Namespace, num_patches: int,
                  epoch: int):
    """The global batches of an epoch: images uint8 (B, 3, H, W), noise (B, N)."""
    images = dataset.train_images
    generator = data.seeded_generator(images.device, settings.seed, epoch)
    for ids in data.epoch_order(len(images), settings.batch_size, generator):
        batch = data.augment(images[ids], settings.augment, generator)
        yield batch, torch.rand(len(ids), num_patches, generator=generator, device=images.device)


@torch.no_grad()
def test_loss(model: nn.Module, images: Tensor, noise: Tensor, machine: Machine) -> float:
    """The mean loss over test images (n, 3, H, W) with fixed masks by noise (n, N)."""
    model.eval()
    total = torch.zeros((), device=images.device)
    with machine.eager(), machine.autocast():
        for part in zip(machine.part(images).split(250), machine.part(noise).split(250)):
            if len(part[0]):
                total += masked_loss(model, *part)[0] * len(part[0])
    return machine.sum(total).item() / len(images)


def say_expected(model: nn.Module, objective, batches, images: float, steps: int, optimizers,
                 micro: int, machine: Machine) -> None:
    """Print how long so many images and optimizer steps will take, by the second of two steps on
    one micro-batch; model and optimizers stay as they were."""
    learners = model, *optimizers
    before = copy.deepcopy([learner.state_dict() for learner in learners])
    batch = [machine.part(tensor)[:micro] for tensor in next(batches)]
    for _ in range(2):
        start = time.monotonic()
        gradient(model, objective, batch, micro, machine).sum().item()
        computed = time.monotonic()
        for optimizer in optimizers:
            optimizer.step()
        next(model.parameters()).sum().item()               # waits for the device
        stepped = time.monotonic()
    for learner, state in zip(learners, before):
        learner.load_state_dict(state)
    model.zero_grad()
    seconds = (images * (computed - start) / len(batch[0]) / machine.processes
               + steps * (stepped - computed))
    if machine.main:
        print(f"expected   {timedelta(seconds=round(seconds))} (hours:minutes:seconds)", flush=True)


def describe_run(settings: argparse.Namespace, machine: Machine, dataset: data.Dataset, steps: int,
                 micro: int, model: nn.Module, out: Path | None, epoch: int) -> None:
    """Print what is about to run. out: its folder, if it has one; epoch: how many are done."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"device     {machine.describe()}\n"
          f"data       {dataset.name}, {len(dataset.train_images):,} training and "
          f"{len(dataset.test_images):,} {tested_on(settings)} images, augmentation: "
          f"{settings.augment}\n"
          f"recipe     {settings.recipe}: {settings.epochs} epochs of {steps} steps of "
          f"{settings.batch_size} images (micro-batches of {micro}), {settings.optimizer}, "
          f"learning rate up to {settings.base_lr * settings.batch_size / 256:.3g}\n"
          f"model      ViT {settings.dim} x {settings.depth} blocks, {settings.heads} heads, patch "
          f"{settings.patch_size}; {type(model).__name__} of {parameters:,} parameters\n"
          f"run        {out or 'none, a benchmark'}"
          + (f", goes on after epoch {epoch}" if out and epoch else ""), flush=True)


def main(argv: list[str] | None = None) -> None:
    given = parse_flags(make_parser(), argv)
    checkpoint = None
    if given.get("resume"):
        checkpoint = load_run(given["out"], "pretrain")
        settings = resumed_settings(checkpoint, given)
        given["precision"] = settings.precision
    with on_machine(given) as machine:
        if not checkpoint:
            settings = resolve_settings(given, RECIPES, machine)
        pretrain(settings, checkpoint, given, machine)


def pretrain(settings: argparse.Namespace, checkpoint: dict | None, given: dict,
             machine: Machine) -> None:
    benchmark = given.get("benchmark", False)
    if benchmark:
        shorten_steps(settings, given, machine)
    plain = build("pretrain", settings)
    num_patches = plain.encoder.num_patches
    micro = fit_micro_batch(settings, machine, count_tokens_width(plain, settings))
    dataset = load_data(settings, machine)
    kind = "pretrain-validation" if settings.validation else "pretrain"
    out = given.get("out") or Path("runs") / f"{kind}-{dataset.name}-{settings.recipe}"
    if checkpoint:
        data.load_weights(plain, checkpoint["model"], out)
    elif machine.main and not benchmark:
        check_free(out, "pretrain.py")                      # early; again under the lock
    model = prepare_model(plain, machine)
    optimizers = make_optimizers(plain, settings, betas=(0.9, 0.95))
    log = restore(optimizers, checkpoint)

    def batches(epoch: int):
        return epoch_batches(dataset, settings, num_patches, epoch)

    pace = Pace()

    def save() -> None:
        save_epoch(out, "pretrain", settings, plain, optimizers, log, pace)

    steps = max(1, len(dataset.train_images) // settings.batch_size)
    images = steps * settings.batch_size
    if machine.main:
        describe_run(settings, machine, dataset, steps, micro, plain, None if benchmark else out,
                     len(log))
    if benchmark:
        return run_benchmark(model, masked_loss, batches, optimizers, micro, settings, machine)
    left = settings.epochs - len(log)
    say_expected(model, masked_loss, batches(0), images * left, steps * left, optimizers, micro,
                 machine)
    test_images = dataset.test_images[:TEST_IMAGES]
    caption = (f"{visualize.title_of(dataset.name)} {tested_on(settings)} images · "
               f"{out.resolve().name}")
    noise = torch.rand(len(test_images), num_patches, generator=data.seeded_generator("cpu", 0))
    noise = noise.to(machine.device)                        # the same masks on every device
    with run_folder(out, "pretrain.py", checkpoint is not None, machine):
        if machine.main:
            begin_run(out, save, log, settings, machine, micro)
        started = time.monotonic()
        for epoch in range(len(log) + 1, settings.epochs + 1):
            begun = time.monotonic()
            loss, = train_epoch(model, masked_loss, batches(epoch), steps, optimizers, epoch,
                                micro, settings, machine)
            speed = images / (time.monotonic() - begun)
            values = {"loss": loss, "test_loss": test_loss(plain, test_images, noise, machine)}
            log.append(log_row(epoch, values, learning_rate(settings, epoch),
                               time.monotonic() - started, speed, machine))
            started = time.monotonic()
            if not machine.main:
                continue
            if epoch % settings.picture_every == 0 or epoch in (1, settings.epochs):
                picture = visualize.reconstruction_grid(
                    plain, test_images[:PICTURED], noise[:PICTURED], caption, epoch=epoch)
                visualize.save_png(picture, out / "reconstructions" / f"epoch-{epoch:04}.png")
            save()
            print(f"epoch {epoch}/{settings.epochs}  loss {values['loss']:.4f}  test loss "
                  f"{values['test_loss']:.4f}  {log[-1]['images_per_second']:,.0f} images/s  "
                  f"{time_left(log, settings.epochs)} left", flush=True)
        if machine.main:
            draw_log(out, dataset, log)
            print(f"done: {out}", flush=True)


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
