"""Every picture of this repository, drawn with Pillow alone; a library and a program.

What goes in: a model and images, or the logs and pictures of runs. What comes out: a PIL image,
on the command line a file.

    reconstruct   masked | reconstruction | original        MAE, figure 2
    ratios        the same images at growing mask ratios    MAE, figure 4
    timeline      the same images and masks over a run      sheet or animation
    curves        losses, accuracies, learning rates        one run or many
    attention     where a token looks, head by head         ViT, section 4.5
    embeddings    positions compared, patch filters         ViT, figure 7
    architecture  a batch on its way through the model      MAE, figure 1

First come the shared pieces (sheet, tiles, colours), then each picture's function, in this order,
then what reads the input, then the program. Without arguments it draws `reconstruct`.

Sources:
    MAE   He et al. 2021, Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377
    ViT   Dosovitskiy et al. 2020, An Image Is Worth 16x16 Words, arXiv 2010.11929
"""
import argparse
import csv
import functools
import io
import itertools
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
from data import BadInput


# ------------------------------------------------------------------------------ the sheet

WIDTH, MARGIN, GAP = 1720, 40, 6        # pixels: about twice the width of a README
INK, GREY, FAINT, PAPER = (31, 35, 40), (95, 103, 112), (222, 226, 231), (255, 255, 255)
ORANGE, SLATE = (230, 120, 0), (150, 172, 205)      # class token, mask tokens
HIDDEN = 195                            # the grey level of a masked patch
SHARP = 4                               # lines are drawn this many times larger, then reduced


@functools.lru_cache
def font(size: int):
    return ImageFont.load_default(size)     # the scalable one that Pillow brings along


def wrap(text: str, width: float) -> list[str]:
    """Break text of size 24 into lines of at most `width` pixels, between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(24).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class Sheet:
    """A white page with a title and a caption, readable on a light and on a dark background.

    x and y are pixels from its top left corner; below `top` are `height` pixels for the picture.
    """

    def __init__(self, width: int, height: int, title: str, caption: str) -> None:
        lines = wrap(caption, width - 2 * MARGIN) if caption else []
        self.top = MARGIN + 60 + 32 * len(lines)
        self.image = Image.new("RGB", (width, self.top + height + MARGIN), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.text(MARGIN, MARGIN, title, 32, fit=width - 2 * MARGIN)
        for i, line in enumerate(lines):
            self.text(MARGIN, MARGIN + 46 + 32 * i, line, color=GREY, fit=width - 2 * MARGIN)

    def text(self, x: float, y: float, text: str, size: int = 24, color=INK, anchor: str = "la",
             fit: float = math.inf) -> None:
        """One line, made smaller and then cut until it is at most `fit` pixels wide."""
        text = "".join(c if " " <= c <= "~" or c in "·…" else "?" for c in text)   # has a glyph
        if font(size).getlength(text) > fit:
            size = max(16, int(size * fit / font(size).getlength(text)))
        while len(text) > 1 and font(size).getlength(text) > fit:
            text = text[:-2] + "…"
        self.draw.text((x, y), text, color, font(size), anchor)

    def tile(self, x: int, y: int, pixels: Tensor, enlarge: int = 1) -> None:
        """uint8 (3, H, W), every pixel a sharp square of enlarge x enlarge."""
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        size = (picture.width * enlarge, picture.height * enlarge)
        self.image.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))

    def line(self, points, color=INK, width: float = 2, dashed: bool = False) -> None:
        """An anti-aliased line through points (n, 2)."""
        points = np.asarray(points, dtype=float)
        corner = np.floor(points.min(axis=0)).astype(int) - 4
        size = np.ceil(points.max(axis=0)).astype(int) + 4 - corner
        mask = Image.new("L", tuple(size * SHARP))
        for part in dashes(points) if dashed else [points]:
            ImageDraw.Draw(mask).line([tuple(p) for p in (part - corner) * SHARP], 255,
                                      round(width * SHARP), "curve")
        self.image.paste(color, tuple(corner), mask.reduce(SHARP))

    def arrow(self, points) -> None:
        """A line through points (n, 2) with a head at its end."""
        (x0, y0), (x1, y1) = points[-2:]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = 12 * (x1 - x0) / length, 12 * (y1 - y0) / length
        self.line(points, width=2.5)
        self.line([(x1 - dx - dy / 1.6, y1 - dy + dx / 1.6), (x1, y1),
                   (x1 - dx + dy / 1.6, y1 - dy - dx / 1.6)], width=2.5)

    def color_bar(self, y: int, low: str, high: str, what: str) -> None:
        x = MARGIN + int(font(22).getlength(low)) + 12
        self.text(MARGIN, y + 10, low, 22, anchor="lm")
        self.tile(x, y, heat(torch.linspace(0, 1, 240).expand(20, -1)))
        self.text(x + 252, y + 10, f"{high}   {what}", 22, anchor="lm")


def dashes(points: np.ndarray, on: float = 9, off: float = 7) -> list[np.ndarray]:
    """Cut the line through points (n, 2) into dashes, by the distance along it, in pixels."""
    steps = np.hypot(*np.diff(points, axis=0).T)
    along = np.concatenate([[0], np.cumsum(steps)])         # (n,)
    parts = []
    for start in np.arange(0, along[-1], on + off):
        end = min(start + on, along[-1])
        places = np.concatenate([[start], along[(along > start) & (along < end)], [end]])
        parts.append(np.stack([np.interp(places, along, axis) for axis in points.T], axis=1))
    return parts


HEAT = torch.tensor([(0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10),
                     (252, 255, 164)])                      # dark to bright, also in greys


def heat(values: Tensor) -> Tensor:
    """Numbers 0..1 to colours: (..., H, W) -> uint8 (..., 3, H, W)."""
    place = values.clamp(0, 1) * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    colors = torch.lerp(HEAT[low].float(), HEAT[low + 1].float(), (place - low)[..., None])
    return colors.round().to(torch.uint8).movedim(-1, -3)


def mosaic(pictures: Tensor, columns: int, enlarge: int, gap: int) -> Tensor:
    """Little pictures in rows, gaps between: uint8 (M, 3, h, w) -> uint8 (3, H, W)."""
    pictures = pictures.repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    missing = -len(pictures) % columns
    cells = F.pad(pictures, (0, gap, 0, gap, 0, 0, 0, missing), value=255)
    M, _, h, w = cells.shape
    rows = cells.reshape(M // columns, columns, 3, h, w).permute(2, 0, 3, 1, 4)
    return rows.reshape(3, M // columns * h, columns * w)[:, :-gap, :-gap]


def draw_grid(rows: list[list[Tensor]], heads: list[str], title: str, caption: str,
              notes: list[list[str]] | None = None, apart=(), foot: int = 0):
    """Tiles in rows and columns, as large as the sheet's width allows.

    rows: tiles uint8 (3, H, W), all of one size; heads: a text over each column; notes: a text
    under each tile; apart: columns with a wider gap before them; foot: free pixels at the bottom.
    Returns the sheet, the (x, y) of every tile, and how many times the tiles are enlarged.
    """
    H, W = rows[0][0].shape[-2:]
    gaps = [0 if c == 0 else 5 * GAP if c in apart else GAP for c in range(len(heads))]
    room = (WIDTH - 2 * MARGIN - sum(gaps)) // len(heads)
    enlarge = max(1, min(320, room) // max(H, W))
    step, pitch = W * enlarge, H * enlarge + (42 if notes else GAP)
    left = [MARGIN + c * step + sum(gaps[:c + 1]) for c in range(len(heads))]
    width = max(left[-1] + step + MARGIN, 680)
    sheet = Sheet(width, 34 + len(rows) * pitch - GAP + foot, title, caption)
    origins = [[(x, sheet.top + 34 + r * pitch) for x, _ in zip(left, row)]
               for r, row in enumerate(rows)]
    for x, head in zip(left, heads):
        sheet.text(x + step / 2, sheet.top + 24, head, 24, GREY, "ms", fit=step)
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            x, y = origins[r][c]
            sheet.tile(x, y, tile, enlarge)
            if notes:
                sheet.text(x + step / 2, y + H * enlarge + 24, notes[r][c], 24, GREY, "ms", step)
    return sheet, origins, enlarge


def save_png(picture: Image.Image, path: Path | str) -> None:
    """Write a picture whole or not at all, with the texts in its `info`. Raises BadInput."""
    texts, content = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in picture.info.items():
        texts.add_text(key, value)
    picture.save(content, "PNG", pnginfo=texts)
    data.write_file(path, content.getvalue())


def save_animation(frames: list[Image.Image], path: Path | str) -> None:
    """Write a GIF or WebP that dwells on its last frame. Raises BadInput."""
    content, kind = io.BytesIO(), Path(path).suffix[1:].upper()
    if kind == "GIF":                                       # 256 colours, each frame its own
        frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], loop=0, lossless=True,
                   duration=[400] * (len(frames) - 1) + [3000])    # milliseconds
    data.write_file(path, content.getvalue())


# ------------------------------------------------------------------------------ reconstruct

NORMALIZED = " · predicts normalised patches, shown with each patch's own mean and deviation"


def to_pixels(model: mae.MAEViT, patches: Tensor, pred: Tensor) -> Tensor:
    """What the model predicts as pixels, both (B, N, 3*p*p): where it predicts normalised
    patches, each is brought back with its own mean and deviation (`mae.normalize_patches`)."""
    if not model.norm_pix_loss:
        return pred
    deviation = (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()   # (B, N, 1)
    return pred * deviation + patches.mean(dim=-1, keepdim=True)


@torch.no_grad()
def reconstruct(model: mae.MAEViT, images: Tensor, noise: Tensor, raw: bool = False,
                mask_ratio: float | None = None) -> tuple[Tensor, Tensor]:
    """Mask images and let the model fill them in, on the device where it is.

    images uint8 (B, 3, H, W), noise (B, N) -> tiles uint8 (B, 3, 3, H, W), which are masked,
    reconstruction, original; error (B,), the mean squared error of the masked patches' pixels,
    scaled to -1..1. Both on the CPU. The visible patches are pasted back unless `raw`; the mask
    ratio is the model's own unless given. Raises ValueError where all or no patch would be visible.
    """
    device = model.encoder.pos_embed.device
    p = model.encoder.patch_size
    patches = model.encoder.patchify(data.scale(images.to(device)))     # (B, N, 3*p*p)
    shuffle = mae.PatchShuffle(mask_ratio or model.shuffle.mask_ratio)
    visible, restore, mask = shuffle(patches, noise.to(device))
    pred = model.decoder(model.encoder(visible, restore), restore).float()
    pred = to_pixels(model, patches, pred)                  # (B, N, 3*p*p)
    error = ((pred - patches).square().mean(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1)   # (B,)
    hidden = mask.unsqueeze(-1).bool()                      # (B, N, 1)
    masked = patches.masked_fill(hidden, HIDDEN / 127.5 - 1)
    filled = pred if raw else torch.where(hidden, pred, patches)
    tiles = [data.unscale(mae.unpatchify(tile, p)) for tile in (masked, filled, patches)]
    return torch.stack(tiles, dim=1).cpu(), error.cpu()


def draw_triples(tiles: Tensor, title: str, caption: str, notes: list[list[str]] | None = None):
    """Tiles uint8 (B, 3, 3, H, W) as `reconstruct` makes them, up to three images in a row."""
    across = 1 if len(tiles) == 1 else 2 if len(tiles) <= 4 else 3
    rows = [[tile for triple in tiles[i:i + across] for tile in triple]
            for i in range(0, len(tiles), across)]
    notes = notes and [sum(notes[i:i + across], []) for i in range(0, len(notes), across)]
    return draw_grid(rows, ["masked", "reconstruction", "original"] * across, title, caption,
                     notes, apart=range(3, 3 * across, 3))


def reconstruction_grid(model: mae.MAEViT, images: Tensor, noise: Tensor, caption: str,
                        raw: bool = False, labels: list[str] | None = None,
                        epoch: int | None = None, mask_ratio: float | None = None) -> Image.Image:
    """Masked, reconstruction, original (MAE, figure 2), each image's error under it.

    images uint8 (B, 3, H, W), noise (B, N); caption: data set and run, to which epoch and mask
    ratio are added; labels: a name for each image. The picture's `info["tiles"]` says where its
    tiles are and of which epoch, so that `timeline` can cut them out. Raises ValueError where all
    or no patch would be visible.
    """
    tiles, errors = reconstruct(model, images, noise, raw, mask_ratio)
    caption += f" · mask ratio {percent(mask_ratio or model.shuffle.mask_ratio)}"
    if raw:
        caption += " · bare prediction, visible patches not pasted back"
    if model.norm_pix_loss:
        caption += NORMALIZED
    labels = labels or [""] * len(images)
    notes = [["", f"error {error:.4f}", label] for error, label in zip(errors.tolist(), labels)]
    title = "Reconstructions" if epoch is None else f"Reconstructions after epoch {epoch}"
    sheet, origins, enlarge = draw_triples(tiles, title, caption, notes)
    origins = sum(origins, [])
    sheet.image.info["tiles"] = json.dumps({
        "epoch": epoch, "caption": caption, "size": images.shape[-1], "enlarge": enlarge,
        "origins": [origins[i:i + 3] for i in range(0, len(origins), 3)]})
    return sheet.image


def percent(ratio: float) -> str:
    return f"{100 * ratio:.3g} %"


# ------------------------------------------------------------------------------ ratios


def draw_ratios(model: mae.MAEViT, images: Tensor, noise: Tensor, caption: str,
                ratios=(0.5, 0.75, 0.85, 0.95)) -> Image.Image:
    """One image a row, more and more of it hidden (MAE, figure 4).

    images uint8 (B, 3, H, W), noise (B, N): what is hidden at one ratio is hidden at all higher
    ones. Raises ValueError where a ratio leaves no patch visible or none masked.
    """
    rows, notes = [[image] for image in images], [[""] for _ in images]
    for ratio in ratios:
        for i, (tiles, error) in enumerate(zip(*reconstruct(model, images, noise,
                                                            mask_ratio=ratio))):
            rows[i] += tiles[:2]
            notes[i] += ["", f"error {error:.4f}"]
    heads = ["original", *(head for ratio in ratios
                           for head in (f"{percent(ratio)} masked", "reconstruction"))]
    caption += f" · pre-trained with mask ratio {percent(model.shuffle.mask_ratio)}"
    if model.norm_pix_loss:
        caption += NORMALIZED
    sheet, _, _ = draw_grid(rows, heads, "How much can be hidden?", caption, notes,
                            apart=range(1, len(heads), 2))
    return sheet.image


# ------------------------------------------------------------------------------ timeline


def read_tiles(path: Path) -> tuple[int, str, Tensor]:
    """A picture of `reconstruction_grid` -> epoch, caption, tiles uint8 (B, 3, 3, H, W).

    Raises BadInput where the file is none.
    """
    picture = open_image(path)
    try:
        about, pixels = json.loads(picture.info["tiles"]), np.asarray(picture.convert("RGB"))
        size, enlarge = about["size"], about["enlarge"]
        tiles = np.stack([[pixels[y:y + size * enlarge:enlarge, x:x + size * enlarge:enlarge]
                           for x, y in triple] for triple in about["origins"]])
        if tiles.shape[1:] != (3, size, size, 3):
            raise ValueError("tiles outside of the picture")
        tiles = torch.from_numpy(tiles).permute(0, 1, 4, 2, 3)
        return int(about["epoch"]), str(about["caption"]), tiles
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError):
        raise BadInput(f"{path} is not a picture that pretrain.py drew of an epoch; delete it, or "
                       "give another run") from None


def read_run_pictures(run: Path) -> list[tuple[int, str, Tensor]]:
    """What `read_tiles` returns for each picture of a run, by epoch. Raises BadInput."""
    paths = sorted((run / "reconstructions").glob("*.png"))
    if not paths:
        raise BadInput(f"{run} holds no reconstructions/epoch-*.png: give the folder of a run of "
                       "pretrain.py that has done an epoch")
    pictures = [read_tiles(path) for path in paths]
    for path, (_, _, tiles) in zip(paths, pictures):
        if tiles.shape != pictures[0][2].shape:
            raise BadInput(f"{path} shows other images than {paths[0].name}: delete one of the two")
    return sorted(pictures, key=lambda picture: picture[0])


def draw_timeline(pictures: list[tuple[int, str, Tensor]], count: int = 6) -> Image.Image:
    """The first `count` images of a run at up to seven epochs, early to late, as one sheet.

    pictures: from `read_run_pictures`; most is learned early, so the epochs lie closer there.
    """
    epochs = np.array([epoch for epoch, _, _ in pictures])
    wanted = np.geomspace(max(epochs[0], 1), max(epochs[-1], 1), min(7, len(epochs)))
    chosen = sorted({int(abs(epochs - epoch).argmin()) for epoch in wanted})
    _, caption, tiles = pictures[-1]
    rows = [[tiles[i, 0], *(pictures[c][2][i, 1] for c in chosen), tiles[i, 2]]
            for i in range(min(count, len(tiles)))]
    heads = ["masked", *(f"epoch {epochs[c]}" for c in chosen), "original"]
    sheet, _, _ = draw_grid(rows, heads, "Reconstructions as pre-training goes on", caption,
                            apart=(1, len(heads) - 1))
    return sheet.image


def draw_frames(pictures: list[tuple[int, str, Tensor]], count: int = 6,
                most: int = 60) -> list[Image.Image]:
    """The first `count` images of a run, a frame an epoch, at most so many; for an animation."""
    chosen = np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int)
    return [draw_triples(tiles[:count], f"Reconstructions after epoch {epoch}", caption)[0].image
            for epoch, caption, tiles in (pictures[c] for c in chosen)]


# ------------------------------------------------------------------------------ curves

METRICS = {     # name: (axis title, column of the training set or the only one, of the test set)
    "loss": ("reconstruction loss (mean squared error)", "loss", "test_loss"),
    "cross-entropy": ("classification loss (cross-entropy)", "train_loss", "test_loss"),
    "accuracy": ("accuracy in %", "train_accuracy", "test_accuracy"),
    "lr": ("learning rate", "lr", None),
    "speed": ("training images per second", "images_per_second", None),
    "memory": ("peak memory in MB", "peak_memory_mb", None),
}
USUAL = ("loss", "cross-entropy", "accuracy", "lr")
COLORS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233),
          (230, 159, 0), (0, 0, 0), (150, 150, 150)]    # Okabe and Ito's, safe for the colour-blind


def round_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most so many multiples of 1, 2 or 5 times a power of ten between low and high."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10) if (high - low) / (m * power) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.9g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with their multiples by 2 and 5 where there is room for them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5)):
        ticks = [m * 10.0 ** power for power in powers for m in multiples]
        ticks = [float(f"{tick:.9g}") for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[::-(-len(ticks) // 8)]
    return round_ticks(low, high)


def tick_labels(ticks: list[float], log: bool) -> list[str]:
    """Short numbers; on a linear axis with equally many decimals."""
    labels = [f"{tick:g}" for tick in ticks]
    if log or "e" in "".join(labels):
        return labels
    decimals = max(len(label.partition(".")[2]) for label in labels)
    return [f"{tick:.{decimals}f}" for tick in ticks]


def draw_panel(sheet: Sheet, box: tuple[int, int, int, int], title: str, x_title: str, lines,
               log: bool) -> None:
    """Axes and curves in the box (left, top, right, bottom).

    lines: (xs (n,), ys (n,), color, dashed), NaN where there is nothing to draw.
    """
    left, top, right, bottom = box[0] + 96, box[1] + 44, box[2] - 16, box[3] - 80
    every_x = np.concatenate([xs for xs, _, _, _ in lines])
    every_y = np.concatenate([ys[np.isfinite(ys)] for _, ys, _, _ in lines])
    sheet.text(left, box[1] + 32, title, anchor="ls", fit=right - left)
    sheet.text((left + right) / 2, bottom + 46, x_title, 24, GREY, "ma")
    sheet.draw.line([(left, top), (left, bottom), (right, bottom)], GREY, 2)
    if not len(every_y):
        sheet.text((left + right) / 2, (top + bottom) / 2, "no finite value", 24, GREY, "mm")
        return
    bend = np.log10 if log else np.asarray
    x1 = max(every_x.max(), 1e-9)
    x0 = min(every_x.min(), x1 - 1) if x_title == "epoch" else 0    # a lone epoch stands at the end
    y0, y1 = bend(every_y.min()), bend(every_y.max())
    pad = max(0.05 * (y1 - y0), 0.01 * max(abs(y0), abs(y1))) or 0.05
    y0, y1 = y0 - pad, y1 + pad
    if not log and every_y.min() >= 0:
        y0 = max(y0, 0)

    def place(xs, ys):
        return np.stack([left + (xs - x0) / (x1 - x0) * (right - left),
                         bottom - (bend(ys) - y0) / (y1 - y0) * (bottom - top)], axis=-1)

    ticks = log_ticks(10 ** y0, 10 ** y1) if log else round_ticks(y0, y1)
    for tick, label in zip(ticks, tick_labels(ticks, log)):
        y = round(place(x0, tick)[1])
        sheet.draw.line([(left + 2, y), (right, y)], FAINT)
        sheet.text(left - 10, y, label, 24, GREY, "rm")
    for tick in round_ticks(x0, x1):
        if x_title != "epoch" or tick == int(tick):
            x = round(place(tick, every_y[0])[0])
            sheet.draw.line([(x, bottom), (x, bottom + 6)], GREY, 2)
            sheet.text(x, bottom + 12, f"{tick:g}", 24, GREY, "ma")
    for xs, ys, color, dashed in lines:
        there = np.isfinite(ys)
        for drawn, part in itertools.groupby(range(len(xs)), key=there.__getitem__):
            part = list(part)
            points = place(xs[part], ys[part]) if drawn else ()
            if len(points) > 1:
                sheet.line(points, color, 3, dashed)
            elif len(points):                               # a dot, where no line can be
                sheet.line([points[0] - (3, 0), points[0] + (3, 0)], color, 6)


def draw_curves(runs: dict[str, list[dict]], x: str = "epoch", log: bool = False,
                metrics: list[str] | None = None, caption: str = "") -> Image.Image:
    """Curves of one or many runs, a panel a metric (keys of METRICS; the USUAL ones by default).

    runs: for each label in the legend the rows of log.csv as dicts of numbers; what a run's rows
    lack is left out, what is not finite is a gap. x: "epoch" or "time", the rows' seconds summed
    up. log: logarithmic axes, but for accuracy; what is not positive is then a gap. Raises
    BadInput where there is nothing to draw.
    """
    shown = [name for name in metrics or USUAL
             if any(METRICS[name][1] in row for rows in runs.values() for row in rows[:1])]
    if len(runs) > len(COLORS):
        raise BadInput(f"{len(runs)} runs are more than colours tell apart: give at most "
                       f"{len(COLORS)}")
    if not shown:
        raise BadInput(f"no log has a column for {', '.join(metrics or USUAL)}: leave --metric "
                       "out, or give other runs")
    times = [np.nan_to_num([row["seconds"] for row in rows], posinf=0).clip(0, 1e9).cumsum()
             for rows in runs.values()]
    longest = max(time[-1] for time in times)
    unit, seconds = (("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 120
                     else ("seconds", 1))
    both = any(METRICS[name][2] for name in shown)
    legend = [(label, color, False) for label, color in zip(runs, COLORS)]
    legend += [("test", GREY, False), ("train", GREY, True)] if both else []
    places, right, down = [], 0, 0
    for label, _, _ in legend:
        needed = min(int(font(24).getlength(label)) + 110, WIDTH - 2 * MARGIN)
        if right and right + needed > WIDTH - 2 * MARGIN or label == "test" and len(runs) > 1:
            right, down = 0, down + 38
        places.append((MARGIN + right, down))
        right += needed
    across = 3 if len(shown) == 3 else min(2, len(shown))
    width, height = (WIDTH - 2 * MARGIN) // across, 460
    sheet = Sheet(WIDTH, down + 50 + height * -(-len(shown) // across), "Training curves", caption)
    for (label, color, dashed), (left, down) in zip(legend, places):
        y = sheet.top + down + 18
        sheet.line([(left, y), (left + 52, y)], color, 4, dashed)
        sheet.text(left + 64, y, label, anchor="lm", fit=WIDTH - 2 * MARGIN - 80)
    for i, name in enumerate(shown):
        title, *columns = METRICS[name]
        lines, logarithmic = [], log and name != "accuracy"
        for rows, time, color in zip(runs.values(), times, COLORS):
            xs = time / seconds if x == "time" else np.array([row["epoch"] for row in rows], float)
            for column, dashed in zip(columns, (columns[1] is not None, False)):
                if columns[0] in rows[0] and column in rows[0]:
                    ys = np.array([row[column] for row in rows], dtype=float)
                    ys[~(abs(ys) < 1e99) | (logarithmic & ~(ys > 0))] = math.nan
                    lines.append((xs, ys, color, dashed))
        left, top = MARGIN + i % across * width, sheet.top + down + 50 + i // across * height
        draw_panel(sheet, (left, top, left + width, top + height), title,
                   "epoch" if x == "epoch" else f"time in {unit}", lines, logarithmic)
    return sheet.image


# ------------------------------------------------------------------------------ attention


def encoder_of(model: nn.Module) -> mae.Encoder:
    return model.encoder if isinstance(model, mae.MAEViT) else model    # a classifier is one


@torch.no_grad()
def draw_attention(model: nn.Module, images: Tensor, caption: str, labels: list[str],
                   patch: tuple[int, int] | None = None, block: int = -1) -> Image.Image:
    """Where a token looks in whole images, head by head (ViT, section 4.5).

    images uint8 (B, 3, H, W); patch: (row, column) of the one that looks, None for the class
    token; block: counted from 0, or from the last, -1. Each map is scaled by its own largest
    weight; the weight on the class token is left out.
    """
    encoder = encoder_of(model)
    p, depth = encoder.patch_size, len(encoder.blocks)
    side = encoder.image_size // p
    looking = 0 if patch is None else 1 + patch[0] * side + patch[1]
    maps = encoder.attention_maps(data.scale(images))[block][:, :, looking, 1:]     # (B, h, N)
    maps = torch.cat([maps, maps.mean(dim=1, keepdim=True)], dim=1)                 # (B, h+1, N)
    maps = (maps / maps.amax(dim=-1, keepdim=True)).unflatten(-1, (side, side))
    colors = heat(maps.repeat_interleave(p, -2).repeat_interleave(p, -1))   # (B, h+1, 3, H, W)
    grey = images.float().mean(dim=1)[:, None, None]                        # (B, 1, 1, H, W)
    overlaid = (0.35 * grey + 0.65 * colors).round().to(torch.uint8)
    rows = [[image, *row] for image, row in zip(images, overlaid)]
    heads = ["image", *(f"head {h + 1}" for h in range(maps.shape[1] - 1)), "mean"]
    notes = [[label] + [""] * (len(heads) - 1) for label in labels]
    who = "the class token" if patch is None else f"patch {patch[0]},{patch[1]}"
    sheet, origins, enlarge = draw_grid(
        rows, heads, f"Where {who} looks", f"{caption} · block {block % depth + 1} of {depth} · "
        "whole images, nothing masked", notes, apart=(1, len(heads) - 1), foot=44)
    for x, y in sum(origins, []) if patch else ():
        x, y = x + patch[1] * p * enlarge, y + patch[0] * p * enlarge
        sheet.draw.rectangle((x - 1, y - 1, x + p * enlarge, y + p * enlarge), None, PAPER, 3)
    sheet.color_bar(sheet.image.height - MARGIN - 20, "0", "max", "weight, for each map")
    return sheet.image


# ------------------------------------------------------------------------------ embeddings


@torch.no_grad()
def draw_embeddings(model: nn.Module, caption: str) -> Image.Image:
    """Each position's embedding compared with all others, and the filters that embed a patch.

    ViT, figure 7: the map at row i, column j shows the cosine similarity of the position
    embedding of patch (i, j) with those of all patches, after subtracting their mean, which says
    nothing about position. A filter is the weights of one of the D outputs for the pixels of a
    patch, grey for zero, scaled by its largest weight; the largest norm comes first.
    """
    encoder = encoder_of(model)
    side = encoder.image_size // encoder.patch_size
    positions = {"encoder": encoder.pos_embed[0]}           # (N, D)
    if isinstance(model, mae.MAEViT):                       # (N, D'), without the class token's
        positions["decoder"] = model.decoder.pos_embed[0, 1:]
    half = (WIDTH - 2 * MARGIN - 40) // 2
    maps = []
    for embedding in positions.values():
        embedding = embedding - embedding.mean(dim=0)
        alike = F.normalize(embedding, dim=1) @ F.normalize(embedding, dim=1).T     # (N, N)
        maps.append(mosaic(heat((alike.view(-1, side, side) + 1) / 2), side,
                           max(1, (half // side - 6) // side), 6))
    filters = encoder.patch_embed.proj.weight               # (D, 3, p, p)
    filters = filters[filters.flatten(1).norm(dim=1).argsort(descending=True)]
    peak = filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-9)
    most = (WIDTH - 2 * MARGIN) // (encoder.patch_size + 6)
    columns = min(48, most, math.ceil(encoder.dim / 4))     # four rows, more where it is wide
    room = min(60, (WIDTH - 2 * MARGIN) // columns - 6)
    enlarge = max(1, room // encoder.patch_size)
    filters = mosaic(data.unscale(filters / peak), columns, enlarge, 6)
    size = maps[0].shape[-1]
    sheet = Sheet(WIDTH, 40 + size + 64 + 60 + filters.shape[1],
                  "Position embeddings and patch filters", caption)
    for i, (name, picture) in enumerate(zip(positions, maps)):
        x = MARGIN + i * (half + 40)
        sheet.text(x, sheet.top + 2, f"position embeddings of the {name}")
        sheet.tile(x, sheet.top + 40, picture)
    y = sheet.top + 40 + size + 18
    sheet.color_bar(y, "-1", "1", "cosine similarity of one position's embedding with all others, "
                    "their mean subtracted")
    sheet.text(MARGIN, y + 58, f"{encoder.dim} filters of the patch embedding, largest norm first")
    sheet.tile(MARGIN, y + 96, filters)
    return sheet.image


# ------------------------------------------------------------------------------ architecture

STAGE = 224     # pixels: the side of a picture in the figure


def cells(pictures: Tensor, columns: int) -> Tensor:
    """Little pictures uint8 (M, 3, h, w) as a mosaic about STAGE pixels wide and high."""
    most = max(columns, -(-len(pictures) // columns))
    return mosaic(pictures, columns, max(1, (STAGE // most - 2) // pictures.shape[-1]), 2)


def draw_flow(stages: list[tuple], arrows: list[tuple[str, str]], title: str,
              caption: str) -> Image.Image:
    """Stages, four in a row, and what goes from each to the next.

    stages: (name, picture uint8 (3, h, w) or the lines in a box, note); arrows: (shape of what
    leaves the stage, action).
    """
    step, pitch = (WIDTH - 2 * MARGIN - STAGE) // 3, STAGE + 172
    sheet = Sheet(WIDTH, -(-len(stages) // 4) * pitch - 96, title, caption)
    corners = [(MARGIN + i % 4 * step, sheet.top + 36 + i // 4 * pitch) for i in range(len(stages))]
    for (name, content, note), (x, y) in zip(stages, corners):
        sheet.text(x + STAGE / 2, y - 12, name, anchor="ms")
        sheet.text(x + STAGE / 2, y + STAGE + 30, note, 24, GREY, "ms", fit=STAGE + 60)
        if isinstance(content, Tensor):
            _, h, w = content.shape
            sheet.tile(x + (STAGE - w) // 2, y + (STAGE - h) // 2, content)
        else:
            sheet.draw.rounded_rectangle((x, y, x + STAGE, y + STAGE), 14, (246, 248, 250), GREY, 2)
            for i, line in enumerate(content):
                sheet.text(x + STAGE / 2, y + STAGE / 2 + 40 * (i - (len(content) - 1) / 2), line,
                           26, anchor="mm")
    for i, ((x, y), (x1, y1), (shape, action)) in enumerate(zip(corners, corners[1:], arrows)):
        if i % 4 < 3:                                       # to the right
            y += STAGE / 2
            points = [(x + STAGE + 12, y), (x1 - 12, y)]
            fit = step - STAGE - 24
        else:                                               # around, to the next row
            x, x1, y = x + STAGE / 2, x1 + STAGE / 2, y1 - 84
            points = [(x, y - 12), (x, y), (x1, y), (x1, y1 - 40)]
            fit = WIDTH
        sheet.arrow(points)
        middle = (points[0][0] + points[-1][0]) / 2
        sheet.text(middle, y - 14, shape, 24, anchor="ms", fit=fit)
        sheet.text(middle, y + 34, action, 24, GREY, "ms", fit=fit)
    return sheet.image


@torch.no_grad()
def draw_architecture(model: mae.MAEViT, image: Tensor, noise: Tensor, caption: str) -> Image.Image:
    """A batch on its way through the model, the shapes at every arrow (MAE, figure 1).

    image uint8 (3, H, W), noise (1, N): what is drawn for the batch. Every shape, number and
    picture is computed with the model.
    """
    encoder, decoder, p = model.encoder, model.decoder, model.encoder.patch_size
    images = data.scale(image[None])                        # (1, 3, H, W)
    patches = encoder.patchify(images)                      # (1, N, 3*p*p)
    visible, restore, mask = model.shuffle(patches, noise)  # (1, K, 3*p*p), (1, N), (1, N)
    tokens = encoder.embed(visible, restore)                # (1, 1 + K, D)
    latent = encoder(visible, restore)                      # (1, 1 + K, D)
    pred = decoder(latent, restore)                         # (1, N, 3*p*p)
    target = mae.normalize_patches(patches) if model.norm_pix_loss else patches
    error = (pred - target).square().mean(dim=-1)           # (1, N)
    side, K, hidden = image.shape[-1] // p, visible.shape[1], int(mask.sum())
    N, across = side * side, math.isqrt(visible.shape[1])

    def batch(tensor: Tensor) -> str:
        return f"({', '.join(map(str, ['B', *tensor.shape[1:]]))})"

    def cut(values: Tensor) -> Tensor:                      # (1, M, 3*p*p) -> uint8 (M, 3, p, p)
        return data.unscale(values[0]).unflatten(1, (3, p, p))

    def with_class(colors: Tensor, columns: int) -> Tensor:     # the class token on its own row
        first = torch.full((columns, 3, 1, 1), 255, dtype=torch.uint8)
        first[0, :, 0, 0] = torch.tensor(ORANGE)
        return cells(torch.cat([first, colors[:, :, None, None]]), columns)

    def blocks(part: nn.Module) -> str:
        return f"{len(part.blocks)} block{'s' if len(part.blocks) > 1 else ''}"

    def parameters(part: nn.Module) -> str:
        return f"{sum(weights.numel() for weights in part.parameters()) / 1e6:.2f} M parameters"

    where = mask[0].bool()                                  # (N,)
    masked = cut(patches).masked_fill(where[:, None, None, None], HIDDEN)
    means = cut(patches).float().mean(dim=(2, 3)).to(torch.uint8)       # (N, 3)
    unshuffled = torch.where(where[:, None], torch.tensor(SLATE, dtype=torch.uint8), means)
    errors = heat((error / (error * mask).max())[0, :, None, None])     # (N, 3, 1, 1)
    errors = errors.masked_fill(~where[:, None, None, None], HIDDEN)
    whole = batch(decoder.pos_embed.expand(1, -1, -1))      # (B, 1 + N, D')
    stages = [
        ("images", image.repeat_interleave(STAGE // image.shape[-1], 1).repeat_interleave(
            STAGE // image.shape[-1], 2), "scaled to -1..1"),
        ("patches", cells(cut(patches), side), f"{N} of {p} x {p} pixels"),
        ("mask", cells(masked, side), f"{hidden} of {N} hidden"),
        ("visible patches", cells(cut(visible), across), f"{K}, in shuffled order"),
        ("tokens", with_class(means[noise[0].argsort()[:K]], across), "orange: class token"),
        ("encoder", [blocks(encoder), f"{encoder.dim} wide",
                     f"{encoder.blocks[0].attn.heads} heads", "LayerNorm"], parameters(encoder)),
        ("all positions", with_class(unshuffled, side), f"blue: {hidden} mask tokens"),
        ("decoder", [blocks(decoder), f"{decoder.pos_embed.shape[-1]} wide",
                     f"{decoder.blocks[0].attn.heads} heads", "linear head"], parameters(decoder)),
        ("prediction", cells(cut(to_pixels(model, patches, pred)), side),
         "visible: no loss"),
        ("original", cells(cut(patches), side),
         "each patch normalised" if model.norm_pix_loss else "every patch"),
        ("error per patch", cells(errors, side), "grey: visible, no loss"),
        ("loss", [f"{float((error * mask).sum() / mask.sum()):.4f}"],
         f"over {hidden} patches"),
    ]
    arrows = [
        (batch(images), "cut up"), (batch(patches), "shuffle, mask"),
        (batch(patches), f"keep the first {K}"),
        (batch(visible), "embed, add positions, class token in front"), (batch(tokens), ""),
        (batch(latent), "project, fill, unshuffle"), (whole, "add positions"),
        (batch(pred), "the class token is dropped before the head"), (batch(pred), "compare with"),
        (batch(pred), "mean squared error"), (batch(error), "mean over masked"),
    ]
    caption += NORMALIZED if model.norm_pix_loss else ""
    return draw_flow(stages, arrows, "A masked autoencoder, step by step", caption)


# ------------------------------------------------------------------------------ reading


def open_image(path: Path | str) -> Image.Image:
    """Read an image file of a usual kind. Raises BadInput where it is none, broken or huge."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
            image.load()
            return image
    except Exception as error:      # what Pillow raises on damaged files has no common type
        reason = getattr(error, "strerror", None) or "it is no image, or a damaged or huge one"
        raise BadInput(f"cannot read the picture {path}: {reason}; give a PNG, JPEG, WebP, GIF, "
                       "BMP, TIFF or PPM file") from None


def read_image(path: Path | str, size: int) -> Tensor:
    """The middle square of an image file, upright and resized: uint8 (3, size, size).

    16 bits become 8, transparent pixels the sheet's white. Raises BadInput.
    """
    image = ImageOps.exif_transpose(open_image(path))
    if image.mode.startswith("I"):                          # 16 bits
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, PAPER), image).convert("RGB")
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, or of the one in a run's folder, as numbers; an empty field is NaN.

    Raises BadInput where it is missing, empty, cut off or no log.
    """
    path = path / "log.csv" if path.is_dir() else path
    try:
        with open(path, newline="", encoding="utf-8") as file:
            text = file.read()
        header, *lines = list(csv.reader(io.StringIO(text))) or [[]]
    except OSError as error:
        raise BadInput(f"cannot read log {path}: {error.strerror}; give a log.csv or the folder of "
                       "a run") from None
    except (UnicodeDecodeError, csv.Error):
        raise BadInput(f"{path} is no log.csv: it is not text") from None
    if not {"epoch", "seconds", "lr"} <= set(header) or not {"loss", "train_loss"} & set(header):
        raise BadInput(f"{path} is no log.csv of pretrain.py or finetune.py: its first line does "
                       "not name their columns")
    if not lines:
        raise BadInput(f"{path} has no epoch yet: wait for the first one, or give another run")
    rows = []
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header) or number > len(lines) and not text.endswith("\n"):
            raise BadInput(f"{path}, line {number}: the row is cut off or has other columns than "
                           "the first line; mend it or delete it")
        try:
            rows.append({name: float(value or "nan") for name, value in zip(header, line)})
        except ValueError:
            raise BadInput(f"{path}, line {number}: not a row of numbers; mend it or delete "
                           "it") from None
        if not 0 <= rows[-1]["epoch"] < 1e9:
            raise BadInput(f"{path}, line {number}: no epoch; mend it or delete it")
    odd = sum(not math.isfinite(value) for row in rows for value in row.values())
    if odd:
        print(f"note: {path}: {odd} values are not finite and are drawn as gaps", file=sys.stderr)
    return rows


def title_of(dataset: str) -> str:
    return data.SOURCES[dataset].title if dataset in data.SOURCES else str(dataset)


def name_log(path: Path) -> str:
    """A log's name in a legend: that of its folder and, if config.json tells, the data set."""
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    try:
        settings = json.loads((folder / "config.json").read_text())["settings"]
        held_out = ", validation" if settings.get("validation") else ""
        return f"{folder.name} ({title_of(settings['dataset'])}{held_out})"
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def load_model(path: Path | str, kind: str | None = None) -> tuple[nn.Module, dict]:
    """The model of a checkpoint, in eval mode, and the checkpoint. Raises BadInput."""
    checkpoint = data.load_checkpoint(path, kind)
    try:
        model = mae.build_model(checkpoint["kind"], checkpoint["settings"])
    except (KeyError, TypeError, ValueError):
        raise BadInput(f"the settings in {path} describe no model: the file is damaged") from None
    data.load_weights(model, checkpoint["model"], path)
    return model.eval(), checkpoint


def describe(path: Path | str, checkpoint: dict) -> str:
    """Whose checkpoint it is, in a caption: name of the run, data set, epoch."""
    path = Path(path).resolve()
    run = path.parent.name if path.stem in ("checkpoint", "weights") else path.stem
    task = "pre-trained on" if checkpoint["kind"] == "pretrain" else "classifies"
    return f"{run}, {task} {title_of(checkpoint['settings']['dataset'])}, epoch " \
           f"{checkpoint['epoch']}"


HERE = Path(__file__).parent


def load_images(args: argparse.Namespace, dataset: str, size: int):
    """What to draw: images uint8 (n, 3, size, size), a label for each, where they are from.

    The given files; else images of the data set, which is downloaded only where --dataset asks
    for it; else, where it is not there, the examples that come with the repository. Raises
    BadInput.
    """
    name = args.dataset or dataset
    chosen = args.indices or range(args.count)
    files = [Path(file) for file in args.images]
    if files and (args.indices or args.dataset):
        raise BadInput("--indices and --dataset are about images of a data set: leave them out, or "
                       "the image files")
    if not files and not args.dataset and not args.indices and name != "shapes":
        if not (args.data_dir / data.SOURCES[name].folder).exists():
            files = sorted((HERE / "assets" / "examples").glob("*.png"))[:args.count]
            if not files:
                raise BadInput(f"{title_of(name)} is not in {args.data_dir}: give image "
                               f"files, --data-dir, or --dataset {name} to download it")
    if files:
        images = torch.stack([read_image(file, size) for file in files])
        return images, [file.stem for file in files], "image files"
    loaded = data.load_dataset(name, args.data_dir)
    images = getattr(loaded, f"{args.split}_images")
    labels = getattr(loaded, f"{args.split}_labels")
    if max(chosen) >= len(images):
        raise BadInput(f"image {max(chosen)}: the {args.split} images of {loaded.name} are "
                       f"numbered 0 to {len(images) - 1}; see --indices and --count")
    chosen = list(chosen)
    names = [f"{i} {loaded.classes[label]}" for i, label in zip(chosen, labels[chosen].tolist())]
    return images[chosen], names, f"{title_of(loaded.name)} {args.split} images"


# ------------------------------------------------------------------------------ the program


def draw_noise(images: Tensor, model: mae.MAEViT, seed: int) -> Tensor:
    generator = data.seeded_generator("cpu", seed)
    return torch.rand(len(images), model.encoder.num_patches, generator=generator)     # (B, N)


def prepare(args: argparse.Namespace, kind: str | None = None):
    """What the pictures of a model and images need: model, checkpoint, images, labels, caption."""
    model, checkpoint = load_model(args.checkpoint, kind)
    images, labels, source = load_images(args, checkpoint["settings"]["dataset"],
                                         encoder_of(model).image_size)
    return model, checkpoint, images, labels, f"{source} · {describe(args.checkpoint, checkpoint)}"


def run_reconstruct(args: argparse.Namespace) -> Image.Image:
    model, checkpoint, images, labels, caption = prepare(args, "pretrain")
    noise = draw_noise(images, model, args.seed)
    try:
        _, errors = reconstruct(model, images, noise, args.raw, args.mask_ratio)
    except ValueError as error:
        raise BadInput(f"--mask-ratio: {error}") from None
    for label, error in zip(labels, errors.tolist()):
        print(f"{label}: error {error:.4f}")
    print(f"mean error of the masked patches, pixels scaled to -1..1: {errors.mean():.4f}")
    if model.norm_pix_loss:
        print("(the model predicts normalised patches; each got its own mean and deviation back)")
    return reconstruction_grid(model, images, noise, caption, args.raw, labels,
                               mask_ratio=args.mask_ratio)


def run_ratios(args: argparse.Namespace) -> Image.Image:
    model, _, images, _, caption = prepare(args, "pretrain")
    try:
        return draw_ratios(model, images, draw_noise(images, model, args.seed), caption)
    except ValueError as error:
        raise BadInput(f"{args.checkpoint} has too large patches for this: {error}") from None


def run_timeline(args: argparse.Namespace) -> Image.Image | list[Image.Image]:
    draw = draw_timeline if args.out.suffix == ".png" else draw_frames
    return draw(read_run_pictures(args.RUN), args.count)


def run_curves(args: argparse.Namespace) -> Image.Image:
    runs = {}
    for path in args.logs:
        label = name_log(path)
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
    return draw_attention(model, images, caption, labels, args.patch, (args.block or 0) - 1)


def run_embeddings(args: argparse.Namespace) -> Image.Image:
    model, checkpoint = load_model(args.checkpoint)
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
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 0,3,12")
    return [int(part) for part in parts]


FLAGS = {
    "images": dict(nargs="*", metavar="IMAGE", help="image files, cut to their middle square and "
                   "resized (images of the data set)"),
    "RUN": dict(metavar="RUN", type=Path, help="folder of a run of pretrain.py"),
    "logs": dict(nargs="+", metavar="RUN_OR_CSV", type=Path, help="folders of runs, or log.csv "
                 "files of runs"),
    "--checkpoint": dict(metavar="FILE", type=Path, help="checkpoint, or a run's folder "
                         "(results/laptop-pixels; for the architecture MAEViT with its "
                         "defaults, untrained)"),
    "--indices": dict(type=whole_numbers, metavar="I,J,...", help="which images of the data set, "
                      "counted from 0 (the first ones)"),
    "--count": dict(type=data.number(int, 1, 60), metavar="N",
                    help="how many images of the data set or run (%(default)s)"),
    "--split": dict(choices=["train", "test"], default="test", help="of the data set "
                    "(%(default)s)"),
    "--dataset": dict(choices=list(data.SOURCES), help="data set, downloaded if it is missing (the "
                      "checkpoint's, never downloaded)"),
    "--data-dir": dict(type=Path, default=Path("data"), metavar="DIR", help="folder of the data "
                       "sets' folders (%(default)s)"),
    "--seed": dict(type=data.number(int, 0, 2**32 - 1), default=0, metavar="S", help="of the masks "
                   "(%(default)s)"),
    "--mask-ratio": dict(type=data.number(float, 0, 1, open_ends=True), metavar="R", help="part of "
                         "the patches that is hidden, between 0 and 1 (the model's)"),
    "--raw": dict(action="store_true", help="show the bare prediction, without the visible patches "
                  "pasted back"),
    "--x": dict(choices=["epoch", "time"], default="epoch", help="horizontal axis: epochs, or the "
                "time that they took (%(default)s)"),
    "--log": dict(action="store_true", help="logarithmic vertical axes, but for accuracy"),
    "--metric": dict(action="append", choices=list(METRICS), dest="metrics", help="what to draw; "
                     f"may be repeated ({', '.join(USUAL)})"),
    "--patch": dict(type=whole_numbers, metavar="ROW,COLUMN", help="the patch that looks, counted "
                    "from 0 (the class token looks)"),
    "--block": dict(type=data.number(int, 1), metavar="N", help="block of the encoder, counted "
                    "from 1 (the last)"),
    "--out": dict(type=Path, metavar="FILE", help="file to write (%(default)s)"),
}
IMAGES = ("images", "--checkpoint", "--indices", "--split", "--dataset", "--data-dir")
SHIPPED = HERE / "results" / "laptop-pixels"
COMMANDS = {    # name: (function, what it draws, flags, their defaults)
    "reconstruct": (run_reconstruct, "masked images, their reconstructions and the originals",
                    (*IMAGES, "--count", "--seed", "--mask-ratio", "--raw"),
                    dict(checkpoint=SHIPPED, count=12, out=Path("reconstruction.png"))),
    "ratios": (run_ratios, "reconstructions at mask ratios from 0.5 to 0.95",
               (*IMAGES, "--count", "--seed"), dict(checkpoint=SHIPPED, count=6)),
    "timeline": (run_timeline, "the same images and masks over a run; .png is a sheet, .gif and "
                 ".webp are animations", ("RUN", "--count"), dict(count=6)),
    "curves": (run_curves, "losses, accuracies and learning rates of runs",
               ("logs", "--x", "--log", "--metric"), {}),
    "attention": (run_attention, "where the class token or a patch looks, head by head",
                  (*IMAGES, "--count", "--patch", "--block"), dict(checkpoint=SHIPPED, count=3)),
    "embeddings": (run_embeddings, "position embeddings compared, filters of the patch embedding",
                   ("--checkpoint",), dict(checkpoint=SHIPPED)),
    "architecture": (run_architecture, "a batch on its way through the model, with all shapes",
                     (*IMAGES, "--seed"), dict(count=1)),
}


def make_parser() -> argparse.ArgumentParser:
    parser = data.Parser(description="Draw a picture; without arguments: reconstruct. "
                         "SUBCOMMAND --help explains the flags.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for name, (run, text, flags, defaults) in COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False,
                                      description=f"Draw {text}. Defaults in parentheses.")
        for flag in (*flags, "--out"):
            command.add_argument(flag, **FLAGS[flag])
        command.set_defaults(**{"out": Path(f"{name}.png"), "run": run, **defaults})
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv or ["reconstruct"])
    kinds = (".png", ".gif", ".webp") if args.run is run_timeline else (".png",)
    if args.out.suffix not in kinds:
        raise BadInput(f"--out {args.out}: its name must end in {' or '.join(kinds)}")
    drawn = args.run(args)
    (save_animation if isinstance(drawn, list) else save_png)(drawn, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
