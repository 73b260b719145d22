"""Pre-train a masked autoencoder: `python pretrain.py`.

Input: images without labels. Output: a run folder with the settings (config.json), one row per
epoch (log.csv), the state to resume from (checkpoint.pt), the final weights in half precision
(weights.pt), reconstructions of the same test images as training goes on, and curves.

Read from top to bottom: recipes, `main`, the story (`pretrain`), and then what the story calls, in
this order:

    batches       images, and what is hidden of them
    settings      the command line, over a recipe or over the run that is resumed
    machine       processes, device, precision, compilation; data set and model on it
    training      one epoch: gradients, learning rate, evaluation
    optimizers    AdamW and Muon
    run folder    log, checkpoints, resuming
    benchmark

`finetune.py` uses these parts too. Several processes: `torchrun --nproc-per-node 8 pretrain.py`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    Muon  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
"""
import signal

if __name__ == "__main__":      # Ctrl-C ends the program at once: a run can be killed at any time
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.flop_counter import FlopCounterMode

import data
import visualize
from data import BadInput

MODELS = {
    "full": dict(patch_size=2, dim=192, depth=12, heads=3),     # ViT-Tiny
    "laptop": dict(patch_size=4, dim=128, depth=6, heads=8),
}
RECIPES = {                     # warmup: part of the epochs in which the learning rate rises
    "full": dict(
        MODELS["full"], decoder_dim=192, decoder_depth=4, decoder_heads=3, mask_ratio=0.75,
        norm_pix_loss=False, epochs=2000, warmup=0.1, batch_size=4096, base_lr=1.5e-4,
        optimizer="adamw", weight_decay=0.05, augment="none", checkpoint_every=10,
        picture_every=50),
    "laptop": dict(
        MODELS["laptop"], decoder_dim=64, decoder_depth=1, decoder_heads=4, mask_ratio=0.75,
        norm_pix_loss=True, epochs=8, warmup=0.125, batch_size=64, base_lr=1e-2,
        optimizer="muon", weight_decay=0.05, augment="crop", checkpoint_every=1, picture_every=1),
}
RECIPES["lunch"] = RECIPES["laptop"] | dict(epochs=40, batch_size=128, base_lr=7e-3)
TEST_IMAGES = 1000              # the first ones, for the test loss
PICTURED = 12                   # the first ones of these, for the reconstructions
BENCHMARK_SECONDS = 15          # at least


def main(argv: list[str] | None = None) -> None:
    _, defaults = choose_defaults("pretrain", RECIPES, argv)
    settings = parse_settings("pretrain", "Pre-train a masked autoencoder.", defaults, argv)
    with on_machine(settings) as machine:
        pretrain(settings, machine)


def pretrain(settings: argparse.Namespace, machine: "Machine") -> None:
    """Hide most of each training image, predict it, and keep a run folder while doing so (MAE,
    section 3 and appendix A.1)."""
    dataset = load_data(settings, machine)
    model = make_model("pretrain", settings, machine)
    optimizers = make_optimizers(model, settings, betas=(0.9, 0.95))    # MAE, table 8
    learner = Learner(machine.compiled(model, settings), masked_loss, optimizers)

    def train_batches(epoch: int):
        return mae_batches(dataset.train_images, model.encoder.num_patches, epoch, settings)

    test_images = dataset.test_images[:TEST_IMAGES]
    test_noise = visualize.random_noise(test_images, model, seed=0).to(machine.device)

    describe("pretrain", settings, machine, model, dataset)
    if settings.benchmark:
        return run_benchmark(learner, train_batches, settings, machine)
    with open_run("pretrain", "pretrain", settings, machine) as run:
        run.restore(optimizers, model=model)
        caption = f"{dataset.title} {test_name(settings)} images · {run.out.resolve().name}"

        def save_picture(epoch: int) -> None:
            visualize.save_epoch(run.out / "reconstructions", epoch, model, test_images[:PICTURED],
                                 test_noise[:PICTURED], caption)

        if machine.main and not run.log:
            save_picture(0)                                 # before training
        for epoch in run.epochs_left():
            loss, speed = train_epoch(learner, train_batches(epoch), epoch, run.progress, settings,
                                      machine)
            if machine.main:
                last = epoch == settings.epochs
                test_loss = evaluate(model, masked_loss, in_batches(test_images, test_noise),
                                     machine, exact=last)
                run.check_still_there()                     # before its folder gets a picture
                if last or epoch == 1 or epoch % settings.picture_every == 0:
                    save_picture(epoch)
                run.end_epoch([*loss, *test_loss], speed, model, optimizers)


# ------------------------------------------------------------------------------ batches


def mae_batches(images: Tensor, num_patches: int, epoch: int, settings: argparse.Namespace):
    """The batches of an epoch: images (B, 3, H, W) of -1..1, noise (B, N)."""
    generator = data.seeded_generator(images.device, settings.seed, epoch)
    for ids in data.epoch_order(len(images), settings.batch_size, generator):
        batch = data.augment(images[ids], settings.augment, generator)
        noise = torch.rand(len(ids), num_patches, generator=generator, device=images.device)
        yield data.scale(batch), noise


def in_batches(images: Tensor, *others: Tensor):
    """Images uint8 (n, 3, H, W) and what belongs to each, 250 at a time, the images scaled."""
    for batch, *rest in zip(images.split(250), *(other.split(250) for other in others)):
        yield data.scale(batch), *rest


def masked_loss(model: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W), (B, N) -> the loss, and what to log: the loss, (1,)."""
    loss, _, _ = model(images, noise)
    return loss, loss.detach()[None]


# ------------------------------------------------------------------------------ settings

MAY_CHANGE = {"data_dir", "device", "precision", "compile", "micro_batch_size", "checkpoint_every",
              "picture_every"}  # when a run is resumed: where and how it runs, not what it learns


def choose_defaults(kind: str, recipes: dict,
                    argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """Parse the flags that decide the defaults of the others. Returns them and these defaults: the
    settings of the run that is resumed, or else those of a recipe. Raises BadInput."""
    flags = data.FLAGS[kind] | data.RUN_FLAGS
    parser = data.Parser(add_help=False)
    parser.add_flags({name: flags[name] for name in ("recipe", "init", "mode", "out", "resume")
                      if name in flags})
    parser.set_defaults(recipe="full" if torch.cuda.is_available() else "laptop")
    first, _ = parser.parse_known_args(argv)
    if not first.resume:
        return first, dict(recipes[first.recipe], recipe=first.recipe)
    if not first.out:
        raise BadInput("--resume needs --out RUN, the run to continue")
    settings = data.read_settings(first.out)
    if not data.are_settings(settings, kind):
        raise BadInput(f"--resume: {first.out} has no config.json with the settings of a run of "
                       f"{data.PROGRAMS[kind]}")
    return first, settings


def parse_settings(kind: str, text: str, defaults: dict,
                   argv: list[str] | None) -> argparse.Namespace:
    """The settings: the command line, over `defaults`. Raises BadInput.

    defaults: the values of a recipe or, with --resume, of the run, which they may not contradict.
    """
    parser = data.Parser(description=text)
    parser.add_flags(data.FLAGS[kind] | data.RUN_FLAGS)
    parser.set_defaults(**defaults)
    settings = parser.parse_args(argv)
    if settings.benchmark and (settings.out or settings.resume):
        raise BadInput("--benchmark leaves no run: leave out --out and --resume")
    for name in ("data_dir", "init"):                       # the run may be resumed elsewhere
        if vars(settings).get(name):
            setattr(settings, name, os.path.abspath(getattr(settings, name)))
    if settings.resume:
        check_same_run(settings, defaults)
    if settings.warmup_epochs is None:
        settings.warmup_epochs = settings.warmup * settings.epochs
    if settings.warmup_epochs > settings.epochs:
        raise BadInput(f"--warmup-epochs {settings.warmup_epochs:g} is longer than --epochs "
                       f"{settings.epochs}")
    return settings


def check_same_run(settings: argparse.Namespace, own: dict) -> None:
    """Raises BadInput if the settings would change what the resumed run learns, except that there
    may be more epochs."""
    own = {name: value for name, value in own.items() if name not in MAY_CHANGE
           and not (name == "epochs" and settings.epochs > value)}
    check_given(settings, own, f"the run in {settings.out}")


def check_given(settings: argparse.Namespace, own: dict, owner: str) -> None:
    """Raises BadInput if a setting is not that of its owner: of a run, an encoder, a probe."""
    for name, value in own.items():
        given = getattr(settings, name)
        if given != value:
            raise BadInput(f"--{name.replace('_', '-')} is {value} for {owner}, not {given}; leave "
                           "the flag out")


def test_name(settings: argparse.Namespace) -> str:
    """What the images of the test losses and accuracies are called."""
    return "validation" if settings.validation else "test"


# ------------------------------------------------------------------------------ machine


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a program runs: this process, its device, how it computes."""
    device: torch.device
    precision: str              # "fp32" or "bf16"
    rank: int = 0               # of this process
    local_rank: int = 0         # of this process among those on its computer
    processes: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def autocast(self, exact: bool = False):
        """Matrix products in bfloat16, unless `exact`; weights, LayerNorms and losses stay in
        float32."""
        enabled = self.precision == "bf16" and not exact
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def compiled(self, model: nn.Module, settings: argparse.Namespace) -> nn.Module:
        """The model to train, sharing the weights of `model`: compiled, if that is wanted. On CUDA
        its kernels are then replayed as one graph instead of launched one by one, unless a batch is
        larger than a micro-batch: a replay overwrites the gradients that the last one returned, so
        they could not be added up."""
        if not settings.compile:
            return model
        graphs = self.device.type == "cuda" and settings.batch_size <= settings.micro_batch_size
        return torch.compile(model, mode="reduce-overhead" if graphs else None)

    def part(self, batch: Tensor) -> Tensor:
        """This process's part of a batch: (B, ...) -> about (B / processes, ...)."""
        return batch.tensor_split(self.processes)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def on_machine(settings: argparse.Namespace):
    """Decide what is "auto" in the settings, join the other processes if torchrun started several,
    and yield a Machine. Raises BadInput if the device is missing or cannot do what is asked."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if settings.device == "auto":
        settings.device = next(name for name in there if there[name])
    name = settings.device
    if not there[name]:
        raise BadInput(f"--device {name}: torch finds no such device here, choose another")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise BadInput(f"process {local_rank + 1} on this machine finds "
                       f"{torch.cuda.device_count()} GPUs: start as many processes as GPUs")
    if processes > settings.batch_size:
        raise BadInput(f"--batch-size {settings.batch_size} is too small for {processes} processes")
    device = torch.device(name, local_rank) if name == "cuda" else torch.device(name)
    if name == "cuda":
        torch.cuda.set_device(device)
    if settings.precision == "auto":
        settings.precision = "bf16" if multiplies_bf16(name) else "fp32"
    settings.compile = decide_to_compile(settings.compile, device)
    if settings.micro_batch_size is None:
        settings.micro_batch_size = 512 if name == "cuda" else 128
    keep_freed_memory()
    if processes > 1:                                       # the main process may download for long
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=1),
                                device_id=device if name == "cuda" else None)
    yield Machine(device, settings.precision, rank, local_rank, processes)
    if processes > 1:           # skipped after an error, when the others may never get here
        dist.barrier()                                      # leave together, or gloo may abort
        dist.destroy_process_group()


def multiplies_bf16(device: str) -> bool:
    """Whether the processor has matrix products in bfloat16 (on x86: AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()   # not in older torch
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def decide_to_compile(wanted: bool | None, device: torch.device) -> bool:
    """Compile if that is asked for or, by default, on CUDA; first try it on something tiny. Raises
    BadInput if it is asked for and does not work."""
    if wanted is False or (wanted is None and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # a missing compiler, headers, Triton: there is no common type
        problem = f"torch.compile does not work here: {' '.join(str(error).split())[:200]}"
        if wanted:
            raise BadInput(f"--compile: {problem}") from None
        print(f"note: {problem}; training is slower without it", file=sys.stderr)
        return False


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of any size, instead of returning them to the system and asking
    for them again at every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # another C library: as it is
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)                         # no block gets pages of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def load_data(settings: argparse.Namespace, machine: Machine) -> data.Dataset:
    """The data set on the device, without the images and labels that the settings leave out. Adds
    to the settings how many images there are, before --labels-per-class, and the steps per epoch.
    The main process reads (and downloads) the data first, then one process of each other machine,
    then the rest."""
    turn = 0 if machine.main else 1 if machine.local_rank == 0 else 2
    for now in range(3):
        if now == turn:
            dataset = data.load_dataset(settings.dataset, settings.data_dir)
        if machine.processes > 1:
            name = [dataset.name if machine.main else None]
            dist.broadcast_object_list(name)
            settings.dataset = name[0]                      # what "auto" has turned out to be
            dist.barrier()
    settings.dataset = dataset.name
    if settings.validation:
        dataset = dataset.hold_out(settings.validation)
    if settings.limit:
        dataset = dataset.first(settings.limit)
    settings.images = [len(dataset.train_images), len(dataset.test_images)]
    if vars(settings).get("labels_per_class"):
        dataset = dataset.balanced(settings.labels_per_class, settings.seed)
    shown = len(dataset.train_images) * vars(settings).get("repeat", 1)
    settings.steps = max(1, shown // settings.batch_size)   # per epoch
    return dataset.to(machine.device)


def make_model(kind: str, settings: argparse.Namespace, machine: Machine) -> nn.Module:
    """A new model, its weights fixed by the seed. Raises BadInput if its sizes do not fit."""
    torch.manual_seed(settings.seed)
    try:
        return data.build_model(kind, vars(settings)).to(machine.device)
    except ValueError as error:
        raise BadInput(f"{error}; see --help for the sizes") from None


def describe(kind: str, settings: argparse.Namespace, machine: Machine, model: nn.Module,
             dataset: data.Dataset) -> None:
    """Print what is about to run."""
    if not machine.main:
        return
    device = (torch.cuda.get_device_name() if machine.device.type == "cuda"
              else f"{machine.device.type}, threads: {torch.get_num_threads()}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in
                       kept(settings, kind).items() if value is not None)
    print(f"machine    {device}, processes: {machine.processes}\n"
          f"data       {dataset.title}: {len(dataset.train_images):,} training and "
          f"{len(dataset.test_images):,} {test_name(settings)} images\n"
          f"model      {type(model).__name__} of {parameters:,} parameters\n"
          f"{textwrap.fill('settings   ' + values, 90, subsequent_indent=' ' * 11)}", flush=True)


# ------------------------------------------------------------------------------ training

DIVERGED = ("the last checkpoint is kept: lower --base-lr or raise --warmup-epochs in a new "
            "run")


@dataclasses.dataclass
class Learner:
    """What a training step needs: objective(model, *batch) returns a loss and what to log, (S,)."""
    model: nn.Module
    objective: Callable
    optimizers: list[torch.optim.Optimizer]


def train_epoch(learner: Learner, batches: Iterable, epoch: int, progress: data.Progress,
                settings: argparse.Namespace, machine: Machine) -> tuple[list[float], float]:
    """Train for one epoch, counted from 1. Returns the mean of what the objective logs, and the
    images per second.

    batches: tensors (B, ...), the same in all processes. The program waits for the device only to
    show progress and at the end. Raises BadInput if the loss is not finite.
    """
    learner.model.train()
    began, logged = time.monotonic(), []
    for step, batch in enumerate(batches, start=1):
        rate = learning_rate(settings, epoch - 1 + (step - 0.5) / settings.steps)   # mid-step
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
        logged.append(compute_gradient(learner, batch, settings, machine))
        for optimizer in learner.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if machine.main and progress.advance():
            progress.show(f"epoch {epoch}/{settings.epochs}  step {step}/{settings.steps}  "
                          f"loss {logged[-1][0] * machine.processes:.4f}")
    logged = machine.sum(torch.stack(logged))               # (steps, S)
    finite = logged.isfinite().all(dim=1)
    if not finite.all():
        raise BadInput(f"the loss is no longer finite in epoch {epoch}, step "
                       f"{int(finite.long().argmin()) + 1}; {DIVERGED}")
    speed = len(logged) * settings.batch_size / (time.monotonic() - began)
    return logged.mean(dim=0).tolist(), speed


def compute_gradient(learner: Learner, batch: tuple[Tensor, ...], settings: argparse.Namespace,
                     machine: Machine) -> Tensor:
    """Add up the gradient of a batch, micro-batch by micro-batch and over all processes. Each
    micro-batch is weighted by its number of images, so the sum does not depend on how the batch is
    divided.

    Returns this process's share of the mean of what the objective logs, (S,).
    """
    logged = 0
    parts = [machine.part(tensor).split(settings.micro_batch_size) for tensor in batch]
    for micro_batch in zip(*parts):
        weight = len(micro_batch[0]) / settings.batch_size
        with machine.autocast():
            loss, values = learner.objective(learner.model, *micro_batch)
        (loss * weight).backward()
        logged = logged + values * weight
    if machine.processes > 1:
        gradients = [parameter.grad for parameter in learner.model.parameters()]
        vector_to_parameters(machine.sum(parameters_to_vector(gradients)), gradients)
    return logged


def learning_rate(settings: argparse.Namespace, epoch: float) -> float:
    """The learning rate after `epoch` epochs, which may be a fraction: a linear warm-up, then half
    a cosine to zero (MAE, appendix A.1)."""
    peak = settings.base_lr * settings.batch_size / 256     # the linear scaling rule (A.1)
    if epoch < settings.warmup_epochs:
        return peak * epoch / settings.warmup_epochs
    decay_epochs = max(settings.epochs - settings.warmup_epochs, 1e-9)
    progress = min((epoch - settings.warmup_epochs) / decay_epochs, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, objective: Callable, batches: Iterable, machine: Machine,
             exact: bool) -> list[float]:
    """The mean of what the objective logs, over the batches of a whole set.

    exact: in float32, as for the final figures of a run; or else in the precision of training.
    """
    model.eval()
    total = count = 0
    with machine.autocast(exact):
        for batch in batches:
            total = total + objective(model, *batch)[1] * len(batch[0])
            count += len(batch[0])
    return (total / count).tolist()


# ------------------------------------------------------------------------------ optimizers


def make_optimizers(model: nn.Module, settings: argparse.Namespace, betas: tuple[float, float],
                    lr_scale: Callable[[str], float] = lambda name: 1.0
                    ) -> list[torch.optim.Optimizer]:
    """AdamW and, if the settings say so, Muon for the matrices inside the blocks.

    No weight decay for biases and LayerNorms (1 dimension), tokens and position embeddings (3),
    only for matrices (2) and the patch embedding (4). lr_scale(name) is the factor of a parameter's
    learning rate.
    """
    adamw, muon = {}, {}                                    # (decay, scale) -> parameters
    for name, parameter in model.named_parameters():
        in_block = "blocks." in name and parameter.ndim == 2
        groups = muon if settings.optimizer == "muon" and in_block else adamw
        decay = settings.weight_decay if parameter.ndim in (2, 4) else 0.0
        groups.setdefault((decay, lr_scale(name)), []).append(parameter)

    def as_groups(by_factors: dict[tuple, list]) -> list[dict]:
        return [{"params": parameters, "weight_decay": decay, "lr_scale": scale}
                for (decay, scale), parameters in by_factors.items()]

    optimizers = [torch.optim.AdamW(as_groups(adamw), lr=0.0, betas=betas, fused=True)]
    if muon:
        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        optimizers.append(Muon(as_groups(muon), dtype))
    return optimizers                                       # train_epoch sets the rates


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): a matrix moves equally far in all directions,
    not only in the few that dominate its gradient.

    For the weight matrices inside a network. An orthogonal (r, c) matrix has entries of about
    1 / sqrt(max(r, c)). `step` multiplies it by STEP * lr * sqrt(max(r, c)), so a weight moves by
    about STEP * lr; AdamW moves it by 0.2 to 0.4 times lr (Liu et al. 2025, arXiv 2502.16982,
    section 2.2), hence STEP. Queries, keys and values are taken as the one matrix that they share.
    torch.optim.Muon computes matrix by matrix and in bfloat16, which most CPUs emulate; here
    matrices of one shape go together, in `dtype`.
    """
    STEP, MOMENTUM = 0.4, 0.95

    def __init__(self, groups: list[dict], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(groups, dict(lr=0.0, weight_decay=0.0))
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        by_shape = {}                                       # matrices of one shape go together
        for group in self.param_groups:
            for matrix in group["params"]:
                by_shape.setdefault(matrix.shape, []).append((matrix, group))
        for shape, members in by_shape.items():
            averages = [self.average(matrix) for matrix, _ in members]
            directions = orthogonalize(torch.stack(averages), self.dtype).float()
            for (matrix, group), direction in zip(members, directions):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(direction, alpha=self.STEP * group["lr"] * max(shape) ** 0.5)

    def average(self, matrix: Tensor) -> Tensor:
        """Nesterov momentum: the running average of the gradients, blended with the latest."""
        state = self.state[matrix]
        if "average" not in state:
            state["average"] = torch.zeros_like(matrix)
        average = state["average"].lerp_(matrix.grad, 1 - self.MOMENTUM)
        return matrix.grad.lerp(average, self.MOMENTUM)


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T of each matrix U S V^T, by products alone: (n, r, c) -> the same shape, `dtype`.

    X is the matrix divided by its norm. Each of five steps (Newton-Schulz; Jordan et al. 2024)
    takes a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5: in the end those that began
    above 0.0015 are between 0.68 and 1.21. So each step multiplies s by a function of s^2. In
    float32 the steps are taken on the small square matrix X X^T, whose eigenvalues are the s^2, and
    their factors are multiplied: less arithmetic, if the matrices are long. In bfloat16 they are
    taken on X itself: the rounding of small s^2 would grow from step to step.
    """
    if matrices.shape[1] > matrices.shape[2]:               # the other square matrix is smaller
        return orthogonalize(matrices.mT.contiguous(), dtype).mT
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)    # no s above 1

    def higher_terms(gram: Tensor) -> Tensor:               # (n, r, r) -> (n, r, r)
        return torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)

    if dtype == torch.bfloat16:
        for _ in range(5):
            x = torch.baddbmm(x, higher_terms(x @ x.mT), x, beta=3.4445)
        return x                                            # (n, r, c)
    identity = torch.eye(x.shape[1], dtype=dtype, device=x.device)
    gram, factors = x @ x.mT, identity
    for _ in range(5):
        factor = 3.4445 * identity + higher_terms(gram)
        gram, factors = factor @ gram @ factor, factor @ factors
    return factors @ x                                      # (n, r, c)


def load_optimizers(optimizers: list[torch.optim.Optimizer], states, path: Path) -> None:
    """Restore the state of each optimizer. Raises BadInput if it is not that of these parameters:
    fused AdamW would not check the shapes."""
    names = {torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"average"}}
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            expected = {i: {name: () if name == "step" else parameter.shape
                            for name in names[type(optimizer)]}
                        for i, parameter in enumerate(parameters)}
            found = {i: {name: tensor.shape for name, tensor in of_parameter.items()}
                     for i, of_parameter in state.items()}
            if found != expected:
                raise ValueError
            optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (ValueError, TypeError, AttributeError):
        raise BadInput(f"{path} cannot be resumed: the state of its optimizers is missing or does "
                       "not fit the model") from None


# ------------------------------------------------------------------------------ run folder


@contextlib.contextmanager
def open_run(kind: str, name: str, settings: argparse.Namespace, machine: Machine):
    """Yield the `Run` in --out, or in runs/ under a name that begins with `name`. No other program
    can write to it until the end. Raises BadInput if another program does, or if the folder holds
    other files or a run that is not to be resumed."""
    labels = vars(settings).get("labels_per_class")
    parts = [name, settings.validation and "validation", settings.dataset, settings.recipe,
             settings.limit and f"{settings.limit}-images", labels and f"{labels}-labels"]
    out = settings.out or Path("runs", "-".join(filter(None, parts)))
    resume = f"python {data.PROGRAMS[kind]} --out {shlex.quote(str(out))} --resume"
    lock = data.locked(out) if machine.main else contextlib.nullcontext()
    with lock as check_still_there:
        if machine.main:
            found = {path.name for path in out.glob("[!.]*")}
            before_first_epoch = {"config.json", "reconstructions"}
            if not settings.resume and found - before_first_epoch:
                raise BadInput(f"{out} already holds a run or other files: to continue a run, "
                               f"{resume}; to start another one, name another folder with --out")
            print(f"run        {out}; if it is stopped: {resume}", flush=True)
        run = Run(out, kind, settings, machine, check_still_there)
        yield run
        if machine.main:
            check_still_there()
            title = visualize.title_of(settings.dataset)
            picture = visualize.draw_curves({out.resolve().name: run.log}, caption=title)
            visualize.save_png(picture, out / "curves.png")
            print(f"done       {out}", flush=True)


class Run:
    """A run folder and its log. Only the main process writes to it."""

    def __init__(self, out: Path, kind: str, settings: argparse.Namespace, machine: Machine,
                 check_still_there: Callable | None) -> None:
        self.out, self.kind, self.settings, self.machine = out, kind, settings, machine
        self.check_still_there = check_still_there
        self.log: list[dict] = []                           # the rows of log.csv
        self.row_began = time.monotonic()

    def restore(self, optimizers: list[torch.optim.Optimizer], **modules: nn.Module) -> bool:
        """Continue after the last checkpoint, if this run is resumed and has one. Returns whether
        that is so. Writes config.json, so that the run can be resumed from now on. Raises BadInput.

        modules: by the key that the weights of each have in the checkpoint.
        """
        path, settings = self.out / "checkpoint.pt", self.settings
        resumed = settings.resume and path.exists()
        if resumed:
            checkpoint = data.load_checkpoint(path, self.kind)
            check_same_run(settings, checkpoint["settings"])    # config.json may have been changed
            if checkpoint.get("images") != settings.images:
                raise BadInput(f"{self.out} was trained and tested on {checkpoint.get('images')} "
                               f"images, {settings.data_dir} has {settings.images}: name the "
                               "folder of its data set with --data-dir")
            for key, module in modules.items():
                data.load_weights(module, checkpoint.get(key), path)
            load_optimizers(optimizers, checkpoint.get("optimizers"), path)
            self.log = checkpoint["log"]
        if self.machine.main:
            write_config(self.out, self.kind, settings, self.machine)
        return resumed

    def epochs_left(self) -> range:
        """The epochs that are not done, counted from 1. Starts the estimate of the time left."""
        epochs = range(len(self.log) + 1, self.settings.epochs + 1)
        self.progress = data.Progress(len(epochs) * self.settings.steps)
        return epochs

    def end_epoch(self, values: list[float], speed: float, model: nn.Module,
                  optimizers: list[torch.optim.Optimizer], **more) -> None:
        """Write the row of an epoch to log.csv; a checkpoint if it is due; after the last epoch
        also the weights alone, in half precision, to keep and share.

        values: the losses and accuracies, in the order of LOG_COLUMNS; speed: images per second in
        training alone; more: what else to store in the checkpoint. Raises BadInput if a value is
        not finite or the folder is gone.
        """
        if not all(map(math.isfinite, values)):
            raise BadInput(f"the test loss is not finite after epoch {len(self.log) + 1}; "
                           f"{DIVERGED}")
        self.check_still_there()
        settings, epoch, now = self.settings, len(self.log) + 1, time.monotonic()
        rounded = [float(f"{value:.7g}") for value in (*values, learning_rate(settings, epoch))]
        row = dict(zip(data.LOG_COLUMNS[self.kind], (
            epoch, *rounded, round(now - self.row_began, 2), round(speed, 1),
            peak_memory_mb(self.machine.device)), strict=True))
        self.log.append(row)
        self.row_began = now
        write_log(self.out, self.log)
        last = epoch == settings.epochs
        checkpoint = dict(kind=self.kind, settings=kept(settings, self.kind), epoch=epoch,
                          log=self.log, images=settings.images, model=model.state_dict())
        if last:
            half = {name: value.half() for name, value in checkpoint["model"].items()}
            data.save_checkpoint(self.out / "weights.pt", dict(checkpoint, model=half))
        if last or epoch % settings.checkpoint_every == 0:
            # checkpoint.pt is written last: a run that is killed earlier does the epoch again.
            states = [optimizer.state_dict()["state"] for optimizer in optimizers]
            data.save_checkpoint(self.out / "checkpoint.pt",
                                 dict(checkpoint, optimizers=states, **more))
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.2f} %" if "accuracy" in name
                          else f"{name.replace('_', ' ')} {value:.4f}"
                          for name, value in list(row.items())[1:1 + len(values)])
        print(f"epoch {epoch}/{settings.epochs}  {shown}  {speed:,.0f} images/s  "
              f"{self.progress.time_left()} left", flush=True)


def kept(settings: argparse.Namespace, kind: str) -> dict:
    """The settings that are kept with a run."""
    return {name: getattr(settings, name) for name in data.FLAGS[kind]}


def write_config(out: Path, kind: str, settings: argparse.Namespace, machine: Machine) -> None:
    """config.json: everything needed to repeat the run."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    processor = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
    if machine.device.type == "cuda":
        processor = torch.cuda.get_device_name()
    path = out / "config.json"
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if settings.resume:                                     # the command that started the run
        command = json.loads(path.read_text()).get("command", command)
    config = {
        "settings": kept(settings, kind),
        "command": command,
        "machine": {"processor": processor, "threads": torch.get_num_threads(),
                    "processes": machine.processes},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__, "pillow": PIL.__version__},
        "commit": commit,
    }
    data.write_file(path, (json.dumps(config, indent=2) + "\n").encode())


def write_log(out: Path, log: list[dict]) -> None:
    """log.csv, whole. A resumed run takes its rows from the checkpoint."""
    lines = [log[0].keys(), *(row.values() for row in log)]
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    data.write_file(out / "log.csv", text.encode())


def peak_memory_mb(device: torch.device) -> int:
    """The most memory used so far, in MiB: the GPU's on CUDA, or else the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    try:
        import resource
    except ImportError:         # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024          # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


# ------------------------------------------------------------------------------ benchmark


def run_benchmark(learner: Learner, epoch_batches: Callable, settings: argparse.Namespace,
                  machine: Machine) -> None:
    """Print images/s, arithmetic and memory of whole training steps on real batches."""
    flop = count_flop(learner, next(epoch_batches(1)))
    settings.steps = 10 if machine.device.type == "cuda" else max(1, 256 // settings.batch_size)
    batches = itertools.chain.from_iterable(map(epoch_batches, itertools.repeat(1)))    # endless
    speeds, began, seconds = [], time.monotonic(), 0
    while len(speeds) < 6 or seconds < BENCHMARK_SECONDS:
        some = itertools.islice(batches, settings.steps)
        _, speed = train_epoch(learner, some, 1, data.Progress(0), settings, machine)
        speeds.append(speed)
        seconds = torch.tensor(time.monotonic() - began, device=machine.device)
        seconds = machine.sum(seconds) / machine.processes  # all processes go on, or none
    speed = statistics.median(speeds[1:])                   # the first one is a warm-up
    if machine.main:
        print(f"speed      {speed:,.1f} images/s (median of {len(speeds) - 1} timings of "
              f"{settings.steps} steps of {settings.batch_size} images)\n"
              f"arithmetic {speed * flop / 1e12:.3g} TFLOP/s ({flop / 1e9:.3g} GFLOP per image, "
              f"forward and backward)\n"
              f"memory     {peak_memory_mb(machine.device):,} MiB at the peak")


def count_flop(learner: Learner, batch: Iterable[Tensor]) -> int:
    """Floating-point operations of one image of a batch, forward and backward."""
    model = getattr(learner.model, "_orig_mod", learner.model)          # not compiled
    one_image = [tensor[:1] for tensor in batch]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        learner.objective(model, *one_image)[0].backward()  # attention as products, to be counted
    model.zero_grad()
    return counter.get_total_flops()


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
