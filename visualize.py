"""Every picture of this repository, drawn with Pillow alone: a library and a program.

Input: a model and images, or what runs have written. Output: a PIL image; of the program, a file.

    reconstruct   masked | reconstruction | original        MAE, figure 2
    ratios        the same images at growing mask ratios    MAE, figure 4
    timeline      the same images and masks over a run      a sheet or an animation
    curves        losses, accuracies, learning rates        of one run or several
    attention     where a token looks, head by head         ViT, section 4.5
    embeddings    positions compared, patch filters         ViT, figure 7
    architecture  a batch on its way through the model      MAE, figure 1

The library comes first: the sheet that all pictures are drawn on, then each picture's function in
this order, then what reads the input. The program comes last. Without arguments it draws
`reconstruct`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    ViT   Dosovitskiy et al. 2020, An Image Is Worth 16x16 Words, arXiv 2010.11929
"""
import argparse
import csv
import functools
import io
import json
import math
import re
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
from data import BadInput


# ------------------------------------------------------------------------------ the sheet

WIDTH, MARGIN, GAP = 1720, 40, 6        # pixels: about twice the width of a README
INK, GREY, FAINT, PAPER = (31, 35, 40), (95, 103, 112), (222, 226, 231), (255, 255, 255)
HIDDEN = 195                            # the grey level of a masked patch
SHARP = 3                               # sheets are drawn this many times larger, then reduced


@functools.lru_cache
def font(size: int):
    return ImageFont.load_default(size)     # the scalable one that Pillow brings along


def text_width(text: str, size: int = 24) -> float:
    """In pixels of the sheet."""
    return font(SHARP * size).getlength(text) / SHARP


class Sheet:
    """A white page with a title and a caption, readable on a light and on a dark background.

    x and y are pixels from its top left corner; below `top` are `height` pixels for the picture.
    Everything is drawn SHARP times larger and reduced once, in `picture`: this smooths lines and
    text and leaves every pixel of a tile as it was.
    """

    def __init__(self, width: int, height: int, title: str, caption: str) -> None:
        lines = textwrap.wrap(caption, int((width - 2 * MARGIN) / 11.5))
        self.top = MARGIN + 60 + 32 * len(lines)
        self.bottom = self.top + height
        self.canvas = Image.new("RGB", (SHARP * width, SHARP * (self.bottom + MARGIN)), PAPER)
        self.draw = ImageDraw.Draw(self.canvas)
        self.text(MARGIN, MARGIN, title, size=32)
        for i, line in enumerate(lines):
            self.text(MARGIN, MARGIN + 46 + 32 * i, line, GREY, fit=width - 2 * MARGIN)

    def picture(self) -> Image.Image:
        return self.canvas.reduce(SHARP)

    def text(self, x: float, y: float, text: str, color=INK, anchor: str = "la",
             fit: float = math.inf, size: int = 24) -> None:
        """One line, made smaller and then cut until it is at most `fit` pixels wide."""
        text = "".join(c if " " <= c <= "~" or c in "·…" else "?" for c in text)   # has a glyph
        while size > 16 and text_width(text, size) > fit:
            size -= 1
        while len(text) > 1 and text_width(text, size) > fit:
            text = text[:-2] + "…"
        self.draw.text((SHARP * x, SHARP * y), text, color, font(SHARP * size), anchor)

    def tile(self, x: int, y: int, pixels: Tensor, enlarge: int = 1) -> None:
        """uint8 (3, H, W), every pixel a sharp square of enlarge x enlarge."""
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        size = (picture.width * enlarge * SHARP, picture.height * enlarge * SHARP)
        self.canvas.paste(picture.resize(size, Image.Resampling.NEAREST), (SHARP * x, SHARP * y))

    def line(self, points, color=INK, width: int = 2) -> None:
        """A line through points (x, y), or a dot if there is only one."""
        points = [(SHARP * x, SHARP * y) for x, y in points]
        if len(points) == 1:
            self.draw.circle(points[0], SHARP * width * 1.5, color)
        else:
            self.draw.line(points, color, SHARP * width, "curve")

    def arrow(self, points) -> None:
        """A line through points (x, y) with a head at its end."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = 14 * (x - x0) / length, 14 * (y - y0) / length
        base = (x - dx, y - dy)
        head = [(x, y), (base[0] - dy / 2, base[1] + dx / 2), (base[0] + dy / 2, base[1] - dx / 2)]
        self.line([*points[:-1], base])
        self.draw.polygon([(SHARP * x, SHARP * y) for x, y in head], INK)


HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10),
                 (252, 255, 164)])                          # dark to bright, also in greys


def heat(values: Tensor) -> Tensor:
    """Numbers 0..1 to colours: (..., H, W) -> uint8 (..., 3, H, W)."""
    places = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values.cpu().numpy(), places, channel) for channel in HEAT.T]
    return torch.from_numpy(np.stack(channels, axis=-3).round().astype(np.uint8))


def mosaic(pictures: Tensor, columns: int, size: int) -> Tensor:
    """Little square pictures in rows, as large as fits: uint8 (M, 3, h, h) -> (3, size, size)."""
    M, _, h, _ = pictures.shape
    rows, gap = math.ceil(M / columns), 2
    enlarge = max(1, (size // max(rows, columns) - gap) // h)
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    h, step = h * enlarge, h * enlarge + gap
    top, left = (size - rows * step + gap) // 2, (size - columns * step + gap) // 2
    page = torch.full((3, size, size), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        y, x = top + i // columns * step, left + i % columns * step
        page[:, y:y + h, x:x + h] = picture
    return page


def draw_grid(rows: list[list[tuple[Tensor, str]]], heads: list[list[str]], title: str,
              caption: str, bar: str = "",
              mark: tuple[int, int, int] | None = None) -> Image.Image:
    """Tiles in rows and columns, as large as the sheet's width allows.

    rows: tiles uint8 (3, H, W), all of one size, and the text under each; heads: a text over each
    column, in groups with wider gaps between them; bar: what the colours of `heat` mean; mark: y, x
    and side of a square to outline in every tile.
    """
    H, W = rows[0][0][0].shape[-2:]
    count = sum(map(len, heads))
    room = WIDTH - 2 * MARGIN - GAP * (count - len(heads)) - 5 * GAP * (len(heads) - 1)
    enlarge = max(1, min(320, room // count) // max(H, W))
    width, height = W * enlarge, H * enlarge                # of a tile
    lefts, x = [], MARGIN
    for group in heads:
        lefts += [x + i * (width + GAP) for i in range(len(group))]
        x = lefts[-1] + width + 5 * GAP
    pitch = height + (42 if any(note for row in rows for _, note in row) else GAP)
    sheet = Sheet(max(lefts[-1] + width + MARGIN, 680), 34 + len(rows) * pitch - GAP
                  + (44 if bar else 0), title, caption)
    for left, head in zip(lefts, sum(heads, [])):
        sheet.text(left + width / 2, sheet.top + 24, head, GREY, "ms", width)
    for r, row in enumerate(rows):
        y = sheet.top + 34 + r * pitch
        for left, (tile, note) in zip(lefts, row):
            sheet.tile(left, y, tile, enlarge)
            sheet.text(left + width / 2, y + height + 24, note, GREY, "ms", width)
            if mark:
                y0, x0, side = (value * enlarge for value in mark)
                x0, y0 = left + x0, y + y0
                sheet.line([(x0, y0), (x0 + side, y0), (x0 + side, y0 + side), (x0, y0 + side),
                            (x0, y0)], PAPER)
    if bar:
        sheet.tile(MARGIN, sheet.bottom - 20, heat(torch.linspace(0, 1, 240).expand(20, -1)))
        sheet.text(MARGIN + 256, sheet.bottom - 10, bar, anchor="lm")
    return sheet.picture()


def save_png(picture: Image.Image, path: Path | str) -> None:
    """Write a picture whole or not at all. Raises OSError if it cannot be written."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    data.write_file(path, content.getvalue())


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """Write a GIF or WebP that dwells on its last frame. Raises OSError."""
    content, kind = io.BytesIO(), path.suffix[1:].upper()
    if kind == "GIF":                                       # 256 colours, chosen for each frame
        frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], loop=0, lossless=True,
                   duration=[400] * (len(frames) - 1) + [3000])    # milliseconds
    data.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------ reconstruct


def conditions(mask_ratio: float, norm_pix_loss: bool) -> str:
    """What a caption says of a model's task."""
    normalized = " · predicts normalised patches, shown with each patch's own mean and deviation"
    return f"mask ratio {mask_ratio:g}" + (normalized if norm_pix_loss else "")


@torch.no_grad()
def reconstruct(model: mae.MAEViT, images: Tensor, noise: Tensor, raw: bool = False,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor]:
    """Mask images and let the model fill them in, on the model's device.

    images uint8 (B, 3, H, W), noise (B, N) -> tiles uint8 (B, 3, 3, H, W): masked, reconstruction,
    original; error (B,): the mean squared error of the masked patches' pixels, scaled to -1..1.
    Both are on the CPU. The visible patches are pasted back unless `raw`. mask_ratio: another one
    than the model's own. Raises BadInput if it leaves no patch visible or none masked.
    """
    device, p = model.encoder.pos_embed.device, model.encoder.patch_size
    images = data.scale(images.to(device))
    patches = model.encoder.patchify(images)                # (B, N, 3*p*p)
    try:
        _, pred, mask = model(images, noise.to(device), mask_ratio)
    except ValueError as error:                             # of the mask ratio
        raise BadInput(f"{error}: choose another ratio, or smaller patches") from None
    pred = pred.float()
    if model.norm_pix_loss:
        pred = mae.denormalize_patches(pred, patches)
    error = ((pred - patches).square().mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)   # (B,)
    hidden = mask.unsqueeze(-1).bool()                      # (B, N, 1)
    masked = patches.masked_fill(hidden, HIDDEN / 127.5 - 1)
    filled = pred if raw else torch.where(hidden, pred, patches)
    tiles = [data.unscale(mae.unpatchify(tile, p)) for tile in (masked, filled, patches)]
    return torch.stack(tiles, dim=1).cpu(), error.cpu()


def draw_triples(tiles: Tensor, title: str, caption: str, errors: list[float] | None = None,
                 labels: list[str] | None = None) -> Image.Image:
    """Masked, reconstruction, original (MAE, figure 2), up to three images in a row.

    tiles: uint8 (B, 3, 3, H, W) from `reconstruct`; errors, labels: one for each image.
    """
    B = len(tiles)
    across = 1 if B == 1 else 2 if B <= 4 else 3
    notes = [f"error {error:.4f}" for error in errors] if errors else [""] * B
    triples = [[(masked, ""), (filled, note), (original, label)] for (masked, filled, original),
               note, label in zip(tiles, notes, labels or [""] * B)]
    rows = [sum(triples[i:i + across], []) for i in range(0, B, across)]
    heads = [["masked", "reconstruction", "original"]] * across
    return draw_grid(rows, heads, title, caption)


def save_epoch(folder: Path, epoch: int, model: mae.MAEViT, images: Tensor, noise: Tensor,
               caption: str) -> None:
    """The reconstructions after an epoch: a picture, epoch-0001.png, and the same tiles as an
    array, epoch-0001.npy, from which `timeline` draws. Raises OSError.

    images uint8 (B, 3, H, W), noise (B, N); caption: data set and run.
    """
    tiles, errors = reconstruct(model, images, noise)
    array = io.BytesIO()
    np.save(array, tiles.numpy())
    data.write_file(folder / f"epoch-{epoch:04}.npy", array.getvalue())
    caption += f" · {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    picture = draw_triples(tiles, f"Reconstructions after epoch {epoch}", caption, errors.tolist())
    save_png(picture, folder / f"epoch-{epoch:04}.png")


# ------------------------------------------------------------------------------ ratios


def draw_ratios(model: mae.MAEViT, images: Tensor, noise: Tensor, caption: str,
                ratios=(0.5, 0.75, 0.85, 0.95)) -> Image.Image:
    """One row per image, with more and more of it hidden (MAE, figure 4).

    images uint8 (B, 3, H, W), noise (B, N): what is hidden at one ratio is hidden at all higher
    ones. Raises BadInput if a ratio leaves no patch visible or none masked.
    """
    rows, heads = [[(image, "")] for image in images], [["original"]]
    for ratio in ratios:
        heads.append([f"{100 * ratio:g} % masked", "reconstruction"])
        for row, (masked, filled, _), error in zip(
                rows, *reconstruct(model, images, noise, mask_ratio=ratio)):
            row += [(masked, ""), (filled, f"error {error:.4f}")]
    caption += f" · pre-trained with {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    return draw_grid(rows, heads, "How much can be hidden?", caption)


# ------------------------------------------------------------------------------ timeline


def draw_timeline(epochs: dict[int, Tensor], caption: str, count: int = 6) -> Image.Image:
    """The first `count` images of a run at up to seven epochs, early to late, as one sheet.

    epochs: for each epoch, in order, tiles uint8 (B, 3, 3, H, W) from `read_epochs`. Most is
    learned early, so the epochs that are shown lie closer there.
    """
    numbers = np.array(list(epochs))
    wanted = np.geomspace(max(numbers[0], 1), max(numbers[-1], 1), min(7, len(numbers)))
    shown = sorted({int(numbers[abs(numbers - number).argmin()]) for number in wanted})
    last = epochs[shown[-1]][:count]
    rows = [[(last[i, 0], ""), *((epochs[epoch][i, 1], "") for epoch in shown), (last[i, 2], "")]
            for i in range(len(last))]
    heads = [["masked"], [f"epoch {epoch}" for epoch in shown], ["original"]]
    return draw_grid(rows, heads, "Reconstructions as pre-training goes on", caption)


# ------------------------------------------------------------------------------ curves

METRICS = {     # name: (axis title, column of the training set or the only one, of the test set)
    "loss": ("reconstruction loss (mean squared error)", "loss", "test_loss"),
    "cross-entropy": ("classification loss (cross-entropy)", "train_loss", "test_loss"),
    "accuracy": ("accuracy in %", "train_accuracy", "test_accuracy"),
    "lr": ("learning rate", "lr", None),
    "speed": ("training images per second", "images_per_second", None),
    "memory": ("peak memory in MiB", "peak_memory_mb", None),
}
USUAL = ("loss", "cross-entropy", "accuracy", "lr")
COLORS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
          (230, 159, 0), (0, 0, 0), (150, 150, 150)]    # Okabe and Ito's, safe for the colour-blind
THICK, THIN = 4, 2              # pixels: lines of the test set and of the training set
LARGEST, SMALLEST = 1e99, 1e-99     # of a number that can be drawn; the second on a log axis


def ticks(low: float, high: float, log: bool) -> list[tuple[float, str]]:
    """About six round numbers on an axis from low to high: their places and labels.

    On a logarithmic axis places are exponents of ten, and so are low and high.
    """
    if log and high - low > 1:                              # 1, 2, 5, 10, 20, 50, 100, ...
        values = [m * 10.0 ** power for power in range(math.floor(low), math.ceil(high) + 1)
                  for m in (1, 2, 5)]
        if high - low > 3:                                  # 1, 10, 100, ... or fewer
            values = values[::3 * math.ceil((high - low) / 8)]
        values = [value for value in values if low <= math.log10(value) <= high]
    else:
        first, last = (10 ** low, 10 ** high) if log else (low, high)
        step = 10.0 ** math.floor(math.log10((last - first) / 6))
        step *= next(m for m in (1, 2, 5, 10) if (last - first) / (m * step) <= 6)
        values = [i * step for i in range(math.ceil(first / step - 1e-9),
                                          math.floor(last / step + 1e-9) + 1)]
    labels = [f"{value:g}" for value in values]
    if not log and "e" not in "".join(labels):              # equally many decimals
        decimals = max(len(label.partition(".")[2]) for label in labels)
        labels = [f"{value:.{decimals}f}" for value in values]
    return [(math.log10(value) if log else value, label) for value, label in zip(values, labels)]


def draw_panel(sheet: Sheet, box: tuple[int, int, int, int], title: str, x_title: str,
               lines: list[tuple], log: bool) -> None:
    """Axes and curves in the box (left, top, right, bottom).

    lines: (xs (n,), ys (n,), color, width), ys NaN for a gap, and log10 of the values if `log`.
    """
    left, top, right, bottom = box[0] + 96, box[1] + 44, box[2] - 16, box[3] - 80
    every_x = np.concatenate([xs for xs, _, _, _ in lines])
    every_y = np.concatenate([ys[np.isfinite(ys)] for _, ys, _, _ in lines])
    sheet.text(left, box[1] + 32, title, anchor="ls", fit=right - left)
    sheet.text((left + right) / 2, bottom + 46, x_title, GREY, "ma")
    if not len(every_y):
        sheet.text((left + right) / 2, (top + bottom) / 2, "no value to draw", GREY, "mm")
        every_y = np.zeros(1)
    x1 = max(every_x.max(), 1e-9)
    x0 = min(every_x.min(), x1 - 1) if x_title == "epoch" else 0    # a lone epoch stands at the end
    y0, y1 = every_y.min(), every_y.max()
    pad = max(0.05 * (y1 - y0), 0.01 * max(abs(y0), abs(y1))) or 0.05
    y0, y1 = y0 - pad if log or y0 < 0 else max(y0 - pad, 0), y1 + pad

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))

    for tick, label in ticks(y0, y1, log):
        y = round(place(x0, tick)[1])
        sheet.line([(left, y), (right, y)], FAINT)
        sheet.text(left - 10, y, label, GREY, "rm")
    for tick, _ in ticks(x0, x1, log=False):
        if x_title != "epoch" or tick == round(tick):
            x = round(place(tick, y0)[0])
            sheet.line([(x, bottom), (x, bottom + 8)], GREY)
            sheet.text(x, bottom + 12, f"{tick:g}", GREY, "ma")
    sheet.line([(left, top), (left, bottom), (right, bottom)], GREY)
    for xs, ys, color, width in lines:
        there = np.flatnonzero(np.isfinite(ys))
        for part in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1):
            if len(part):
                sheet.line([place(xs[i], ys[i]) for i in part], color, width)


def draw_curves(runs: dict[str, list[dict]], x: str = "epoch", log: bool = False,
                metrics: list[str] | None = None, caption: str = "") -> Image.Image:
    """Curves of one or several runs, one panel per metric (keys of METRICS; USUAL by default).

    runs: for each label in the legend, the rows of log.csv as dicts of numbers, at least one.
    Columns that a run does not have are left out; values that cannot be drawn are gaps. x: "epoch",
    or "time", the sum of the rows' seconds. log: logarithmic axes, except for accuracy. Raises
    BadInput if there are too many runs, or none has the metrics.
    """
    if len(runs) > len(COLORS):
        raise BadInput(f"{len(runs)} runs are too many for one picture: give at most {len(COLORS)}")
    possible = [name for name, (_, column, _) in METRICS.items()
                if any(column in rows[0] for rows in runs.values())]
    shown = [name for name in metrics or USUAL if name in possible]
    if not shown:
        raise BadInput(f"no log has what --metric {' --metric '.join(metrics or USUAL)} needs: "
                       f"choose from {', '.join(possible)}")
    times = [np.nan_to_num([row["seconds"] for row in rows], posinf=0).clip(0, 1e9).cumsum()
             for rows in runs.values()]
    unit, seconds = ("hours", 3600) if max(time[-1] for time in times) > 7200 else ("minutes", 60)

    if any(METRICS[name][2] for name in shown):
        caption = f"{caption} · thick: test, thin: train".removeprefix(" · ")
    room, height = WIDTH - 2 * MARGIN, 460                  # height: of a panel
    entry = min(room, int(max(map(text_width, runs))) + 110)     # of the legend
    columns = room // entry
    down = 38 * math.ceil(len(runs) / columns) + 16
    across = 3 if len(shown) == 3 else min(2, len(shown))
    width = room // across
    sheet = Sheet(WIDTH, down + height * math.ceil(len(shown) / across), "Training curves", caption)
    for i, (label, color) in enumerate(zip(runs, COLORS)):
        left, y = MARGIN + i % columns * entry, sheet.top + 18 + i // columns * 38
        sheet.line([(left, y), (left + 52, y)], color, THICK)
        sheet.text(left + 64, y, label, anchor="lm", fit=entry - 64)
    for i, name in enumerate(shown):
        title, train, test = METRICS[name]
        bent, lines = log and name != "accuracy", []
        for rows, time, color in zip(runs.values(), times, COLORS):
            xs = time / seconds if x == "time" else np.array([row["epoch"] for row in rows], float)
            for column in (train, test) if train in rows[0] else ():
                if column in rows[0]:
                    ys = np.array([row[column] for row in rows], dtype=float)
                    ys[~(abs(ys) < LARGEST) | (bent & ~(ys > SMALLEST))] = math.nan
                    thick = THIN if test and column == train else THICK
                    lines.append((xs, np.log10(ys) if bent else ys, color, thick))
        left, top = MARGIN + i % across * width, sheet.top + down + i // across * height
        draw_panel(sheet, (left, top, left + width, top + height), title,
                   "epoch" if x == "epoch" else f"time in {unit}", lines, bent)
    return sheet.picture()


# ------------------------------------------------------------------------------ attention


def encoder_of(model: nn.Module) -> mae.Encoder:
    return model.encoder if isinstance(model, mae.MAEViT) else model    # a classifier is one


@torch.no_grad()
def draw_attention(model: nn.Module, images: Tensor, caption: str, labels: list[str],
                   patch: tuple[int, int] | None, block: int) -> Image.Image:
    """Where a token looks in whole images, head by head (ViT, section 4.5).

    images uint8 (B, 3, H, W); patch: (row, column) of the one that looks, or None for the class
    token; block: its index. Each map is scaled by its own largest weight; the weight on the class
    token is left out.
    """
    encoder = encoder_of(model)
    p, side = encoder.patch_size, encoder.image_size // encoder.patch_size
    looking = 0 if patch is None else 1 + patch[0] * side + patch[1]
    maps = encoder.attention_maps(data.scale(images))[block][:, :, looking, 1:]     # (B, h, N)
    maps = torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1)                 # (B, h+1, N)
    maps = (maps / maps.amax(dim=-1, keepdim=True)).unflatten(-1, (side, side))
    colors = heat(maps.repeat_interleave(p, -2).repeat_interleave(p, -1))   # (B, h+1, 3, H, W)
    grey = images.float().mean(dim=1)[:, None, None]                        # (B, 1, 1, H, W)
    overlaid = (0.35 * grey + 0.65 * colors).round().to(torch.uint8)
    tiles = torch.cat([images[:, None], overlaid], dim=1)                   # (B, h+2, 3, H, W)
    rows = [[(tile, "" if c else label) for c, tile in enumerate(row)]
            for row, label in zip(tiles, labels)]
    heads = [["image"], [f"head {h + 1}" for h in range(maps.shape[1] - 1)], ["mean"]]
    who = "the class token" if patch is None else f"patch {patch[0]},{patch[1]}"
    caption += f" · block {block + 1} of {len(encoder.blocks)} · nothing masked"
    return draw_grid(rows, heads, f"Where {who} looks", caption,
                     "0 to the largest weight of each map",
                     patch and (patch[0] * p, patch[1] * p, p))


# ------------------------------------------------------------------------------ embeddings


@torch.no_grad()
def draw_embeddings(model: nn.Module, caption: str) -> Image.Image:
    """Each position's embedding compared with all others (ViT, figure 7), and the patch filters.

    The map at row i, column j shows the cosine similarity of the position embedding of patch (i, j)
    with those of all patches, after subtracting their mean, which says nothing about position. Of
    32 x 32 patches every second row and column has a map. A filter is the weights of one of the D
    outputs for the pixels of a patch, grey for zero, scaled by its largest weight. Those with the
    largest norm are shown, as many as fill a square.
    """
    encoder, size = encoder_of(model), 544                  # pixels
    side = encoder.image_size // encoder.patch_size
    every = math.ceil(side / 16)
    positions = {"encoder": encoder.pos_embed[0]}           # (N, D)
    if isinstance(model, mae.MAEViT):                       # (N, D'), without the class token's
        positions["decoder"] = model.decoder.pos_embed[0, 1:]
    tiles, heads = [], []
    for name, embedding in positions.items():
        embedding = F.normalize(embedding - embedding.mean(dim=0), dim=1)
        alike = (embedding @ embedding.T).view(side, side, side, side)
        alike = alike[::every, ::every].flatten(0, 1)       # (maps, side, side)
        tiles.append((mosaic(heat((alike + 1) / 2), side // every, size), ""))
        heads.append([f"position embeddings of the {name}"])
    filters = encoder.patch_embed.proj.weight               # (D, 3, p, p)
    columns = min(14, math.isqrt(encoder.dim))
    filters = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:columns ** 2]]
    filters = filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)
    tiles.append((mosaic(data.unscale(filters), columns, size), ""))
    heads.append([f"{columns ** 2} of {encoder.dim} patch filters"])
    return draw_grid([tiles], heads, "Position embeddings and patch filters", caption,
                     "cosine similarity with all positions, mean subtracted, -1 to 1")


# ------------------------------------------------------------------------------ architecture

STAGE = 224                     # pixels: the side of a picture in the figure
ORANGE, SLATE = (230, 120, 0), (150, 172, 205)      # the class token, mask tokens


def draw_flow(stages: list[tuple], title: str, caption: str) -> Image.Image:
    """Stages, four in a row, with an arrow from each to the next.

    stages: (name, picture uint8 (3, STAGE, STAGE) or the lines in a box, note, text over the
    arrow, text under it).
    """
    step, pitch = (WIDTH - 2 * MARGIN - STAGE) // 3, STAGE + 172
    sheet = Sheet(WIDTH, math.ceil(len(stages) / 4) * pitch - 96, title, caption)
    corners = [(MARGIN + i % 4 * step, sheet.top + 36 + i // 4 * pitch) for i in range(len(stages))]
    for (name, content, note, *_), (x, y) in zip(stages, corners):
        middle = x + STAGE / 2
        sheet.text(middle, y - 12, name, anchor="ms")
        sheet.text(middle, y + STAGE + 30, note, GREY, "ms", fit=STAGE + 60)
        if isinstance(content, Tensor):
            sheet.tile(x, y, content)
        else:
            corner = [SHARP * value for value in (x, y, x + STAGE, y + STAGE)]
            sheet.draw.rounded_rectangle(corner, SHARP * 14, (246, 248, 250), GREY, SHARP * 2)
            for i, line in enumerate(content):
                sheet.text(middle, y + STAGE / 2 + 40 * (i - (len(content) - 1) / 2), line,
                           anchor="mm")
    for i, ((x, y), (x1, y1), (*_, over, under)) in enumerate(zip(corners, corners[1:], stages)):
        if i % 4 < 3:                                       # to the right
            y += STAGE // 2
            points = [(x + STAGE + 12, y), (x1 - 12, y)]
            fit = step - STAGE - 24
        else:                                               # around, to the next row
            x, x1, y = x + STAGE // 2, x1 + STAGE // 2, y1 - 84
            points = [(x, y - 12), (x, y), (x1, y), (x1, y1 - 40)]
            fit = WIDTH
        sheet.arrow(points)
        middle = (points[0][0] + points[-1][0]) / 2
        sheet.text(middle, y - 14, over, anchor="ms", fit=fit)
        sheet.text(middle, y + 34, under, GREY, "ms", fit=fit)
    return sheet.picture()


@torch.no_grad()
def draw_architecture(model: mae.MAEViT, image: Tensor, noise: Tensor, caption: str) -> Image.Image:
    """A batch on its way through the model, the shapes at every arrow (MAE, figure 1).

    image uint8 (3, H, W), noise (1, N): what is drawn for the batch. Every shape, number and
    picture is computed with the model.
    """
    encoder, decoder, p = model.encoder, model.decoder, model.encoder.patch_size
    images = data.scale(image[None])                        # (1, 3, H, W)
    loss, pred, mask = model(images, noise)                 # (), (1, N, 3*p*p), (1, N)
    patches = encoder.patchify(images)                      # (1, N, 3*p*p)
    tokens = encoder.embed(patches)                         # (1, N, D)
    visible, restore, _ = model.shuffle(tokens, noise)      # (1, K, D), (1, N)
    latent = encoder(visible)                               # (1, 1 + K, D)
    filled = decoder.fill_gaps(latent, restore)             # (1, 1 + N, D')
    N, K = patches.shape[1], visible.shape[1]
    errors = torch.stack([model.loss(patches, pred, one) for one in torch.eye(N)[:, None]])  # (N,)
    side, across = math.isqrt(N), math.isqrt(K)             # columns in the pictures
    hidden = mask[0].bool()                                 # (N,)

    def batch(tensor: Tensor) -> str:
        return f"({', '.join(map(str, ['B', *tensor.shape[1:]]))})"

    def cut(patches: Tensor) -> Tensor:                     # (1, N, 3*p*p) -> uint8 (N, 3, p, p)
        return data.unscale(patches[0]).unflatten(1, (3, p, p))

    def with_class(colors: Tensor, columns: int) -> Tensor:     # the class token on its own row
        first = torch.full((columns, 3), 255, dtype=torch.uint8)
        first[0] = torch.tensor(ORANGE)
        return mosaic(torch.cat([first, colors])[:, :, None, None], columns, STAGE)

    def box(part: nn.Module, last: str) -> tuple[list[str], str]:       # lines, note
        count = sum(parameter.numel() for parameter in part.parameters())
        return [f"depth {len(part.blocks)}", f"width {part.pos_embed.shape[-1]}",
                f"heads {part.blocks[0].attn.heads}", last], f"{count / 1e6:.2f} M parameters"

    original = cut(patches)                                 # (N, 3, p, p)
    masked = original.masked_fill(hidden[:, None, None, None], HIDDEN)
    means = original.float().mean(dim=(2, 3)).to(torch.uint8)           # (N, 3)
    first = means[noise[0].argsort()[:K]]                   # (K, 3), of the visible patches
    filled_in = torch.where(hidden[:, None], torch.tensor(SLATE, dtype=torch.uint8), means)
    colors = heat((errors / errors[hidden].max())[:, None, None])       # (N, 3, 1, 1)
    colors = colors.masked_fill(~hidden[:, None, None, None], HIDDEN)
    predicted = mae.denormalize_patches(pred, patches) if model.norm_pix_loss else pred
    target = "each patch normalised" if model.norm_pix_loss else "every patch"
    stages = [
        ("images", mosaic(image[None], 1, STAGE), "scaled to -1..1",
         batch(images), "cut up"),
        ("patches", mosaic(original, side, STAGE), f"{N} of {p} x {p} pixels",
         batch(patches), "embed, add positions"),
        ("tokens", mosaic(masked, side, STAGE), f"{N - K} of {N} hidden",
         batch(tokens), f"shuffle, keep {K}"),
        ("visible tokens", mosaic(original[noise[0].argsort()[:K]], across, STAGE),
         f"{K}, in shuffled order", batch(visible), "put the class token in front"),
        ("with class token", with_class(first, across), "orange: class token", batch(latent), ""),
        ("encoder", *box(encoder, "LayerNorm"), batch(latent), "project, fill, unshuffle"),
        ("all positions", with_class(filled_in, side), f"blue: {N - K} mask tokens",
         batch(filled), "add positions"),
        ("decoder", *box(decoder, "linear head"),
         batch(pred), "the class token is dropped before the head"),
        ("prediction", mosaic(cut(predicted), side, STAGE), "visible: no loss",
         batch(pred), "compare with"),
        ("original", mosaic(original, side, STAGE), target, batch(patches), "mean squared error"),
        ("error per patch", mosaic(colors, side, STAGE), "grey: visible, no loss",
         batch(mask), "mean over masked"),
        ("loss", [f"{loss:.4f}"], f"over {N - K} patches", "", ""),
    ]
    caption += f" · {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    return draw_flow(stages, "A masked autoencoder, step by step", caption)


# ------------------------------------------------------------------------------ input


def read_image(path: Path | str, size: int) -> Tensor:
    """The middle square of an image file, upright and resized: uint8 (3, size, size).

    16 bits become 8; what is transparent becomes white. Raises BadInput if the file cannot be read,
    or is not a picture of a usual kind, or broken or huge.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                  # 16 bits
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB").convert("RGBA")
    except Exception as error:      # what Pillow raises on damaged files has no common type
        reason = getattr(error, "strerror", None) or "it is not an image, or damaged or huge"
        raise BadInput(f"cannot read the picture {path}: {reason}; give a PNG, JPEG, WebP, GIF, "
                       "BMP, TIFF or PPM file") from None
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", image.size, PAPER)
    page.alpha_composite(image)
    return torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1)


def read_epochs(run: Path) -> dict[int, Tensor]:
    """What `save_epoch` kept in a run's folder: tiles uint8 (B, 3, 3, H, W) by epoch, in order.

    Raises BadInput if there are none, or one is damaged or shows other images; OSError.
    """
    folder = run / "reconstructions"
    files = {int(match[1]): path for path in folder.glob("epoch-*.npy")
             if (match := re.fullmatch(r"epoch-(\d{1,9})", path.stem))}
    if not files:
        raise BadInput(f"{folder} has no epoch-*.npy, which pretrain.py writes beside its "
                       "pictures: give the folder of a run that still has them, or train again")
    epochs, shape = {}, None
    for epoch, path in sorted(files.items()):
        content = io.BytesIO(path.read_bytes())
        try:
            tiles = torch.from_numpy(np.load(content, allow_pickle=False))
            images, *rest = tiles.shape
            if tiles.dtype != torch.uint8 or rest != [3, 3, data.SIDE, data.SIDE] or images < 1:
                raise ValueError("not tiles")
        except Exception:           # what np.load raises for damaged files has no common type
            raise BadInput(f"{path} is damaged: delete it") from None
        shape = shape or tiles.shape
        if tiles.shape != shape:
            raise BadInput(f"{path} shows other images than those before it: delete it")
        epochs[epoch] = tiles
    return epochs


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, or of the one in a run's folder, as numbers; an empty field is NaN.

    Raises BadInput if it is empty, cut off or not a log; OSError if it cannot be read.
    """
    path = path / "log.csv" if path.is_dir() else path
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")                  # spreadsheets write a byte-order mark
        header, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error):
        raise BadInput(f"{path} is not a log.csv: it is not a text in UTF-8") from None
    if not {"epoch", "seconds", "lr"} <= set(header) or not {"loss", "train_loss"} & set(header):
        raise BadInput(f"{path} is not a log.csv of pretrain.py or finetune.py: its first line "
                       "does not name their columns")
    if not lines:
        raise BadInput(f"{path} has no epoch yet: wait for the first one, or give another run")
    rows = []
    for number, line in enumerate(lines, start=2):
        cut_off = number > len(lines) and not text.endswith(("\n", "\r"))
        try:
            row = {name: float(value or "nan") for name, value in zip(header, line, strict=True)}
        except ValueError:
            row = {"epoch": math.nan}
        if cut_off or not 0 <= row["epoch"] < 1e9:
            raise BadInput(f"{path}, line {number}: not a whole row of numbers, one per column and "
                           "first an epoch; mend it or delete it")
        rows.append(row)
    odd = sum(not abs(value) < LARGEST for row in rows for value in row.values())
    if odd:
        print(f"note: {path}: {odd} values are not finite, or too large, and are drawn as gaps",
              file=sys.stderr)
    return rows


def read_settings(run: Path) -> dict:
    """The settings in a run's config.json, or none if it does not hold any."""
    try:
        return dict(json.loads((run / "config.json").read_text())["settings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def title_of(dataset: str) -> str:
    return data.SOURCES[dataset].title if dataset in data.SOURCES else dataset


def name_run(path: Path) -> str:
    """A run is called after its folder, or after a log or checkpoint that was renamed."""
    path = path.resolve()
    if path.name in ("checkpoint.pt", "weights.pt", "log.csv"):
        path = path.parent
    return path.name if path.is_dir() else path.stem


def describe_run(path: Path) -> str:
    """The name of a run or log and, if the config.json beside it tells, its data set."""
    settings = read_settings(path if path.is_dir() else path.parent)
    if "dataset" not in settings:
        return name_run(path)
    held_out = ", validation" if settings.get("validation") else ""
    return f"{name_run(path)} ({title_of(str(settings['dataset']))}{held_out})"


def describe(path: Path, checkpoint: dict) -> str:
    """A checkpoint in a caption: name of the run, data set, epoch."""
    task = "pre-trained on" if checkpoint["kind"] == "pretrain" else "classifies"
    title = title_of(checkpoint["settings"]["dataset"])
    return f"{name_run(path)}, {task} {title}, epoch {checkpoint['epoch']}"


HERE = Path(__file__).parent


def load_images(args: argparse.Namespace, dataset: str, size: int):
    """What to draw: images uint8 (n, 3, size, size), a label for each, where they are from.

    These are the given files, or else images of the data set. It is downloaded only if --dataset
    asks for it; if it is missing, the examples of this repository take its place. Raises BadInput.
    """
    name, files = args.dataset or dataset, args.images
    title = data.SOURCES[name].title
    if files and (args.indices or args.dataset):
        raise BadInput("--indices and --dataset are about images of a data set: leave them out, or "
                       "the image files")
    there = (args.data_dir / data.SOURCES[name].folder).exists() or name == "shapes"
    if not files and not there and not args.dataset:
        files = sorted((HERE / "assets" / "examples").glob("*.png"))[:args.count]
        if args.indices or not files:
            raise BadInput(f"{title} is not in {args.data_dir}: give image files, --data-dir, or "
                           f"--dataset {name} to download it")
    if files:
        images = torch.stack([read_image(file, size) for file in files])
        return images, [file.stem for file in files], "image files"
    loaded = data.load_dataset(name, args.data_dir)
    images, labels = ((loaded.test_images, loaded.test_labels) if args.split == "test" else
                      (loaded.train_images, loaded.train_labels))
    chosen = args.indices or list(range(args.count))
    if max(chosen) >= len(images):
        raise BadInput(f"image {max(chosen)}: the {args.split} images of {title} are numbered 0 to "
                       f"{len(images) - 1}; see --indices and --count")
    names = [f"{i} {loaded.classes[label]}" for i, label in zip(chosen, labels[chosen].tolist())]
    return images[chosen], names, f"{title} {args.split} images"


# ------------------------------------------------------------------------------ the program


def draw_noise(images: Tensor, model: mae.MAEViT, seed: int) -> Tensor:
    generator = data.seeded_generator("cpu", seed)
    return torch.rand(len(images), model.encoder.num_patches, generator=generator)     # (B, N)


def prepare(args: argparse.Namespace, kind: str | None = None):
    """What the pictures of a model and images need: model, checkpoint, images, labels, caption."""
    model, checkpoint = data.load_model(args.checkpoint, kind)
    images, labels, source = load_images(args, checkpoint["settings"]["dataset"],
                                         encoder_of(model).image_size)
    caption = f"{source} · {describe(args.checkpoint, checkpoint)}"
    return model, checkpoint, images, labels, caption


def run_reconstruct(args: argparse.Namespace) -> Image.Image:
    model, _, images, labels, caption = prepare(args, "pretrain")
    noise = draw_noise(images, model, args.seed)
    tiles, errors = reconstruct(model, images, noise, args.raw, args.mask_ratio)
    for label, error in zip(labels, errors.tolist()):
        print(f"{label}: error {error:.4f}")
    print(f"mean error of the masked patches, pixels scaled to -1..1: {errors.mean():.4f}")
    caption += " · visible patches not pasted back" if args.raw else ""
    ratio = args.mask_ratio or model.shuffle.mask_ratio
    caption += f" · {conditions(ratio, model.norm_pix_loss)}"
    return draw_triples(tiles, "Reconstructions", caption, errors.tolist(), labels)


def run_ratios(args: argparse.Namespace) -> Image.Image:
    model, _, images, _, caption = prepare(args, "pretrain")
    return draw_ratios(model, images, draw_noise(images, model, args.seed), caption)


def run_timeline(args: argparse.Namespace) -> Image.Image | list[Image.Image]:
    epochs, settings = read_epochs(args.RUN), read_settings(args.RUN)
    caption = describe_run(args.RUN)
    if isinstance(settings.get("mask_ratio"), float):
        norm_pix_loss = settings.get("norm_pix_loss") is True
        caption += f" · {conditions(settings['mask_ratio'], norm_pix_loss)}"
    if args.out.suffix == ".png":
        return draw_timeline(epochs, caption, args.count)
    shown = sorted(epochs)[::-math.ceil(len(epochs) / 60)][::-1]        # the last is one of them
    return [draw_triples(epochs[epoch][:args.count], f"Reconstructions after epoch {epoch}",
                         caption) for epoch in shown]


def run_curves(args: argparse.Namespace) -> Image.Image:
    runs = {}
    for path in args.logs:
        label = describe_run(path)
        runs[label if label not in runs else str(path)] = read_log(path)
    return draw_curves(runs, args.x, args.log, args.metrics)


def run_attention(args: argparse.Namespace) -> Image.Image:
    model, checkpoint, images, labels, caption = prepare(args)
    if checkpoint["settings"].get("pool") == "mean" and not args.patch:
        caption += " · its head reads the patches, not this token"
    encoder = encoder_of(model)
    side, depth = encoder.image_size // encoder.patch_size, len(encoder.blocks)
    if args.patch and (len(args.patch) != 2 or max(args.patch) >= side):
        raise BadInput(f"--patch needs ROW,COLUMN, each from 0 to {side - 1}")
    if args.block and args.block > depth:
        raise BadInput(f"--block {args.block}: the encoder has {depth} blocks")
    return draw_attention(model, images, caption, labels, args.patch, (args.block or depth) - 1)


def run_embeddings(args: argparse.Namespace) -> Image.Image:
    model, checkpoint = data.load_model(args.checkpoint)
    return draw_embeddings(model, describe(args.checkpoint, checkpoint))


def run_architecture(args: argparse.Namespace) -> Image.Image:
    if args.checkpoint:
        model, _, images, _, caption = prepare(args, "pretrain")
    else:
        torch.manual_seed(args.seed)
        model = mae.MAEViT().eval()
        images, _, source = load_images(args, "cifar10", model.encoder.image_size)
        caption = f"{source} · MAEViT with its defaults (recipe full), untrained"
    return draw_architecture(model, images[0], draw_noise(images[:1], model, args.seed), caption)


def whole_numbers(text: str) -> list[int]:
    """"0,3,12" -> [0, 3, 12]; for a flag."""
    return [data.number(int, 0, 10**6)(part) for part in text.split(",")]


FLAGS = {
    "images": dict(nargs="*", metavar="IMAGE", type=Path, help="image files, cut to their middle "
                   "square and resized (default: images of the data set)"),
    "RUN": dict(metavar="RUN", type=Path, help="folder of a run of pretrain.py"),
    "logs": dict(nargs="+", metavar="RUN_OR_CSV", type=Path, help="folders of runs, or log.csv "
                 "files of runs"),
    "--checkpoint": dict(metavar="FILE", type=Path, help="checkpoint, or a run's folder"),
    "--indices": dict(type=whole_numbers, metavar="I,J,...", help="which images of the data set, "
                      "counted from 0 (default: the first ones)"),
    "--count": dict(type=data.number(int, 1, 60), metavar="N", help="how many images of the data "
                    "set or run"),
    "--split": dict(choices=["train", "test"], default="test", help="of the data set"),
    "--dataset": dict(choices=list(data.SOURCES), help="data set, downloaded if it is missing "
                      "(default: the checkpoint's, never downloaded)"),
    "--data-dir": dict(type=Path, default=Path("data"), metavar="DIR", help="folder that holds the "
                       "folders of the data sets"),
    "--seed": dict(type=data.number(int, 0, 2**32 - 1), default=0, metavar="S",
                   help="of the masks"),
    "--mask-ratio": dict(type=data.number(float, 0, 1, open_ends=True), metavar="R", help="part of "
                         "the patches that is hidden (default: the model's)"),
    "--raw": dict(action="store_true", help="show the bare prediction, without the visible patches "
                  "pasted back"),
    "--x": dict(choices=["epoch", "time"], default="epoch", help="horizontal axis: epochs, or the "
                "time that they took"),
    "--log": dict(action="store_true", help="logarithmic vertical axes, except for accuracy"),
    "--metric": dict(action="append", choices=list(METRICS), dest="metrics", help="what to draw; "
                     f"may be repeated (default: {', '.join(USUAL)})"),
    "--patch": dict(type=whole_numbers, metavar="ROW,COLUMN", help="the patch that looks, counted "
                    "from 0 (default: the class token looks)"),
    "--block": dict(type=data.number(int, 1), metavar="N", help="block of the encoder, counted "
                    "from 1 (default: the last)"),
    "--out": dict(type=Path, metavar="FILE", help="file to write"),
}
IMAGES = ("images", "--checkpoint", "--indices", "--split", "--dataset", "--data-dir", "--count")
SHIPPED = HERE / "results" / "weights" / "pretrain-pixels.pt"
COMMANDS = {    # name: (function, what it draws, flags, their defaults)
    "reconstruct": (run_reconstruct, "masked images, their reconstructions and the originals",
                    (*IMAGES, "--seed", "--mask-ratio", "--raw"),
                    dict(checkpoint=SHIPPED, count=12, out=Path("reconstruction.png"))),
    "ratios": (run_ratios, "reconstructions at mask ratios from 0.5 to 0.95", (*IMAGES, "--seed"),
               dict(checkpoint=SHIPPED, count=6)),
    "timeline": (run_timeline, "the same images and masks over a run; .png is a sheet, .gif and "
                 ".webp are animations", ("RUN", "--count"), dict(count=6)),
    "curves": (run_curves, "losses, accuracies and learning rates of runs",
               ("logs", "--x", "--log", "--metric"), {}),
    "attention": (run_attention, "where the class token or a patch looks, head by head",
                  (*IMAGES, "--patch", "--block"), dict(checkpoint=SHIPPED, count=3)),
    "embeddings": (run_embeddings, "position embeddings compared, filters of the patch embedding",
                   ("--checkpoint",), dict(checkpoint=SHIPPED)),
    "architecture": (run_architecture, "an image on its way through the model, with all shapes; "
                     "without --checkpoint MAEViT with its defaults, untrained",
                     (*IMAGES, "--seed"), dict(count=1)),
}


def make_parser() -> data.Parser:
    parser = data.Parser(description="Draw a picture; without a subcommand: reconstruct. "
                         "SUBCOMMAND --help explains its flags.")
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, (run, text, flags, defaults) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"Draw {text}.")
        for flag in (*flags, "--out"):
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(**{"out": Path(f"{name}.png"), "run": run, **defaults})
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv = ["reconstruct", *argv]
    args = make_parser().parse_args(argv)
    kinds = (".png", ".gif", ".webp") if args.run is run_timeline else (".png",)
    if args.out.suffix not in kinds:
        raise BadInput(f"--out {args.out}: its name must end in {' or '.join(kinds)}")
    if args.out.resolve() in [file.resolve() for file in getattr(args, "images", [])]:
        raise BadInput(f"--out {args.out} is one of the pictures to read: name another file")
    drawn = args.run(args)
    (save_animation if isinstance(drawn, list) else save_png)(drawn, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
