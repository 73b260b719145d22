"""A gallery: every picture of this repository, drawn with Pillow alone.

Input: a checkpoint and images, or the folder of a run. Output: a picture. In this order:

    reconstruct   masked | reconstruction | original        MAE, figure 2
    ratios        the same images at growing mask ratios    MAE, figure 4
    timeline      the same images and masks over a run      a sheet or an animation
    predict       which class is it?                        the most probable ones, as bars
    curves        losses, accuracies, learning rates        of one run or several
    attention     where a token looks, head by head         ViT, section 4.5
    embeddings    positions compared, patch filters         ViT, figure 7
    architecture  an image on its way through the model     MAE, figure 1

Each picture is one function, `draw_NAME(args)`: what is shown comes first, how it is put together
is at the end, in "layout" and "drawing". A new picture needs its function and a line in
`make_parser`; a new flag, a line in `FLAGS`.
MAE: He et al. 2021, arXiv 2111.06377. ViT: Dosovitskiy et al. 2020, arXiv 2010.11929.
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import math
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

import data
import mae
from data import BadInput

HERE = Path(__file__).parent
WIDTH, MARGIN, GAP = 1720, 40, 6        # pixels: about twice the width of a README
TEXT, LINE = 24, 28                     # pixels: the size of letters, the height of a line
SHARP = 3                               # pages are drawn this many times larger, then reduced
INK, GRAY, FAINT, PAPER = (31, 35, 40), (95, 103, 112), (222, 226, 231), (255, 255, 255)
PALE, HIDDEN = (246, 248, 250), 195     # a background; the gray level of a masked patch


# ------------------------------------------------------------------------------ reconstructions


def draw_reconstruct(args: argparse.Namespace) -> Image.Image:
    """Masked images, their reconstructions and the originals (MAE, figure 2)."""
    inputs = load(args, "pretrain")
    noise = random_noise(inputs.images, inputs.model, args.seed)
    tiles, errors = reconstruct(inputs.model, inputs.images, noise, args.raw, args.mask_ratio)
    for name, error in zip(inputs.labels, errors.tolist()):
        print(f"{name}: error {error:.4f}")
    print(f"mean error of the masked patches, pixels scaled to -1..1: {errors.mean():.4f}")
    caption = inputs.caption + (f" · masked here: {args.mask_ratio:g}" if args.mask_ratio else "")
    caption += " · visible patches not pasted back" if args.raw else ""
    return draw_triples(tiles, "Reconstructions", caption, errors, inputs.labels)


def random_noise(images: Tensor, model: mae.MAEViT, seed: int) -> Tensor:
    """Noise (B, N), made on the CPU: one seed masks the same patches on every device."""
    generator = data.seeded_generator("cpu", seed)
    return torch.rand(len(images), model.encoder.num_patches, generator=generator)


@torch.no_grad()
def reconstruct(model: mae.MAEViT, images: Tensor, noise: Tensor, raw: bool = False,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor]:
    """Mask images and let the model fill them in, on the model's device: images uint8 (B, 3, H, W),
    noise (B, N) -> tiles uint8 (B, 3, 3, H, W): masked, reconstruction, original; error (B,): the
    mean squared error over the masked patches, of pixels scaled to -1..1. Both are on the CPU.
    raw: do not paste the visible patches back. mask_ratio: replaces the model's own. Raises
    BadInput if it leaves no patch visible or none masked."""
    device, p = model.encoder.pos_embed.device, model.encoder.patch_size
    images = data.scale(images.to(device))
    patches = model.encoder.patchify(images)                # (B, N, 3*p*p)
    try:
        model.shuffle.count_visible(patches.shape[1], mask_ratio)
    except ValueError as error:
        raise BadInput(f"{error}: choose another ratio, or smaller patches") from None
    _, pred, mask = model(images, noise.to(device), mask_ratio)
    pred = to_pixels(model, pred.float(), patches)
    error = ((pred - patches).square().mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)   # (B,)
    masked = mask.unsqueeze(-1).bool()                      # (B, N, 1)
    grayed = patches.masked_fill(masked, HIDDEN / 127.5 - 1)
    filled = pred if raw else torch.where(masked, pred, patches)
    tiles = [data.unscale(mae.unpatchify(tile, p)) for tile in (grayed, filled, patches)]
    return torch.stack(tiles, dim=1).cpu(), error.cpu()


def to_pixels(model: mae.MAEViT, pred: Tensor, patches: Tensor) -> Tensor:
    """The prediction as pixels, given the original `patches`: (B, N, 3*p*p) each."""
    return mae.denormalize_patches(pred, patches) if model.norm_pix_loss else pred


def draw_triples(tiles: Tensor, title: str, caption: str, errors=(), labels=()) -> Image.Image:
    """Masked, reconstruction, original, up to three images side by side: tiles uint8
    (B, 3, 3, H, W) and errors (B,), from `reconstruct`, and labels, one for each image."""
    across = math.ceil(len(tiles) / math.ceil(len(tiles) / 3))     # four images: two by two
    notes, groups = [f"error {error:.4f}" for error in errors], []
    for start in range(across):
        masked, filled, original = tiles[start::across].unbind(dim=1)
        groups.append([Column("masked", masked),
                       Column("reconstruction", filled, notes[start::across]),
                       Column("original", original, labels[start::across])])
    return draw_grid(groups, title, caption)


def draw_ratios(args: argparse.Namespace) -> Image.Image:
    """One row per image, with more and more of it masked (MAE, figure 4)."""
    inputs = load(args, "pretrain")
    noise = random_noise(inputs.images, inputs.model, args.seed)    # the same for all ratios
    groups = [[Column("original", inputs.images, inputs.labels)]]
    for ratio in (0.5, 0.75, 0.85, 0.95):
        tiles, errors = reconstruct(inputs.model, inputs.images, noise, mask_ratio=ratio)
        notes = [f"error {error:.4f}" for error in errors]
        groups.append([Column(f"{100 * ratio:g} % masked", tiles[:, 0]),
                       Column("reconstruction", tiles[:, 1], notes)])
    return draw_grid(groups, "How much can be hidden?", inputs.caption)


def draw_timeline(args: argparse.Namespace) -> Image.Image | list[Image.Image]:
    """The same images and masks over a run: a sheet (.png) or an animation (.gif)."""
    epochs = {epoch: tiles[:args.count] for epoch, tiles in read_epochs(args.RUN).items()}
    caption = load_run(args.RUN)[-1] if any(args.RUN.glob("*.pt")) else run_label(args.RUN, {})
    animation, numbers = args.out.suffix.lower() == ".gif", np.array(list(epochs))
    # Most is learned early, so the epochs that are shown lie closer together there.
    wanted = [numbers[0], *np.geomspace(1, max(numbers[-1], 1), 60 if animation else 7)]
    shown = sorted({int(numbers[abs(numbers - number).argmin()]) for number in wanted})
    if animation:
        return [draw_triples(epochs[epoch], f"Reconstructions after epoch {epoch}", caption)
                for epoch in shown]
    masked, _, original = epochs[shown[-1]].unbind(dim=1)   # (B, 3, H, W) each
    filled = [Column(f"epoch {epoch}" if epoch else "untrained", epochs[epoch][:, 1])
              for epoch in shown]
    return draw_grid([[Column("masked", masked)], filled, [Column("original", original)]],
                     "Reconstructions as pre-training goes on", caption)


def save_epoch(folder: Path, epoch: int, model: mae.MAEViT, images: Tensor, noise: Tensor,
               caption: str) -> None:
    """Write the reconstructions after an epoch (0: before training): a picture, epoch-0001.png, and
    its tiles as an array, epoch-0001.npy, from which `timeline` draws. images: uint8 (B, 3, H, W);
    noise: (B, N); caption: data set and run. Raises OSError."""
    tiles, errors = reconstruct(model, images, noise)
    array = io.BytesIO()
    np.save(array, tiles.numpy())
    data.write_file(folder / f"epoch-{epoch:04}.npy", array.getvalue())
    picture = draw_triples(tiles, f"Reconstructions after epoch {epoch}",
                           f"{caption} · {describe_task(model)}", errors)
    save(picture, folder / f"epoch-{epoch:04}.png")


# ------------------------------------------------------------------------------ predictions


@torch.no_grad()
def draw_predict(args: argparse.Namespace) -> Image.Image:
    """Which class is it? The most probable classes of each image, at most five."""
    inputs = load(args, "classifier")
    classes = inputs.checkpoint["classes"]
    probabilities = inputs.model(data.scale(inputs.images)).softmax(dim=1)  # (n, classes)
    values, ids = probabilities.topk(min(5, len(classes)))  # (n, at most 5) each
    guesses = [[(classes[j], value) for j, value in zip(*best)]
               for best in zip(ids.tolist(), values.tolist())]
    wrong = [truth not in ("", best[0][0]) for truth, best in zip(inputs.truths, guesses)]
    for name, best, is_wrong in zip(inputs.labels, guesses, wrong):
        text = ", ".join(f"{guess} {100 * value:.1f} %" for guess, value in best)
        print(f"{name}: {text}{' (wrong)' if is_wrong else ''}")
    right = f" · {wrong.count(False)} of {len(wrong)} right"
    right += " · blue: true class, orange: wrong prediction"
    return draw_cards(inputs, guesses, inputs.caption + (right if any(inputs.truths) else ""))


# ------------------------------------------------------------------------------ curves

COLORS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
          (230, 159, 0), (0, 0, 0), (150, 150, 150)]    # Okabe and Ito's, safe for the color-blind
THICK, THIN = 4, 2              # pixels: lines of the test set and of the training set
PANELS = {      # title: columns of log.csv, line widths; a run without the first has no curve there
    "reconstruction loss (mean squared error)": {"loss": THIN, "test_loss": THICK},
    "classification loss (cross-entropy)": {"train_loss": THIN, "test_loss": THICK},
    "accuracy in %": {"train_accuracy": THIN, "test_accuracy": THICK},
    "learning rate": {"lr": THICK},
}


def draw_curves(args: argparse.Namespace) -> Image.Image:
    """Losses, accuracies and learning rates of one run or several."""
    runs = {}
    for path in args.logs:
        settings = {}
        with contextlib.suppress(BadInput, OSError):        # the log alone is enough
            settings = data.load_checkpoint(path)["settings"]
        name = run_label(path, settings)
        runs[name if name not in runs else str(path)] = read_log(path)
    return plot_curves(runs)


# ------------------------------------------------------------------------------ inside a model


@torch.no_grad()
def draw_attention(args: argparse.Namespace) -> Image.Image:
    """Where the class token or a patch looks, head by head (ViT, section 4.5).
    Each map is scaled by its own largest weight. The weight on the class token is left out."""
    inputs, patch = load(args), args.patch
    model, images, caption = inputs.model, inputs.images, inputs.caption
    encoder = getattr(model, "encoder", model)              # a classifier is an encoder
    p, side = encoder.patch_size, encoder.image_size // encoder.patch_size
    if patch and (len(patch) != 2 or max(patch) >= side):
        raise BadInput(f"--patch needs ROW,COLUMN, each from 0 to {side - 1}")
    block = args.block or encoder.depth
    if block > encoder.depth:
        raise BadInput(f"--block {block}: the encoder has {encoder.depth} blocks")
    query = 1 + patch[0] * side + patch[1] if patch else 0
    maps = encoder.attention_maps(data.scale(images))[block - 1][:, :, query, 1:]   # (B, h, N)
    maps = torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1)                 # (B, h+1, N)
    maps = (maps / maps.amax(dim=-1, keepdim=True)).unflatten(-1, (side, side))
    colors = heat(maps.repeat_interleave(p, -2).repeat_interleave(p, -1))   # (B, h+1, 3, H, W)
    gray = images.float().mean(dim=1)[:, None, None]                        # (B, 1, 1, H, W)
    overlaid = (0.35 * gray + 0.65 * colors).round().to(torch.uint8)
    *heads, mean = overlaid.unbind(dim=1)                                   # (B, 3, H, W) each
    groups = [[Column("image", images, inputs.labels)],
              [Column(f"head {i + 1}", head) for i, head in enumerate(heads)],
              [Column("mean", mean)]]
    caption += f" · block {block} of {encoder.depth} · nothing masked"
    if getattr(model, "pool", None) == "mean" and not patch:
        caption += " · its head reads the patches, not this token"
    name = f"patch {patch[0]},{patch[1]}" if patch else "the class token"
    return draw_grid(groups, f"Where {name} looks", caption, "0 to the largest weight of each map",
                     (patch[0] * p, patch[1] * p, p) if patch else None)


@torch.no_grad()
def draw_embeddings(args: argparse.Namespace) -> Image.Image:
    """Position embeddings compared (ViT, figure 7), and filters of the patch embedding.
    A map shows the cosine similarity of one patch's position embedding with those of all patches,
    after their mean is subtracted. A filter is scaled by its own largest weight."""
    model, _, caption = load_run(args.checkpoint)
    encoder, size = getattr(model, "encoder", model), 544   # pixels
    side = encoder.image_size // encoder.patch_size
    every = math.ceil(side / 16)                            # 16 rows and columns of maps, at most
    positions = {"encoder": encoder.pos_embed[0]}           # (N, D)
    if isinstance(model, mae.MAEViT):                       # (N, D'), without the class token's
        positions["decoder"] = model.decoder.pos_embed[0, 1:]
    parts = []
    for name, embedding in positions.items():
        embedding = nn.functional.normalize(embedding - embedding.mean(dim=0), dim=1)
        similarity = (embedding @ embedding.T).view(side, side, side, side)
        similarity = similarity[::every, ::every].flatten(0, 1)         # (maps, side, side)
        parts.append([label(f"position embeddings of the {name}", GRAY),
                      mosaic(heat((similarity + 1) / 2), size)])
    filters = encoder.patch_embed.proj.weight               # (D, 3, p, p)
    count = min(14, math.isqrt(encoder.dim)) ** 2           # the largest, as many as fill a square
    filters = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:count]]
    filters = filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)
    parts.append([label(f"{count} of {encoder.dim} patch filters", GRAY),
                  mosaic(data.unscale(filters), size)])
    legend = draw_scale("each map: cosine similarity of its position with all others, -1 to 1")
    body = stacked([beside([stacked(part, align=0.5) for part in parts], 30), legend], 16)
    return page(body, "Position embeddings and patch filters", caption)


# ------------------------------------------------------------------------------ architecture

ORANGE = torch.tensor([230, 120, 0], dtype=torch.uint8)[:, None, None]          # class token
SLATE = torch.tensor([150, 172, 205], dtype=torch.uint8)[:, None, None]         # mask tokens


def draw_architecture(args: argparse.Namespace) -> Image.Image:
    """An image on its way through the model, with the shapes of a batch (MAE, figure 1)."""
    inputs = load(args, "pretrain")
    if len(inputs.images) > 1:
        raise BadInput("only one image can be drawn on its way: give one file or one index")
    noise = random_noise(inputs.images, inputs.model, args.seed)
    stages = make_stages(inputs.model, inputs.images[0], noise)
    return draw_flow(stages, "A masked autoencoder, step by step", inputs.caption)


@torch.no_grad()
def make_stages(model: mae.MAEViT, image: Tensor, noise: Tensor) -> list["Stage"]:
    """The way of an image, uint8 (3, H, W), with noise (1, N). The tensors are those that the model
    itself computes."""
    images, p = data.scale(image[None]), model.encoder.patch_size       # (1, 3, H, W)
    (loss, pred, mask), calls = record_calls(model, images, noise)      # pred (1, N, 3*p*p)
    (tokens, *_), (visible, ids_restore, _) = calls["shuffle"]  # (1, N, D), (1, K, D), (1, N)
    _, latent = calls["encoder"]                            # (1, 1 + K, D)
    (filled,), _ = calls["decoder.blocks.0"]                # (1, 1 + N, D')
    patches = model.encoder.patchify(images)                # (1, N, 3*p*p)
    N, K = patches.shape[1], visible.shape[1]

    def shape(tensor: Tensor) -> str:                       # of a batch
        return f"({', '.join(map(str, ['B', *tensor.shape[1:]]))})"

    def cut(patches: Tensor) -> Tensor:                     # (1, N, 3*p*p) -> uint8 (N, 3, p, p)
        return data.unscale(patches[0]).unflatten(1, (3, p, p))

    masked = mask[0].bool()[:, None, None, None]            # (N, 1, 1, 1)
    original = cut(patches)                                 # (N, 3, p, p)
    kept = original[ids_restore[0].argsort()[:K]]           # (K, 3, p, p), in shuffled order
    class_row = torch.full((math.isqrt(N), 3, p, p), 255, dtype=torch.uint8)
    class_row[0] = ORANGE                                   # the class token on a row of its own
    all_tokens = torch.cat([class_row, torch.where(masked, SLATE, original)])
    # The loss of one patch is that of a mask with a single 1: torch.eye(N) has one in each row.
    errors = torch.stack([model.loss(patches, pred, one[None]) for one in torch.eye(N)])    # (N,)
    colors = heat((errors / errors[mask[0].bool()].max())[:, None, None])   # (N, 3, 1, 1)
    return [
        Stage("images", image[None], "scaled to -1..1", shape(images), "cut up"),
        Stage("patches", original, f"{N} of {p} x {p} pixels", shape(patches),
              "embed, add position"),
        Stage("tokens", original.masked_fill(masked, HIDDEN), f"{N - K} of {N} masked",
              shape(tokens), f"shuffle, keep {K}"),
        Stage("visible tokens", kept, f"{K}, in shuffled order", shape(visible),
              f"put the class token in front: {shape(latent)}"),
        Stage("encoder", *describe(model.encoder, "LayerNorm"), shape(latent),
              "project, fill, unshuffle"),
        Stage("all positions", all_tokens, "orange: class token, blue: masked", shape(filled),
              "add positions"),
        Stage("decoder", *describe(model.decoder, "linear head"), shape(pred),
              "without class token"),
        Stage("prediction", cut(to_pixels(model, pred, patches)), "visible: no loss", shape(pred),
              "compare with"),
        Stage("original", original, "normalized first" if model.norm_pix_loss else
              "every patch", shape(patches), "mean squared error"),
        Stage("error per patch", colors.masked_fill(~masked, HIDDEN), "gray: visible, no loss",
              shape(mask), "mean over masked"),
        Stage("loss", [f"{loss:.4f}"], f"over {N - K} patches"),
    ]


def record_calls(model: mae.MAEViT, images: Tensor, noise: Tensor) -> tuple[tuple, dict]:
    """The model's output, and {name of a module in it: (the module's inputs, its output)}."""
    calls = {}
    hooks = [module.register_forward_hook(                  # call = (module, inputs, output)
        lambda *call, name=name: calls.update({name: call[1:]})) for name, module in
        model.named_modules()]
    outputs = model(images, noise)
    for hook in hooks:
        hook.remove()
    return outputs, calls


def describe(part: nn.Module, last: str) -> tuple[list[str], str]:
    """The lines in the box of the encoder or decoder, which ends in `last`, and the note below."""
    count = sum(parameter.numel() for parameter in part.parameters())
    return [f"depth {len(part.blocks)}", f"width {part.pos_embed.shape[-1]}",
            f"heads {part.blocks[0].attn.heads}", last], f"{count / 1e6:.2f} M parameters"


# ------------------------------------------------------------------------------ input


@dataclasses.dataclass
class Inputs:
    """The model and the images that the flags name."""
    model: nn.Module
    checkpoint: dict
    images: Tensor              # uint8 (n, 3, H, W)
    labels: list[str]           # one for each image, to print and to draw
    truths: list[str]           # its true class, "" if that is not known
    caption: str


def load(args: argparse.Namespace, kind: str | None = None) -> Inputs:
    """The model of --checkpoint with image files or, if there are none, test images of the data
    set that --dataset or the checkpoint names. Only --dataset downloads: if CIFAR is missing, the
    examples of this repository take its place. kind: see `load_run`. Raises BadInput, OSError."""
    model, checkpoint, caption = load_run(args.checkpoint, kind)
    settings, files = checkpoint["settings"], args.images
    if files and (args.indices or args.dataset):
        raise BadInput("give either image files or --dataset and --indices, not both")
    name, size = args.dataset or settings["dataset"], getattr(model, "encoder", model).image_size
    folder = args.data_dir or Path(data.find_folder(name, settings))
    needed = folder / (data.SOURCES[name].folder if name in data.SOURCES else "")
    if not (files or args.dataset or name == "shapes" or needed.exists()):
        files = sorted((HERE / "assets" / "examples").glob("*.png"))[:args.count]
        if args.indices or not files or name not in data.SOURCES:
            raise BadInput(f"the data set {name} is not in {folder}: give image files, --data-dir, "
                           "or --dataset to download one")
    if files:
        images = torch.stack([data.read_image(file, size) for file in files])
        return Inputs(model, checkpoint, images, [file.stem for file in files], [""] * len(files),
                      f"image files · {caption}")
    dataset = data.load_dataset(name, folder, size, checkpoint["classes"])
    chosen = args.indices or list(range(len(dataset.test_images)))[:args.count]
    if max(chosen) >= len(dataset.test_images):
        raise BadInput(f"image {max(chosen)}: the test images of {dataset.title} are numbered 0 to "
                       f"{len(dataset.test_images) - 1}; see --indices")
    classes = dataset.classes
    if kind == "classifier":
        classes = checkpoint["classes"]                     # as it names them
        dataset.refuse_other_classes(args.checkpoint, classes)
    truths = [classes[dataset.test_labels[i]] if classes else "" for i in chosen]
    labels = [f"{i} {truth}".rstrip() for i, truth in zip(chosen, truths)]
    return Inputs(model, checkpoint, dataset.test_images[chosen], labels, truths,
                  f"{dataset.title} test images · {caption}")


def load_run(path: Path, kind: str | None = None) -> tuple[nn.Module, dict, str]:
    """The model of a checkpoint, the checkpoint, and the caption. kind: "pretrain" if it must be an
    autoencoder, "classifier" if it must be a classifier. Raises BadInput, OSError."""
    model, checkpoint = data.load_model(path, kind)
    count = checkpoint["epoch"]
    epochs = f"{count} epoch{'s' * (count != 1)} of {data.PROGRAMS[checkpoint['kind']]}"
    task = f" with {describe_task(model)}" if isinstance(model, mae.MAEViT) else ""
    return model, checkpoint, f"{run_label(path, checkpoint['settings'])} · {epochs}{task}"


def run_label(path: Path, settings: dict) -> str:
    """The name of a run's folder, or of a renamed file, and its data set if the settings tell."""
    path = path.resolve()
    if path.name in ("checkpoint.pt", "weights.pt", "log.csv"):
        path = path.parent
    name, dataset = path.name if path.is_dir() else path.stem, settings.get("dataset")
    title = data.SOURCES[dataset].title if dataset in data.SOURCES else dataset
    held_out = ", validation" if settings.get("validation") else ""
    return f"{name} ({title}{held_out})" if dataset else name


def describe_task(model: mae.MAEViT) -> str:
    """The task of an autoencoder, for a caption."""
    normalized = " · predicts normalized patches, shown with the original mean and std"
    return f"mask ratio {model.shuffle.mask_ratio:g}" + (normalized if model.norm_pix_loss else "")


def read_epochs(run: Path) -> dict[int, Tensor]:
    """The tiles of `save_epoch` in a run's folder: uint8 (B, 3, 3, H, W) by epoch, in order.
    Raises BadInput if there are none, or one is damaged or shows other images; OSError."""
    folder, epochs = run / "reconstructions", {}
    for path in sorted(folder.glob("epoch-*.npy")):
        content = io.BytesIO(path.read_bytes())
        with data.damaged_if_it_fails(path):
            tiles = torch.from_numpy(np.load(content, allow_pickle=False))
            first = next(iter(epochs.values()), tiles)
            if tiles.dtype != torch.uint8 or tiles.ndim != 5 or tiles.shape != first.shape:
                raise ValueError("other images than in the first epoch")
            epochs[int(path.stem.removeprefix("epoch-"))] = tiles
    if not epochs:
        raise BadInput(f"{folder} has no epoch-*.npy: give the folder of a run of pretrain.py")
    return dict(sorted(epochs.items()))


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, or of the one in a run's folder, as numbers; an empty field is NaN.
    Raises BadInput if it is not a whole log of at least one epoch; OSError."""
    path = path / "log.csv" if path.is_dir() else path
    text = path.read_bytes().decode("utf-8-sig", "replace")     # without a byte-order mark
    rows = []
    with contextlib.suppress(ValueError, TypeError, csv.Error):     # TypeError: too many fields
        rows = [{name: float(value or "nan") for name, value in row.items()}
                for row in csv.DictReader(text.splitlines(), restval="cut off")]
    whole = all("lr" in row and 0 <= row.get("epoch", -1) < 1e9 for row in rows)
    if not (rows and whole and text.endswith("\n")):
        raise BadInput(f"{path} is not a whole log.csv of pretrain.py or finetune.py with at least "
                       "one epoch: wait for the first one, or repair or delete the file")
    return rows


# ------------------------------------------------------------------------------ layout

# A picture is put together from smaller ones, `beside` each other or `stacked`; `page` adds the
# title. Lengths are in pixels; plain numbers are distances by eye.
PORTRAIT, BAR = 192, 308        # `predict`: the widths of an image and of a bar
TRUE, WRONG, OTHER = (160, 205, 236), (248, 184, 140), FAINT        # its bars
LARGEST = 1e99                  # `curves`: larger values are not drawn, since sums would overflow
STAGE = 224                     # `architecture`: the side of an image


class Column(NamedTuple):
    """A column of `draw_grid`."""
    heading: str
    tiles: Tensor               # square images, uint8 (n, 3, H, W)
    notes: Sequence[str] = ()   # one under each of them, or none


def draw_grid(groups: list[list[Column]], title: str, caption: str, scale: str = "",
              outline: tuple[int, int, int] | None = None) -> Image.Image:
    """Columns of tiles, as large as the page's width allows, with wider gaps between the groups.
    scale: what the colors of `heat` mean. outline: see `enlarge`."""
    columns = [column for group in groups for column in group]
    texts = [text for column in columns for text in (column.heading, *column.notes)]
    room = WIDTH - 2 * MARGIN - GAP * len(columns) - 4 * GAP * (len(groups) - 1)
    side = drawn_width(columns[0].tiles, min(320, room // len(columns)))
    width = max(side, min(176, math.ceil(max(map(text_width, texts)))))
    has_notes = any(column.notes for column in columns)

    def draw(column: Column) -> Image.Image:
        parts = [label(column.heading, GRAY, width, "m")]
        for i, tile in enumerate(column.tiles):
            parts.append(enlarge(tile, side, outline))
            if has_notes:
                parts.append(label(column.notes[i] if column.notes else "", GRAY, width, "m"))
        return stacked(parts, align=0.5)

    body = beside([beside([draw(column) for column in group]) for group in groups], 5 * GAP)
    if scale:
        body = stacked([body, draw_scale(scale)], 16)
    return page(body, title, caption)


def draw_scale(text: str) -> Image.Image:
    """The colors of `heat`, and what they mean."""
    return beside([enlarge(heat(torch.linspace(0, 1, 240).expand(LINE, -1)), 240), label(text)], 16)


def draw_cards(inputs: "Inputs", guesses: list[list[tuple]], caption: str) -> Image.Image:
    """Images, up to three in a row, each beside its guesses as bars. guesses: for each image,
    (class, probability), the largest first."""
    cards = []
    for image, name, truth, best in zip(inputs.images, inputs.labels, inputs.truths, guesses):
        bars = [label(name, width=BAR)]
        for i, (guess, probability) in enumerate(best):
            color = TRUE if guess == (truth or best[0][0]) else WRONG if i == 0 else OTHER
            bars.append(draw_bar(guess, probability, color))
        cards.append(beside([enlarge(image, PORTRAIT), stacked(bars, 4)], 20))
    across = math.ceil(len(cards) / math.ceil(len(cards) / 3))      # four images: two by two
    return page(table(cards, across, 40, 28), "Predictions", caption)


def draw_bar(name: str, probability: float, color: tuple[int, int, int]) -> Image.Image:
    canvas = Canvas(BAR, LINE)
    canvas.box(0, 0, BAR, LINE, PALE)
    canvas.box(0, 0, round(BAR * probability), LINE, color)
    canvas.text(8, LINE / 2, name, anchor="lm", fit=BAR - 106)
    canvas.text(BAR - 8, LINE / 2, f"{100 * probability:.1f} %", anchor="rm")
    return canvas.picture()


def plot_curves(runs: dict[str, list[dict]], caption: str = "") -> Image.Image:
    """The PANELS of runs. runs: for each label in the legend, the rows of log.csv as dicts of
    numbers, at least one. Raises BadInput if there are more runs than colors."""
    if len(runs) > len(COLORS):
        raise BadInput(f"{len(runs)} runs are too many for one picture: give at most {len(COLORS)}")
    panels = {}                                             # title: curves, as in `draw_panel`
    for title, columns in PANELS.items():
        for rows, color in zip(runs.values(), COLORS):
            if any(next(iter(columns)) in row for row in rows):
                for name, width in columns.items():
                    points = np.array([(row["epoch"], row.get(name, math.nan)) for row in rows])
                    panels.setdefault(title, []).append((*points.T, color, width))
    room = WIDTH - 2 * MARGIN
    entries = 3 if len(runs) > 2 else 2                     # of the legend, in a line
    legend = [draw_entry(name, color, room // entries) for name, color in zip(runs, COLORS)]
    across = len(panels) if len(panels) < 4 else 2
    panels = [draw_panel(title, curves, room // across, 460) for title, curves in panels.items()]
    body = stacked([table(legend, entries, 0, 10), table(panels, across, 0, 0)], 24)
    return page(body, "Training curves", f"{caption} · thick: test, thin: train".strip(" ·"))


def draw_entry(name: str, color: tuple[int, int, int], width: int) -> Image.Image:
    """A run's entry in the legend."""
    canvas = Canvas(width, LINE)
    canvas.line([(0, LINE / 2), (52, LINE / 2)], color, THICK)
    canvas.text(64, LINE / 2, name, anchor="lm", fit=width - 84)
    return canvas.picture()


def draw_panel(title: str, curves: list[tuple], width: int, height: int) -> Image.Image:
    """Axes and curves: (epochs (n,), values (n,), color, width of the line). Values that are not
    finite are gaps."""
    canvas = Canvas(width, height)
    left, top, right, bottom = 108, 44, width - 16, height - 80         # the axes
    canvas.text(left, 32, title, anchor="ls", fit=right - left)
    canvas.text((left + right) / 2, bottom + 46, "epoch", GRAY, "ma")
    known = np.concatenate([values[abs(values) < LARGEST] for _, values, _, _ in curves])
    x1 = 1.02 * max(1, *(epochs.max() for epochs, *_ in curves))        # from 0
    y0, y1 = (known.min(), known.max()) if len(known) else (0, 1)
    pad = max(0.08 * (y1 - y0), 0.01 * max(abs(y0), abs(y1))) or 0.05
    y0, y1 = y0 - pad if y0 < 0 else max(y0 - pad, 0), y1 + pad

    def place(epoch: float, value: float) -> tuple[float, float]:       # pixels
        return (left + epoch / x1 * (right - left),
                bottom - (value - y0) / (y1 - y0) * (bottom - top))

    for value, text in ticks(y0, y1):
        y = round(place(0, value)[1])
        canvas.line([(left, y), (right, y)], FAINT)
        canvas.text(left - 10, y, text, GRAY, "rm", fit=98)
    for epoch, _ in ticks(0, x1):
        if epoch == round(epoch):                           # only whole epochs
            x = round(place(epoch, y0)[0])
            canvas.line([(x, bottom), (x, bottom + 8)], GRAY)
            canvas.text(x, bottom + 12, f"{epoch:g}", GRAY, "ma")
    canvas.line([(left, top), (left, bottom), (right, bottom)], GRAY)
    for epochs, values, color, thickness in curves:
        known = np.flatnonzero(abs(values) < LARGEST)
        for part in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
            if len(part):                                   # an unbroken piece
                canvas.line([place(epochs[i], values[i]) for i in part], color, thickness)
    return canvas.picture()


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """About six round numbers from low to high, and their labels."""
    step = 10.0 ** math.floor(math.log10((high - low) / 6))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f".{decimals}f" if decimals < 6 and step < 1e5 else ".1e"
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:{form}}") for i in range(first, last + 1)]


class Stage(NamedTuple):
    """A step on the way through a model, and the arrow to the next one."""
    name: str
    content: Tensor | list[str]     # small square images, uint8 (M, 3, h, h), or lines of text
    note: str
    over_arrow: str = ""
    under_arrow: str = ""


def draw_flow(stages: list[Stage], title: str, caption: str) -> Image.Image:
    """Stages, four in a row, with an arrow from each to the next."""
    room = WIDTH - 2 * MARGIN
    step, pitch = (room - STAGE) // 3, STAGE + 172          # to the next stage, to the next row
    canvas = Canvas(room, math.ceil(len(stages) / 4) * pitch - 96)
    corners = [(i % 4 * step, 36 + i // 4 * pitch) for i in range(len(stages))]     # top left
    for stage, (x, y) in zip(stages, corners):
        middle = x + STAGE / 2
        canvas.text(middle, y - 12, stage.name, anchor="ms")
        canvas.text(middle, y + STAGE + 30, stage.note, GRAY, "ms")
        if isinstance(stage.content, Tensor):
            canvas.paste(middle, y + STAGE / 2, mosaic(stage.content, STAGE))
        else:
            canvas.box(x, y, STAGE, STAGE, PALE, GRAY, radius=14)
            for i, line in enumerate(stage.content):
                below = 40 * (i - (len(stage.content) - 1) / 2)
                canvas.text(middle, y + STAGE / 2 + below, line, anchor="mm")
    for stage, (x, y), (x1, y1) in zip(stages, corners, corners[1:]):
        if y == y1:                                         # to the right
            y += STAGE // 2
            points = [(x + STAGE + 12, y), (x1 - 16, y)]
        else:                                               # around, to the next row
            x, x1, y = x + STAGE // 2, x1 + STAGE // 2, y1 - 84
            points = [(x, y - 12), (x, y), (x1, y), (x1, y1 - 44)]
        canvas.arrow(points)
        middle = (points[0][0] + points[-1][0]) / 2
        canvas.text(middle, y - 14, stage.over_arrow, anchor="ms")
        canvas.text(middle, y + 34, stage.under_arrow, GRAY, "ms")
    return page(canvas.picture(), title, caption)


def page(body: Image.Image, title: str, caption: str) -> Image.Image:
    """A picture with a title and a caption above it, and a margin around it."""
    lines = textwrap.wrap(caption, int(max(body.width, 600) / 11.5))    # 11.5: a usual letter
    head = [label(title, size=32), *(label(line.strip(" ·"), GRAY) for line in lines)]
    return ImageOps.expand(stacked([stacked(head, 4), body], 12), MARGIN, PAPER)


def beside(pictures: list[Image.Image], gap: int = GAP) -> Image.Image:
    """Pictures in a row, their tops level."""
    width = sum(picture.width + gap for picture in pictures) - gap
    whole = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole


def stacked(pictures: list[Image.Image], gap: int = GAP, align: float = 0) -> Image.Image:
    """Pictures below each other. align: 0 to begin on the left, 0.5 to center them."""
    height = sum(picture.height + gap for picture in pictures) - gap
    whole = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        whole.paste(picture, (round(align * (whole.width - picture.width)), y))
        y += picture.height + gap
    return whole


def table(pictures: list[Image.Image], across: int, gap_x: int, gap_y: int) -> Image.Image:
    """Pictures of one size in rows of `across`."""
    rows = [pictures[i:i + across] for i in range(0, len(pictures), across)]
    return stacked([beside(row, gap_x) for row in rows], gap_y)


def label(text: str, color=INK, width: int | None = None, anchor: str = "l", size: int = TEXT
          ) -> Image.Image:
    """A line of text. width: of the picture, in which the text is cut if it is longer, and begins
    on the left (anchor "l") or is in the middle ("m")."""
    fit, width = width or math.inf, width or math.ceil(text_width(text, size))
    canvas = Canvas(width, round(LINE * size / TEXT))
    canvas.text(0 if anchor == "l" else width / 2, 0.9 * size, text, color, anchor + "s", fit, size)
    return canvas.picture()


# ------------------------------------------------------------------------------ drawing


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with Pillow. Raises BadInput if this Pillow cannot draw text."""
    with contextlib.suppress(ImportError):
        return ImageFont.load_default(size)
    raise BadInput("this Pillow was built without FreeType and cannot draw text: install it again")


def text_width(text: str, size: int = TEXT) -> float:
    return font(SHARP * size).getlength(plain(text)) / SHARP


def plain(text: str) -> str:
    """Pillow's font has only ASCII and a few signs: letters lose their accents, others become ?."""
    letters = [c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c)]
    return "".join(c if " " <= c <= "~" or c in "·…" else "?" for c in letters)


class Canvas:
    """A white picture to draw on. x and y are pixels from its top left corner. Everything is drawn
    SHARP times larger and reduced at the end, which smooths lines and text."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (SHARP * width, SHARP * height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def picture(self) -> Image.Image:
        return self.image.reduce(SHARP)

    def text(self, x: float, y: float, text: str, color=INK, anchor: str = "la",
             fit: float = math.inf, size: int = TEXT) -> None:
        """One line, cut if it is more than `fit` pixels wide."""
        text = plain(text)
        while len(text) > 1 and text_width(text, size) > fit:
            text = text[:-2] + "…"
        self.draw.text((SHARP * x, SHARP * y), text, color, font(SHARP * size), anchor)

    def line(self, points: list[tuple[float, float]], color=INK, width: int = 2) -> None:
        """A line through points (x, y), or a dot if there is only one."""
        points = [(SHARP * x, SHARP * y) for x, y in points]
        if len(points) == 1:
            self.draw.circle(points[0], SHARP * width * 1.5, color)
        else:
            self.draw.line(points, color, SHARP * width, "curve")

    def arrow(self, points: list[tuple[float, float]]) -> None:
        """A line that ends in a tip, to the right or downwards."""
        self.line(points)
        (_, y0), (x, y) = points[-2:]
        tip = [SHARP * value for value in (x, y, 9)]        # center and radius
        self.draw.regular_polygon(tip, 3, 270 if y == y0 else 180, INK)

    def box(self, x: float, y: float, width: float, height: float, fill, outline=None, radius=0
            ) -> None:
        corners = [SHARP * value for value in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, SHARP * radius, fill, outline, SHARP * 2)

    def paste(self, x: float, y: float, picture: Image.Image) -> None:
        """A picture around x, y."""
        larger = ImageOps.scale(picture, SHARP, Image.Resampling.NEAREST)
        self.image.paste(larger, (round(SHARP * x - larger.width / 2),
                                  round(SHARP * y - larger.height / 2)))


def drawn_width(images: Tensor, room: int) -> int:
    """How wide to draw images (..., H, W): each pixel becomes a square, if there is room for it."""
    W = images.shape[-1]
    return max(1, room // W * W or room)


def enlarge(pixels: Tensor, width: int, outline: tuple[int, int, int] | None = None) -> Image.Image:
    """uint8 (3, H, W) as a picture `width` pixels wide. Enlarged pixels are sharp squares. outline:
    y, x and side of a square to outline, in pixels of the image."""
    H, W = pixels.shape[1:]
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image = image.resize((width, H * width // W), Image.Resampling.BOX)
    if outline:
        y, x, side = (value * width // W for value in outline)
        ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), outline=PAPER, width=2)
    return image


HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10),
                 (252, 255, 164)])                          # dark to bright, also in gray


def heat(values: Tensor) -> Tensor:
    """Numbers 0..1 to colors: (..., H, W) -> uint8 (..., 3, H, W)."""
    places = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values.cpu().numpy(), places, channel) for channel in HEAT.T]
    return torch.from_numpy(np.stack(channels, axis=-3).round().astype(np.uint8))


def mosaic(images: Tensor, size: int) -> Image.Image:
    """Small square images, uint8 (M, 3, h, h), in rows, enlarged to about size x size pixels."""
    columns, gap = math.isqrt(len(images)), 2
    side = drawn_width(images, size // math.ceil(len(images) / columns) - gap)
    return table([enlarge(image, side) for image in images], columns, gap, gap)


def save(picture: Image.Image | list[Image.Image], path: Path | str) -> None:
    """Write a picture as PNG, or a list of frames as a GIF that dwells on the last one; whole or
    not at all. Raises OSError if the file cannot be written."""
    content = io.BytesIO()
    if isinstance(picture, list):
        picture[0].save(content, "GIF", save_all=True, append_images=picture[1:], loop=0,
                        duration=[400] * (len(picture) - 1) + [3000])   # milliseconds
    else:
        picture.save(content, "PNG")
    data.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------ the program


def whole_numbers(text: str) -> list[int]:
    """A type for argparse: "0,3,12" -> [0, 3, 12]."""
    return [data.number(int, 0, 10**6)(part) for part in text.split(",")]


WEIGHTS = HERE / "results" / "weights"
FLAGS = {
    "images": dict(nargs="*", type=data.path, help="files (default: test images of a data set)"),
    "RUN": dict(type=data.path, help="folder of a run of pretrain.py"),
    "logs": dict(nargs="+", type=data.path, help="folders of runs, or log.csv files"),
    "--checkpoint": dict(type=data.path, help="file, or a run's folder (default: a shipped one)",
                         default=WEIGHTS / "pretrain-pixels.pt"),
    "--indices": dict(type=whole_numbers, help="of test images: 0,3,12 (default: the first)"),
    "--count": dict(type=data.number(int, 1, 60), default=6, help="how many images to draw"),
    "--dataset": dict(choices=data.DATASETS, help="downloaded if it is missing"),
    "--data-dir": dict(type=data.path, help="folder of data sets (default: the checkpoint's)"),
    "--seed": dict(type=data.number(int, 0, 2**32 - 1), default=0, help="of the masks"),
    "--mask-ratio": dict(type=data.number(float, 0, 1), help="default: the model's"),
    "--raw": dict(action="store_true", help="do not paste the visible patches back"),
    "--patch": dict(type=whole_numbers, metavar="ROW,COLUMN", help="default: the class token"),
    "--block": dict(type=data.COUNT, help="of the encoder, from 1 (default: the last)"),
    "--out": dict(type=data.path, help="file to write"),
}
IMAGES = ("images", "--checkpoint", "--indices", "--count", "--dataset", "--data-dir")


def make_parser() -> data.Parser:
    parser = data.Parser(description="Draw a picture; without PICTURE: reconstruct. "
                         "PICTURE --help explains its flags.")
    commands = parser.add_subparsers(required=True, metavar="PICTURE")

    def add(draw, *flags: str, **defaults) -> None:
        name, text = draw.__name__.removeprefix("draw_"), draw.__doc__
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        for flag in (*flags, "--out"):
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(draw=draw, **{"out": Path(f"{name}.png"), **defaults})

    add(draw_reconstruct, *IMAGES, "--seed", "--mask-ratio", "--raw", count=12)
    add(draw_ratios, *IMAGES, "--seed")
    add(draw_timeline, "RUN", "--count")
    add(draw_predict, *IMAGES, count=12, checkpoint=WEIGHTS / "finetune-lunch.pt")
    add(draw_curves, "logs")
    add(draw_attention, *IMAGES, "--patch", "--block", count=3)
    add(draw_embeddings, "--checkpoint")
    add(draw_architecture, *IMAGES, "--seed", count=1)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    first = argv[0] if argv else ""
    if not first or Path(first).suffix or first[0] == "-" and first not in ("-h", "--help"):
        argv = ["reconstruct", *argv]
    args = make_parser().parse_args(argv)
    kinds = (".png", ".gif") if args.draw is draw_timeline else (".png",)
    if args.out.suffix.lower() not in kinds:
        raise BadInput(f"--out {args.out}: its name must end in {' or '.join(kinds)}")
    if args.out.resolve() in [file.resolve() for file in getattr(args, "images", [])]:
        raise BadInput(f"--out {args.out} is one of the pictures to read: name another file")
    save(args.draw(args), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with data.as_program():
        main()
