"""Everything on disk: data sets, and what a run writes and reads; flags and errors.

Input: the name of a data set and a folder. Output: a `Dataset`, which holds the images for training
and those for testing, each uint8 (n, 3, 32, 32), and their labels, int64 (n,). Flips, crops and
scaling are operations on whole batches, on the device where the tensors are. In this order:

    data sets     where they are, how they are read: the binary files, parsed by hand
    batches       order, flips, crops and colours, mixing, scaling
    download      archive -> checked -> unpacked -> in place
    shapes        a data set of drawn shapes, for machines without CIFAR
    run files     written whole or not at all; checkpoints and the models in them
    flags         of the programs that train, and their ranges
    errors        bad input is one line and exit status 2; progress is a line, too

CIFAR-10 and CIFAR-100: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images. The
binary format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import sys
import tarfile
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mae

try:
    import fcntl
except ImportError:             # Windows: no locks on folders
    fcntl = None


# ------------------------------------------------------------------------------ data sets

SIDE = 32                       # pixels
PIXELS = 3 * SIDE * SIDE        # bytes of an image: channel by channel, row by row
BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the binary files of a data set are, and how their records are laid out."""
    title: str
    folder: str
    train: tuple[str, ...]      # file names
    test: tuple[str, ...]
    class_names: str            # the file that names the classes, one per line
    num_classes: int
    label_bytes: int            # the last one is the label; CIFAR-100 has a coarse one before it
    url: str = ""
    md5: str = ""


SOURCES = {
    "cifar10": Source(
        "CIFAR-10", "cifar-10-batches-bin", BATCHES, ("test_batch.bin",), "batches.meta.txt", 10, 1,
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": Source(
        "CIFAR-100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt",
        100, 2, "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8"),
    "shapes": Source(
        "shapes", "shapes", BATCHES, ("test_batch.bin",), "batches.meta.txt", 10, 1),
}


@dataclasses.dataclass
class Dataset:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,)."""
    name: str                   # a key of SOURCES
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def title(self) -> str:
        return SOURCES[self.name].title

    def to(self, device: torch.device) -> "Dataset":
        return dataclasses.replace(self, **{name: value.to(device) for name, value in
                                            vars(self).items() if torch.is_tensor(value)})

    def subset(self, ids: Tensor) -> "Dataset":
        """Only these training images."""
        return dataclasses.replace(self, train_images=self.train_images[ids],
                                   train_labels=self.train_labels[ids])

    def first(self, count: int) -> "Dataset":
        """The first `count` training images. Raises BadInput if there are fewer."""
        if count > len(self.train_images):
            raise BadInput(f"--limit {count}: only {len(self.train_images):,} training images of "
                           f"{self.name} are in use")
        return self.subset(torch.arange(count))

    def hold_out(self, count: int) -> "Dataset":
        """Test on the last `count` training images and train on the others. Raises BadInput if no
        others are left."""
        rest = len(self.train_images) - count
        if rest < 1:
            raise BadInput(f"--validation {count}: {self.name} has {len(self.train_images):,} "
                           "training images, and some must be left to train on")
        return dataclasses.replace(self.first(rest), test_images=self.train_images[rest:],
                                   test_labels=self.train_labels[rest:])

    def balanced(self, per_class: int, seed: int) -> "Dataset":
        """`per_class` random training images of each class. Raises BadInput if one has fewer."""
        order = torch.randperm(len(self.train_labels), generator=seeded_generator("cpu", seed))
        ids = []
        for label, title in enumerate(self.classes):
            of_class = order[self.train_labels[order] == label]
            if len(of_class) < per_class:
                raise BadInput(f"--labels-per-class {per_class}: only {len(of_class)} of the "
                               f"{len(order):,} training images in use are of class {title}")
            ids.append(of_class[:per_class])
        return self.subset(torch.cat(ids).sort().values)


NO_CIFAR = """
{line}
  CIFAR-10 IS NOT HERE AND COULD NOT BE DOWNLOADED: THIS RUN USES THE DRAWN `shapes` INSTEAD.
  {reason}
  Its numbers say nothing about CIFAR-10. For the real data set see the questions in the README.
{line}
"""


def load_dataset(name: str, data_dir: Path | str) -> Dataset:
    """Read a data set; download it (or, for `shapes`, draw it) first if it is not in `data_dir`.

    name: a key of SOURCES, or "auto": CIFAR-10 if it is there or can be downloaded, or else
    `shapes`, with a warning. Raises BadInput.
    """
    data_dir = Path(data_dir)
    if name == "auto":
        try:
            return load_dataset("cifar10", data_dir)
        except DownloadFailed as failure:
            print(NO_CIFAR.format(line="!" * 90, reason=failure), file=sys.stderr)
            name = "shapes"
    source = SOURCES[name]
    folder = data_dir / source.folder
    if not folder.exists():
        if (data_dir / source.test[0]).exists():
            raise BadInput(f"--data-dir {data_dir} is itself the folder of a data set: name the "
                           "folder in which it lies")
        (make_shapes if name == "shapes" else download)(source, data_dir)
    return Dataset(name, read_class_names(folder, source),
                   *parse_files(folder, source.train, source),
                   *parse_files(folder, source.test, source))


def parse_files(folder: Path, names: tuple[str, ...], source: Source) -> tuple[Tensor, Tensor]:
    """The records of several files, in order: images (n, 3, 32, 32), labels (n,)."""
    images, labels = zip(*(parse_records(folder / name, source) for name in names))
    return (torch.from_numpy(np.concatenate(images)),
            torch.from_numpy(np.concatenate(labels)).long())


def parse_records(path: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """A binary file -> pixels uint8 (n, 3, 32, 32), labels uint8 (n,).

    A record is 1 label byte (CIFAR-100: 2, coarse and fine) and then the pixels. Raises BadInput if
    the file is not made of such records, OSError if it cannot be read.
    """
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    size = source.label_bytes + PIXELS
    advice = f"put the right file there, or move {path.parent} away to get it anew"
    if len(raw) == 0 or len(raw) % size:
        raise BadInput(f"{path} has {len(raw):,} bytes, which is not a whole number of "
                       f"{size:,}-byte {source.title} records; {advice}")
    records = raw.reshape(-1, size)                         # (n, size)
    labels = records[:, source.label_bytes - 1]             # (n,)
    wrong = (labels >= source.num_classes).nonzero()[0]
    if len(wrong):
        raise BadInput(f"{path}: record {wrong[0]} has label {labels[wrong[0]]}, but the labels of "
                       f"{source.title} are 0 to {source.num_classes - 1}; {advice}")
    return records[:, source.label_bytes:].reshape(-1, 3, SIDE, SIDE), labels


def read_class_names(folder: Path, source: Source) -> list[str]:
    """The names of the classes, or their numbers if the file with the names is not as expected."""
    try:
        text = (folder / source.class_names).read_text(errors="replace")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError:
        names = []
    numbers = [str(label) for label in range(source.num_classes)]
    return names if len(names) == source.num_classes else numbers


# ------------------------------------------------------------------------------ batches


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator whose draws depend only on the numbers, such as (seed, epoch)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def epoch_order(count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Which images make up each batch of an epoch: (steps, batch_size).

    Every image once, in random order. The last count % batch_size of that order do not fill a
    batch and are left out. A set smaller than one batch is repeated until it fills one.
    """
    steps = max(1, count // batch_size)
    rounds = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator, device=generator.device)
                       for _ in range(rounds)])
    return order[:steps * batch_size].view(steps, batch_size)


def augment(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Change images at random. kind: "none"; "flip"; "crop" for flips and shifted crops; "color"
    for flips, shifted crops and changed colours.

    images uint8 (B, 3, H, W) -> the same shape, as floats if colours change. A crop shifts by up
    to `pad` pixels in each direction and fills the margin with the mirror image. Flip and crop are
    one indexing operation.
    """
    if kind == "none":
        return images
    B, _, H, W = images.shape
    device = images.device
    rows = torch.arange(H, device=device).expand(B, H)      # (B, H) where each row comes from
    columns = torch.arange(W, device=device).expand(B, W)   # (B, W)
    flip = torch.rand(B, 1, generator=generator, device=device) < 0.5
    columns = torch.where(flip, W - 1 - columns, columns)
    if kind in ("crop", "color"):
        shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator, device=device)
        rows, columns = rows + shift[0], columns + shift[1]
    rows = (H - 1) - ((H - 1) - rows.abs()).abs()           # mirror at both edges
    columns = (W - 1) - ((W - 1) - columns.abs()).abs()
    batch = torch.arange(B, device=device)[:, None, None]
    images = images[batch, :, rows[:, :, None], columns[:, None, :]]    # (B, H, W, 3)
    images = images.permute(0, 3, 1, 2)                     # (B, 3, H, W)
    return change_colors(images, generator) if kind == "color" else images


def change_colors(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Random saturation, contrast and brightness: three factors per image, from 1 - strength to
    1 + strength, multiply the distance of each colour from its own grey, then from the mean of the
    image, then from black. After Chen et al. 2020, arXiv 2002.05709, appendix A, who also change
    the hue.

    images uint8 (B, 3, H, W) -> the same shape, as floats, 0..255.
    """
    def factor() -> Tensor:                                 # (B, 1, 1, 1)
        uniform = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
        return 1 + strength * (2 * uniform - 1)

    images = images.float()
    grey = images.mean(dim=1, keepdim=True)                 # (B, 1, H, W)
    images = torch.lerp(grey, images, factor())             # saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)         # (B, 1, 1, 1)
    images = torch.lerp(mean, images, factor())             # contrast
    return (images * factor()).clamp(0, 255)                # brightness


def mix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899),
    each with probability 1/2: an image is blended with the previous one of the batch, or a box of
    that one is pasted into it. Its label is mixed in the same proportion.

    images (B, 3, H, W) of 0..255, labels (B, classes) as probabilities -> both mixed, as floats.
    The proportion is uniform, Beta(1, 1) in the papers.
    """
    B, _, H, W = images.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=images.device)

    def near_random_center(length: int, half: Tensor) -> Tensor:        # (B, length)
        places = torch.arange(length, device=images.device) + 0.5
        return (places - uniform(B, 1) * length).abs() < half * length

    drawn = uniform(B, 1)                                   # the image's own share
    half = (1 - drawn).sqrt() / 2                           # half a box's side; its area: 1 - drawn
    box = near_random_center(H, half)[:, :, None] & near_random_center(W, half)[:, None, :]
    weight = torch.where(uniform(B, 1, 1) < 0.5, drawn[:, :, None], 1.0 - box.float())  # (B, H, W)
    share = weight.mean(dim=(1, 2))[:, None]                # exact: the edge may cut a box off
    return (torch.lerp(images.roll(1, 0).float(), images.float(), weight[:, None]),
            torch.lerp(labels.roll(1, 0), labels, share))


def scale(images: Tensor) -> Tensor:
    """0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def unscale(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------ download


def download(source: Source, data_dir: Path) -> None:
    """Download, check and unpack an archive. Raises DownloadFailed."""
    with appearing_whole(data_dir / source.folder) as temporary:
        archive, advice = temporary / "archive.tar.gz", f"or unpack it into {data_dir} yourself"
        try:
            fetch(source.url, archive)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadFailed(f"cannot download {source.url}: {error}; try again, "
                                 f"{advice}") from None
        with open(archive, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != source.md5:
            raise DownloadFailed(f"{source.url} arrived with MD5 {md5} instead of {source.md5}: "
                                 f"cut off or changed on the way; try again, {advice}")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")


def fetch(url: str, path: Path, timeout: float = 30) -> None:
    """Download a file, with a progress line. timeout: seconds without an answer."""
    with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
        progress = Progress(int(response.headers.get("Content-Length", 0)))
        while chunk := response.read(2**18):
            file.write(chunk)
            if progress.advance(len(chunk)):
                share = progress.done / progress.total
                progress.show(f"downloading {Path(url).name}  {share:.0%}")


@contextlib.contextmanager
def appearing_whole(folder: Path):
    """Yield a temporary folder; at the end move its subfolder `folder.name` to `folder`. Leftovers
    of a killed program are deleted first."""
    temporary = folder.with_name(f".incomplete-{folder.name}")
    with locked(folder.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            os.rename(temporary / folder.name, folder)
        except OSError as error:
            error.filename = error.filename or str(folder)  # a full disk does not name the file
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------------------ shapes

SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "star", "crescent", "bar", "bow")


def make_shapes(source: Source, data_dir: Path) -> None:
    """Write the data set `shapes` in CIFAR-10's binary format, the same every time."""
    rng = np.random.default_rng(0)
    with appearing_whole(data_dir / source.folder) as temporary:
        folder = temporary / source.folder
        folder.mkdir()
        (folder / source.class_names).write_text("\n".join(SHAPES) + "\n")
        for name in source.train + source.test:
            labels = rng.permutation(np.arange(2_000) % source.num_classes)
            pixels = draw_shapes(labels, rng).reshape(-1, PIXELS)
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (folder / name).write_bytes(records.tobytes())


def draw_shapes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures of the shapes with these labels: (n,) -> uint8 (n, 3, 32, 32).

    Place, size, rotation, colours, background and noise vary. Edges are anti-aliased.
    """
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (len(labels), *shape)).astype(np.float32)

    def antialias(distance):    # from the edge, in units of the shape's size, to 0..1
        return np.clip(distance * size + 0.5, 0, 1)

    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)        # (32, 32) each, in pixels
    size, angle = uniform(6, 13, 1, 1), uniform(0, 2 * np.pi, 1, 1)
    dx, dy = x - uniform(10, 22, 1, 1), y - uniform(10, 22, 1, 1)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / size    # (n, 32, 32), the shape's own axes
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / size
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    high, low = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    distances = [                                           # positive inside, in order of SHAPES
        1 - radius,
        0.25 - abs(radius - 0.75),
        0.8 - high,
        0.2 - abs(high - 0.7),
        0.5 - np.max([radius * np.cos(turn - k * 2 * np.pi / 3) for k in range(3)], 0),
        np.minimum(0.27 - low, 1 - high),
        0.65 + 0.35 * np.cos(5 * turn) - radius,
        np.minimum(1 - radius, np.hypot(u - 0.5, v) - 0.75),
        np.minimum(1 - abs(u), 0.25 - abs(v)),
        np.minimum(abs(u) - abs(v), 0.9 - abs(u)),
    ]
    inside = np.choose(labels[:, None, None], [antialias(one) for one in distances])[:, None]
    ramp = antialias(uniform(-1, 1, 1, 1) * (x - 16) / 16 + uniform(-1, 1, 1, 1) * (y - 16) / 16)
    near, far = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    ground = near + (far - near) * ramp[:, None]
    colour = (ground.mean((2, 3), keepdims=True) + uniform(70, 185, 3, 1, 1)) % 255
    picture = ground * (1 - inside) + colour * inside       # (n, 3, 32, 32)
    picture += rng.normal(size=picture.shape).astype(np.float32) * uniform(0, 12, 1, 1, 1)
    return picture.clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------ run files


def write_file(path: Path | str, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: to a temporary file beside it, which is flushed to the disk
    and then renamed. Raises OSError if it cannot be written; an older file is then untouched."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)                          # a full disk does not name the file
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path):
    """Make a folder and lock it until the end of the `with`, so that no second program writes to
    it. Yields a function that raises BadInput if the folder was deleted or replaced in the
    meantime. Raises BadInput if another program has the lock. Windows and some network file
    systems have no such locks; nothing is locked there."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield lambda: None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise BadInput(f"another program is writing to {folder}: wait for it, or name another "
                       "folder") from None
    except OSError:             # a file system without locks
        pass

    def check_still_there() -> None:
        if not (folder.exists() and os.path.samestat(folder.stat(), os.fstat(handle))):
            raise BadInput(f"{folder} was deleted or replaced while its run was going on")

    try:
        yield check_still_there
    finally:
        os.close(handle)


CHECKPOINT_VERSION = 5
PROGRAMS = {"pretrain": "pretrain.py", "classifier": "finetune.py"}     # by kind of run
MEASURED = ("lr", "seconds", "images_per_second", "peak_memory_mb")     # lr at the epoch's end
LOG_COLUMNS = {
    "pretrain": ("epoch", "loss", "test_loss", *MEASURED),
    "classifier": ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
                   *MEASURED),
}
ENCODER_SIZES = ("patch_size", "dim", "depth", "heads")


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write tensors and plain values with the keys that `load_checkpoint` names."""
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path: Path | str, kind: str | None = None) -> dict:
    """Read a checkpoint, or the one in a run's folder. No code in it is executed.

    Keys: kind ("pretrain" or "classifier"), settings (a value for each of FLAGS[kind]), epoch
    (epochs done), log (a dict per epoch), images (how many for training, before --labels-per-class,
    and for testing), model (state dict) and, except in weights.pt, optimizers (the state of each)
    and, of a linear probe, probe. Raises BadInput if the file is not what the programs write, or of
    another kind or version; OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "checkpoint.pt", path / "weights.pt"]
        path = next((file for file in files if file.exists()), files[0])
    content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
            version = int(checkpoint["version"])
    except Exception:           # what torch.load raises for damaged files has no common type
        raise BadInput(f"{path} is not a checkpoint, or it is damaged; give the checkpoint.pt or "
                       "weights.pt of a run") from None
    if version != CHECKPOINT_VERSION:
        raise BadInput(f"{path} has checkpoint version {version}, this program reads version "
                       f"{CHECKPOINT_VERSION}: use the program that wrote it")
    if not is_complete(checkpoint):
        raise BadInput(f"{path} is damaged: it does not hold the settings, log and weights of a "
                       "run")
    if kind and checkpoint["kind"] != kind:
        raise BadInput(f"{path} is from {PROGRAMS[checkpoint['kind']]}, but one from "
                       f"{PROGRAMS[kind]} is needed")
    return checkpoint


def is_complete(checkpoint: dict) -> bool:
    """Whether a checkpoint has all that the programs write, each value of its type and range. That
    the weights fit is found out when a model loads them."""
    kind, log, model = (checkpoint.get(key) for key in ("kind", "log", "model"))
    if kind not in tuple(PROGRAMS) or not isinstance(log, list) or not isinstance(model, dict):
        return False
    rows_fit = all(isinstance(row, dict) and tuple(row) == LOG_COLUMNS[kind]
                   and all(type(value) in (int, float) for value in row.values()) for row in log)
    return (rows_fit and checkpoint.get("epoch") == len(log)
            and are_settings(checkpoint.get("settings"), kind))


def build_model(kind: str, settings: dict) -> nn.Module:
    """A new MAEViT ("pretrain") or ViTClassifier ("classifier") of the sizes in `settings`.

    Raises ValueError if they do not fit together.
    """
    sizes = {name: settings[name] for name in ENCODER_SIZES}
    if kind == "classifier":
        return mae.ViTClassifier(mae.Encoder(**sizes), SOURCES[settings["dataset"]].num_classes,
                                 settings["pool"], settings["mask_ratio"])
    for name in ("decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio", "norm_pix_loss"):
        sizes[name] = settings[name]
    return mae.MAEViT(**sizes)


def load_model(path: Path | str, kind: str | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises BadInput, OSError."""
    checkpoint = load_checkpoint(path, kind)
    try:
        model = build_model(checkpoint["kind"], checkpoint["settings"])
        load_weights(model, checkpoint["model"], path)
    except ValueError as error:
        raise BadInput(f"the settings in {path} do not describe a model: {error}") from None
    return model.eval(), checkpoint


def load_weights(model: nn.Module, weights: dict, path: Path | str) -> None:
    """Raises BadInput if they are not the weights of this model."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):       # of other shapes, or not weights
        raise BadInput(f"the weights in {path} do not fit the model in its settings") from None


def read_settings(run: Path) -> dict:
    """The settings in the config.json of a run's folder; none if it has none. Raises OSError if
    the file cannot be read."""
    try:
        return dict(json.loads((run / "config.json").read_text())["settings"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return {}


# ------------------------------------------------------------------------------ flags


def number(kind: type, low: float, high: float, open_ends: bool = False):
    """A type for a flag: a number from `low` to `high`, the ends excluded if `open_ends`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high if open_ends else low <= value <= high):
            name = "a whole number" if kind is int else "a number"
            ends = f"above {low} and below {high}" if open_ends else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {ends}")
        return value
    return parse


COUNT = number(int, 1, 10**6)
SWITCH = argparse.BooleanOptionalAction                 # --flag and --no-flag
COMMON_FLAGS = {                # of pretrain.py and finetune.py
    "dataset": dict(choices=["auto", *SOURCES], default="auto", help="auto is CIFAR-10 if it is "
                    "there or can be downloaded, or else the drawn shapes"),
    "data_dir": dict(default="data", help="folder that holds the folders of the data sets"),
    "limit": dict(metavar="N", type=COUNT, help="use only the first N training images"),
    "validation": dict(metavar="N", type=number(int, 0, 10**6), default=0, help="test on the last "
                       "N training images and train on the others, to choose settings"),
    "epochs": dict(type=COUNT, help="passes over the training images"),
    "warmup_epochs": dict(type=number(float, 0, 10**6), help="epochs in which the learning rate "
                          "rises from 0 (default: the recipe's share of the epochs)"),
    "batch_size": dict(type=COUNT, help="images per optimizer step, over all processes"),
    "micro_batch_size": dict(type=COUNT, help="images that a process computes at once; their "
                             "gradients add up to that of the batch (default: 512 on CUDA, "
                             "else 128)"),
    "base_lr": dict(type=number(float, 0, 1000, open_ends=True), help="learning rate for a batch "
                    "of 256; the one used is this x batch size / 256"),
    "optimizer": dict(choices=["adamw", "muon"], help="muon: orthogonalised updates for the "
                      "matrices in the blocks, AdamW for the rest"),
    "weight_decay": dict(type=number(float, 0, 1000), help="of weight matrices only"),
    "patch_size": dict(type=COUNT, help="side of a patch in pixels"),
    "dim": dict(type=COUNT, help="width of the encoder"),
    "depth": dict(type=COUNT, help="blocks of the encoder"),
    "heads": dict(type=COUNT, help="attention heads of the encoder"),
    "augment": dict(choices=["none", "flip", "crop", "color"], help="flip: half of the images are "
                    "mirrored; crop: also shifted by up to 4 pixels; color: also saturation, "
                    "contrast and brightness change by up to 40 %%"),
    "seed": dict(type=number(int, 0, 2**32 - 1), default=0, help="of weights, order, augmentation, "
                 "masks and the choice of labelled images"),
    "device": dict(choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto is cuda if "
                   "it is there, or else mps, or else cpu"),
    "precision": dict(choices=["auto", "fp32", "bf16"], default="auto", help="bf16: matrix "
                      "products in bfloat16; auto is bf16 if the hardware multiplies it"),
    "compile": dict(action=SWITCH, help="compile the model with torch.compile (default: on CUDA)"),
    "checkpoint_every": dict(type=COUNT, help="epochs from checkpoint to checkpoint"),
}
FLAGS = {                       # the settings of a run, by kind
    "pretrain": COMMON_FLAGS | {
        "recipe": dict(choices=["full", "laptop", "lunch"], help="set of defaults"),
        "mask_ratio": dict(type=number(float, 0, 1, open_ends=True), help="part of the patches "
                           "that is hidden"),
        "norm_pix_loss": dict(action=SWITCH, help="predict each patch normalised by its own mean "
                              "and standard deviation"),
        "decoder_dim": dict(type=COUNT, help="width of the decoder"),
        "decoder_depth": dict(type=COUNT, help="blocks of the decoder"),
        "decoder_heads": dict(type=COUNT, help="attention heads of the decoder"),
        "picture_every": dict(type=COUNT, help="epochs from picture to picture"),
    },
    "classifier": COMMON_FLAGS | {
        "recipe": dict(choices=["full", "laptop", "lunch", "strong"], help="set of defaults"),
        "init": dict(help="checkpoint or run folder of pretrain.py, whose encoder is the start "
                     "(default: from scratch)"),
        "mode": dict(choices=["finetune", "linear"], default="finetune", help="finetune: all "
                     "weights are trained; linear: only the head, on a frozen encoder"),
        "pool": dict(choices=["cls", "mean"], help="what the head reads: the class token, or the "
                     "mean over the patches"),
        "layer_decay": dict(type=number(float, 0, 1), help="each layer learns at this "
                            "factor of the rate of the layer above"),
        "mask_ratio": dict(type=number(float, 0, 1), help="part of the patches that is left out "
                           "of training images"),
        "whole_epochs": dict(metavar="N", type=number(int, 0, 10**6), help="no patches are left "
                             "out in the last N epochs, as in testing"),
        "mix": dict(action=SWITCH, help="mixup or CutMix: mix each training image, and its label, "
                    "with another one"),
        "labels_per_class": dict(metavar="N", type=COUNT, help="train on N random images of each "
                                 "class"),
        "repeat": dict(metavar="N", type=number(int, 1, 10**4), default=1, help="show each "
                       "training image N times per epoch"),
    },
}
RUN_FLAGS = {                   # of one call of a program, not kept with the run
    "out": dict(type=Path, help="run folder (default: a new one in runs/, named after the run)"),
    "resume": dict(action="store_true", help="continue the run in --out, with its own settings"),
    "benchmark": dict(action="store_true", help="print the speed of these settings, train nothing"),
}
OPTIONAL = ("limit", "init", "labels_per_class")        # settings that may be None


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of a flag, if it has one."""

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or "(default" in action.help
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Reports wrong flags like any other bad input, as one line."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def add_flags(self, flags: dict[str, dict]) -> None:
        for name, options in flags.items():
            self.add_argument(f"--{name.replace('_', '-')}", **options)

    def error(self, message: str):
        raise BadInput(f"{message}; see {self.prog} --help")


def are_settings(settings, kind: str) -> bool:
    """Whether these are the settings of a run. Writes them as flags, parses the flags, and
    compares the result with the settings."""
    if not isinstance(settings, dict) or settings.keys() != FLAGS[kind].keys():
        return False
    parser, flags = Parser(add_help=False), []
    parser.add_flags(FLAGS[kind])
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            flags.append(f"{flag}={value}")
        elif name not in OPTIONAL:
            return False
    try:
        return "auto" not in settings.values() and vars(parser.parse_args(flags)) == settings
    except BadInput:
        return False


# ------------------------------------------------------------------------------ errors


class BadInput(Exception):
    """The user's input cannot be used. The text is one line: what is wrong, where, what to do."""


class DownloadFailed(BadInput):
    """The archive cannot be downloaded, or is not what it should be."""


@contextlib.contextmanager
def exit_on_bad_input():
    """Around a program: bad input, a file that the system refuses, and too little memory become
    one line on standard error and exit status 2. Other errors keep their traceback."""
    try:
        yield
    except BadInput as error:
        problem = str(error)
    except BrokenPipeError:     # the reader of the output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not error.filename:
            raise
        problem = f"{error.filename}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:            # of numpy; of torch, CUDA and cuBLAS
        signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        problem = "out of memory: use smaller sizes or batches, see --help"
    else:
        return
    sys.stderr.write(f"error: {' '.join(problem.split())}\n")   # one write: lines do not mix
    sys.exit(2)


class Progress:
    """A line on standard error that says how much time is left: on a terminal one that replaces
    itself twice a second, elsewhere a new line every half minute."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.shown = time.monotonic()

    def advance(self, count: int = 1) -> bool:
        """Count what is done. Returns whether it is time to show the line."""
        self.done += count
        if self.done == self.total and sys.stderr.isatty():     # erase the line
            print("\x1b[K", end="", file=sys.stderr, flush=True)
        return (time.monotonic() - self.shown > (0.5 if sys.stderr.isatty() else 30)
                and self.done < self.total)

    def show(self, text: str) -> None:
        self.shown = time.monotonic()
        text, end = f"{text}  {self.time_left()} left", "\n"
        if sys.stderr.isatty():                             # \x1b[K erases the rest of the line
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            text, end = text[:columns - 1], "\x1b[K\r"
        print(text, end=end, file=sys.stderr, flush=True)

    def time_left(self) -> datetime.timedelta:
        """Estimated from the time per count so far."""
        seconds = (time.monotonic() - self.began) / max(self.done, 1) * (self.total - self.done)
        return datetime.timedelta(seconds=round(seconds))
