"""Data sets, batches and checkpoints: everything between the disk and the model.

Input: the name of a data set and a folder. Output: a `Dataset`, which holds the images for training
and those for testing, each uint8 (n, 3, H, W), and their labels, int64 (n,). Flips, crops, color
jitter and scaling are operations on whole batches, on the device where the tensors are.

In this order: data sets, batches, checkpoints, and the drawn `shapes`, which need no download. The
plumbing (own pictures, download, files and errors, command line) comes last.

CIFAR-10 and CIFAR-100: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images. The
binary format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""
import argparse
import contextlib
import dataclasses
import datetime
import glob
import hashlib
import http.client
import inspect
import io
import math
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import urllib.request
import warnings
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor, nn

import mae


# ------------------------------------------------------------------------------ data sets

SIDE = 32                       # pixels: the side of an image of CIFAR and of `shapes`


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
    url: str
    md5: str


SOURCES = {                     # another data set in this format needs only an entry here
    "cifar10": Source(
        "CIFAR-10", "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",), "batches.meta.txt", num_classes=10, label_bytes=1,
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": Source(
        "CIFAR-100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt",
        num_classes=100, label_bytes=2,
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8"),
}
DATASETS = (*SOURCES, "shapes", "folder")


@dataclasses.dataclass
class Dataset:
    """Images uint8 (n, 3, H, W) with H = W, and labels int64 (n,)."""
    name: str                   # one of DATASETS
    title: str
    classes: list[str]          # their names; empty if there are no labels
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Dataset":
        return dataclasses.replace(self, **{name: value.to(device) for name, value in
                                            vars(self).items() if torch.is_tensor(value)})

    def counts(self) -> list[int]:
        """How many images there are for training and for testing."""
        return [len(self.train_images), len(self.test_images)]

    def subset(self, ids: Tensor | slice) -> "Dataset":
        """Only these training images."""
        return dataclasses.replace(self, train_images=self.train_images[ids],
                                   train_labels=self.train_labels[ids])

    def limited(self, count: int) -> "Dataset":
        """The first `count` training images, and at most as many test images. Raises BadInput if
        there are fewer training images; there may be none at all, if they were not read."""
        if 0 < len(self.train_images) < count:
            raise BadInput(f"--limit {count}: only {len(self.train_images):,} training images of "
                           f"{self.title} are in use")
        return dataclasses.replace(self.subset(slice(count)), test_images=self.test_images[:count],
                                   test_labels=self.test_labels[:count])

    def hold_out(self, count: int) -> "Dataset":
        """Test on the last `count` training images and train on the others. Raises BadInput if no
        others are left."""
        rest = len(self.train_images) - count
        if rest < 1:
            raise BadInput(f"--validation {count}: {self.title} has {len(self.train_images):,} "
                           "training images, and some must be left to train on")
        return dataclasses.replace(self.subset(slice(rest)), title=f"{self.title}, validation",
                                   test_images=self.train_images[rest:],
                                   test_labels=self.train_labels[rest:])

    def balanced(self, per_class: int, seed: int) -> "Dataset":
        """`per_class` random training images of each class. Raises BadInput if one has fewer."""
        labels, by_class = self.train_labels.tolist(), [[] for _ in self.classes]
        for i in torch.randperm(len(labels), generator=seeded_generator("cpu", seed)).tolist():
            by_class[labels[i]].append(i)
        for name, ids in zip(self.classes, by_class):
            if len(ids) < per_class:
                raise BadInput(f"--labels-per-class {per_class}: only {len(ids)} of the "
                               f"{len(labels):,} training images in use are of class {name}")
        return self.subset(torch.tensor(sorted(i for ids in by_class for i in ids[:per_class])))

    def refuse_other_classes(self, path: Path | str, classes: list[str]) -> None:
        """Raises BadInput if the classes of a checkpoint are not those of the data set, in order.
        Numbers, which stand in for CIFAR's names if their file is missing, count as the same."""
        numbers = [str(label) for label in range(len(classes))] if self.name in SOURCES else None
        if len(classes) != len(self.classes) or (
                classes != self.classes and numbers not in (classes, self.classes)):
            raise BadInput(f"{path} has the classes {', '.join(classes)}, but {self.title} has "
                           f"{', '.join(self.classes)}: name the right data set with --dataset or "
                           "--data-dir")


NO_CIFAR = """
{line}
  CIFAR-10 IS NOT HERE AND COULD NOT BE DOWNLOADED: THIS RUN USES THE DRAWN `shapes` INSTEAD.
  {reason}
  Its numbers say nothing about CIFAR-10. For the real data set see "Help" in the README.
{line}"""


def load_dataset(name: str, data_dir: Path | str, image_size: int = SIDE,
                 classes: list[str] | None = None) -> Dataset:
    """Read a data set. CIFAR is downloaded first if it is not in `data_dir`. Raises BadInput.

    name: one of DATASETS, or "auto": CIFAR-10 if it is there or can be downloaded, or else
    `shapes`, with a warning. image_size: the side in pixels to which the pictures of a folder are
    resized; the other data sets have 32. classes: those of a trained classifier, if only the test
    images are needed; the training pictures of a folder are then not read."""
    data_dir = Path(data_dir)
    if name == "folder":
        return load_folder(data_dir, image_size, classes)
    if image_size != SIDE:
        raise BadInput(f"--image-size {image_size}: the images of this data set have {SIDE} x "
                       f"{SIDE} pixels; only --dataset folder can have another size")
    if name == "shapes":
        return make_shapes()
    try:
        return load_cifar("cifar10" if name == "auto" else name, data_dir)
    except DownloadFailed as failure:
        if name != "auto":
            raise
        tell(NO_CIFAR.format(line="!" * 90, reason=failure))
        return make_shapes()


def find_folder(name: str, settings: dict) -> str:
    """The --data-dir of a data set: for that of the checkpoint, its settings say so. But CIFAR may
    have been elsewhere, on another machine; then it is in data/."""
    own = settings.get("data_dir", "data") if name == settings["dataset"] else "data"
    if name not in SOURCES or Path(own, SOURCES[name].folder).exists():
        return own
    if os.path.abspath(own) != os.path.abspath("data"):
        note(f"{SOURCES[name].title} is not in {own}: looking in data")
    return "data"


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 (a key of SOURCES). Raises BadInput, OSError."""
    source = SOURCES[name]
    folder = data_dir / source.folder
    if not folder.exists():
        download(source, data_dir)

    def read(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(parse_records(folder / name, source) for name in names))
        return torch.cat(images), torch.cat(labels)

    return Dataset(name, source.title, read_class_names(folder, source), *read(source.train),
                   *read(source.test))


def parse_records(path: Path, source: Source) -> tuple[Tensor, Tensor]:
    """A binary file -> images uint8 (n, 3, 32, 32), labels int64 (n,). A record is 1 label byte
    (CIFAR-100: 2, coarse and fine) and then the pixels, channel by channel, row by row. Raises
    BadInput if the file is missing or is not made of such records."""
    size = source.label_bytes + 3 * SIDE * SIDE
    content = bytearray(path.read_bytes() if path.exists() else b"")
    count = len(content) // size
    records = torch.from_numpy(np.frombuffer(content, np.uint8, count * size)).view(count, size)
    labels = records[:, source.label_bytes - 1].long()      # (n,)
    if not count or len(content) % size or labels.max() >= source.num_classes:
        raise BadInput(f"{path} is missing or damaged: it is not made of {size:,}-byte records "
                       f"with labels from 0 to {source.num_classes - 1}; put the right file there, "
                       f"or move {path.parent} away to download it again")
    return records[:, source.label_bytes:].reshape(count, 3, SIDE, SIDE), labels


def read_class_names(folder: Path, source: Source) -> list[str]:
    """The names of the classes, or their numbers if the file with the names is missing."""
    path = folder / source.class_names
    names = path.read_text("utf-8", "replace").strip().splitlines() if path.exists() else []
    return names if len(names) == source.num_classes else list(map(str, range(source.num_classes)))


# ------------------------------------------------------------------------------ batches


def seeded_generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator whose draws depend only on the numbers, such as (seed, epoch)."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


def epoch_order(count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Which images make up each batch of an epoch: (steps, batch_size). Every image once, in random
    order. The last count % batch_size of that order do not fill a batch and are left out. A set
    smaller than one batch is repeated until it fills one."""
    steps = max(1, count // batch_size)
    rounds = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator, device=generator.device)
                       for _ in range(rounds)])
    return order[:steps * batch_size].view(steps, batch_size)


AUGMENTATIONS = ("none", "flip", "crop", "color")           # each one includes those before it


def augment(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Change images at random. kind: "none"; "flip"; "crop" for flips and shifted crops; "color"
    for flips, shifted crops and color jitter. images uint8 (B, 3, H, W) -> the same shape, as
    floats after color jitter. A crop shifts by up to `pad` pixels in each direction and fills the
    margin with the mirror image. Flip and crop are one indexing operation. Raises ValueError if
    there is no such kind."""
    kinds = AUGMENTATIONS[:AUGMENTATIONS.index(kind) + 1]   # with those before it
    if "flip" not in kinds:
        return images
    B, _, H, W = images.shape
    device = images.device
    rows = torch.arange(H, device=device).expand(B, H)      # (B, H) where each row comes from
    columns = torch.arange(W, device=device).expand(B, W)   # (B, W)
    flip = torch.rand(B, 1, generator=generator, device=device) < 0.5
    columns = torch.where(flip, W - 1 - columns, columns)
    if "crop" in kinds:
        shift = torch.randint(-pad, pad + 1, (2, B, 1), generator=generator, device=device)
        rows, columns = rows + shift[0], columns + shift[1]
    rows = (H - 1) - ((H - 1) - rows.abs()).abs()           # mirrored: -1 -> 1, H -> H - 2
    columns = (W - 1) - ((W - 1) - columns.abs()).abs()
    batch = torch.arange(B, device=device)[:, None, None]
    images = images[batch, :, rows[:, :, None], columns[:, None, :]]    # (B, H, W, 3)
    images = images.permute(0, 3, 1, 2)                     # (B, 3, H, W)
    return color_jitter(images, generator) if "color" in kinds else images


def color_jitter(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Random saturation, contrast and brightness, after Chen et al. 2020, arXiv 2002.05709,
    appendix A, who also change the hue. Three factors per image, from 1 - strength to 1 + strength,
    multiply the distance of each color from its own gray, from the image's mean and from black:
    images uint8 (B, 3, H, W) -> the same shape, as floats, 0..255."""
    def factor() -> Tensor:                                 # (B, 1, 1, 1)
        uniform = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
        return 1 + strength * (2 * uniform - 1)

    images = images.float()
    gray = images.mean(dim=1, keepdim=True)                 # (B, 1, H, W)
    images = torch.lerp(gray, images, factor())             # saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)         # (B, 1, 1, 1)
    images = torch.lerp(mean, images, factor())             # contrast
    return (images * factor()).clamp(0, 255)                # brightness


def mixup_or_cutmix(images: Tensor, labels: Tensor,
                    generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2017, arXiv 1710.09412) or CutMix (Yun et al. 2019, arXiv 1905.04899),
    each with probability 1/2: an image is blended with the previous one of the batch, or a box of
    that one is pasted into it. Its label is mixed in the same proportion.

    images (B, 3, H, W) of 0..255, labels (B, classes) as probabilities -> both mixed, as floats."""
    B, _, H, W = images.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=images.device)

    lam = uniform(B, 1)                     # the image's own share; Beta(1, 1) in the papers
    half_side = (1 - lam).sqrt() / 2                        # of the box, whose area is 1 - lam

    def near_random_center(length: int) -> Tensor:          # (B, length)
        places = torch.arange(length, device=images.device) + 0.5
        return (places - uniform(B, 1) * length).abs() < half_side * length

    rows_in_box, columns_in_box = near_random_center(H), near_random_center(W)
    box = rows_in_box[:, :, None] & columns_in_box[:, None, :]                      # (B, H, W)
    is_mixup = uniform(B, 1, 1) < 0.5                       # (B, 1, 1), or else CutMix
    weight = torch.where(is_mixup, lam[:, :, None], 1.0 - box.float())  # (B, H, W) own share
    share = weight.mean(dim=(1, 2))[:, None]                # (B, 1) not `lam`: edges cut boxes off
    return (torch.lerp(images.roll(1, 0).float(), images.float(), weight[:, None]),
            torch.lerp(labels.roll(1, 0), labels, share))


def scale(images: Tensor) -> Tensor:
    """0..255 -> float -1..1."""
    return images.float() / 127.5 - 1


def unscale(images: Tensor) -> Tensor:
    """float -1..1 -> uint8 0..255, clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------ checkpoints

CHECKPOINT_VERSION = 7
PROGRAMS = {"pretrain": "pretrain.py", "classifier": "finetune.py"}     # by kind of run


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write tensors and plain values with the keys that `load_checkpoint` names."""
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path | str, kind: str | None = None) -> dict:
    """Read a checkpoint, or the one in a run's folder. No code in it is executed.

    Keys: kind ("pretrain" or "classifier"), settings (a dict, as they were asked), epoch (epochs
    done), log (a dict per epoch), images (how many for training and testing), classes (their names
    in order, none without labels), model (state dict) and, except in weights.pt, optimizers (state
    dicts) and machine (what the settings meant there). Raises BadInput if the file is not what the
    programs write, or of another kind or version; OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "checkpoint.pt", path / "weights.pt"]
        path = next((file for file in files if file.exists()), files[0])
    content = io.BytesIO(path.read_bytes())
    with damaged_if_it_fails(path), warnings.catch_warnings(action="ignore"):
        if changed := zipfile.ZipFile(content).testzip():   # torch does not look at checksums
            raise ValueError(f"{changed} has a wrong checksum")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        version, kind_found = checkpoint["version"], PROGRAMS[checkpoint["kind"]]
    if version != CHECKPOINT_VERSION:
        raise BadInput(f"{path} has checkpoint version {version}, this program reads version "
                       f"{CHECKPOINT_VERSION}: use the program that wrote it")
    if kind and checkpoint["kind"] != kind:
        raise BadInput(f"{path} is from {kind_found}, but one from {PROGRAMS[kind]} is needed")
    return checkpoint


def model_settings(model_class: type, settings: dict) -> dict:
    """Those of the settings that are arguments of a class of models. Both use the same names, so a
    new argument of MAEViT or ViTClassifier needs only a flag of that name with the same default,
    which is also what the models of older checkpoints have."""
    arguments = inspect.signature(model_class).parameters
    return {name: value for name, value in settings.items() if name in arguments}


def build_model(kind: str, settings: dict, num_classes: int = 10) -> nn.Module:
    """A new MAEViT ("pretrain") or ViTClassifier ("classifier"), as the settings say. Raises
    BadInput if they do not fit together."""
    try:
        if kind == "pretrain":
            return mae.MAEViT(**model_settings(mae.MAEViT, settings))
        encoder = mae.Encoder(**model_settings(mae.Encoder, settings))
        return mae.ViTClassifier(encoder, num_classes,
                                 **model_settings(mae.ViTClassifier, settings))
    except ValueError as error:
        raise BadInput(f"{error}; see --help for the sizes") from None


def load_model(path: Path | str, kind: str | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises BadInput, OSError."""
    checkpoint = load_checkpoint(path, kind)
    with damaged_if_it_fails(path):
        weights, settings = checkpoint["model"], dict(checkpoint["settings"])
        num_classes = len(weights.get("head.bias", ()))
    model = build_model(checkpoint["kind"], settings, num_classes)
    with damaged_if_it_fails(path):
        model.load_state_dict(weights)
    return model.eval(), checkpoint


# ------------------------------------------------------------------------------ shapes

SHAPES = ("disc", "ring", "square", "frame", "triangle", "plus", "star", "crescent", "bar", "bow")


def make_shapes() -> Dataset:
    """10,000 training and 2,000 test images of drawn shapes, the same every time."""
    rng, images, labels = np.random.default_rng(0), [], []
    for _ in range(6):
        labels.append(rng.permutation(np.arange(2_000) % len(SHAPES)))
        images.append(torch.from_numpy(draw_shapes(labels[-1], rng)))
    images, labels = torch.cat(images), torch.from_numpy(np.concatenate(labels))
    return Dataset("shapes", "shapes", list(SHAPES), images[:10_000], labels[:10_000],
                   images[10_000:], labels[10_000:])


def draw_shapes(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images of the shapes with these labels: (n,) -> uint8 (n, 3, 32, 32). Place, size, rotation,
    colors, background and noise vary. Edges are anti-aliased."""
    def uniform(low, high, *shape):
        return rng.uniform(low, high, (len(labels), *shape)).astype(np.float32)

    def antialias(distance):    # 1 inside, 0 outside; distance: from the edge, in units of `size`
        return np.clip(distance * size + 0.5, 0, 1)

    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)        # (32, 32) each, in pixels
    size, angle = uniform(6, 13, 1, 1), uniform(0, 2 * np.pi, 1, 1)
    dx, dy = x - uniform(10, 22, 1, 1), y - uniform(10, 22, 1, 1)
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / size    # (n, 32, 32), the shape's own axes
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / size
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    high, low = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    distances = [                                           # positive inside, in order of SHAPES
        1 - radius,                                         # disc
        0.25 - abs(radius - 0.75),                          # ring
        0.8 - high,                                         # square
        0.2 - abs(high - 0.7),                              # frame
        0.5 - np.max([radius * np.cos(turn - k * 2 * np.pi / 3) for k in range(3)], 0),  # triangle
        np.minimum(0.27 - low, 1 - high),                   # plus
        0.65 + 0.35 * np.cos(5 * turn) - radius,            # star
        np.minimum(1 - radius, np.hypot(u - 0.5, v) - 0.75),                # crescent
        np.minimum(1 - abs(u), 0.25 - abs(v)),              # bar
        np.minimum(abs(u) - abs(v), 0.9 - abs(u)),          # bow
    ]
    inside = np.choose(labels[:, None, None], antialias(np.array(distances)))[:, None]
    ramp = antialias(uniform(-1, 1, 1, 1) * (x - 16) / 16 + uniform(-1, 1, 1, 1) * (y - 16) / 16)
    near, far = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    ground = near + (far - near) * ramp[:, None]
    color = (ground.mean((2, 3), keepdims=True) + uniform(70, 185, 3, 1, 1)) % 255
    images = ground * (1 - inside) + color * inside         # (n, 3, 32, 32)
    images += rng.normal(size=images.shape).astype(np.float32) * uniform(0, 12, 1, 1, 1)
    return images.clip(0, 255).astype(np.uint8)


# ======================= plumbing: not needed to understand the method ========================
# ------------------------------------------------------------------------------ own pictures

KINDS = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in
         ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")}      # if Pillow has them
MAX_MEGAPIXELS = 100
Image.MAX_IMAGE_PIXELS = None                               # MAX_MEGAPIXELS takes its place
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY      # long texts, color profiles
warnings.filterwarnings("ignore", module="PIL")             # about unusual metadata


def load_folder(folder: Path, image_size: int, known: list[str] | None) -> Dataset:
    """Pictures of any size in train/CLASS/ and in val/CLASS/ or test/CLASS/, cut square and
    resized. Without class folders, those in train/ itself have no labels. A note counts the files
    left out. known: the classes of a classifier, if only the test images are needed. Then train/
    may be missing, and its pictures are not read. Raises BadInput, OSError."""
    if not folder.is_dir():
        raise BadInput(f"there is no folder {folder}: name that of the pictures with --data-dir")
    train, *tests = [find_files(folder / part) for part in ("train", "val", "test")]
    classes = choose_classes(train, tests, known)
    names = classes or [""]                                 # "": the files in train/ itself
    train, test = split_files(folder, train, tests, names)
    train = train if known is None else {}
    train_images, train_labels, train_files = read_pictures(train, names, image_size)
    test_images, test_labels, test_files = read_pictures(test, names, image_size)
    note_left_out(folder, [train, test, *tests], train_files + test_files)
    return Dataset("folder", folder.resolve().name, classes, train_images, train_labels,
                   test_images, test_labels)


def find_files(folder: Path) -> dict[str | None, list[Path]]:
    """The files in a folder, in order of their names: the pictures of each class, which are at any
    depth in the folder with its name; under "" those in `folder` itself; under None all others.
    Hidden files are not listed."""
    groups = {}
    paths = [folder / name for name in glob.glob("**", root_dir=folder, recursive=True)]
    for path in sorted(paths, key=lambda path: path.parts):         # the same on every system
        if not path.is_dir():
            *folders, _ = path.relative_to(folder).parts
            made_by_a_system = any(name.startswith(("__", "@")) for name in folders)
            is_picture = path.suffix.lower() in KINDS and not made_by_a_system
            name = (folders[0] if folders else "") if is_picture else None
            groups.setdefault(name, []).append(path)
    return groups


def choose_classes(train: dict, tests: list[dict], known: list[str] | None) -> list[str]:
    """The class folders in train/, in order of their names. If there are none: the classes of the
    classifier (`known`), or those of the folder for testing if it has others."""
    in_train, *in_tests = (sorted(filter(None, files)) for files in (train, *tests))
    if in_train or not known:                               # filter leaves "" and None out
        return in_train
    tested = next(filter(None, in_tests), [])
    return known if tested and set(tested) <= set(known) else tested


def split_files(folder: Path, train: dict, tests: list[dict], names: list[str]) -> list[dict]:
    """The files for training and those for testing: the first of `tests` that has pictures of the
    classes, or a tenth of each class in `train`. Raises BadInput if that leaves none."""
    for test in tests:
        if test.keys() & set(names):
            return [train, test]
    held_out = {name: files[1::10] for name, files in train.items()}
    if not any(held_out.get(name) for name in names):
        raise BadInput(f"there are too few pictures in {folder / 'train'}: put at least two of "
                       "each class into train/CLASS, or name another folder with --data-dir")
    note(f"{folder} has no test pictures of the classes: a tenth of train is held out for testing")
    return [{name: [file for i, file in enumerate(files) if i % 10 != 1]
             for name, files in train.items()}, held_out]


def note_left_out(folder: Path, parts: list[dict], used: list[Path]) -> None:
    """Say how many of the files in these parts of the folder are not used."""
    present = {file for part in parts for files in part.values() for file in files}
    left_out = present.difference(used)
    if left_out:
        note(f"{len(left_out):,} of {len(present):,} files in {folder} are left out: they cannot "
             "be read as pictures, are in no folder of a class, or in test beside val, for example "
             f"{min(left_out).relative_to(folder)}")


def read_pictures(groups: dict, names: list[str], size: int) -> tuple[Tensor, Tensor, list[Path]]:
    """The pictures of these classes that can be read, in a shuffled order that is always the same:
    images uint8 (n, 3, size, size), labels (n,), files. Raises BadInput, OSError if none can."""
    pairs = [(file, label) for label, name in enumerate(names) for file in groups.get(name, [])]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    images, progress = np.empty((len(pairs), 3, size, size), np.uint8), Progress(len(pairs))
    if pairs:
        tell(f"reading {len(pairs):,} pictures of {size} x {size}")

    def read(pair: tuple[Path, int]) -> Tensor | None:
        with contextlib.suppress(BadInput, OSError):
            return read_image(pair[0], size)

    done = []
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:   # Pillow decodes without Python's lock
        for pair, image in zip(pairs, pool.imap(read, pairs)):
            if image is not None:
                images[len(done)] = image
                done.append(pair)
            if progress.advance():
                progress.show("reading pictures")
    if pairs and not done:
        read_image(pairs[0][0], size)                       # raises the error of the first
    labels = torch.tensor([label for _, label in done], dtype=torch.long)
    return torch.from_numpy(images[:len(done)]), labels, [file for file, _ in done]


def read_image(path: Path | str, size: int) -> Tensor:
    """The middle square of an image file, resized: uint8 (3, size, size). Transparent pixels become
    white. Raises what `open_image` raises."""
    image = ImageOps.fit(open_image(path), (size, size), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1)


def open_image(path: Path | str) -> Image.Image:
    """An image file, upright, as RGBA with 8 bits; of an animation the first frame. Raises BadInput
    if the file is not of one of the KINDS, is damaged, too large or has 32-bit values, whose range
    is not known; OSError if it cannot be read."""
    file, kinds = io.BytesIO(Path(path).read_bytes()), sorted(set(KINDS.values()))
    with damaged_if_it_fails(path):
        try:
            image = Image.open(file, formats=kinds)
        except UnidentifiedImageError:
            raise BadInput(f"{path} is not a picture of a kind that can be read "
                           f"({', '.join(kinds)})") from None
        megapixels = image.width * image.height / 1e6
        if megapixels > MAX_MEGAPIXELS:
            raise BadInput(f"the picture {path} is too large: it has {megapixels:.0f} megapixels, "
                           f"the limit is {MAX_MEGAPIXELS}")
        has_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
        if image.mode in ("I", "F") and not has_16_bits:
            raise BadInput(f"the picture {path} has 32-bit values, whose range is not known: store "
                           "it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
        if has_16_bits:                                     # 0..65535 -> 0..255
            image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
        return image.convert("RGBA")


# ------------------------------------------------------------------------------ download


def download(source: Source, data_dir: Path) -> None:
    """Download, check and unpack an archive, in a temporary folder, and move the data set into
    place. Raises DownloadFailed, OSError."""
    data_dir.mkdir(parents=True, exist_ok=True)
    advice = f"try again, or unpack it into {data_dir}"
    with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=data_dir,
                                     ignore_cleanup_errors=True) as folder:
        archive = Path(folder, "archive.tar.gz")
        try:
            fetch(source.url, archive)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DownloadFailed(f"cannot download {source.url}: {error}; {advice}") from None
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        if md5 != source.md5:
            raise DownloadFailed(f"{source.url} arrived with MD5 {md5} instead of {source.md5}: "
                                 f"cut off or changed on the way; {advice}")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        if not (data_dir / source.folder).exists():         # or another program was faster
            os.rename(Path(folder, source.folder), data_dir / source.folder)


def fetch(url: str, path: Path, timeout: float = 30) -> None:
    """Download a file. timeout: seconds without an answer."""
    with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length", "")
        progress = Progress(int(length) if length.isdecimal() else 0)
        while chunk := response.read(2**18):
            file.write(chunk)
            if progress.advance(len(chunk)):
                progress.show(f"downloading {progress.done / 1e6:.0f} MB")


# ------------------------------------------------------------------------------ files and errors


class BadInput(Exception):
    """The user's input cannot be used. The text is one line: what is wrong, where, what to do."""


class DownloadFailed(BadInput):
    """The archive cannot be downloaded, or is not what it should be."""


def write_file(path: Path | str, content: bytes) -> None:
    """Write a file completely or not at all: to a temporary file beside it, which is then renamed.
    Raises OSError if it cannot be written; an older file is then untouched."""
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        replace_file(part, path)
    except OSError as error:
        error.filename = str(path)                          # a full disk does not name the file
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def replace_file(new: Path, old: Path, tries: int = 5) -> None:
    """os.replace, tried again for a moment: on Windows a virus scanner may hold the old file."""
    for _ in range(tries - 1):
        with contextlib.suppress(PermissionError):
            return os.replace(new, old)
        time.sleep(0.05)
    os.replace(new, old)


@contextlib.contextmanager
def damaged_if_it_fails(path: Path | str):
    """Around the use of a file's content: damaged files cause errors of all types."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput) or is_out_of_memory(error):
            raise
        raise BadInput(f"{path} is damaged, or not what this version of the program reads: "
                       f"{type(error).__name__}: {str(error)[:200]}") from None


def is_out_of_memory(error: Exception) -> bool:
    """The words are those of torch on several systems, CUDA, cuBLAS and MPS."""
    signs = ("out of memory", "not enough memory", "allocate memory", "Invalid buffer size",
             "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def one_line(error: Exception) -> str | None:
    """What to tell the user, or None for a fault of the program."""
    if isinstance(error, BadInput):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if is_out_of_memory(error):
        return "out of memory: try a smaller --micro-batch-size or --image-size or larger patches"
    return None


@contextlib.contextmanager
def note_if_it_fails():
    """Around the writing of a log or a picture: if that fails, for whatever reason, a note says so
    and the run goes on."""
    try:
        yield
    except Exception as error:
        reason = one_line(error) or traceback.format_exc().strip()
        note(f"{reason}; the run goes on")


@contextlib.contextmanager
def as_program():
    """Around a program: an error that `one_line` can tell is printed and becomes exit status 2, any
    other keeps its traceback. Ctrl-C becomes exit status 130."""
    sys.stdout = sys.stdout or open(os.devnull, "w")        # a stream may be missing, as after 2>&-
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):                  # those of notebooks cannot do that
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        problem = one_line(error)
        if problem is None:
            raise
        sys.stderr.write(f"error: {' '.join(problem.split())}\n")   # one write: lines do not mix
        sys.exit(2)


# ------------------------------------------------------------------------------ command line


def tell(text: str, **options) -> None:
    """Print on standard error, from the main process alone."""
    if os.environ.get("RANK", "0") == "0":                  # set by torchrun
        print(text, file=sys.stderr, **options)


def note(text: str) -> None:
    """One line on standard error, from the main process alone."""
    tell(f"note: {text}")


def shell_line(*words: str) -> str:
    """A command to type, quoted as the system needs it."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def number(kind: type, low: float, high: float):
    """A type for argparse: a number from `low` to `high`."""
    def parse(text: str):
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not low <= value <= high:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value
    return parse


COUNT = number(int, 1, 10**6)


def path(text: str) -> Path:
    """A type for argparse: ~ is the home folder, as in --out=~/runs."""
    return Path(os.path.expanduser(text))


class Parser(argparse.ArgumentParser):
    """Reports wrong flags like any other bad input, as one line."""

    def error(self, message: str):
        raise BadInput(f"{message}; see {self.prog} --help")


class Progress:
    """A line on standard error that says how much time is left: on a terminal one that replaces
    itself twice a second, elsewhere a new line every half minute."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.began = self.shown = time.perf_counter()

    def advance(self, count: int = 1) -> bool:
        """Count what is done. Returns whether it is time to show the line."""
        self.done += count
        if self.done == self.total and sys.stderr.isatty():
            tell("\x1b[K", end="", flush=True)              # erase the line
        due = time.perf_counter() - self.shown > (0.5 if sys.stderr.isatty() else 30)
        return due and self.done < self.total

    def show(self, text: str) -> None:
        self.shown = time.perf_counter()
        text, end = f"{text}  {self.time_left()} left", "\n"
        if sys.stderr.isatty():                             # \x1b[K erases the rest of the line
            text, end = text[:shutil.get_terminal_size().columns - 1], "\x1b[K\r"
        tell(text, end=end, flush=True)

    def time_left(self) -> datetime.timedelta:
        """Estimated from the time per count so far."""
        seconds = (time.perf_counter() - self.began) / max(self.done, 1) * (self.total - self.done)
        return datetime.timedelta(seconds=round(seconds))
