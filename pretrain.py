"""Pre-train a masked autoencoder: `python pretrain.py`.

Input: images without labels. Output: a run folder with the settings (config.json), one row per
epoch (log.csv), the state to resume from (checkpoint.pt), the final weights in half precision
(weights.pt), reconstructions of the same test images as training goes on, and curves.

Read from top to bottom: settings and recipes, `main`, the story (`pretrain`), and then what the
story calls, in this order:

    training      one loop, from batch to loss to step; learning rate, evaluation
    optimizers    AdamW and Muon
    plumbing      the run folder; data, model and threads; processes and device; the command line

`finetune.py` uses these parts too. Several processes: `torchrun --nproc-per-node 8 pretrain.py`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    Muon  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
"""
import os

if "OMP_WAIT_POLICY" not in os.environ:     # threads that wait for each other spin only briefly:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # faster if other programs are busy, too

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import data
import visualize
from data import COUNT, BadInput, number


# ------------------------------------------------------------------------------ settings


def flag(default, help: str, **options):
    """A setting: its default, which is that of the recipe `laptop`, and its flag for argparse."""
    if type(default) is bool:
        options["action"] = argparse.BooleanOptionalAction  # --flag and --no-flag
    elif type(default) is int:
        options = dict(type=COUNT, metavar="N") | options   # at least 1
    return dataclasses.field(default=default, metadata=dict(options, help=help))


def absolute(text: str) -> str:
    """A path that stays right if the run is resumed from another folder."""
    return os.path.abspath(os.path.expanduser(text))


SHARE = number(float, 0, 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is set for a run of pretrain.py or finetune.py. Each field but `command` is a flag."""
    recipe: str = flag("laptop", "set of defaults", choices=["laptop", "lunch", "full"])
    dataset: str = flag("auto", "auto: CIFAR-10 if it is there or can be downloaded, or else the "
                        "drawn shapes", choices=["auto", *data.DATASETS])
    data_dir: str = flag("data", "folder that holds the data", type=absolute)
    image_size: int = flag(data.SIDE, "side in pixels to which pictures of a folder are resized")
    limit: int | None = flag(None, "use only the first N training images and at most N test images",
                             type=COUNT, metavar="N")
    validation: int = flag(0, "test on the last N training images and train on the others, to "
                           "choose settings", type=number(int, 0, 10**6))
    epochs: int = flag(8, "passes over the training images")
    warmup: float = flag(0.125, "share of the epochs in which the learning rate rises", type=SHARE)
    batch_size: int = flag(64, "images per optimizer step, over all processes")
    micro_batch_size: int | None = flag(
        None, "images that a process computes at once; their gradients add up to that of the batch "
        "(default: 512 on CUDA, else 128)", type=COUNT, metavar="N")
    base_lr: float = flag(1e-2, "learning rate for a batch of 256; the one used is this x batch "
                          "size / 256", type=number(float, 0, 1000))
    optimizer: str = flag("muon", "muon: orthogonalized updates for the matrices in the blocks, "
                          "AdamW for the rest", choices=["adamw", "muon"])
    weight_decay: float = flag(0.05, "of weight matrices only", type=number(float, 0, 1000))
    patch_size: int = flag(4, "side of a patch in pixels")
    dim: int = flag(128, "width of the encoder")
    depth: int = flag(6, "blocks of the encoder")
    heads: int = flag(8, "attention heads of the encoder")
    augment: str = flag("crop", "flip: half of the images are mirrored; crop: also shifted by up "
                        "to 4 pixels; color: also color jitter (saturation, contrast, brightness)",
                        choices=data.AUGMENTATIONS)
    seed: int = flag(0, "of weights, order, augmentation, masks and the choice of labeled images",
                     type=number(int, 0, 2**32 - 1))
    device: str = flag("auto", "auto: cuda if it is there, or else mps, or else cpu",
                       choices=["auto", "cpu", "cuda", "mps"])
    precision: str = flag("auto", "bf16: matrix products in bfloat16; auto: bf16 if the hardware "
                          "has such products", choices=["auto", "fp32", "bf16"])
    compile: bool | None = flag(None, "compile the model with torch.compile (default: on CUDA)",
                                action=argparse.BooleanOptionalAction)
    threads: int | None = flag(None, "threads on a CPU (default: timed when the run begins)",
                               type=number(int, 1, 1024), metavar="N")
    checkpoint_every: int = flag(1, "epochs from checkpoint to checkpoint")
    out: str | None = flag(None, "run folder (default: in runs/, named after the run)",
                           type=os.path.expanduser)
    command: str = ""           # that started the run

    @property
    def start(self) -> str:
        """With what weights training begins, in words."""
        return "random weights"


@dataclasses.dataclass(frozen=True)
class PretrainSettings(Settings):
    mask_ratio: float = flag(0.75, "share of the patches that is hidden", type=SHARE)
    norm_pix_loss: bool = flag(True, "predict each patch normalized by its own mean and standard "
                               "deviation")
    decoder_dim: int = flag(64, "width of the decoder")
    decoder_depth: int = flag(1, "blocks of the decoder")
    decoder_heads: int = flag(4, "attention heads of the decoder")
    picture_every: int = flag(1, "epochs from picture to picture")


VIT_TINY = dict(patch_size=2, dim=192, depth=12, heads=3)
RECIPES = {                     # what differs from the defaults above
    "laptop": dict(),
    "lunch": dict(epochs=40, batch_size=128, base_lr=7e-3),
    "full": dict(
        VIT_TINY, decoder_dim=192, decoder_depth=4, decoder_heads=3, norm_pix_loss=False,
        epochs=2000, warmup=0.1, batch_size=4096, base_lr=1.5e-4, optimizer="adamw",
        augment="none", checkpoint_every=10, picture_every=50),
}
MAY_CHANGE = {"data_dir", "device", "precision", "compile", "micro_batch_size", "threads",
              "checkpoint_every", "picture_every"}          # when a run is resumed
TEST_IMAGES = 1000              # the first ones, for the test loss
PICTURED = 12                   # the first ones of these, for the reconstructions


# ------------------------------------------------------------------------------ the story


def main(argv: list[str] | None = None) -> None:
    given = parse_flags("pretrain.py", PretrainSettings, RECIPES,
                        "Pre-train a masked autoencoder.", argv)
    checkpoint = None
    if "resume" in given:
        settings, checkpoint = resumed_settings(PretrainSettings, "pretrain", given)
    else:
        defaults = RECIPES[given.get("recipe", "laptop")] | {"out": run_folder("pretrain", given)}
        settings = PretrainSettings(**defaults | given)
    machine, settings = join_machine(settings)
    pretrain(settings, machine, checkpoint)
    machine.leave()


def pretrain(settings: PretrainSettings, machine: "Machine", checkpoint: dict | None) -> None:
    """Hide most of each training image, predict it, and keep a run folder while doing so (MAE,
    section 3 and appendix A.1).

    checkpoint: that of the run that is resumed, or None.
    """
    dataset, settings = load_data(settings, machine)
    model = make_model("pretrain", settings, machine)
    optimizers = make_optimizers(model, settings, betas=(0.9, 0.95))    # MAE, table 8

    def make_batch(ids: Tensor, epoch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = data.augment(dataset.train_images[ids], settings.augment, generator)
        noise = torch.rand(len(ids), model.encoder.num_patches, generator=generator,
                           device=machine.device)           # (B, N)
        return data.scale(images), noise                    # (B, 3, H, W) of -1..1, (B, N)

    settings = choose_threads(settings, machine, model, masked_loss, make_batch)
    run = Run("pretrain", settings, machine, dataset, optimizers, {"model": model})
    run.begin(checkpoint)
    test_images = dataset.test_images[:TEST_IMAGES]
    test_noise = visualize.random_noise(test_images, model, seed=0).to(machine.device)

    def test(precise: bool) -> list[float]:
        return evaluate(model, masked_loss, in_batches(test_images, test_noise), machine, precise)

    def save_picture(epoch: int) -> None:
        if epoch in (0, 1, settings.epochs) or epoch % settings.picture_every == 0:
            with data.note_if_it_fails():
                visualize.save_epoch(run.out / "reconstructions", epoch, model,
                                     test_images[:PICTURED], test_noise[:PICTURED],
                                     f"{dataset.title} test images · {run.name}")

    train(run, machine.compiled(model, settings), masked_loss, len(dataset.train_images),
          make_batch, test, save_picture)


def masked_loss(model: nn.Module, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W), (B, N) -> the loss, and what to log: the loss, (1,)."""
    loss, _, _ = model(images, noise)
    return loss, loss.detach()[None]


# ------------------------------------------------------------------------------ training


def train(run: "Run", model: nn.Module, objective: Callable, count: int, make_batch: Callable,
          test: Callable, after_epoch: Callable) -> None:
    """The training loop, from the epoch after the last checkpoint to the end of the run.

    objective(model, *batch) -> a loss and what to log, (S,). count: examples per epoch;
    make_batch(ids, epoch, generator) -> the tensors (B, ...) of a batch, the same in all processes.
    test(precise) -> figures of the test set. after_epoch(epoch) is called in the main process, for
    epoch 0 before training. Raises BadInput if the loss is not finite.
    """
    settings, machine = run.settings, run.machine
    epochs, steps = settings.epochs, max(1, count // settings.batch_size)
    progress = data.Progress((epochs - len(run.log)) * steps)
    if machine.main and not run.log:
        after_epoch(0)
    for epoch in range(len(run.log) + 1, epochs + 1):
        model.train()
        generator = data.seeded_generator(machine.device, settings.seed, epoch)
        began, logged = time.monotonic(), []
        for step, ids in enumerate(data.epoch_order(count, settings.batch_size, generator)):
            lr = learning_rate(settings, epoch - 1 + (step + 0.5) / steps)      # mid-step
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
            batch = make_batch(ids, epoch, generator)
            logged.append(add_gradient(model, objective, batch, settings, machine))
            for optimizer in run.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if progress.advance() and machine.main:         # reading the loss waits for the device
                progress.show(f"epoch {epoch}/{epochs}  step {step + 1}/{steps}  "
                              f"loss {logged[-1][0] * machine.processes:.4f}")
        trained = machine.sum(torch.stack(logged)).mean(dim=0).tolist()
        speed = steps * settings.batch_size / (time.monotonic() - began)
        tested = test(precise=epoch == epochs) if machine.main else []
        if not all(map(math.isfinite, [*trained, *tested])):
            raise BadInput(f"the loss is not finite in epoch {epoch}; the last checkpoint is kept: "
                           "lower --base-lr or raise --warmup in a new run")
        if machine.main:
            after_epoch(epoch)
            run.end_epoch([*trained, *tested], learning_rate(settings, epoch), speed,
                          progress.time_left())
    if machine.main:
        run.finish()


def add_gradient(model: nn.Module, objective: Callable, batch: tuple[Tensor, ...],
                 settings: Settings, machine: "Machine") -> Tensor:
    """Add up the gradient of a batch, micro-batch by micro-batch and over all processes. Each
    micro-batch is weighted by its number of images, so the sum does not depend on how the batch is
    divided.

    Returns this process's share of the mean of what the objective logs, (S,).
    """
    logged = 0
    shards = [machine.shard(tensor).split(settings.micro_batch_size) for tensor in batch]
    for micro_batch in zip(*shards):
        weight = len(micro_batch[0]) / len(batch[0])
        with machine.autocast():
            loss, values = objective(model, *micro_batch)
        (loss * weight).backward()
        logged = logged + values * weight
    if machine.processes > 1:
        gradients = [parameter.grad for parameter in model.parameters()]
        vector_to_parameters(machine.sum(parameters_to_vector(gradients)), gradients)
    return logged


def learning_rate(settings: Settings, epoch: float) -> float:
    """The learning rate after `epoch` epochs, which may be a fraction: a linear warm-up, then half
    a cosine to zero (MAE, appendix A.1)."""
    peak = settings.base_lr * settings.batch_size / 256     # the linear scaling rule (A.1)
    warmup_epochs = settings.warmup * settings.epochs
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    decay_epochs = max(settings.epochs - warmup_epochs, 1e-9)
    progress = min((epoch - warmup_epochs) / decay_epochs, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, objective: Callable, batches: Iterable, machine: "Machine",
             precise: bool) -> list[float]:
    """The mean of what the objective logs, over the batches of a whole set.

    precise: in float32, as for the final figures of a run; or else in the precision of training.
    """
    model.eval()
    total = count = 0
    with machine.autocast(precise):
        for batch in batches:
            total = total + objective(model, *batch)[1] * len(batch[0])
            count += len(batch[0])
    return (total / count).tolist()


def in_batches(images: Tensor, *others: Tensor):
    """Images uint8 (n, 3, H, W) and what belongs to each, 250 at a time, the images scaled."""
    for batch, *rest in zip(images.split(250), *(other.split(250) for other in others)):
        yield data.scale(batch), *rest


# ------------------------------------------------------------------------------ optimizers


def make_optimizers(model: nn.Module, settings: Settings, betas: tuple[float, float],
                    lr_scale: Callable[[str], float] = lambda name: 1.0
                    ) -> list[torch.optim.Optimizer]:
    """AdamW and, if the settings say so, Muon for the matrices inside the blocks.

    No weight decay for biases and LayerNorms (1 dimension), tokens and position embeddings (3),
    only for matrices (2) and the patch embedding (4). lr_scale(name) is the factor of a parameter's
    learning rate, which `train` sets at every step.
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
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024): a matrix moves equally far in all directions,
    not only in the few that dominate its gradient.

    For the weight matrices inside a network. An orthogonal (r, c) matrix has entries of about
    1 / sqrt(max(r, c)). `step` multiplies it by STEP * lr * sqrt(max(r, c)), so a weight moves by
    about STEP * lr; AdamW moves it by 0.2 to 0.4 times lr (Liu et al. 2025, arXiv 2502.16982,
    section 2.2), hence STEP. Queries, keys and values are taken as the one matrix that they share.
    torch.optim.Muon computes matrix by matrix and in bfloat16, which is slow without bfloat16 in
    hardware; here matrices of one shape go together, in `dtype`.
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
            directions = orthogonalize(torch.stack(averages).to(self.dtype)).float()
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


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by products alone: (n, r, c) -> the same shape and dtype.

    The matrices are divided by their norms. Each of five steps (Newton-Schulz; Jordan et al. 2024)
    takes a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. In the end those that began above
    0.0015 are between 0.68 and 1.21.
    """
    if matrices.shape[1] > matrices.shape[2]:               # X^T X is smaller than X X^T
        return orthogonalize(matrices.mT.contiguous()).mT
    x = matrices / (matrices.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(matrices.dtype)
    for _ in range(5):
        gram = x @ x.mT                                     # (n, r, r)
        terms = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, terms, x, beta=3.4445)         # (n, r, c)
    return x


# ======================= plumbing: not needed to understand the method ========================
# ------------------------------------------------------------------------------ run folder

LOG_COLUMNS = {                 # by kind of run; then lr at the epoch's end, seconds, images/s
    "pretrain": ("loss", "test_loss"),
    "classifier": ("train_loss", "train_accuracy", "test_loss", "test_accuracy"),
}


@dataclasses.dataclass
class Run:
    """A run folder: its log, and what its checkpoints hold. Only the main process writes to it."""
    kind: str                   # "pretrain" or "classifier"
    settings: Settings
    machine: "Machine"
    dataset: data.Dataset
    optimizers: list[torch.optim.Optimizer]
    modules: dict[str, nn.Module]                           # by their keys in a checkpoint
    log: list[dict] = dataclasses.field(default_factory=list)   # the rows of log.csv

    @property
    def out(self) -> Path:
        return Path(self.settings.out)

    @property
    def name(self) -> str:
        return self.out.resolve().name

    def begin(self, checkpoint: dict | None) -> None:
        """Restore the run from its checkpoint or, for a new run, write its first one; print what is
        about to run. Raises BadInput if the checkpoint does not fit, or the folder of a new run
        holds files."""
        settings, machine, model = self.settings, self.machine, self.modules["model"]
        resume = f"python {data.PROGRAMS[self.kind]} --resume {shlex.quote(settings.out)}"
        self.row_began = time.monotonic()
        if checkpoint:
            self.restore(checkpoint)
        if not machine.main:
            return
        if not checkpoint:
            if any(self.out.glob("[!.]*")):
                raise BadInput(f"{self.out} already holds files: to continue a run, {resume}; to "
                               "start another one, name another folder with --out")
            self.save()
        with data.note_if_it_fails():
            write_config(self.out / "config.json", settings, machine)
        train, test = self.dataset.counts()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        compiled = ", compiled" if settings.compile else ""
        print(f"recipe     {settings.recipe}: {settings.command}\n"
              f"machine    {machine.device}, {machine.precision}{compiled}, "
              f"threads: {torch.get_num_threads()}, processes: {machine.processes}\n"
              f"data       {self.dataset.title}: {train:,} training and {test:,} test images\n"
              f"model      {type(model).__name__} of {parameters:,} parameters, "
              f"{f'resumed after epoch {len(self.log)}' if checkpoint else settings.start}\n"
              f"run        {self.out}; if it is stopped: {resume}")
        if len(self.log) >= settings.epochs:
            print(f"finished   all {len(self.log)} epochs are done; a larger --epochs goes on")
        sys.stdout.flush()

    def restore(self, checkpoint: dict) -> None:
        """Raises BadInput if the checkpoint does not fit the modules, optimizers or data."""
        with data.damaged_if_it_fails(self.out / "checkpoint.pt"):
            images = checkpoint["images"]
            for key, module in self.modules.items():
                module.load_state_dict(checkpoint[key])
            for one, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                one.load_state_dict(state)
            self.log = checkpoint["log"]
        if images != self.dataset.counts():
            raise BadInput(f"{self.out} was trained and tested on {images} images, not on "
                           f"{self.dataset.counts()}: name the folder of its data with --data-dir")

    def save(self, weights_alone: bool = False) -> None:
        """Write checkpoint.pt, with everything that is needed to go on, or weights.pt, with the
        weights alone, in half precision, to keep and share."""
        content = dict(kind=self.kind, settings=dataclasses.asdict(self.settings),
                       epoch=len(self.log), log=self.log, images=self.dataset.counts())
        if weights_alone:
            weights = self.modules["model"].state_dict()
            content["model"] = {name: value.half() for name, value in weights.items()}
        else:
            content |= {key: module.state_dict() for key, module in self.modules.items()}
            content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        name = "weights.pt" if weights_alone else "checkpoint.pt"
        data.save_checkpoint(self.out / name, content)

    def end_epoch(self, values: list[float], lr: float, speed: float, left: timedelta) -> None:
        """Log and print an epoch, and write a checkpoint if it is due.

        values: losses and accuracies, in the order of LOG_COLUMNS; lr: the learning rate at the
        epoch's end; speed: images per second in training alone; left: the time to the end.
        """
        epoch, epochs, now = len(self.log) + 1, self.settings.epochs, time.monotonic()
        values = dict(zip(LOG_COLUMNS[self.kind], values, strict=True))
        rounded = {name: float(f"{value:.7g}") for name, value in (values | {"lr": lr}).items()}
        self.log.append({"epoch": epoch, **rounded, "seconds": round(now - self.row_began, 2),
                         "images_per_second": round(speed, 1)})
        self.row_began = now
        with data.note_if_it_fails():
            write_log(self.out / "log.csv", self.log)
        if epoch == epochs:
            self.save(weights_alone=True)
        if epoch == epochs or epoch % self.settings.checkpoint_every == 0:
            self.save()         # the last file of an epoch: a run killed earlier does it again
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.2f} %" if "accuracy" in name
                          else f"{name.replace('_', ' ')} {value:.4f}"
                          for name, value in values.items())
        print(f"epoch {epoch}/{epochs}  {shown}  {speed:,.0f} images/s  {left} left", flush=True)

    def finish(self) -> None:
        """Draw the curves."""
        with data.note_if_it_fails():
            picture = visualize.plot_curves({self.name: self.log}, self.dataset.title)
            visualize.save(picture, self.out / "curves.png")
        print(f"done       {self.out}", flush=True)


def write_log(path: Path, log: list[dict]) -> None:
    """log.csv, whole."""
    lines = [log[0].keys(), *(row.values() for row in log)]
    data.write_file(path, "".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def write_config(path: Path, settings: Settings, machine: "Machine") -> None:
    """config.json: everything needed to repeat the run. For people; no program reads it."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):                      # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = {"settings": dataclasses.asdict(settings),
              "processes": machine.processes, "commit": commit,
              "versions": {"python": platform.python_version(), "torch": torch.__version__,
                           "numpy": np.__version__, "pillow": PIL.__version__}}
    data.write_file(path, (json.dumps(config, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------ data and model


def load_data(settings: Settings, machine: "Machine") -> tuple[data.Dataset, Settings]:
    """The data set on the device, without what the settings leave out, and the settings with its
    name. The main process reads (and downloads) the data first, then one process of each other
    machine, then the rest."""
    name = [settings.dataset]
    for turn in range(3):
        if turn == (0 if machine.main else 1 if machine.local_rank == 0 else 2):
            dataset = data.load_dataset(name[0], settings.data_dir, settings.image_size)
            name = [dataset.name]                           # what "auto" has turned out to be
        if machine.processes > 1:
            dist.broadcast_object_list(name)                # from the main process
            dist.barrier()
    if settings.validation:
        dataset = dataset.hold_out(settings.validation)
    if settings.limit:
        dataset = dataset.limited(settings.limit)
    return dataset.to(machine.device), dataclasses.replace(settings, dataset=dataset.name)


def make_model(kind: str, settings: Settings, machine: "Machine",
               num_classes: int = 10) -> nn.Module:
    """A new model, its weights fixed by the seed. Raises BadInput if its sizes do not fit."""
    torch.manual_seed(settings.seed)
    try:
        model = data.build_model(kind, dataclasses.asdict(settings), num_classes)
    except (ValueError, TypeError) as error:                # TypeError: from a damaged checkpoint
        raise BadInput(f"{error}; see --help for the sizes") from None
    return model.to(machine.device)


def choose_threads(settings: Settings, machine: "Machine", model: nn.Module, objective: Callable,
                   make_batch: Callable) -> Settings:
    """The settings with a number of threads: if none is set, the one that computes a few gradients
    fastest. More threads are slower if the network is small or the machine busy. On a GPU, and with
    several processes on a CPU, it stays as it is."""
    if settings.threads or machine.device.type != "cpu" or machine.processes > 1:
        return settings
    most, seconds = torch.get_num_threads(), {}
    ids = torch.zeros(min(settings.batch_size, settings.micro_batch_size)).long()
    batch = make_batch(ids, 1, data.seeded_generator("cpu", 0))
    for threads in {*(2**i for i in range(10) if 2**i < most), most}:
        torch.set_num_threads(threads)
        add_gradient(model, objective, batch, settings, machine)        # a warm-up
        began = time.monotonic()
        for _ in range(4):
            add_gradient(model, objective, batch, settings, machine)
        seconds[threads] = time.monotonic() - began
    model.zero_grad()
    fastest = min(seconds, key=seconds.get)
    torch.set_num_threads(fastest)
    return dataclasses.replace(settings, threads=fastest)


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

    def autocast(self, precise: bool = False):
        """Matrix products in bfloat16, unless `precise`; weights, LayerNorms and losses stay in
        float32."""
        enabled = self.precision == "bf16" and not precise
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def compiled(self, model: nn.Module, settings: Settings) -> nn.Module:
        """The model to train, sharing the weights of `model`: compiled, if that is wanted. On CUDA
        its kernels are then replayed as one graph instead of launched one by one, unless a batch is
        larger than a micro-batch: a replay overwrites the gradients that the last one returned, so
        they could not be added up."""
        if not settings.compile:
            return model
        graphs = self.device.type == "cuda" and settings.batch_size <= settings.micro_batch_size
        return torch.compile(model, mode="reduce-overhead" if graphs else None)

    def shard(self, batch: Tensor) -> Tensor:
        """This process's share of a batch: (B, ...) -> about (B / processes, ...)."""
        return batch.tensor_split(self.processes)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def leave(self) -> None:
        """The end. It is not reached after an error, when the others may never get here."""
        if self.processes > 1:
            dist.barrier()                                  # wait for the main one's last files
            dist.destroy_process_group()


def join_machine(settings: Settings) -> tuple[Machine, Settings]:
    """Decide what is "auto", and join the other processes if torchrun started several. Returns the
    Machine and the settings. Raises BadInput if the device is missing or cannot do what is
    asked."""
    rank, local_rank, processes = read_environment()
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    name = settings.device
    if name == "auto":
        name = next(name for name in there if there[name])
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
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_bf16_products(name) else "fp32"
    settings = dataclasses.replace(
        settings, device=name, precision=precision, compile=decide_to_compile(settings, device),
        micro_batch_size=settings.micro_batch_size or (512 if name == "cuda" else 128),
        data_dir=absolute(settings.data_dir))
    if processes > 1:
        # Imported later, as by AdamW, it would keep the group alive after `leave`, and the threads
        # of gloo, which then outlive Python, could abort the process.
        from torch import _dynamo
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=timedelta(hours=1),
                                device_id=device if name == "cuda" else None)
    return Machine(device, precision, rank, local_rank, processes), settings


def read_environment() -> tuple[int, int, int]:
    """Rank, local rank and number of processes, as torchrun sets them. Raises BadInput."""
    set_by_torchrun = [os.environ.get(name) or default for name, default in (
        ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", ""),
        ("MASTER_PORT", ""))]
    *numbers, address, port = set_by_torchrun
    if not all(map(str.isdecimal, numbers)) or (numbers[2] != "1" and not (address and port)):
        raise BadInput("RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the "
                       f"environment do not fit ({set_by_torchrun}): use torchrun, or unset them")
    return tuple(map(int, numbers))


def has_bf16_products(device: str) -> bool:
    """Whether the processor has matrix products in bfloat16 (on x86: AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()   # not in older torch
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return False


def decide_to_compile(settings: Settings, device: torch.device) -> bool:
    """Compile if that is asked for or, by default, on CUDA; first try it on something tiny. Raises
    BadInput if it does not work."""
    if settings.compile is False or (settings.compile is None and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, headers, Triton: there is no common type
        raise BadInput(f"torch.compile does not work here, train with --no-compile: "
                       f"{' '.join(str(error).split())[:200]}") from None
    return True


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of any size, instead of returning them to the system and asking
    for them again at every step (7 to 13 % of a step)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # another C library: as it is
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)                         # no block gets pages of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------------ command line


def parse_flags(program: str, settings_class: type, recipes: dict[str, dict], description: str,
                argv: list[str] | None, **more: dict) -> dict:
    """The flags that are given, by the names of their settings. Also `command`, the command line,
    and what is no setting: `resume` and `more` flags. Raises BadInput."""
    argv = sys.argv[1:] if argv is None else argv
    parser = data.Parser(prog=program, description=description, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(settings_class):
        if field.metadata:
            text = field.metadata["help"] + shown_default(field, recipes)
            parser.add_argument(f"--{field.name.replace('_', '-')}",
                                **field.metadata | {"help": text})
    more["resume"] = dict(metavar="RUN", type=os.path.expanduser, help="continue a run after its "
                          "last checkpoint, with its own settings")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    return vars(parser.parse_args(argv)) | {"command": shlex.join([program, *argv])}


def shown_default(field: dataclasses.Field, recipes: dict[str, dict]) -> str:
    """The default of a setting, for --help: one value, or one for each recipe."""
    values = {name: recipe.get(field.name, field.default) for name, recipe in recipes.items()}
    if field.default is None or field.default is False:
        return ""
    if len(set(values.values())) == 1:
        return f" (default: {field.default})"
    return f" (default: {', '.join(f'{name} {value}' for name, value in values.items())})"


def run_folder(kind: str, given: dict) -> str:
    """The default folder of a new run. Its name tells what is given and is not a default."""
    recipe, dataset = given.get("recipe", "laptop"), given.get("dataset", "auto")
    parts = [kind, recipe != "laptop" and recipe,
             dataset not in ("auto", "cifar10") and dataset,
             given.get("validation") and "validation",
             "limit" in given and f"{given['limit']}-images",
             "labels_per_class" in given and f"{given['labels_per_class']}-labels"]
    return os.path.join("runs", "-".join(filter(None, parts)))


def resumed_settings(settings_class: type, kind: str, given: dict) -> tuple[Settings, dict]:
    """For --resume: the settings of a run, changed as far as they may be, and its checkpoint.
    Raises BadInput, OSError."""
    run = Path(given["resume"])
    run = run.parent if run.is_file() else run              # its checkpoint may be named, too
    path = run / "checkpoint.pt"
    checkpoint = data.load_checkpoint(path, kind)
    own = saved_settings(settings_class, checkpoint, path) | {"out": str(run)}
    given = {name: value for name, value in given.items() if name not in ("resume", "command")}
    free = MAY_CHANGE | ({"epochs"} if given.get("epochs", 0) > own["epochs"] else set())
    refuse_other(given, {name: own[name] for name in own.keys() - free}, f"the run in {own['out']}")
    return settings_class(**own | given), checkpoint


def saved_settings(settings_class: type, checkpoint: dict, path: Path | str) -> dict:
    """The settings in a checkpoint. An older one may lack some; they have their defaults. Raises
    BadInput if this program does not know one."""
    with data.damaged_if_it_fails(path):
        saved = dict(checkpoint["settings"])
    known = {field.name for field in dataclasses.fields(settings_class)}
    for name in saved.keys() - known:
        raise BadInput(f"{path} has the setting {name!r}, which this program does not know: use "
                       "the program that wrote it")
    return dataclasses.asdict(settings_class()) | saved


def refuse_other(given: dict, fixed: dict, owner: str) -> None:
    """Raises BadInput if a setting that is given is not that of its owner: of a run, an encoder, a
    probe."""
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise BadInput(f"--{name.replace('_', '-')} is {value} for {owner}, not "
                           f"{given[name]}; leave the flag out")


if __name__ == "__main__":
    with data.as_program():
        main()
