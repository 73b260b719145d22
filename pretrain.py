"""Pre-train a masked autoencoder: `python pretrain.py`.

Input: images without labels. Output: a run folder with the settings (config.json), one row per
epoch (log.csv), the state to resume from (checkpoint.pt), the final weights in half precision
(weights.pt), reconstructions of the same test images as training goes on, and curves.

Read from top to bottom: settings and recipes, `main`, the training loop (`pretrain`), and what the
loop calls: evaluation, learning rate, optimizers. The rest is plumbing: the run folder, data, model
and threads, the machine, the command line. Several GPUs: `torchrun --nproc-per-node 8 pretrain.py`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    Muon  Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
"""
import argparse
import contextlib
import ctypes
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():   # before torch is imported:
    os.environ["GOMP_SPINCOUNT"] = "5000"   # idle threads give up their core sooner

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import data
import visualize
from data import COUNT, BadInput, note, number, shell_line


# ------------------------------------------------------------------------------ settings


def flag(default, help: str, **options):
    """A setting: its default, and the help and options of its flag."""
    if type(default) is bool:
        options["action"] = argparse.BooleanOptionalAction  # --flag and --no-flag
    elif type(default) is int:
        options = dict(type=COUNT, metavar="N") | options   # at least 1
    elif type(default) is float:
        options = dict(type=float, metavar="X") | options
    return dataclasses.field(default=default, metadata=dict(options, help=help))


def absolute(text: str) -> str:
    """A path that stays right if the run is resumed from another folder."""
    return os.path.abspath(os.path.expanduser(text))


FRACTION = number(float, 0, 1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a run, as they were asked for. Each field but `command` is a flag. "auto" and
    None of device, precision, compile and micro-batch size are decided in `join_machine`."""
    recipe: str = flag("laptop", "set of defaults", choices=["laptop", "lunch", "full"])
    dataset: str = flag("auto", "auto: CIFAR-10, or drawn shapes if it cannot be downloaded",
                        choices=["auto", *data.DATASETS])
    data_dir: str = flag("data", "folder that holds the data", type=absolute)
    image_size: int = flag(data.SIDE, "side in pixels to which pictures of a folder are resized")
    limit: int | None = flag(None, "use the first N training images, and at most N test images",
                             type=COUNT, metavar="N")
    validation: int = flag(0, "test on the last N training images and train on the others, to "
                           "choose settings", type=number(int, 0, 10**6))
    epochs: int = flag(8, "passes over the training images")
    warmup: float = flag(0.125, "fraction of the epochs in which the lr rises", type=FRACTION)
    batch_size: int = flag(64, "images per optimizer step, over all processes")
    micro_batch_size: int | None = flag(
        None, "the most images that a process computes at once; smaller: less memory, the same "
        "result (default: 512 on CUDA, 128 on a CPU, 64 on MPS)", type=COUNT, metavar="N")
    base_lr: float = flag(1e-2, "learning rate for a batch of 256; scaled with --batch-size",
                          type=number(float, 0, 1000))
    optimizer: str = flag("muon", "muon: orthogonalized updates for the matrices in the blocks, "
                          "AdamW for the rest", choices=["adamw", "muon"])
    weight_decay: float = flag(0.05, "weight decay, on matrices only", type=number(float, 0, 1000))
    patch_size: int = flag(4, "side of a patch in pixels")
    dim: int = flag(128, "width of the encoder")
    depth: int = flag(6, "blocks of the encoder")
    heads: int = flag(8, "attention heads of the encoder")
    augment: str = flag("crop", "none; flip: half of the images are mirrored; crop: also shifted "
                        "by up to 4 pixels; color: also color jitter (saturation, contrast, "
                        "brightness)", choices=data.AUGMENTATIONS)
    seed: int = flag(0, "random seed of weights, order, augmentation, masks, labels used",
                     type=number(int, 0, 2**32 - 1))
    device: str = flag("auto", "auto: cuda if available, else cpu",
                       choices=["auto", "cpu", "cuda", "mps"])
    precision: str = flag("auto", "bf16: matmuls in bfloat16; auto: if the hardware has them",
                          choices=["auto", "fp32", "bf16"])
    compile: bool | None = flag(None, "compile the model with torch.compile (default: on CUDA, if "
                                "it works)", action=argparse.BooleanOptionalAction)
    threads: int | None = flag(None, "threads on a CPU (default: the fastest, timed at the start)",
                               type=number(int, 1, 1024), metavar="N")
    checkpoint_every: int = flag(1, "save a checkpoint every N epochs")
    out: str | None = flag(None, "run folder, which must be empty", type=os.path.expanduser)
    command: str = ""           # the command line that started the run


@dataclasses.dataclass(frozen=True)
class PretrainSettings(Settings):
    mask_ratio: float = flag(0.75, "fraction of the patches that is masked", type=FRACTION)
    norm_pix_loss: bool = flag(True, "predict each patch normalized by its own mean and std")
    decoder_dim: int = flag(64, "width of the decoder")
    decoder_depth: int = flag(1, "blocks of the decoder")
    decoder_heads: int = flag(4, "attention heads of the decoder")
    picture_every: int = flag(1, "draw a picture every N epochs")


VIT_TINY = dict(patch_size=2, dim=192, depth=12, heads=3)
DEFAULTS = {                    # by recipe: what differs from the defaults above
    "laptop": dict(),
    "lunch": dict(epochs=40, batch_size=128, base_lr=7e-3),
    "full": dict(
        VIT_TINY, decoder_dim=192, decoder_depth=4, decoder_heads=3, norm_pix_loss=False,
        epochs=2000, warmup=0.1, batch_size=4096, base_lr=1.5e-4, optimizer="adamw",
        augment="none", checkpoint_every=10, picture_every=50),
}
TEST_IMAGES = 1000              # the first ones, for the test loss
PICTURED = 12                   # the first ones of these, for the reconstructions


# ------------------------------------------------------------------------------ pre-training


def main(argv: list[str] | None = None) -> None:
    parser, given = read_flags("pretrain.py", "Pre-train a masked autoencoder.", PretrainSettings,
                               argv)
    checkpoint = None
    if "resume" in given:
        defaults, checkpoint = resumed_settings(PretrainSettings, "pretrain", given)
    else:
        recipe = given.get("recipe", "laptop")
        defaults = DEFAULTS[recipe] | {"out": run_folder("pretrain", given)}
    settings = make_settings(parser, PretrainSettings, defaults, given)
    machine = join_machine(settings)
    pretrain(settings, machine, checkpoint)
    machine.leave()


def pretrain(settings: PretrainSettings, machine: "Machine", checkpoint: dict | None) -> None:
    """Hide most of each training image, predict it, and keep a run folder while doing so (MAE,
    section 3 and appendix A.1). checkpoint: the one to resume from, or None. Raises BadInput if the
    loss is not finite."""
    dataset = load_data(settings, machine)
    model = make_model("pretrain", settings, machine)
    optimizers = make_optimizers(model, settings, machine, betas=(0.9, 0.95))   # MAE, table 8
    choose_threads(model, settings, machine, checkpoint)
    steps = max(1, len(dataset.train_images) // settings.batch_size)
    run = Run("pretrain", settings, machine, dataset, optimizers, {"model": model})
    run.begin(checkpoint, steps)
    compiled = machine.compiled(model, settings.batch_size)     # shares the weights of `model`
    test_images = dataset.test_images[:TEST_IMAGES]
    test_noise = visualize.random_noise(test_images, model, seed=0).to(machine.device)
    if machine.main and run.epoch == 0:
        save_picture(run, 0, model, test_images, test_noise)

    progress = data.Progress((settings.epochs - run.epoch) * steps)
    for epoch in range(run.epoch + 1, settings.epochs + 1):
        model.train()
        generator = data.seeded_generator(machine.device, settings.seed, epoch)
        order = data.epoch_order(len(dataset.train_images), settings.batch_size, generator)
        losses = torch.zeros(steps, device=machine.device)
        began = time.perf_counter()
        for step, ids in enumerate(order):
            images = data.augment(dataset.train_images[ids], settings.augment, generator)
            images = data.scale(images)                     # (B, 3, H, W), -1..1
            noise = torch.rand(len(ids), model.encoder.num_patches, generator=generator,
                               device=machine.device)       # (B, N)
            for part, weight in machine.micro_batches(len(ids)):
                with machine.autocast():
                    loss, _, _ = compiled(images[part], noise[part])
                (loss * weight).backward()
                losses[step] += loss.detach() * weight
            machine.add_up_gradients(model)
            set_learning_rate(optimizers, settings, epoch - 1 + (step + 0.5) / steps)   # mid-step
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if progress.advance() and machine.main:
                loss = losses[step] * machine.processes     # estimated from this process's share
                progress.show(f"epoch {epoch}/{settings.epochs}  step {step + 1}/{steps}  "
                              f"loss {loss:.4f}")
        train_loss = machine.sum(losses).mean().item()      # over all processes
        images_per_second = steps * settings.batch_size / (time.perf_counter() - began)
        if machine.main:
            fp32 = epoch == settings.epochs                 # the result is that of the last epoch
            test_loss = evaluate(model, test_images, test_noise, machine, fp32)
            metrics = {"loss": train_loss, "test_loss": test_loss}
            refuse_infinite(metrics, epoch)
            save_picture(run, epoch, model, test_images, test_noise)
            run.end_epoch(metrics, images_per_second, progress.time_left())
    run.finish()


# ------------------------------------------------------- pictures, evaluation, learning rate


def save_picture(run: "Run", epoch: int, model: nn.Module, images: Tensor, noise: Tensor) -> None:
    """Draw the first images after an epoch, if a picture is due."""
    if epoch in (0, 1, run.settings.epochs) or epoch % run.settings.picture_every == 0:
        with data.note_if_it_fails():
            visualize.save_epoch(run.out / "reconstructions", epoch, model, images[:PICTURED],
                                 noise[:PICTURED], f"{run.dataset.title} test images · {run.name}")


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, noise: Tensor, machine: "Machine",
             fp32: bool) -> float:
    """The mean loss of images uint8 (n, 3, H, W), masked by noise (n, N). fp32: compute in float32,
    whatever the precision of training."""
    model.eval()
    total, size = 0, machine.micro_batch_size
    with machine.autocast(fp32):
        for batch, batch_noise in zip(images.split(size), noise.split(size)):
            loss, _, _ = model(data.scale(batch), batch_noise)
            total = total + loss * len(batch)
    return (total / len(images)).item()


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


def set_learning_rate(optimizers: list[torch.optim.Optimizer], settings: Settings,
                      epoch: float) -> None:
    lr = learning_rate(settings, epoch)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def refuse_infinite(metrics: dict[str, float], epoch: int) -> None:
    """Raises BadInput if a number is infinite or NaN."""
    if not all(map(math.isfinite, metrics.values())):
        raise BadInput(f"the loss is not finite in epoch {epoch}; the last checkpoint is kept: "
                       "lower --base-lr or raise --warmup in a new run")


# ------------------------------------------------------------------------------ optimizers


def make_optimizers(model: nn.Module, settings: Settings, machine: "Machine",
                    betas: tuple[float, float], lr_scale: Callable[[str], float] = lambda name: 1.0
                    ) -> list[torch.optim.Optimizer]:
    """AdamW and, if the settings say so, Muon for the matrices inside the blocks.

    Weight decay is for matrices (2 dimensions) and the patch embedding (4), not for biases and
    LayerNorms (1), tokens and position embeddings (3). lr_scale(name) is the factor of a
    parameter's learning rate, which is set at every step.
    """
    adamw, muon = {}, {}                                    # (decay, scale) -> parameter group
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:                     # frozen
            continue
        block_matrix = "blocks." in name and parameter.ndim == 2
        groups = muon if settings.optimizer == "muon" and block_matrix else adamw
        decay, scale = settings.weight_decay if parameter.ndim in (2, 4) else 0.0, lr_scale(name)
        group = groups.setdefault((decay, scale), dict(params=[], weight_decay=decay,
                                                       lr_scale=scale))
        group["params"].append(parameter)
    optimizers = [torch.optim.AdamW([*adamw.values()], lr=0.0, betas=betas, fused=True)]
    if muon:
        dtype = torch.bfloat16 if machine.precision == "bf16" else torch.float32
        optimizers.append(Muon([*muon.values()], dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al. 2024): a matrix moves equally far in all directions,
    not only in the few that dominate its gradient.

    For the weight matrices inside a network. An orthogonal (r, c) matrix has entries of about
    1 / sqrt(max(r, c)). `step` multiplies it by STEP * lr * sqrt(max(r, c)), so a weight moves by
    about STEP * lr; AdamW moves it by 0.2 to 0.4 times lr (Liu et al. 2025, arXiv 2502.16982,
    section 2.2), hence STEP. Queries, keys and values are taken as the one matrix that they share.
    torch.optim.Muon computes matrix by matrix and in bfloat16, which is slow on hardware without
    bf16 matmuls; here matrices of one shape go together, in `dtype`.
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
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append((matrix, group))
        for shape, members in by_shape.items():
            momenta = [self.momentum(matrix) for matrix, _ in members]
            directions = orthogonalize(torch.stack(momenta).to(self.dtype)).float()
            for (matrix, group), direction in zip(members, directions):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(direction, alpha=self.STEP * group["lr"] * max(shape) ** 0.5)

    def momentum(self, matrix: Tensor) -> Tensor:
        """Nesterov momentum: the moving average of the gradients, blended with the latest one."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        buffer = state["momentum_buffer"].lerp_(matrix.grad, 1 - self.MOMENTUM)
        return matrix.grad.lerp(buffer, self.MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, by products alone: (n, r, c) -> the same shape and dtype.
    The matrices are divided by their norms. Each of five steps (Newton-Schulz; Jordan et al. 2024)
    takes a singular value s to 3.4445 s - 4.775 s^3 + 2.0315 s^5. In the end those that began above
    0.0015 are between 0.68 and 1.21."""
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

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.log)

    def begin(self, checkpoint: dict | None, steps: int) -> None:
        """Restore the run from its checkpoint, if there is one, and write a checkpoint, so that the
        run can be resumed from now on, with these settings. steps: optimizer steps per epoch.
        Raises BadInput if the checkpoint does not fit."""
        self.row_began = time.perf_counter()
        if checkpoint:
            self.restore(checkpoint)
        if self.machine.main:
            if not checkpoint:
                self.out.mkdir(parents=True, exist_ok=True)
                try:
                    (self.out / "config.json").open("x").close()
                except FileExistsError:                     # it was free when the program started
                    raise BadInput(f"another run has just begun in {self.out}: name another folder "
                                   "with --out") from None
            self.save()
            with data.note_if_it_fails():
                write_log(self.out / "log.csv", self.log)
                write_config(self.out / "config.json", self.saved_settings(), self.machine)
            self.print_header(steps)

    def print_header(self, steps: int) -> None:
        """Print what is about to run. steps: optimizer steps per epoch."""
        settings, machine, model = self.settings, self.machine, self.modules["model"]
        (train, test), init = self.dataset.counts(), getattr(settings, "init", None)
        start = (f"resumed after epoch {self.epoch}" if self.log else
                 f"encoder from {init}" if init else "from scratch")
        compiled = ", compiled" if machine.compile else ""
        resume = shell_line("python", data.PROGRAMS[self.kind], "--resume", settings.out)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"recipe     {settings.recipe}: {settings.command}\n"
              f"machine    {machine.device}, {machine.precision}{compiled}, "
              f"threads: {torch.get_num_threads()}, processes: {machine.processes}\n"
              f"data       {self.dataset.title}: {train:,} training and {test:,} test images\n"
              f"model      {type(model).__name__} of {parameters:,} parameters, {start}\n"
              f"run        {self.out}; if it is stopped: {resume}")
        if self.epoch >= settings.epochs:
            print(f"finished   all {self.epoch} epochs are done; a larger --epochs goes on")
        elif steps * settings.epochs < 100:
            new_classifier = getattr(settings, "mode", "") == "finetune" and not self.log
            larger = "--repeat" if new_classifier else "--epochs"
            note(f"steps in all: {steps * settings.epochs}, too few to learn much; raise {larger}")
        sys.stdout.flush()

    def restore(self, checkpoint: dict) -> None:
        """Raises BadInput if the checkpoint does not fit the modules, optimizers or data."""
        path = self.out / "checkpoint.pt"
        with data.damaged_if_it_fails(path):
            images, before = checkpoint["images"], checkpoint["machine"]
            for key, module in self.modules.items():
                module.load_state_dict(checkpoint[key])
            for optimizer, state in zip(self.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.log = checkpoint["log"]
            changes = [f"{key} {before[key]} -> {value}"
                       for key, value in self.machine.describe().items() if value != before[key]]
        if images != self.dataset.counts():
            raise BadInput(f"{self.out} was trained and tested on {images} images, not on "
                           f"{self.dataset.counts()}: name the folder of its data with --data-dir")
        self.dataset.refuse_other_classes(path, checkpoint["classes"])
        if changes:
            note(f"changed since the last checkpoint: {', '.join(changes)}")

    def saved_settings(self) -> dict:
        """With the data set that "auto" has become, since a resumed run needs the same."""
        return dataclasses.asdict(self.settings) | {"dataset": self.dataset.name}

    def save(self, weights_alone: bool = False) -> None:
        """Write checkpoint.pt, with everything that is needed to go on, or weights.pt, with the
        weights alone, in half precision, to keep and share."""
        content = dict(kind=self.kind, settings=self.saved_settings(), epoch=self.epoch,
                       log=self.log, images=self.dataset.counts(), classes=self.dataset.classes)
        if weights_alone:
            weights = self.modules["model"].state_dict()
            content["model"] = {name: value.half() for name, value in weights.items()}
        else:
            content |= {key: module.state_dict() for key, module in self.modules.items()}
            content["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            content["machine"] = self.machine.describe()
        name = "weights.pt" if weights_alone else "checkpoint.pt"
        data.save_checkpoint(self.out / name, content)

    def end_epoch(self, metrics: dict[str, float], images_per_second: float,
                  left: timedelta) -> None:
        """Log and print an epoch, and write a checkpoint if it is due. metrics: losses and
        accuracies; images_per_second: in training alone; left: the time to the end."""
        epoch, epochs, now = self.epoch + 1, self.settings.epochs, time.perf_counter()
        values = metrics | {"lr": learning_rate(self.settings, epoch)}      # at the epoch's end
        rounded = {name: float(f"{value:.7g}") for name, value in values.items()}
        self.log.append({"epoch": epoch, **rounded, "seconds": round(now - self.row_began, 2),
                         "images_per_second": round(images_per_second, 1)})
        self.row_began = now
        with data.note_if_it_fails():
            write_log(self.out / "log.csv", self.log)
        if epoch == epochs:
            self.save(weights_alone=True)
        if epoch == epochs or epoch % self.settings.checkpoint_every == 0:
            self.save()         # the last file of an epoch: a run killed earlier does it again
        shown = "  ".join(f"{name.replace('_', ' ')} {value:.2f} %" if "accuracy" in name
                          else f"{name.replace('_', ' ')} {value:.4f}"
                          for name, value in metrics.items())
        print(f"epoch {epoch}/{epochs}  {shown}  {images_per_second:,.0f} images/s  {left} left",
              flush=True)

    def finish(self) -> None:
        """Draw the curves."""
        if self.machine.main:
            with data.note_if_it_fails():
                picture = visualize.plot_curves({self.name: self.log}, self.dataset.title)
                visualize.save(picture, self.out / "curves.png")
            print(f"done       {self.out}", flush=True)


def write_log(path: Path, log: list[dict]) -> None:
    """Write log.csv, or remove it if there are no rows yet. A row may lack a column that others
    have."""
    if not log:
        return path.unlink(missing_ok=True)
    columns = list(dict.fromkeys(name for row in log for name in row))
    lines = [columns, *([row.get(name, "") for name in columns] for row in log)]
    data.write_file(path, "".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def write_config(path: Path, settings: dict, machine: "Machine") -> None:
    """config.json: everything needed to repeat the run, for people and for results/."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):                      # git is not installed
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = {"settings": settings, "machine": machine.describe(),
              "processes": machine.processes, "commit": commit,
              "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    data.write_file(path, (json.dumps(config, indent=2) + "\n").encode())


# ------------------------------------------------------------------------------ data and model


def load_data(settings: Settings, machine: "Machine",
              classes: list[str] | None = None) -> data.Dataset:
    """The data set on the device, limited as the settings say. The main process reads (and
    downloads) it first, then all others read it. classes: those of a classifier that is only
    tested."""
    name, where = [settings.dataset], (settings.data_dir, settings.image_size, classes)
    if machine.main:
        dataset = data.load_dataset(name[0], *where)
        name = [dataset.name]                               # perhaps "auto" has become "shapes"
    if machine.processes > 1:
        dist.broadcast_object_list(name)                    # in place; the others wait here
    if not machine.main:
        dataset = data.load_dataset(name[0], *where)
    if settings.validation:
        dataset = dataset.hold_out(settings.validation)
    if settings.limit:
        dataset = dataset.limited(settings.limit)
    return dataset.to(machine.device)


def make_model(kind: str, settings: Settings, machine: "Machine",
               num_classes: int = 10) -> nn.Module:
    """A new model, its weights fixed by the seed. Raises BadInput if its sizes do not fit."""
    torch.manual_seed(settings.seed)
    model = data.build_model(kind, dataclasses.asdict(settings), num_classes)
    return model.to(machine.device)


def choose_threads(model: nn.Module, settings: Settings, machine: "Machine",
                   checkpoint: dict | None) -> None:
    """Set the number of CPU threads, unless --threads did: that of the resumed run if its machine
    had as many cores, or else the fastest of 1, 2, 4, ..., timed on zeros. More threads are slower
    if the network is small or the machine busy."""
    if settings.threads or machine.device.type != "cpu" or machine.processes > 1:
        return
    before = checkpoint and checkpoint.get("machine")
    if before and before["device"] == "cpu" and before["cores"] == os.cpu_count():
        return torch.set_num_threads(before["threads"])
    most, fastest, shortest = torch.get_num_threads(), 1, math.inf
    count, N = min(machine.micro_batch_size, 64), getattr(model, "encoder", model).num_patches
    images = torch.zeros(count, 3, settings.image_size, settings.image_size)
    for threads in sorted({*(2**i for i in range(10) if 2**i < most), most}):
        torch.set_num_threads(threads)
        ends = []
        for _ in range(5):                                  # the first one is a warm-up
            with machine.autocast():
                output = model(images, torch.zeros(count, N))       # the loss and more, or logits
            output = output if torch.is_tensor(output) else output[0]
            if output.requires_grad:                        # a probe's encoder is frozen
                output.sum().backward()
            ends.append(time.perf_counter())
        if ends[-1] - ends[0] > shortest:
            break
        fastest, shortest = threads, ends[-1] - ends[0]
    model.zero_grad()
    torch.set_num_threads(fastest)


# ------------------------------------------------------------------------------ machine


@dataclasses.dataclass(frozen=True)
class Machine:
    """The settings of the hardware, with "auto" decided, and which process this is."""
    device: torch.device
    precision: str              # "fp32" or "bf16"
    compile: bool
    micro_batch_size: int       # the most images that a process computes at once
    rank: int = 0               # of this process
    processes: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def describe(self) -> dict:
        """What should not change if a run is resumed."""
        return dict(device=self.device.type, precision=self.precision, compile=self.compile,
                    threads=torch.get_num_threads(), cores=os.cpu_count())

    def autocast(self, fp32: bool = False):
        """Matmuls in bfloat16, unless `fp32`; weights, LayerNorms and losses stay in float32."""
        enabled = self.precision == "bf16" and not fp32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def compiled(self, model: nn.Module, batch_size: int) -> nn.Module:
        """The model to train, with the weights of `model`: compiled, if that is wanted. On CUDA its
        kernels are then replayed as one graph, unless a process has several micro-batches: a replay
        overwrites the gradients that the last one returned, so they could not be added up."""
        if not self.compile:
            return model
        graphs = (self.device.type == "cuda"
                  and math.ceil(batch_size / self.processes) <= self.micro_batch_size)
        return torch.compile(model, mode="reduce-overhead" if graphs else None)

    def micro_batches(self, count: int) -> list[tuple[slice, float]]:
        """How this process computes its part of a batch of `count` images: slices of at most a
        micro-batch, and the weight of each. The weights of all processes add up to 1, so the sum of
        the weighted gradients does not depend on how the batch is divided, if a loss is the mean
        over its images."""
        begin, end = (count * rank // self.processes for rank in (self.rank, self.rank + 1))
        edges = [*range(begin, end, self.micro_batch_size), end]
        return [(slice(a, b), (b - a) / count) for a, b in itertools.pairwise(edges)]

    def add_up_gradients(self, model: nn.Module) -> None:
        """Replace the gradients by their sums over all processes."""
        if self.processes > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            vector_to_parameters(self.sum(parameters_to_vector(gradients)), gradients)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values

    def leave(self) -> None:
        """Leave the process group. After an error this is skipped: others might never get here."""
        if self.processes > 1:
            dist.barrier()                                  # wait for the main one's last files
            dist.destroy_process_group()


def join_machine(settings: Settings) -> Machine:
    """Decide what the settings mean here, and join the other processes if torchrun started several.
    Raises BadInput if the device is missing or cannot do what is asked."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    processes = int(os.environ.get("WORLD_SIZE", 1))        # torchrun sets them
    if processes > settings.batch_size:
        raise BadInput(f"--batch-size {settings.batch_size} is too small for {processes} processes")
    device = find_device(settings.device, local_rank)
    if device.type == "mps" and (settings.compile or processes > 1):
        raise BadInput("--device mps works without --compile and in one process only")
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if has_bf16_matmuls(device.type) else "fp32"
    elif precision == "bf16" and not has_bf16_matmuls(device.type):
        note("bf16 is emulated here, which may be very slow: choose --precision fp32")
    if settings.threads:
        torch.set_num_threads(min(settings.threads, os.cpu_count()))
        if settings.threads > os.cpu_count():
            note(f"--threads {settings.threads}: this machine has {os.cpu_count()} cores")
    keep_freed_memory()
    compile = works_compiled(settings.compile, device)
    usual = {"cuda": 512, "cpu": 128, "mps": 64}[device.type]   # mps: large products were wrong
    micro_batch_size = min(settings.micro_batch_size or usual, settings.batch_size)
    if processes > 1:
        # Imported later, as by AdamW, it would keep the group alive after `leave`, and the threads
        # of gloo, which then outlive Python, could abort the process.
        from torch import _dynamo
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=device_id)
    return Machine(device, precision, compile, micro_batch_size, rank, processes)


def find_device(name: str, local_rank: int) -> torch.device:
    """The device of this process. "auto" is a GPU that torch can use, or else the CPU. Raises
    BadInput if another one is asked for and does not work."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(name, True):
        raise BadInput(f"--device {name}: torch finds no such device here, choose another")
    if name in ("cpu", "mps") or not there["cuda"]:
        return torch.device("mps" if name == "mps" else "cpu")
    if local_rank >= torch.cuda.device_count():
        raise BadInput(f"process {local_rank + 1} on this machine finds "
                       f"{torch.cuda.device_count()} GPUs: start as many processes as GPUs")
    try:
        torch.cuda.set_device(local_rank)
        return torch.ones(2, device=torch.device("cuda", local_rank)).mul(2).device
    except RuntimeError as error:                           # such as no kernels for this GPU
        reason = f"torch {torch.__version__} cannot use this GPU: {str(error).splitlines()[0]}"
        if name == "cuda":
            raise BadInput(f"--device cuda: {reason}") from None
        note(f"{reason}; using the CPU")
        return torch.device("cpu")


def has_bf16_matmuls(device: str) -> bool:
    """Whether the hardware has bf16 matmuls (on x86: AMX or AVX512-BF16)."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()       # not in older torch
    return device == "cpu" and any(map(capabilities.get, ("amx_bf16", "avx512_bf16")))


def works_compiled(asked: bool | None, device: torch.device) -> bool:
    """Whether to compile: if it is asked for or, by default, on CUDA. It is tried on something tiny
    first. Raises BadInput if it is asked for and does not work."""
    if asked is False or (asked is None and device.type != "cuda"):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # a missing compiler, headers, Triton: there is no common type
        reason = f"torch.compile does not work here: {' '.join(str(error).split())[:200]}"
        if asked:
            raise BadInput(f"{reason}; train with --no-compile") from None
        note(f"{reason}; training goes on without it, more slowly")
        return False
    return True


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of any size, instead of returning them to the system and asking
    for them again at every step (7 to 13 % of a step)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):   # not glibc: leave it
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4               # malloc.h
        libc.mallopt(M_MMAP_MAX, 0)                         # no block gets pages of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# ------------------------------------------------------------------------------ command line


def read_flags(program: str, description: str, settings_class: type, argv: list[str] | None,
               **more: dict) -> tuple[data.Parser, dict]:
    """The flags that are given, by name, and `command`, the command line. There is a flag for each
    setting, --resume, --help and `more`. Raises BadInput."""
    parser = data.Parser(prog=program, description=description, allow_abbrev=False, add_help=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags = {field.name: field.metadata for field in dataclasses.fields(settings_class)
             if field.metadata}
    flags["resume"] = dict(metavar="RUN", type=os.path.expanduser, help="continue a run after its "
                           "last checkpoint, with its own settings")
    for name, options in (flags | more).items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    parser.add_argument("-h", "--help", action="store_true", help="show the flags and the defaults "
                        "of this command line")
    argv = sys.argv[1:] if argv is None else argv
    return parser, vars(parser.parse_args(argv)) | {"command": shell_line(program, *argv)}


def make_settings(parser: data.Parser, settings_class: type, defaults: dict,
                  given: dict) -> Settings:
    """The flags that are given win over `defaults`, and these over those of the class. With --help
    the result is shown, and the program ends. Raises BadInput if a new run's folder is not free."""
    values = dataclasses.asdict(settings_class()) | defaults
    values |= {name: value for name, value in given.items() if name in values}
    settings = settings_class(**values | {"data_dir": absolute(values["data_dir"])})
    if "help" in given:
        parser.set_defaults(**{name: value for name, value in vars(settings).items()
                               if value is not None})
        parser.print_help()
        sys.exit(0)
    if not {"resume", "evaluate"} & given.keys() and any(Path(settings.out).glob("[!.]*")):
        free = next(path for i in itertools.count(2)
                    if not os.path.lexists(path := f"{Path(settings.out)}-{i}"))
        raise BadInput(f"{settings.out} already holds files: to continue that run, "
                       f"{shell_line('python', parser.prog, '--resume', settings.out)}; to start "
                       f"another one, add {shell_line('--out', free)}")
    return settings


def run_folder(kind: str, given: dict) -> str:
    """The default folder of a new run. Its name lists what differs from the defaults."""
    recipe, dataset = given.get("recipe", "laptop"), given.get("dataset", "auto")
    parts = [kind, recipe != "laptop" and recipe,
             dataset not in ("auto", "cifar10") and dataset,
             given.get("validation") and "validation",
             "limit" in given and f"{given['limit']}-images",
             "labels_per_class" in given and f"{given['labels_per_class']}-labels"]
    return os.path.join("runs", "-".join(filter(None, parts)))


MAY_CHANGE = {"data_dir", "device", "precision", "compile", "micro_batch_size", "threads",
              "checkpoint_every", "picture_every", "epochs"}        # when a run is resumed


def resumed_settings(settings_class: type, kind: str, given: dict) -> tuple[dict, dict]:
    """For --resume: the settings of a run, and its checkpoint. Raises BadInput if a flag is given
    that may not change; OSError."""
    path = Path(given["resume"])
    out = path if path.is_dir() else path.parent            # its checkpoint may be named, too
    checkpoint = data.load_checkpoint(path, kind)
    if "optimizers" not in checkpoint or path not in (out, out / "checkpoint.pt"):
        raise BadInput(f"{path} cannot be resumed: name the folder of a run with a checkpoint.pt")
    own = saved_settings(settings_class, checkpoint, out / "checkpoint.pt")
    own |= dict(out=str(out), data_dir=data.find_folder(own["dataset"], own))
    given.pop("command")                                    # the run keeps its first one
    refuse_other(given, {name: own[name] for name in own.keys() - MAY_CHANGE}, f"the run in {out}")
    epochs, done = given.get("epochs", own["epochs"]), len(checkpoint["log"])
    if epochs != own["epochs"] and epochs <= done:
        raise BadInput(f"--epochs {epochs}: {done} epochs are done already; give a larger number")
    return own, checkpoint


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
    """Raises BadInput if a flag differs from a fixed setting of its owner: a run, an encoder, a
    probe."""
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise BadInput(f"--{name.replace('_', '-')} is {value} for {owner}, not "
                           f"{given[name]}; leave the flag out")


if __name__ == "__main__":
    with data.as_program():
        main()
