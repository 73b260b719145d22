"""Data sets, batches and files: everything between the disk and the model.

Input: the name of a data set and a folder. Output: a `Dataset`, which holds the images for training
and those for testing, each uint8 (n, 3, H, W), and their labels, int64 (n,). Flips, crops, color
jitter and scaling are operations on whole batches, on the device where the tensors are. In order:

    data sets     where they are and how they are read: CIFAR's binary files, a folder of pictures
    batches       order, flips, crops, color jitter, mixup and CutMix, scaling
    download      archive -> checked -> unpacked -> in place
    shapes        a data set of drawn shapes, for machines without CIFAR
    files         written whole or not at all; checkpoints and the models in them
    errors        bad input is one line and exit status 2; output that fails costs no result

CIFAR-10 and CIFAR-100: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images. The
binary format is described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""
import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import http.client
import inspect
import io
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
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn

import mae


# ------------------------------------------------------------------------------ data sets

SIDE = 32                       # pixels: the side of an image of CIFAR and of `shapes`
PIXELS = 3 * SIDE * SIDE        # bytes of such an image: channel by channel, row by row


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


SOURCES = {
    "cifar10": Source(
        "CIFAR-10", "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",), "batches.meta.txt", 10, 1,
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530"),
    "cifar100": Source(
        "CIFAR-100", "cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt",
        100, 2, "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8"),
}
DATASETS = (*SOURCES, "shapes", "folder")


@dataclasses.dataclass
class Dataset:
    """Images uint8 (n, 3, H, W) with H = W, and labels int64 (n,)."""
    name: str                   # one of DATASETS
    title: str
    classes: list[str]          # none if there are no labels
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

    def subset(self, ids: Tensor) -> "Dataset":
        """Only these training images."""
        return dataclasses.replace(self, train_images=self.train_images[ids],
                                   train_labels=self.train_labels[ids])

    def limited(self, count: int) -> "Dataset":
        """The first `count` training images, and at most as many test images. Raises BadInput if
        there are fewer training images."""
        if count > len(self.train_images):
            raise BadInput(f"--limit {count}: only {len(self.train_images):,} training images of "
                           f"{self.title} are in use")
        return dataclasses.replace(self.subset(torch.arange(count)),
                                   test_images=self.test_images[:count],
                                   test_labels=self.test_labels[:count])

    def hold_out(self, count: int) -> "Dataset":
        """Test on the last `count` training images and train on the others. Raises BadInput if no
        others are left."""
        rest = len(self.train_images) - count
        if rest < 1:
            raise BadInput(f"--validation {count}: {self.title} has {len(self.train_images):,} "
                           "training images, and some must be left to train on")
        return dataclasses.replace(self.subset(torch.arange(rest)),
                                   title=f"{self.title}, validation",
                                   test_images=self.train_images[rest:],
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
  Its numbers say nothing about CIFAR-10. For the real data set see "Help" in the README.
{line}
"""


def load_dataset(name: str, data_dir: Path | str, image_size: int = SIDE) -> Dataset:
    """Read a data set. CIFAR is downloaded first if it is not in `data_dir`.

    name: one of DATASETS, or "auto": CIFAR-10 if it is there or can be downloaded, or else
    `shapes`, with a warning. image_size: the side in pixels to which the pictures of a folder are
    resized; the other data sets have 32. Raises BadInput.
    """
    data_dir = Path(data_dir)
    if os.path.lexists(data_dir) and not data_dir.is_dir():
        raise BadInput(f"--data-dir {data_dir} is a file, or a link to nothing: name a folder")
    if name == "folder":
        return load_folder(data_dir, image_size)
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
        print(NO_CIFAR.format(line="!" * 90, reason=failure), file=sys.stderr)
        return make_shapes()


def load_cifar(name: str, data_dir: Path) -> Dataset:
    """CIFAR-10 or CIFAR-100 (a key of SOURCES). Raises BadInput, OSError."""
    source = SOURCES[name]
    folder = data_dir / source.folder
    if not folder.exists():
        if (data_dir / source.test[0]).exists():
            raise BadInput(f"--data-dir {data_dir} is itself the folder of a data set: name the "
                           "folder in which it lies")
        download(source, data_dir)
    return Dataset(name, source.title, read_class_names(folder, source),
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
    size = source.label_bytes + PIXELS
    advice = f"put the right file there, or move {path.parent} away to get it anew"
    if not path.exists():
        raise BadInput(f"{path} is missing; {advice}")
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8)
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


def load_folder(folder: Path, image_size: int) -> Dataset:
    """Pictures of any size in train/CLASS/ and test/CLASS/ (or val/), cut square and resized.

    The classes are the folders in train/, sorted; without any there are no labels. If there is no
    folder for testing, a tenth of the pictures is held out. Raises BadInput, OSError.
    """
    classes = sorted(path.name for path in (folder / "train").glob("[!.]*") if path.is_dir())
    train = list_pictures(folder / "train", classes)
    tests = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if tests:
        test = list_pictures(tests[0], classes)
    else:
        count = max(1, len(train) // 10)
        test, train = train[:count], train[count:] or train
        print(f"note: {folder} has no folder test or val: {count:,} pictures of train are held out "
              "for testing", file=sys.stderr)
    files = train + test
    labels = torch.tensor([classes.index(file.parent.name) if classes else 0 for file in files])
    images = torch.from_numpy(read_pictures(files, image_size))
    return Dataset("folder", folder.resolve().name, classes, images[:len(train)],
                   labels[:len(train)], images[len(train):], labels[len(train):])


def list_pictures(folder: Path, classes: list[str]) -> list[Path]:
    """The pictures in the class folders, or in the folder itself if there are no classes; shuffled,
    always in the same way. Other files are left out. Raises BadInput if there are no pictures, or
    some in a folder that is not a class."""
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
    files = [path for path in sorted(folder.glob("[!.]*/[!.]*" if classes else "[!.]*"))
             if path.suffix.lower() in kinds]
    if not files:
        raise BadInput(f"there are no pictures in {folder}: put those of each class into "
                       f"{folder / 'CLASS'}")
    for file in files:
        if classes and file.parent.name not in classes:
            raise BadInput(f"{file} is of a class that has no folder in train")
    return [files[i] for i in np.random.default_rng(0).permutation(len(files))]


def read_pictures(files: list[Path], size: int) -> np.ndarray:
    """All pictures, uint8 (n, 3, size, size). Raises BadInput if they do not fit into memory."""
    total = f"{len(files):,} pictures of {size} x {size}: {len(files) * 3 * size**2 / 1e6:,.0f} MB"
    print(f"reading {total}", file=sys.stderr)
    try:
        images, progress = np.empty((len(files), 3, size, size), np.uint8), Progress(len(files))
    except MemoryError:
        raise BadInput(f"{total} do not fit into memory: choose a smaller --image-size") from None
    for i, file in enumerate(files):
        images[i] = read_image(file, size)
        if progress.advance():
            progress.show("reading pictures")
    return images


def read_image(path: Path | str, size: int) -> Tensor:
    """The middle square of an image file, upright and resized: uint8 (3, size, size).

    Of an animation it is the first frame. 16 bits become 8; what is transparent becomes white.
    Raises BadInput if the file is not a picture of a usual kind, is broken or huge, or has 32-bit
    values, whose range is not known; OSError if it cannot be read.
    """
    file = io.BytesIO(Path(path).read_bytes())
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY      # long texts, color profiles
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
            deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
            unknown_range = image.mode in ("I", "F") and not deep
            image = ImageOps.exif_transpose(image)
            if deep:
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA")
    except Exception:           # what Pillow raises on damaged files has no common type
        raise BadInput(f"cannot read the picture {path}, it is damaged, huge or of another kind: "
                       "give a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file") from None
    if unknown_range:
        raise BadInput(f"cannot read the picture {path}: it has 32-bit values, whose range is not "
                       "known; store it with 8 or 16 bits")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1)


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


AUGMENTATIONS = ("none", "flip", "crop", "color")


def augment(images: Tensor, kind: str, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Change images at random. kind: "none"; "flip"; "crop" for flips and shifted crops; "color"
    for flips, shifted crops and color jitter.

    images uint8 (B, 3, H, W) -> the same shape, as floats after color jitter. A crop shifts by up
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
    return color_jitter(images, generator) if kind == "color" else images


def color_jitter(images: Tensor, generator: torch.Generator, strength: float = 0.4) -> Tensor:
    """Random saturation, contrast and brightness: three factors per image, from 1 - strength to
    1 + strength, multiply the distance of each color from its own gray, then from the mean of the
    image, then from black. After Chen et al. 2020, arXiv 2002.05709, appendix A, who also change
    the hue.

    images uint8 (B, 3, H, W) -> the same shape, as floats, 0..255.
    """
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
    """Download, check and unpack an archive, in a folder that is then moved into place. Raises
    DownloadFailed, OSError."""
    folder, temporary = data_dir / source.folder, data_dir / f".incomplete-{source.folder}"
    shutil.rmtree(temporary, ignore_errors=True)            # left by a killed program
    temporary.mkdir(parents=True)
    archive, advice = temporary / "archive.tar.gz", f"try again, or unpack it into {data_dir}"
    try:
        try:
            fetch(source.url, archive)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DownloadFailed(f"cannot download {source.url}: {error}; {advice}") from None
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        if md5 != source.md5:
            raise DownloadFailed(f"{source.url} arrived with MD5 {md5} instead of {source.md5}: "
                                 f"cut off or changed on the way; {advice}")
        with tarfile.open(archive) as tar:
            tar.extractall(temporary, filter="data")
        os.rename(temporary / source.folder, folder)
    except OSError as error:
        error.filename = error.filename or str(folder)      # a full disk does not name the file
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch(url: str, path: Path, timeout: float = 30) -> None:
    """Download a file, with a progress line if its length is known. timeout: seconds without an
    answer."""
    with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length", "")
        progress = Progress(int(length) if length.isdecimal() else 0)
        while chunk := response.read(2**18):
            file.write(chunk)
            if progress.advance(len(chunk)):
                progress.show(f"downloading {progress.done / 1e6:.0f} MB")


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
    """Pictures of the shapes with these labels: (n,) -> uint8 (n, 3, 32, 32).

    Place, size, rotation, colors, background and noise vary. Edges are anti-aliased.
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
    color = (ground.mean((2, 3), keepdims=True) + uniform(70, 185, 3, 1, 1)) % 255
    picture = ground * (1 - inside) + color * inside       # (n, 3, 32, 32)
    picture += rng.normal(size=picture.shape).astype(np.float32) * uniform(0, 12, 1, 1, 1)
    return picture.clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------ files


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


CHECKPOINT_VERSION = 7
PROGRAMS = {"pretrain": "pretrain.py", "classifier": "finetune.py"}     # by kind of run


def save_checkpoint(path: Path | str, checkpoint: dict) -> None:
    """Write tensors and plain values with the keys that `load_checkpoint` names."""
    buffer = io.BytesIO()
    torch.save({"version": CHECKPOINT_VERSION, **checkpoint}, buffer)
    write_file(path, buffer.getbuffer())


def load_checkpoint(path: Path | str, kind: str | None = None) -> dict:
    """Read a checkpoint, or the one in a run's folder. No code in it is executed.

    Keys: kind ("pretrain" or "classifier"), settings (a dict), epoch (epochs done), log (a dict per
    epoch), images (how many for training and testing), classes (their names in order, none without
    labels), model (state dict) and, except in weights.pt, optimizers (state dicts) and, of a linear
    probe, probe. Raises BadInput if the file is not what the programs write, or of another kind or
    version; OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / "checkpoint.pt", path / "weights.pt"]
        path = next((file for file in files if file.exists()), files[0])
    content = io.BytesIO(path.read_bytes())
    with damaged_if_it_fails(path), warnings.catch_warnings(action="ignore"):
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        version, kind_found = checkpoint["version"], PROGRAMS[checkpoint["kind"]]
    if version != CHECKPOINT_VERSION:
        raise BadInput(f"{path} has checkpoint version {version}, this program reads version "
                       f"{CHECKPOINT_VERSION}: use the program that wrote it")
    if kind and checkpoint["kind"] != kind:
        raise BadInput(f"{path} is from {kind_found}, but one from {PROGRAMS[kind]} is needed")
    return checkpoint


@contextlib.contextmanager
def damaged_if_it_fails(path: Path | str):
    """Whatever fails while the content of a file is used becomes BadInput with the error's own
    words: damaged files cause errors of all types."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{path} is damaged, or not from this version of the program: "
                       f"{type(error).__name__}: {str(error)[:200]}") from None


def model_settings(model_class: type, settings: dict) -> dict:
    """Those of the settings that are arguments of a class of models."""
    arguments = inspect.signature(model_class).parameters
    return {name: value for name, value in settings.items() if name in arguments}


def build_model(kind: str, settings: dict, num_classes: int = 10) -> nn.Module:
    """A new MAEViT ("pretrain") or ViTClassifier ("classifier"), as the settings say. Raises
    ValueError if they do not fit together.

    An argument that the settings of an older checkpoint lack has the default of its class. So a new
    argument and its flag need the same default: what the older models were.
    """
    if kind == "pretrain":
        return mae.MAEViT(**model_settings(mae.MAEViT, settings))
    encoder = mae.Encoder(**model_settings(mae.Encoder, settings))
    return mae.ViTClassifier(encoder, num_classes, **model_settings(mae.ViTClassifier, settings))


def load_model(path: Path | str, kind: str | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises BadInput, OSError."""
    checkpoint = load_checkpoint(path, kind)
    with damaged_if_it_fails(path):
        weights = checkpoint["model"]
        model = build_model(checkpoint["kind"], checkpoint["settings"],
                            len(weights.get("head.bias", ())))
        model.load_state_dict(weights)
    return model.eval(), checkpoint


# ------------------------------------------------------------------------------ errors


class BadInput(Exception):
    """The user's input cannot be used. The text is one line: what is wrong, where, what to do."""


class DownloadFailed(BadInput):
    """The archive cannot be downloaded, or is not what it should be."""


@contextlib.contextmanager
def as_program():
    """Around a program: bad input, a file that the system refuses, and too little memory become
    one line on standard error and exit status 2. Other errors keep their traceback."""
    with (contextlib.redirect_stdout(Output(sys.stdout)),
          contextlib.redirect_stderr(Output(sys.stderr))):
        try:
            yield
            return
        except BadInput as error:
            problem = str(error)
        except OSError as error:
            if not error.filename:
                raise
            problem = f"{error.filename}: {error.strerror}"
        except (MemoryError, RuntimeError) as error:        # of numpy; of torch, CUDA and cuBLAS
            signs = ("out of memory", "allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
                raise
            problem = "out of memory: use smaller sizes or batches, see --help"
        sys.stderr.write(f"error: {' '.join(problem.split())}\n")   # one write: lines do not mix
        sys.exit(2)


class Output:
    """Standard output or standard error, made safe: what it cannot encode is escaped, and what
    cannot be written is lost. A stream may be missing (None), a closed terminal or a full disk."""

    def __init__(self, stream) -> None:
        self.stream = stream or open(os.devnull, "w")
        with contextlib.suppress(AttributeError, OSError, ValueError):      # not all can do that
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):                       # ValueError: it has been closed
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextlib.contextmanager
def note_if_it_fails():
    """Around the writing of a log or a picture: if that fails, a line says so and the run goes
    on."""
    try:
        yield
    except OSError as error:
        print(f"note: {error.filename}: {error.strerror}; the run goes on", file=sys.stderr)


def number(kind: type, low: float, high: float):
    """A type for argparse: a number from `low` to `high`."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
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
            text, end = text[:shutil.get_terminal_size().columns - 1], "\x1b[K\r"
        print(text, end=end, file=sys.stderr, flush=True)

    def time_left(self) -> datetime.timedelta:
        """Estimated from the time per count so far."""
        seconds = (time.monotonic() - self.began) / max(self.done, 1) * (self.total - self.done)
        return datetime.timedelta(seconds=round(seconds))
