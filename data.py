"""From bytes on disk to batches on the device.

What goes in: the name of a data set and a folder. What comes out: `Dataset`, all images as one
uint8 tensor (n, 3, 32, 32) and all labels as one int64 tensor (n,), from which batches are cut,
flipped, cropped and scaled by operations on the whole batch, wherever the tensors are.

    errors        BadInput, the one place that prints it, and flags that raise it
    files         written whole or not at all; checkpoints
    download      archive -> checked -> unpacked -> in place
    shapes        a data set of drawn shapes, for machines without CIFAR
    parse         the binary records, by hand
    batches       order, crops and flips, mixing, scaling

CIFAR-10 and CIFAR-100: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images;
the binary format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import http.client
import io
import math
import os
import socket
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SIDE = 32                       # pixels
PIXELS = 3 * SIDE * SIDE        # bytes of an image: channel by channel, row by row


# ------------------------------------------------------------------------------ errors


class BadInput(Exception):
    """What the user gave cannot be used. The text is one line: what is wrong, where, what to do."""


def is_main_process() -> bool:
    """Whether this is the one of several processes (see torchrun) that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def exit_on_bad_input():
    """Around a program: bad input, or a file that the system refuses, is one line on standard
    error and exit status 2, and so is running out of memory; Ctrl-C is one line and 130, SIGTERM
    (see `pretrain.stop_on_sigterm`) 143. Other errors keep their traceback.
    """
    try:
        yield
    except BadInput as problem:
        sys.stderr.write(f"error: {' '.join(str(problem).split())}\n")  # in one piece
        sys.exit(2)
    except OSError as error:                                # of a file that the user named
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:                           # of torch, the system, CUDA, cuBLAS
        signs = ("out of memory", "t allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
        if not any(sign in str(error) for sign in signs):
            raise
        print("error: out of memory: lower --micro-batch-size, or the sizes of model or batch",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        if is_main_process():
            print(f"\nstopped. {stop}".rstrip(), file=sys.stderr)
        sys.exit(143 if getattr(stop, "sigterm", False) else 130)


class Parser(argparse.ArgumentParser):
    """Reports wrong flags like any other bad input: one line."""

    def error(self, message: str):
        raise BadInput(f"{message}; see {self.prog} --help")


def number(kind: type, low: float, high: float = math.inf, open_ends: bool = False):
    """A type for a flag: a finite number from `low` to `high`, the ends left out if `open_ends`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value < high if open_ends else low <= value <= high
        if not inside or math.isinf(value):
            name = "a whole number" if kind is int else "a number"
            ends = f"{'above' if open_ends else 'of at least'} {low}"
            ends += f" and {'below' if open_ends else 'at most'} {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} {ends}")
        return value
    return parse


# ------------------------------------------------------------------------------ files


def write_file(path: Path | str, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: to a temporary one beside it, flushed to the disk, then
    renamed.

    Raises BadInput where it cannot be written; an older file of that name is then untouched.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if hasattr(os, "O_DIRECTORY"):                      # the new name too, to the disk
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: {error.strerror}; make room or give another folder, "
                       "what was there before is intact") from None


CHECKPOINT_VERSION = 3


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write tensors and plain values; `load_checkpoint` says which keys. Raises BadInput."""
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path: Path | str, kind: str | None = None) -> dict:
    """Read a checkpoint; nothing in it is executed. A run's folder stands for the file in it.

    Keys: kind ("pretrain" or "classifier"), settings (dict), epoch (epochs done), model (state
    dict), log (a dict per epoch) and, unless only the weights were kept, optimizer (state dict of
    each). Raises BadInput where the file is missing, damaged, of another kind or version.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "checkpoint.pt", path / "weights.pt"]
        path = next((file for file in files if file.exists()), files[0])
    try:
        content = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise BadInput(f"cannot read checkpoint {path}: {error.strerror}; give the checkpoint.pt "
                       "or weights.pt of a run, or its folder") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except Exception:   # what torch.load raises on damaged files has no common type
        raise BadInput(f"{path} is no checkpoint, or a damaged one; give the checkpoint.pt or "
                       "weights.pt of a run") from None
    types = dict(version=int, kind=str, settings=dict, epoch=int, model=dict, log=list)
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(key), value) for key, value in types.items()):
        raise BadInput(f"{path} is no checkpoint of pretrain.py or finetune.py")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise BadInput(f"{path} is of checkpoint version {checkpoint['version']}, this program "
                       f"reads version {CHECKPOINT_VERSION}: use the program that wrote it")
    if kind and checkpoint["kind"] != kind:
        wanted = {"pretrain": "an autoencoder from pretrain.py",
                  "classifier": "a classifier from finetune.py"}
        raise BadInput(f"{path} holds {wanted.get(checkpoint['kind'], 'something else')}, "
                       f"{wanted[kind]} is needed")
    return checkpoint


def load_weights(model: nn.Module, state: dict, path: Path | str) -> None:
    """Raises BadInput where the weights are not those of this model."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):       # of another size, or not weights
        raise BadInput(f"the weights in {path} do not fit the model that its settings "
                       "describe: the file is damaged") from None


# ------------------------------------------------------------------------------ download


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a data set's binary files are, and how their records are laid out."""
    title: str
    folder: str
    train: tuple[str, ...]      # file names
    test: tuple[str, ...]
    names: str                  # the file that names the classes, a line each
    num_classes: int
    label_bytes: int            # the last of them is the label that counts
    images: tuple[int, int]     # training and test, in the official files
    url: str = ""
    md5: str = ""


BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
SOURCES = {
    "cifar10": Source(
        "CIFAR-10", "cifar-10-batches-bin", BATCHES, ("test_batch.bin",), "batches.meta.txt",
        10, 1, (50_000, 10_000), "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": Source(
        "CIFAR-100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt",
        100, 2, (50_000, 10_000), "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8"),
    "shapes": Source(
        "shapes", "shapes", BATCHES, ("test_batch.bin",), "batches.meta.txt",
        10, 1, (10_000, 2_000)),
}
DOWNLOAD_TIMEOUT = 30           # seconds without an answer


class DownloadFailed(BadInput):
    """The archive could not be had, or is not what it should be."""


@contextlib.contextmanager
def appearing_whole(folder: Path):
    """Yield a temporary folder; at the end its subfolder `folder.name` is moved to `folder`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".incomplete-") as temporary:
            yield Path(temporary)
            try:
                os.rename(Path(temporary) / folder.name, folder)
            except OSError:
                if not folder.is_dir():                     # else another program was faster
                    raise
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.strerror}; give another --data-dir, or "
                       "make room") from None


def download(source: Source, data_dir: Path) -> None:
    """Fetch, check and unpack an archive. Raises DownloadFailed; nothing half-done stays."""
    advice = f"try again, or unpack {source.url} into {data_dir} yourself"
    with appearing_whole(data_dir / source.folder) as temporary:
        archive = temporary / "archive.tar.gz"
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
        try:
            print(f"downloading {source.url}", file=sys.stderr)
            torch.hub.download_url_to_file(source.url, str(archive), progress=True)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadFailed(f"cannot download {source.url}: {error}; {advice}") from None
        finally:
            socket.setdefaulttimeout(timeout)
        with open(archive, "rb") as file:
            md5 = hashlib.file_digest(file, "md5").hexdigest()
        if md5 != source.md5:
            raise DownloadFailed(f"{source.url} came with MD5 {md5} instead of {source.md5}: cut "
                                 f"off or changed on its way; {advice}")
        try:
            with tarfile.open(archive) as tar:
                for member in tar:
                    parts = Path(member.name).parts
                    if not (member.isfile() or member.isdir()) or ".." in parts \
                            or parts[:1] != (source.folder,):
                        raise tarfile.TarError(f"it holds {member.name}, which does not belong")
                tar.extractall(temporary, filter="data")
        except (tarfile.TarError, EOFError) as error:
            raise DownloadFailed(f"{source.url} is no archive to unpack: {error}; "
                                 f"{advice}") from None
        if not (temporary / source.folder).is_dir():
            raise DownloadFailed(f"{source.url} holds no folder {source.folder}; {advice}")


# ------------------------------------------------------------------------------ shapes


def draw_shapes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures of the shapes that the labels name: (n,) -> uint8 (n, 3, 32, 32).

    Place, size, rotation, colours, background and noise vary. Edges are anti-aliased.
    """
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (len(labels), *shape)).astype(np.float32)

    def clear(inside):          # distance from the edge, in units of the shape's size -> 0..1
        return np.clip(inside * size + 0.5, 0, 1)

    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)        # (32, 32) each, in pixels
    size, angle = uniform(6, 13, 1, 1), uniform(0, 2 * np.pi, 1, 1)
    dx, dy = x - uniform(10, 22, 1, 1), y - uniform(10, 22, 1, 1)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / size    # (n, 32, 32), the shape's own axes
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / size
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    high, low = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    kinds = {                                               # positive inside
        "disc": 1 - radius,
        "ring": 0.25 - abs(radius - 0.75),
        "square": 0.8 - high,
        "frame": 0.2 - abs(high - 0.7),
        "triangle": 0.5 - np.max([radius * np.cos(turn - k * 2 * np.pi / 3) for k in range(3)], 0),
        "plus": np.minimum(0.27 - low, 1 - high),
        "star": 0.65 + 0.35 * np.cos(5 * turn) - radius,
        "crescent": np.minimum(1 - radius, np.hypot(u - 0.5, v) - 0.75),
        "bar": np.minimum(1 - abs(u), 0.25 - abs(v)),
        "bow": np.minimum(abs(u) - abs(v), 0.9 - abs(u)),
    }
    assert tuple(kinds) == SHAPES
    inside = np.choose(labels[:, None, None], [clear(kind) for kind in kinds.values()])[:, None]
    ramp = clear(uniform(-1, 1, 1, 1) * (x - 16) / 16 + uniform(-1, 1, 1, 1) * (y - 16) / 16)
    near, far = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    ground = near + (far - near) * ramp[:, None]
    colour = (ground.mean((2, 3), keepdims=True) + uniform(70, 185, 3, 1, 1)) % 255
    picture = ground * (1 - inside) + colour * inside       # (n, 3, 32, 32)
    picture += rng.normal(size=picture.shape).astype(np.float32) * uniform(0, 12, 1, 1, 1)
    return picture.clip(0, 255).astype(np.uint8)


SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "star", "crescent", "bar", "bow")


def make_shapes(data_dir: Path) -> None:
    """Write the data set `shapes` in CIFAR-10's binary format, the same at every time."""
    source, rng = SOURCES["shapes"], np.random.default_rng(0)
    with appearing_whole(data_dir / source.folder) as temporary:
        folder = temporary / source.folder
        folder.mkdir()
        (folder / source.names).write_text("\n".join(SHAPES) + "\n")
        for name in source.train + source.test:
            labels = rng.permutation(np.arange(2_000) % source.num_classes)
            pixels = draw_shapes(labels, rng).reshape(-1, PIXELS)
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            (folder / name).write_bytes(records.tobytes())


# ------------------------------------------------------------------------------ parse


@dataclasses.dataclass
class Dataset:
    """images uint8 (n, 3, 32, 32), labels int64 (n,)."""
    name: str                   # "cifar10", "cifar100" or "shapes"
    classes: list[str]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Dataset":
        return dataclasses.replace(self, **{
            name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})

    def first(self, count: int) -> "Dataset":
        """The first `count` training images. Raises BadInput where there are fewer."""
        if count > len(self.train_images):
            raise BadInput(f"--limit {count}: {self.name} has {len(self.train_images):,} training "
                           "images in use")
        return self.subset(torch.arange(count))

    def hold_out(self, count: int) -> "Dataset":
        """The last `count` training images become the test images. Raises BadInput where none
        would be left to learn from."""
        rest = len(self.train_images) - count
        if rest < 1:
            raise BadInput(f"--validation {count}: {self.name} has {len(self.train_images)} "
                           "training images, and some must be left to learn from")
        return dataclasses.replace(self.first(rest), test_images=self.train_images[rest:],
                                   test_labels=self.train_labels[rest:])

    def balanced(self, per_class: int, seed: int) -> "Dataset":
        """`per_class` random training images of each class. Raises BadInput where one has fewer."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train_labels), generator=generator)
        ids = []
        for label, title in enumerate(self.classes):
            of_class = order[self.train_labels.cpu()[order] == label]
            if len(of_class) < per_class:
                raise BadInput(f"--labels-per-class {per_class}: of the "
                               f"{len(order):,} training images of {self.name} in use, "
                               f"{len(of_class)} are of class {title}")
            ids.append(of_class[:per_class])
        return self.subset(torch.cat(ids).sort().values)

    def subset(self, ids: Tensor) -> "Dataset":
        ids = ids.to(self.train_images.device)
        return dataclasses.replace(self, train_images=self.train_images[ids],
                                   train_labels=self.train_labels[ids])


def parse_records(path: Path, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """A binary file -> pixels uint8 (n, 3, 32, 32), labels uint8 (n,).

    A record is 1 label byte (CIFAR-100: coarse, then fine), then the pixels. Raises BadInput.
    """
    advice = f"put the right file there, or move {path.parent} away to have it made anew"
    try:
        raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; {advice}") from None
    size = source.label_bytes + PIXELS
    if len(raw) == 0 or len(raw) % size:
        raise BadInput(f"{path} has {len(raw):,} bytes, not a whole number of {size:,}-byte "
                       f"{source.title} records; {advice}")
    records = raw.reshape(-1, size)
    labels = records[:, source.label_bytes - 1]
    if labels.max() >= source.num_classes:
        first = int((labels >= source.num_classes).argmax())
        raise BadInput(f"{path}: record {first} has label {labels[first]}, {source.title} has "
                       f"labels 0 to {source.num_classes - 1}; {advice}")
    return records[:, source.label_bytes:].reshape(-1, 3, SIDE, SIDE), labels


def parse_folder(name: str, folder: Path) -> Dataset:
    """All files of a data set, in order. Raises BadInput."""
    source = SOURCES[name]

    def parse_split(files: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        parts = [parse_records(folder / file, source) for file in files]
        images, labels = (np.concatenate(part) for part in zip(*parts))
        return torch.from_numpy(images), torch.from_numpy(labels).long()

    try:
        lines = (folder / source.names).read_text(errors="replace").split("\n")
        classes = [line.strip() for line in lines if line.strip()]
    except OSError:
        classes = []
    if len(classes) != source.num_classes:      # names only label pictures; numbers will do
        classes = [str(label) for label in range(source.num_classes)]
    dataset = Dataset(name, classes, *parse_split(source.train), *parse_split(source.test))
    counts = len(dataset.train_images), len(dataset.test_images)
    if counts != source.images and is_main_process():
        print(f"note: {folder} holds {counts[0]:,} + {counts[1]:,} images, {source.title} "
              f"{source.images[0]:,} + {source.images[1]:,}: taken for a data set of your own",
              file=sys.stderr)
    return dataset


NO_CIFAR = """
{line}
  CIFAR-10 IS NOT HERE AND COULD NOT BE DOWNLOADED: THIS RUN USES THE DRAWN `shapes` INSTEAD.
  {reason}
  Its numbers say nothing about CIFAR-10. For the real data set see the README, "Data".
{line}
"""


def load_dataset(name: str, data_dir: Path | str) -> Dataset:
    """Find, else download (or, for `shapes`, draw) and parse a data set.

    name: "cifar10", "cifar100", "shapes", or "auto": CIFAR-10 where it is or can be had, else
    `shapes` with a warning. Raises BadInput.
    """
    data_dir = Path(data_dir)
    if name == "auto":
        try:
            return load_dataset("cifar10", data_dir)
        except DownloadFailed as failure:
            print(NO_CIFAR.format(line="!" * 90, reason=failure), file=sys.stderr)
            name = "shapes"
    folder = data_dir / SOURCES[name].folder
    if not folder.exists():
        if name == "shapes":
            make_shapes(data_dir)
        else:
            download(SOURCES[name], data_dir)
    return parse_folder(name, folder)


# ------------------------------------------------------------------------------ batches


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator whose draws depend on the numbers alone, such as (seed, epoch)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def epoch_order(count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Which images make up each batch of an epoch: (steps, batch_size).

    Every image once, in random order, except the last count % batch_size of that order, which
    this epoch leaves out. A set smaller than one batch fills it with repetitions.
    """
    steps = max(1, count // batch_size)
    rounds = -(-steps * batch_size // count)
    order = torch.cat([torch.randperm(count, generator=generator, device=generator.device)
                       for _ in range(rounds)])
    return order[:steps * batch_size].view(steps, batch_size)


def augment(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Flips ("flip"), or flips and shifted crops ("crop"), or neither ("none").

    images (B, 3, H, W) -> the same shape. A crop shifts by up to `pad` pixels each way and
    fills the margin with the image's mirror.
    """
    if kind == "none":
        return images
    B, _, H, W = images.shape
    device = images.device
    rows = torch.arange(H, device=device).expand(B, H)      # (B, H) where each row comes from
    columns = torch.arange(W, device=device).expand(B, W)   # (B, W)
    flip = torch.rand(B, 1, generator=generator, device=device) < 0.5
    columns = torch.where(flip, W - 1 - columns, columns)
    if kind == "crop":
        shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator, device=device)
        rows, columns = rows + shift[0], columns + shift[1]
    rows = (H - 1) - ((H - 1) - rows.abs()).abs()           # the mirror at both edges
    columns = (W - 1) - ((W - 1) - columns.abs()).abs()
    batch = torch.arange(B, device=device)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mix(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899),
    each with probability 1/2: an image is blended with the one before it in the batch, or has a
    box of that one pasted in; its label is mixed by the share of either.

    images uint8 (B, 3, H, W), labels (B, classes), as probabilities -> both mixed, as floats.
    Shares are uniform, Beta(1, 1) in the papers.
    """
    B, _, H, W = images.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=images.device)

    def within(length: int, half: Tensor) -> Tensor:        # (B, length): near a random centre
        places = torch.arange(length, device=images.device) + 0.5
        return (places - uniform(B, 1) * length).abs() < half * length

    own = uniform(B, 1)                                     # the image's own share
    half = (1 - own).sqrt() / 2                             # half the side of a box of 1 - own
    box = within(H, half)[:, :, None] & within(W, half)[:, None, :]     # (B, H, W)
    weight = torch.where(uniform(B, 1, 1) < 0.5, own[:, :, None], 1.0 - box.float())
    own = weight.mean(dim=(1, 2))[:, None]                  # (B, 1), exact: edges cut boxes off
    return (torch.lerp(images.roll(1, 0).float(), images.float(), weight[:, None]),
            torch.lerp(labels.roll(1, 0), labels, own))


def scale(images: Tensor) -> Tensor:
    """0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def unscale(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
