"""Every picture of this repository, drawn with Pillow alone: a library and a program.

Input: a model and images, or what runs have written. Output: a PIL image; of the program, a file.

    reconstruct   masked | reconstruction | original        MAE, figure 2
    ratios        the same images at growing mask ratios    MAE, figure 4
    timeline      the same images and masks over a run      a sheet or an animation
    curves        losses, accuracies, learning rates        of one run or several
    compute       accuracy against arithmetic               with and without pre-training
    attention     where a token looks, head by head         ViT, section 4.5
    embeddings    positions compared, patch filters         ViT, figure 7
    architecture  a batch on its way through the model      MAE, figure 1

The library comes first: the sheet that all pictures are drawn on, each picture in this order, what
reads the input. The program comes last. Without arguments it draws `reconstruct`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    ViT   Dosovitskiy et al. 2020, An Image Is Worth 16x16 Words, arXiv 2010.11929
"""
import argparse
import csv
import functools
import io
import math
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

font = functools.cache(ImageFont.load_default)          # of a size; it comes with Pillow


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

    def box(self, x: int, y: int, side: int, color, fill=None, radius: int = 0) -> None:
        corners = [SHARP * value for value in (x, y, x + side, y + side)]
        self.draw.rounded_rectangle(corners, SHARP * radius, fill, color, SHARP * 2)


HEAT = np.array([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10),
                 (252, 255, 164)])                          # dark to bright, also in greys


def heat(values: Tensor) -> Tensor:
    """Numbers 0..1 to colours: (..., H, W) -> uint8 (..., 3, H, W)."""
    places = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values.cpu().numpy(), places, channel) for channel in HEAT.T]
    return torch.from_numpy(np.stack(channels, axis=-3).round().astype(np.uint8))


def mosaic(pictures: Tensor, size: int) -> Tensor:
    """Little square pictures in rows, as large as fits: uint8 (M, 3, h, h) -> (3, size, size)."""
    M, _, h, _ = pictures.shape
    columns, gap = math.isqrt(M), 2
    rows = math.ceil(M / columns)
    enlarge = max(1, (size // rows - gap) // h)
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    h, step = h * enlarge, h * enlarge + gap
    top, left = (size - rows * step + gap) // 2, (size - columns * step + gap) // 2
    page = torch.full((3, size, size), 255, dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        y, x = top + i // columns * step, left + i % columns * step
        page[:, y:y + h, x:x + h] = picture
    return page


def draw_grid(rows: list[list[tuple[Tensor, str]]], column_titles: list[list[str]], title: str,
              caption: str, color_label: str = "",
              outline: tuple[int, int, int] | None = None) -> Image.Image:
    """Tiles in rows and columns, as large as the sheet's width allows.

    rows: tiles uint8 (3, H, W), all of one size, and the text under each; column_titles: in groups
    with wider gaps between them; color_label: what the colours of `heat` mean; outline: y, x and
    side of a square to outline in every tile.
    """
    H, W = rows[0][0][0].shape[-2:]
    count, group_gap = sum(map(len, column_titles)), 5 * GAP
    room = WIDTH - 2 * MARGIN - GAP * count - group_gap * (len(column_titles) - 1)
    enlarge = max(1, min(320, room // count) // max(H, W))
    width, height = W * enlarge, H * enlarge                # of a tile
    lefts, x = [], MARGIN
    for group in column_titles:
        lefts += [x + i * (width + GAP) for i in range(len(group))]
        x = lefts[-1] + width + group_gap
    pitch = height + (42 if any(note for row in rows for _, note in row) else GAP)
    sheet = Sheet(max(lefts[-1] + width + MARGIN, 680),
                  34 + len(rows) * pitch + (38 if color_label else -GAP), title, caption)
    for left, column_title in zip(lefts, sum(column_titles, [])):
        sheet.text(left + width / 2, sheet.top + 24, column_title, GREY, "ms", width)
    for r, row in enumerate(rows):
        y = sheet.top + 34 + r * pitch
        for left, (tile, note) in zip(lefts, row):
            sheet.tile(left, y, tile, enlarge)
            sheet.text(left + width / 2, y + height + 24, note, GREY, "ms", width)
            if outline:
                top, start, side = (value * enlarge for value in outline)
                sheet.box(left + start, y + top, side, PAPER)
    if color_label:
        sheet.tile(MARGIN, sheet.bottom - 20, heat(torch.linspace(0, 1, 240).expand(20, -1)))
        sheet.text(MARGIN + 256, sheet.bottom - 10, color_label, anchor="lm")
    return sheet.picture()


def save_png(picture: Image.Image, path: Path | str) -> None:
    """Write a picture whole or not at all. Raises OSError if it cannot be written."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    data.write_file(path, content.getvalue())


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """Write a GIF that dwells on its last frame. Raises OSError."""
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[400] * (len(frames) - 1) + [3000])    # milliseconds
    data.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------ reconstructions


def conditions(mask_ratio: float, norm_pix_loss: bool) -> str:
    """What a caption says of a model's task."""
    normalized = " · predicts normalised patches, shown with each patch's own mean and deviation"
    return f"mask ratio {mask_ratio:g}" + (normalized if norm_pix_loss else "")


def random_noise(images: Tensor, model: mae.MAEViT, seed: int) -> Tensor:
    """Noise (B, N), made on the CPU: one seed masks the same patches on every device."""
    generator = data.seeded_generator("cpu", seed)
    return torch.rand(len(images), model.encoder.num_patches, generator=generator)


@torch.no_grad()
def reconstruct(model: mae.MAEViT, images: Tensor, noise: Tensor, raw: bool = False,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor]:
    """Mask images and let the model fill them in, on the model's device.

    images uint8 (B, 3, H, W), noise (B, N) -> tiles uint8 (B, 3, 3, H, W): masked, reconstruction,
    original; error (B,): the mean squared error over the masked patches, of pixels scaled to -1..1.
    Both are on the CPU. The visible patches are pasted back unless `raw`. mask_ratio: instead
    of the model's own. Raises BadInput if it leaves no patch visible or none masked.
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
    cells = []
    for (masked, filled, original), note, label in zip(tiles, notes, labels or [""] * B):
        cells += [(masked, ""), (filled, note), (original, label)]
    rows = [cells[i:i + 3 * across] for i in range(0, len(cells), 3 * across)]
    return draw_grid(rows, [["masked", "reconstruction", "original"]] * across, title, caption)


def save_epoch(folder: Path, epoch: int, model: mae.MAEViT, images: Tensor, noise: Tensor,
               caption: str) -> None:
    """The reconstructions after an epoch: a picture, epoch-0001.png, and the same tiles as an
    array, epoch-0001.npy, from which `timeline` draws. Raises OSError.

    epoch: 0 before training; images uint8 (B, 3, H, W), noise (B, N); caption: data set and run.
    """
    tiles, errors = reconstruct(model, images, noise)
    array = io.BytesIO()
    np.save(array, tiles.numpy())
    data.write_file(folder / f"epoch-{epoch:04}.npy", array.getvalue())
    caption += f" · {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    picture = draw_triples(tiles, title_of_epoch(epoch), caption, errors.tolist())
    save_png(picture, folder / f"epoch-{epoch:04}.png")


def title_of_epoch(epoch: int) -> str:
    return f"Reconstructions after epoch {epoch}" if epoch else "Reconstructions before training"


def draw_ratios(model: mae.MAEViT, images: Tensor, noise: Tensor, caption: str,
                ratios=(0.5, 0.75, 0.85, 0.95)) -> Image.Image:
    """One row per image, with more and more of it hidden (MAE, figure 4).

    images uint8 (B, 3, H, W), noise (B, N): what is hidden at one ratio is hidden at all higher
    ones. Raises BadInput if a ratio leaves no patch visible or none masked.
    """
    rows, column_titles = [[(image, "")] for image in images], [["original"]]
    for ratio in ratios:
        column_titles.append([f"{100 * ratio:g} % masked", "reconstruction"])
        tiles, errors = reconstruct(model, images, noise, mask_ratio=ratio)
        for row, (masked, filled, _), error in zip(rows, tiles, errors):
            row += [(masked, ""), (filled, f"error {error:.4f}")]
    caption += f" · pre-trained with {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    return draw_grid(rows, column_titles, "How much can be hidden?", caption)


def draw_timeline(epochs: dict[int, Tensor], caption: str, count: int = 6) -> Image.Image:
    """The first `count` images of a run at up to eight epochs, early to late, as one sheet.

    epochs: for each epoch, in order, tiles uint8 (B, 3, 3, H, W) from `read_epochs`. Most is
    learned early, so the epochs that are shown lie closer there.
    """
    numbers = np.array(list(epochs))
    wanted = [numbers[0], *np.geomspace(1, max(numbers[-1], 1), 7)]
    shown = sorted({int(numbers[abs(numbers - number).argmin()]) for number in wanted})
    last = epochs[shown[-1]][:count]
    rows = [[(last[i, 0], ""), *((epochs[epoch][i, 1], "") for epoch in shown), (last[i, 2], "")]
            for i in range(len(last))]
    column_titles = [["masked"], [f"epoch {epoch}" if epoch else "untrained" for epoch in shown],
                     ["original"]]
    return draw_grid(rows, column_titles, "Reconstructions as pre-training goes on", caption)


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
    first, last = (10 ** low, 10 ** high) if log else (low, high)
    if log and high - low > 1:
        every = math.ceil((high - low) / 8)                 # 1, 10, 100, ... or fewer
        values = [m * 10.0 ** power for power in range(math.floor(low), math.ceil(high) + 1, every)
                  for m in ((1,) if high - low > 3 else (1, 2, 5))]
        values = [value for value in values if first <= value <= last]
    else:
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
               lines: list[tuple], log: bool, labels: list[tuple] = ()) -> None:
    """Axes and curves in the box (left, top, right, bottom).

    lines: (xs (n,), ys (n,), color, width), ys NaN for a gap, and log10 of the values if `log`;
    labels: (x, y, text, whether below the point, to the right, or above it, to the left).
    """
    left, top, right, bottom = box[0] + 96, box[1] + 44, box[2] - 16, box[3] - 80
    sheet.text(left, box[1] + 32, title, anchor="ls", fit=right - left)
    sheet.text((left + right) / 2, bottom + 46, x_title, GREY, "ma")
    every_y = np.concatenate([ys[np.isfinite(ys)] for _, ys, _, _ in lines])
    if not len(every_y):
        sheet.text((left + right) / 2, (top + bottom) / 2, "no value to draw", GREY, "mm")
        every_y = np.zeros(1)
    room = 1.15 if labels else 1.02                         # to the right of the last point
    x1 = room * max(1e-9, *(xs.max() for xs, _, _, _ in lines))     # from 0
    y0, y1 = every_y.min(), every_y.max()
    pad = max(0.08 * (y1 - y0), 0.01 * max(abs(y0), abs(y1))) or 0.05
    y0, y1 = y0 - pad if log or y0 < 0 else max(y0 - pad, 0), y1 + pad

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x1 * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for tick, label in ticks(y0, y1, log):
        y = round(place(0, tick)[1])
        sheet.line([(left, y), (right, y)], FAINT)
        sheet.text(left - 10, y, label, GREY, "rm")
    for tick, _ in ticks(0, x1, log=False):
        if x_title != "epoch" or tick == round(tick):       # there is no half of an epoch
            x = round(place(tick, y0)[0])
            sheet.line([(x, bottom), (x, bottom + 8)], GREY)
            sheet.text(x, bottom + 12, f"{tick:g}", GREY, "ma")
    sheet.line([(left, top), (left, bottom), (right, bottom)], GREY)
    for xs, ys, color, width in lines:
        finite = np.flatnonzero(np.isfinite(ys))
        for part in np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1):
            if len(part):
                sheet.line([place(xs[i], ys[i]) for i in part], color, width)
    for x, y, text, below in labels:
        x, y = place(x, y)
        if below:
            sheet.text(x + 14, y + 6, text, GREY, fit=right - x - 14, size=20)
        else:
            sheet.text(x - 14, y - 6, text, GREY, "rs", fit=x - 14 - left, size=20)


def draw_legend(labels: list[str], height: int, title: str, caption: str) -> tuple[Sheet, int]:
    """A sheet with a legend, and the height of the legend; below it are `height` pixels."""
    room = WIDTH - 2 * MARGIN
    entry_width = min(room, int(max(map(text_width, labels))) + 110)
    columns = room // entry_width
    legend_height = 38 * math.ceil(len(labels) / columns) + 16
    sheet = Sheet(WIDTH, legend_height + height, title, caption)
    for i, (label, color) in enumerate(zip(labels, COLORS)):
        left, y = MARGIN + i % columns * entry_width, sheet.top + 18 + i // columns * 38
        sheet.line([(left, y), (left + 52, y)], color, THICK)
        sheet.text(left + 64, y, label, anchor="lm", fit=entry_width - 64)
    return sheet, legend_height


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
    x_title = "epoch"
    every_x = [np.array([row["epoch"] for row in rows], float) for rows in runs.values()]
    if x == "time":
        every_x = [np.nan_to_num([row["seconds"] for row in rows], posinf=0).clip(0, 1e9).cumsum()
                   for rows in runs.values()]
        unit, seconds = ("hours", 3600) if np.concatenate(every_x).max() > 7200 else ("minutes", 60)
        x_title, every_x = f"time in {unit}", [xs / seconds for xs in every_x]
    if any(METRICS[name][2] for name in shown):
        caption = f"{caption} · thick: test, thin: train".removeprefix(" · ")
    room, height = WIDTH - 2 * MARGIN, 460                  # height: of a panel
    across = 3 if len(shown) == 3 else min(2, len(shown))
    width = room // across
    sheet, legend_height = draw_legend(list(runs), height * math.ceil(len(shown) / across),
                                       "Training curves", caption)
    for i, name in enumerate(shown):
        title, train, test = METRICS[name]
        logarithmic, lines = log and name != "accuracy", []
        for rows, xs, color in zip(runs.values(), every_x, COLORS):
            if train not in rows[0]:                        # its test_loss is another metric's
                continue
            for column in (train, test):
                if column in rows[0]:
                    ys = np.array([row[column] for row in rows], dtype=float)
                    ys[~(abs(ys) < LARGEST)] = math.nan
                    if logarithmic:
                        ys[~(ys > SMALLEST)] = math.nan
                    thick = THIN if test and column == train else THICK
                    lines.append((xs, np.log10(ys) if logarithmic else ys, color, thick))
        left, top = MARGIN + i % across * width, sheet.top + legend_height + i // across * height
        draw_panel(sheet, (left, top, left + width, top + height), title, x_title, lines,
                   logarithmic)
    return sheet.picture()


def draw_compute(families: dict[str, list[tuple]], caption: str) -> Image.Image:
    """What whole runs reach, against the arithmetic of all their training: a dot for each run, a
    line through the mean of those of equal arithmetic (several seeds), named after the first.

    families: for each label in the legend, (PFLOP, accuracy in %, name) of at least one run.
    """
    lines, labels, height = [], [], 620                     # height: of the panel
    for i, (points, color) in enumerate(zip(families.values(), COLORS)):
        xs, ys, names = zip(*points)
        places, first, which = np.unique(xs, return_index=True, return_inverse=True)
        means = np.bincount(which, ys) / np.bincount(which)
        lines.append((places, means, color, THIN))
        lines += [(np.array([x]), np.array([y]), color, THICK) for x, y in zip(xs, ys)]     # dots
        below = i == 0                                      # names of the first family
        labels += [(x, y, names[j], below) for x, y, j in zip(places, means, first)]
    sheet, legend_height = draw_legend(list(families), height, "Accuracy against compute", caption)
    top = sheet.top + legend_height
    draw_panel(sheet, (MARGIN, top, WIDTH - MARGIN, top + height),
               "test accuracy after the last epoch, in %",
               "PFLOP of training, pre-training included", lines, log=False, labels=labels)
    return sheet.picture()


# ------------------------------------------------------------------------------ attention


def encoder_of(model: nn.Module) -> mae.Encoder:
    return model.encoder if isinstance(model, mae.MAEViT) else model    # a classifier is one


@torch.no_grad()
def draw_attention(model: nn.Module, images: Tensor, caption: str, labels: list[str],
                   patch: tuple[int, int] | None, block: int) -> Image.Image:
    """Where a token looks in whole images, head by head (ViT, section 4.5).

    images uint8 (B, 3, H, W); patch: (row, column) of the query, or None for the class token;
    block: its index, from 0. Each map is scaled by its own largest weight; the weight on the class
    token is left out.
    """
    encoder = encoder_of(model)
    p, side = encoder.patch_size, encoder.image_size // encoder.patch_size
    query = 0 if patch is None else 1 + patch[0] * side + patch[1]
    maps = encoder.attention_maps(data.scale(images))[block][:, :, query, 1:]       # (B, h, N)
    maps = torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1)                 # (B, h+1, N)
    maps = (maps / maps.amax(dim=-1, keepdim=True)).unflatten(-1, (side, side))
    colors = heat(maps.repeat_interleave(p, -2).repeat_interleave(p, -1))   # (B, h+1, 3, H, W)
    grey = images.float().mean(dim=1)[:, None, None]                        # (B, 1, 1, H, W)
    overlaid = (0.35 * grey + 0.65 * colors).round().to(torch.uint8)
    rows = [[(image, label), *((tile, "") for tile in tiles)]
            for image, label, tiles in zip(images, labels, overlaid)]
    column_titles = [["image"], [f"head {h + 1}" for h in range(encoder.heads)], ["mean"]]
    name = "the class token" if patch is None else f"patch {patch[0]},{patch[1]}"
    caption += f" · block {block + 1} of {encoder.depth} · nothing masked"
    return draw_grid(rows, column_titles, f"Where {name} looks", caption,
                     "0 to the largest weight of each map",
                     patch and (patch[0] * p, patch[1] * p, p))


# ------------------------------------------------------------------------------ embeddings


@torch.no_grad()
def draw_embeddings(model: nn.Module, caption: str) -> Image.Image:
    """Each position's embedding compared with all others (ViT, figure 7), and the patch filters.

    The map at row i, column j shows the cosine similarity of the position embedding of patch (i, j)
    with those of all patches, after subtracting their mean, which says nothing about position. Of
    32 x 32 patches every second row and column has a map. A filter is the weights of one output for
    the pixels of a patch, scaled by its largest weight. Those with the largest norm are shown.
    """
    encoder, size = encoder_of(model), 544                  # pixels
    side = encoder.image_size // encoder.patch_size
    every = math.ceil(side / 16)
    positions = {"encoder": encoder.pos_embed[0]}           # (N, D)
    if isinstance(model, mae.MAEViT):                       # (N, D'), without the class token's
        positions["decoder"] = model.decoder.pos_embed[0, 1:]
    tiles = []
    for embedding in positions.values():
        embedding = F.normalize(embedding - embedding.mean(dim=0), dim=1)
        similarity = (embedding @ embedding.T).view(side, side, side, side)
        similarity = similarity[::every, ::every].flatten(0, 1)         # (maps, side, side)
        tiles.append((mosaic(heat((similarity + 1) / 2), size), ""))
    filters = encoder.patch_embed.proj.weight               # (D, 3, p, p)
    count = min(14, math.isqrt(encoder.dim)) ** 2           # as many as fill a square
    filters = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)[:count]]
    filters = filters / filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)
    tiles.append((mosaic(data.unscale(filters), size), ""))
    column_titles = [*([f"position embeddings of the {name}"] for name in positions),
                     [f"{count} of {encoder.dim} patch filters"]]
    return draw_grid([tiles], column_titles, "Position embeddings and patch filters", caption,
                     "each map: cosine similarity of its position with all others, -1 to 1")


# ------------------------------------------------------------------------------ architecture

STAGE = 224                     # pixels: the side of a picture in the figure
ORANGE = torch.tensor([230, 120, 0], dtype=torch.uint8)[:, None, None]          # class token
SLATE = torch.tensor([150, 172, 205], dtype=torch.uint8)[:, None, None]         # mask tokens


def draw_flow(stages: list[tuple], title: str, caption: str) -> Image.Image:
    """Stages, four in a row, with an arrow from each to the next.

    stages: (name, little pictures uint8 (M, 3, h, h) or the lines in a box, note, text over the
    arrow, text under it).
    """
    step, pitch = (WIDTH - 2 * MARGIN - STAGE) // 3, STAGE + 172
    sheet = Sheet(WIDTH, math.ceil(len(stages) / 4) * pitch - 96, title, caption)
    corners = [(MARGIN + i % 4 * step, sheet.top + 36 + i // 4 * pitch) for i in range(len(stages))]
    for (name, content, note, *_), (x, y) in zip(stages, corners):
        middle = x + STAGE / 2
        sheet.text(middle, y - 12, name, anchor="ms")
        sheet.text(middle, y + STAGE + 30, note, GREY, "ms")
        if isinstance(content, Tensor):
            sheet.tile(x, y, mosaic(content, STAGE))
        else:
            sheet.box(x, y, STAGE, GREY, fill=(246, 248, 250), radius=14)
            for i, line in enumerate(content):
                sheet.text(middle, y + STAGE / 2 + 40 * (i - (len(content) - 1) / 2), line,
                           anchor="mm")
    for (x, y), (x1, y1), (*_, over, under) in zip(corners, corners[1:], stages):
        if y == y1:                                         # to the right
            y += STAGE // 2
            points, turn, fit = [(x + STAGE + 12, y), (x1 - 16, y)], 270, step - STAGE - 24
        else:                                               # around, to the next row
            x, x1, y = x + STAGE // 2, x1 + STAGE // 2, y1 - 84
            points, turn, fit = [(x, y - 12), (x, y), (x1, y), (x1, y1 - 44)], 180, WIDTH
        sheet.line(points)
        end = [SHARP * value for value in (*points[-1], 9)]     # x, y, radius of the arrow's head
        sheet.draw.regular_polygon(end, 3, turn, INK)
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
    patches = encoder.patchify(images)                      # (1, N, 3*p*p)
    tokens = encoder.embed(patches)                         # (1, N, D)
    visible, restore, mask = model.shuffle(tokens, noise)   # (1, K, D), (1, N), (1, N)
    latent = encoder(visible)                               # (1, 1 + K, D)
    filled = decoder.fill_gaps(latent, restore)             # (1, 1 + N, D')
    pred = decoder(latent, restore)                         # (1, N, 3*p*p)
    N, K = patches.shape[1], visible.shape[1]

    def batch(tensor: Tensor) -> str:
        return f"({', '.join(map(str, ['B', *tensor.shape[1:]]))})"

    def cut(patches: Tensor) -> Tensor:                     # (1, N, 3*p*p) -> uint8 (N, 3, p, p)
        return data.unscale(patches[0]).unflatten(1, (3, p, p))

    def box(part: nn.Module, last: str) -> tuple[list[str], str]:       # lines, note
        count = sum(parameter.numel() for parameter in part.parameters())
        return [f"depth {len(part.blocks)}", f"width {part.pos_embed.shape[-1]}",
                f"heads {part.blocks[0].attn.heads}", last], f"{count / 1e6:.2f} M parameters"

    hidden = mask[0].bool()[:, None, None, None]            # (N, 1, 1, 1)
    original = cut(patches)                                 # (N, 3, p, p)
    kept = original[noise[0].argsort()[:K]]                 # (K, 3, p, p)
    class_row = torch.full((math.isqrt(N), 3, p, p), 255, dtype=torch.uint8)
    class_row[0] = ORANGE                                   # the class token on a row of its own
    all_tokens = torch.cat([class_row, torch.where(hidden, SLATE, original)])
    every_patch = torch.eye(N)[:, None]                     # (N, 1, N): masks of one patch each
    errors = torch.stack([model.loss(patches, pred, one) for one in every_patch])       # (N,)
    colors = heat((errors / errors[mask[0].bool()].max())[:, None, None])   # (N, 3, 1, 1)
    predicted = mae.denormalize_patches(pred, patches) if model.norm_pix_loss else pred
    stages = [
        ("images", image[None], "scaled to -1..1", batch(images), "cut up"),
        ("patches", original, f"{N} of {p} x {p} pixels", batch(patches), "embed, add positions"),
        ("tokens", original.masked_fill(hidden, HIDDEN), f"{N - K} of {N} hidden", batch(tokens),
         f"shuffle, keep {K}"),
        ("visible tokens", kept, f"{K}, in shuffled order", batch(visible),
         f"put the class token in front: {batch(latent)}"),
        ("encoder", *box(encoder, "LayerNorm"), batch(latent), "project, fill, unshuffle"),
        ("all positions", all_tokens, "orange: class token, blue: masked", batch(filled),
         "add positions"),
        ("decoder", *box(decoder, "linear head"), batch(pred), "without class token"),
        ("prediction", cut(predicted), "visible: no loss", batch(pred), "compare with"),
        ("original", original, "each patch normalised" if model.norm_pix_loss else "every patch",
         batch(patches), "mean squared error"),
        ("error per patch", colors.masked_fill(~hidden, HIDDEN), "grey: visible, no loss",
         batch(mask), "mean over masked"),
        ("loss", [f"{model.loss(patches, pred, mask):.4f}"], f"over {N - K} patches", "", ""),
    ]
    caption += f" · {conditions(model.shuffle.mask_ratio, model.norm_pix_loss)}"
    return draw_flow(stages, "A masked autoencoder, step by step", caption)


# ------------------------------------------------------------------------------ input

HERE = Path(__file__).parent


def read_image(path: Path | str, size: int) -> Tensor:
    """The middle square of an image file, upright and resized: uint8 (3, size, size).

    16 bits become 8; what is transparent becomes white. Raises BadInput if the file is not a
    picture of a usual kind, or broken or huge; OSError if it cannot be read.
    """
    file = io.BytesIO(Path(path).read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                  # 16 bits
                image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            image = image.convert("RGBA")
    except Exception:           # what Pillow raises on damaged files has no common type
        raise BadInput(f"cannot read the picture {path}, it is damaged, huge or of another kind: "
                       "give a PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file") from None
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    page = Image.new("RGBA", image.size, PAPER)
    page.alpha_composite(image)
    return torch.from_numpy(np.array(page.convert("RGB"))).permute(2, 0, 1)


def read_epochs(run: Path) -> dict[int, Tensor]:
    """What `save_epoch` kept in a run's folder: tiles uint8 (B, 3, 3, H, W) by epoch, in order.

    Raises BadInput if there are none, or one is damaged or shows other images; OSError.
    """
    folder, epochs = run / "reconstructions", {}
    for path in sorted(folder.glob("epoch-*.npy")):
        content = io.BytesIO(path.read_bytes())
        try:
            tiles = torch.from_numpy(np.load(content, allow_pickle=False))
            shape = next(iter(epochs.values()), tiles).shape
            if (tiles.dtype != torch.uint8 or tiles.shape != shape or len(tiles) == 0
                    or shape[1:] != (3, 3, data.SIDE, data.SIDE)):
                raise ValueError("not tiles")
            epochs[int(path.stem.removeprefix("epoch-"))] = tiles
        except Exception:       # what np.load raises for damaged files has no common type
            raise BadInput(f"{path} is damaged, or shows other images than the first epoch: "
                           "delete it") from None
    if not epochs:
        raise BadInput(f"{folder} has no epoch-*.npy, which pretrain.py writes beside its "
                       "pictures: give the folder of a run that still has them, or train again")
    return dict(sorted(epochs.items()))


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, or of the one in a run's folder, as numbers; an empty field is NaN.

    Raises BadInput if it has no row, is cut off or not a log; OSError if it cannot be read.
    """
    path = path / "log.csv" if path.is_dir() else path
    text = path.read_bytes().decode("utf-8-sig", "replace")     # without a byte-order mark
    reader, rows = csv.DictReader(text.splitlines(), restval="cut off"), []
    try:
        if not {"epoch", "seconds"} <= set(reader.fieldnames or ()):
            raise ValueError("other columns")
        for row in reader:
            rows.append({name: float(value or "nan") for name, value in row.items()})
            if not 0 <= rows[-1]["epoch"] < 1e9:
                raise ValueError("not an epoch")
        if not text.endswith(("\n", "\r")):
            raise ValueError("the last number may be cut off")
    except (ValueError, TypeError, csv.Error):              # TypeError: more fields than columns
        raise BadInput(f"{path} is not a log.csv of pretrain.py or finetune.py, or its line "
                       f"{max(reader.line_num, 1)} is damaged: fix or delete it") from None
    if not rows:
        raise BadInput(f"{path} has no epoch yet: wait for the first one, or give another run")
    gaps = sum(not abs(value) < LARGEST for row in rows for value in row.values())
    if gaps:
        print(f"note: {path}: {gaps} values are not finite, or too large, and are drawn as gaps",
              file=sys.stderr)
    return rows


def read_compute(path: Path, names: list[str]) -> dict[str, list[tuple]]:
    """(PFLOP, accuracy, name) of classifiers from a table like results/runs.csv. Those of a
    fine-tuned one include the PFLOP of its pre-training.

    Raises BadInput if the table does not have the runs; OSError.
    """
    table = path.read_text("utf-8", "replace").splitlines()
    families = {"from scratch": [], "pre-trained, then fine-tuned": []}
    try:
        rows = {row["name"]: row for row in csv.DictReader(table)}
        for name in names:
            row = rows[name]
            start = row["init"]                             # the run that pre-trained it, if any
            pflop = float(row["pflop"]) + (float(rows[start]["pflop"]) if start else 0)
            accuracy = float(row["test_accuracy"])
            if not (0 <= pflop < 1e9 and 0 <= accuracy <= 100):
                raise ValueError("not arithmetic and an accuracy")
            families["pre-trained, then fine-tuned" if start else "from scratch"].append(
                (pflop, accuracy, name))
    except (KeyError, ValueError, TypeError, csv.Error):
        raise BadInput(f"{path} has no whole row of each of these classifiers and of their "
                       "pre-training") from None
    return {label: points for label, points in families.items() if points}


def title_of(dataset: str) -> str:
    return data.SOURCES[dataset].title if dataset in data.SOURCES else dataset


def run_label(path: Path, settings: dict) -> str:
    """The name of a run and, if its settings tell, its data set.

    A run is named after its folder; a renamed log or checkpoint, after its file.
    """
    path = path.resolve()
    if path.name in ("checkpoint.pt", "weights.pt", "log.csv"):
        path = path.parent
    name = path.name if path.is_dir() else path.stem
    if "dataset" not in settings:
        return name
    held_out = ", validation" if settings.get("validation") else ""
    return f"{name} ({title_of(str(settings['dataset']))}{held_out})"


def load_images(args: argparse.Namespace, dataset: str, size: int):
    """What to draw: images uint8 (n, 3, size, size), a label for each, where they are from.

    These are the given files, or else test images of the data set. It is downloaded only if
    --dataset asks for it; if it is missing, the examples of this repository take its place. Raises
    BadInput.
    """
    name, files = args.dataset or dataset, args.images
    title = title_of(name)
    if files and (args.indices or args.dataset):
        raise BadInput("give either image files or --dataset and --indices, not both")
    on_disk = (args.data_dir / data.SOURCES[name].folder).exists() or name == "shapes"
    if not files and not on_disk and not args.dataset:
        files = sorted((HERE / "assets" / "examples").glob("*.png"))[:args.count]
        if args.indices or not files:
            raise BadInput(f"{title} is not in {args.data_dir}: give image files, --data-dir, or "
                           f"--dataset {name} to download it")
    if files:
        images = torch.stack([read_image(file, size) for file in files])
        return images, [file.stem for file in files], "image files"
    loaded, chosen = data.load_dataset(name, args.data_dir), args.indices or range(args.count)
    images, labels = loaded.test_images, loaded.test_labels
    if max(chosen) >= len(images):
        raise BadInput(f"image {max(chosen)}: the test images of {title} are numbered 0 to "
                       f"{len(images) - 1}; see --indices and --count")
    names = [f"{i} {loaded.classes[labels[i]]}" for i in chosen]
    return images[list(chosen)], names, f"{title} test images"


# ------------------------------------------------------------------------------ the program


def load(args: argparse.Namespace, kind: str | None = None):
    """What the flags name: model, images, their labels, caption; for `embeddings` no images."""
    model, checkpoint = data.load_model(args.checkpoint, kind)
    settings, program = checkpoint["settings"], data.PROGRAMS[checkpoint["kind"]]
    caption = f"{run_label(args.checkpoint, settings)} · {checkpoint['epoch']} epochs of {program}"
    if "images" not in args:
        return model, None, None, caption
    images, labels, source = load_images(args, settings["dataset"], encoder_of(model).image_size)
    return model, images, labels, f"{source} · {caption}"


def run_reconstruct(args: argparse.Namespace) -> Image.Image:
    """Masked images, their reconstructions and the originals."""
    model, images, labels, caption = load(args, "pretrain")
    noise = random_noise(images, model, args.seed)
    tiles, errors = reconstruct(model, images, noise, args.raw, args.mask_ratio)
    for label, error in zip(labels, errors.tolist()):
        print(f"{label}: error {error:.4f}")
    print(f"mean error of the masked patches, pixels scaled to -1..1: {errors.mean():.4f}")
    caption += " · visible patches not pasted back" if args.raw else ""
    ratio = args.mask_ratio or model.shuffle.mask_ratio
    caption += f" · {conditions(ratio, model.norm_pix_loss)}"
    return draw_triples(tiles, "Reconstructions", caption, errors.tolist(), labels)


def run_ratios(args: argparse.Namespace) -> Image.Image:
    """Reconstructions at mask ratios from 0.5 to 0.95."""
    model, images, _, caption = load(args, "pretrain")
    return draw_ratios(model, images, random_noise(images, model, args.seed), caption)


def run_timeline(args: argparse.Namespace) -> Image.Image | list[Image.Image]:
    """The same images and masks over a run: .png is a sheet, .gif an animation."""
    epochs, settings = read_epochs(args.RUN), data.read_settings(args.RUN)
    caption = run_label(args.RUN, settings)
    if isinstance(settings.get("mask_ratio"), float):
        norm_pix_loss = settings.get("norm_pix_loss") is True
        caption += f" · {conditions(settings['mask_ratio'], norm_pix_loss)}"
    if args.out.suffix == ".png":
        return draw_timeline(epochs, caption, args.count)
    every = math.ceil(len(epochs) / 60)                     # at most 60 frames
    shown = list(epochs)[(len(epochs) - 1) % every::every]  # the last is one of them
    return [draw_triples(epochs[epoch][:args.count], title_of_epoch(epoch), caption)
            for epoch in shown]


def run_curves(args: argparse.Namespace) -> Image.Image:
    """Losses, accuracies and learning rates of runs."""
    runs = {}
    for path in args.logs:
        label = run_label(path, data.read_settings(path if path.is_dir() else path.parent))
        runs[label if label not in runs else str(path)] = read_log(path)
    return draw_curves(runs, args.x, args.log, args.metric)


def run_compute(args: argparse.Namespace) -> Image.Image:
    """Accuracies of whole runs against the arithmetic of all their training."""
    return draw_compute(read_compute(args.TABLE, args.names), f"from {args.TABLE}")


def run_attention(args: argparse.Namespace) -> Image.Image:
    """Where the class token or a patch looks, head by head."""
    model, images, labels, caption = load(args)
    if getattr(model, "pool", None) == "mean" and not args.patch:
        caption += " · its head reads the patches, not this token"
    encoder = encoder_of(model)
    side, depth = encoder.image_size // encoder.patch_size, encoder.depth
    if args.patch and (len(args.patch) != 2 or max(args.patch) >= side):
        raise BadInput(f"--patch needs ROW,COLUMN, each from 0 to {side - 1}")
    if args.block and args.block > depth:
        raise BadInput(f"--block {args.block}: the encoder has {depth} blocks")
    return draw_attention(model, images, caption, labels, args.patch, (args.block or depth) - 1)


def run_embeddings(args: argparse.Namespace) -> Image.Image:
    """Position embeddings compared, and filters of the patch embedding."""
    model, _, _, caption = load(args)
    return draw_embeddings(model, caption)


def run_architecture(args: argparse.Namespace) -> Image.Image:
    """An image on its way through the model, with all shapes. Without --checkpoint the model is
    MAEViT with its defaults, untrained."""
    if args.checkpoint:
        model, images, _, caption = load(args, "pretrain")
    else:
        torch.manual_seed(args.seed)
        model = mae.MAEViT().eval()
        images, _, source = load_images(args, "cifar10", model.encoder.image_size)
        caption = f"{source} · MAEViT with its defaults (recipe full), untrained"
    return draw_architecture(model, images[0], random_noise(images[:1], model, args.seed), caption)


def whole_numbers(text: str) -> list[int]:
    """"0,3,12" -> [0, 3, 12]; for a flag."""
    return [data.number(int, 0, 10**6)(part) for part in text.split(",")]


FLAGS = {
    "images": dict(nargs="*", type=Path, help="files, cut square (default: from the data set)"),
    "RUN": dict(type=Path, help="folder of a run of pretrain.py"),
    "logs": dict(nargs="+", type=Path, help="folders of runs, or log.csv files"),
    "TABLE": dict(type=Path, help="such as results/runs.csv"),
    "names": dict(nargs="+", help="classifiers in the table"),
    "--checkpoint": dict(type=Path, help="file, or a run's folder",
                         default=HERE / "results" / "weights" / "pretrain-pixels.pt"),
    "--indices": dict(type=whole_numbers, help="of test images: 0,3,12 (default: the first)"),
    "--count": dict(type=data.number(int, 1, 60), default=6, help="how many images to draw"),
    "--dataset": dict(choices=data.SOURCES, help="downloaded if it is missing (default: the "
                      "checkpoint's, never downloaded)"),
    "--data-dir": dict(type=Path, default=Path("data"), help="folder of the data sets' folders"),
    "--seed": dict(type=data.number(int, 0, 2**32 - 1), default=0, help="of the masks"),
    "--mask-ratio": dict(type=data.number(float, 0, 1, open_ends=True), help="part of the patches "
                         "that is hidden (default: the model's)"),
    "--raw": dict(action="store_true", help="do not paste the visible patches back"),
    "--x": dict(choices=["epoch", "time"], default="epoch", help="the horizontal axis"),
    "--log": dict(action="store_true", help="logarithmic vertical axes, except for accuracy"),
    "--metric": dict(choices=METRICS, action="append", help="what to draw; may be repeated "
                     f"(default: {', '.join(USUAL)})"),
    "--patch": dict(type=whole_numbers, help="ROW,COLUMN of the patch that looks, counted from 0 "
                    "(default: the class token looks)"),
    "--block": dict(type=data.COUNT, help="which one of the encoder, counted from 1 "
                    "(default: the last)"),
    "--out": dict(type=Path, help="file to write"),
}
IMAGES = ("images", "--checkpoint", "--indices", "--count", "--dataset", "--data-dir")


def make_parser() -> data.Parser:
    parser = data.Parser(description="Draw a picture; without arguments or with flags alone: "
                         "reconstruct. SUBCOMMAND --help explains its flags.")
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")

    def add(run, *flags: str, **defaults) -> None:
        name = run.__name__.removeprefix("run_")
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        for flag in (*flags, "--out"):
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(**{"run": run, "out": Path(f"{name}.png"), **defaults})

    add(run_reconstruct, *IMAGES, "--seed", "--mask-ratio", "--raw", count=12,
        out=Path("reconstruction.png"))
    add(run_ratios, *IMAGES, "--seed")
    add(run_timeline, "RUN", "--count")
    add(run_curves, "logs", "--x", "--log", "--metric")
    add(run_compute, "TABLE", "names")
    add(run_attention, *IMAGES, "--patch", "--block", count=3)
    add(run_embeddings, "--checkpoint")
    add(run_architecture, *IMAGES, "--seed", count=1, checkpoint=None)
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["reconstruct", *argv]
    args = make_parser().parse_args(argv)
    kinds = (".png", ".gif") if args.run is run_timeline else (".png",)
    if args.out.suffix not in kinds:
        raise BadInput(f"--out {args.out}: its name must end in {' or '.join(kinds)}")
    if args.out.resolve() in [file.resolve() for file in getattr(args, "images", [])]:
        raise BadInput(f"--out {args.out} is one of the pictures to read: name another file")
    drawn = args.run(args)
    save = save_animation if isinstance(drawn, list) else save_png
    save(drawn, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
