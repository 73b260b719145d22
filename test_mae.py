"""The tests: `pytest test_mae.py`.

In this order: the model, the data, the programs, interruption, several processes, bad input,
pictures, the README, the results. Programs run through their command lines, `run(program,
*flags)`, on small models and files made here. No test needs the network. One uses the real
CIFAR-10, if it is in data/. All need Linux.
"""
import argparse
import collections
import contextlib
import csv
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import finetune
import mae
import pretrain
import visualize
from mae import MAEViT, PatchShuffle, ViTClassifier, patchify, unpatchify

HERE = Path(__file__).parent
WITH_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # the same tests everywhere; one uses WITH_GPU
torch.set_num_threads(1)            # models this small gain nothing from more
TINY = dict(patch_size=8, dim=16, depth=2, heads=2, decoder_dim=12, decoder_depth=1,
            decoder_heads=2)
CPU = pretrain.Machine(torch.device("cpu"), "fp32")


def random_images(count: int, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def random_noise(count: int, patches: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed))


def tiny_mae(**changes) -> MAEViT:
    torch.manual_seed(0)
    return MAEViT(**{**TINY, **changes})


# ------------------------------------------------------------------------------ the model


def test_patches_are_cut_row_by_row_hold_channel_y_x_and_can_be_put_together_again():
    images = random_images(2, side=12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    for b, row, column, c, y, x in itertools.product(range(2), *[range(3)] * 2, range(3),
                                                     *[range(4)] * 2):
        value = images[b, c, row * 4 + y, column * 4 + x]
        assert patches[b, row * 3 + column, c * 16 + y * 4 + x] == value
    assert torch.equal(unpatchify(patches, 4), images)


@pytest.mark.parametrize("N, mask_ratio", [(256, 0.75), (16, 0.5), (7, 0.3)])
def test_shuffle_masks_exactly_and_restore_undoes_it(N, mask_ratio):
    tokens = torch.arange(5 * N * 2, dtype=torch.float32).view(5, N, 2)
    noise, K = random_noise(5, N), round(N * (1 - mask_ratio))
    visible, restore, mask = PatchShuffle(mask_ratio)(tokens, noise)
    assert torch.equal(visible, mae.take(tokens, noise.argsort(dim=1)[:, :K]))
    assert visible.shape == (5, K, 2) and restore.shape == mask.shape == (5, N)
    assert (mask.sum(dim=1) == N - K).all() and set(mask.unique().tolist()) == {0, 1}
    filled = torch.cat([visible, torch.full((5, N - K, 2), -1.0)], dim=1)
    restored = mae.take(filled, restore)
    assert torch.equal(restored, torch.where(mask[..., None] == 1, -1.0, tokens))


def test_every_patch_is_equally_likely_to_be_masked():
    torch.manual_seed(0)
    n, N = 20_000, 16
    _, _, mask = PatchShuffle(0.75)(torch.zeros(n, N, 1))
    spread = math.sqrt(0.75 * 0.25 / n)
    assert (mask.mean(dim=0) - 0.75).abs().max() < 4.5 * spread
    assert mask.unique(dim=0).shape[0] > 1700               # of the 1820 ways to choose 12 of 16
    assert not mask.equal(PatchShuffle(0.75)(torch.zeros(n, N, 1))[2])      # another time, others


def test_masked_pixels_cannot_influence_the_encoder_and_predictions_know_their_place():
    model, images, noise = tiny_mae(), random_images(4), random_noise(4, 16)
    patches = patchify(images, 8).requires_grad_()
    visible, _, mask = model.shuffle(model.encoder.embed(patches), noise)
    gradient, = torch.autograd.grad(model.encoder(visible).square().sum(), patches)
    assert (gradient != 0).any(dim=-1).equal(mask == 0)

    _, pred, _ = model(images, noise)
    hidden = mask[..., None] == 1
    changed = unpatchify(torch.where(hidden, torch.rand_like(patches), patches), 8)
    assert torch.equal(model(changed, noise)[1], pred)
    seen_changed = unpatchify(torch.where(hidden, patches, patches + 0.1), 8)
    assert not torch.allclose(model(seen_changed, noise)[1], pred)
    masked = pred[0][mask[0] == 1]
    assert (masked[0] - masked[1]).abs().max() > 1e-3       # the same mask token, another place


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_one_computed_in_numpy(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), random_images(3)
    loss, pred, mask = model(images, random_noise(3, 16))
    pixels, pred, mask = images.double().numpy(), pred.detach().double().numpy(), mask.numpy()
    errors = []
    for b, row, column in itertools.product(range(3), range(4), range(4)):
        if mask[b, row * 4 + column]:
            target = pixels[b, :, row * 8:row * 8 + 8, column * 8:column * 8 + 8].reshape(-1)
            if norm_pix_loss:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            errors.append(((pred[b, row * 4 + column] - target) ** 2).mean())
    assert len(errors) == 3 * 12
    assert loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


TORCH_NAMES = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj",
               "linear": "mlp.fc", "norm": "norm"}      # how the names of torch and ours begin


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_classifier_computes_what_a_vit_of_torchs_own_layers_computes(pool):
    classifier, images = ViTClassifier(tiny_mae().encoder, 5, pool), random_images(3)
    torch.manual_seed(1)
    for parameter in classifier.parameters():                # neither zeros nor ones
        nn.init.normal_(parameter, std=0.3)
    weights = classifier.state_dict()
    tokens = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"],
                      stride=8).flatten(2).mT + weights["pos_embed"]
    tokens = torch.cat([weights["cls_token"].expand(3, -1, -1), tokens], dim=1)
    for i in range(2):
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True,
                                           norm_first=True)
        for name, value in layer.state_dict().items():
            start = next(start for start in TORCH_NAMES if name.startswith(start))
            ours = f"blocks.{i}.{name.replace(start, TORCH_NAMES[start])}"
            value.copy_(weights.get(ours, torch.zeros(48)))     # q, k and v have no bias
        normed = layer.norm1(tokens)
        _, attention = layer.self_attn(normed, normed, normed, average_attn_weights=False)
        torch.testing.assert_close(classifier.attention_maps(images)[i], attention)
        tokens = layer(tokens)
    codes = F.layer_norm(tokens, (16,), weights["norm.weight"], weights["norm.bias"])
    code = codes[:, 0] if pool == "cls" else codes[:, 1:].mean(dim=1)
    logits = F.linear(code, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(classifier(images), logits)


def test_classifier_leaves_patches_out_only_if_it_is_given_noise():
    encoder, noise, images = tiny_mae().encoder, random_noise(2, 16), random_images(2)
    images.requires_grad_()
    _, _, mask = PatchShuffle(0.75)(patchify(images, 8), noise)
    for mask_ratio, given, seen in ((0.75, noise, mask == 0), (0.75, None, mask >= 0),
                                    (0.0, noise, mask >= 0)):
        logits = ViTClassifier(encoder, 5, "mean", mask_ratio)(images, given)
        gradient, = torch.autograd.grad(logits.square().sum(), images)
        assert (patchify(gradient, 8) != 0).any(dim=-1).equal(seen)


def test_positions_start_as_sines_and_cosines_of_row_and_column():
    model = MAEViT()                                        # 16 x 16 patches
    positions = model.encoder.pos_embed[0].detach().view(16, 16, 192)
    for row, column, i in itertools.product((0, 5, 15), (0, 3, 15), (0, 7, 47)):
        frequency = 16 ** (-i / 48)
        expected = [math.sin(row * frequency), math.cos(row * frequency),
                    math.sin(column * frequency), math.cos(column * frequency)]
        assert positions[row, column, i::48].tolist() == pytest.approx(expected, abs=1e-5)
    assert (model.decoder.pos_embed[0, 0] == 0).all()       # the class token has no place
    assert torch.equal(model.decoder.pos_embed[0, 1:], model.encoder.pos_embed[0])
    assert model.encoder.pos_embed.requires_grad


def test_parameters_are_as_designed():
    model = MAEViT()
    assert sum(p.numel() for p in model.parameters()) == 7_212_684
    names = {"cls_token": (1, 1, 192), "pos_embed": (1, 256, 192),
             "patch_embed.proj.weight": (192, 3, 2, 2), "patch_embed.proj.bias": (192,)}
    for i in range(12):                                     # the names of timm's VisionTransformer
        names |= {f"blocks.{i}.{name}": shape for name, shape in {
            "norm1.weight": (192,), "norm1.bias": (192,), "attn.qkv.weight": (576, 192),
            "attn.proj.weight": (192, 192), "attn.proj.bias": (192,), "norm2.weight": (192,),
            "norm2.bias": (192,), "mlp.fc1.weight": (768, 192), "mlp.fc1.bias": (768,),
            "mlp.fc2.weight": (192, 768), "mlp.fc2.bias": (192,)}.items()}
    names |= {"norm.weight": (192,), "norm.bias": (192,), "head.weight": (10, 192),
              "head.bias": (10,)}
    classifier = ViTClassifier(model.encoder)
    assert {n: tuple(p.shape) for n, p in classifier.state_dict().items()} == names
    assert model.encoder.state_dict().keys() == names.keys() - {"head.weight", "head.bias"}
    decoder = model.decoder.state_dict()
    assert {"mask_token", "head.bias", "blocks.3.mlp.fc2.bias"} <= decoder.keys()
    assert "embed.weight" not in decoder
    assert "embed.weight" in tiny_mae().decoder.state_dict()    # other widths


@pytest.mark.parametrize("recipe", ["full", "laptop"])
def test_the_first_loss_is_about_that_of_predicting_grey(recipe):
    torch.manual_seed(0)
    model = data.build_model("pretrain", pretrain.RECIPES[recipe])
    images = random_images(8)
    loss, pred, _ = model(images)
    grey = 1 if model.norm_pix_loss else images.square().mean()
    assert pred.std() < 0.5 and loss < 1.7 * grey


@pytest.mark.parametrize("make, message", [
    (lambda: MAEViT(depth=0), "at least 1"),
    (lambda: MAEViT(patch_size=16, mask_ratio=0.05), "leaves no masked patch out of 4"),
    (lambda: tiny_mae()(torch.zeros(2, 1, 32, 32)), "images must be (B, 3, 32, 32)"),
    (lambda: patchify(torch.zeros(1, 3, 30, 32), 4), "does not divide an image of 30 x 32"),
    (lambda: unpatchify(torch.zeros(1, 15, 48), 4), "not a square RGB image"),
    (lambda: ViTClassifier(tiny_mae().encoder, pool="max"), "pool")])
def test_what_does_not_fit_together_is_a_value_error(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# ------------------------------------------------------------------------------ the data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """A folder with the data set `shapes`, and small files in the formats of both CIFARs."""
    folder = tmp_path_factory.mktemp("data")
    data.load_dataset("shapes", folder)
    write_records("cifar10", folder, count=40)
    write_records("cifar10", folder / "other", count=30)
    write_records("cifar100", folder, count=300)
    return folder


def write_records(name: str, folder: Path, count: int) -> None:
    """Noise in a data set's binary format. Each class has a colour, the same in all files."""
    source, rng = data.SOURCES[name], np.random.default_rng(0)
    colours = rng.integers(0, 120, (source.num_classes, 3, 1))
    (folder / source.folder).mkdir(parents=True, exist_ok=True)
    for file in source.train + source.test:
        records = rng.integers(0, 10, (count, source.label_bytes + 3072))
        records[:, source.label_bytes - 1] = labels = np.arange(count) % source.num_classes
        pixels = colours[labels] + rng.integers(0, 136, (count, 3, 1024))
        records[:, source.label_bytes:] = pixels.reshape(count, 3072)
        (folder / source.folder / file).write_bytes(records.astype(np.uint8).tobytes())


@pytest.mark.parametrize("name, label_bytes", [("cifar10", 1), ("cifar100", 2), ("shapes", 1),
                                               ("the real cifar10", 1)])
def test_what_is_loaded_is_what_stands_in_the_files(data_dir, name, label_bytes):
    name, real = name.split()[-1], name.startswith("the real")
    folder, source = HERE / "data" if real else data_dir, data.SOURCES[name]
    if not (folder / source.folder).exists():
        pytest.skip("the real CIFAR-10 is not in data/")
    dataset, size = data.load_dataset(name, folder), label_bytes + 3072
    assert dataset.train_images.dtype == torch.uint8 and dataset.train_labels.dtype == torch.int64
    assert len(dataset.classes) == source.num_classes
    assert not real or dataset.classes[dataset.train_labels[0]] == "frog"
    for files, images, labels in [(source.train, dataset.train_images, dataset.train_labels),
                                  (source.test, dataset.test_images, dataset.test_labels)]:
        content = b"".join((folder / source.folder / file).read_bytes() for file in files)
        assert images.shape == (len(content) // size, 3, 32, 32)
        assert labels.tolist() == list(content[label_bytes - 1::size])
        starts = range(0, len(content), size)
        pixels = b"".join(content[start + label_bytes:start + size] for start in starts)
        assert images.numpy().tobytes() == pixels           # channel, then y, then x


def test_shapes_are_balanced_varied_and_the_same_every_time(data_dir, tmp_path):
    first, again = (data.load_dataset("shapes", folder) for folder in (data_dir, tmp_path))
    assert torch.equal(first.train_images, again.train_images)
    assert first.train_labels.bincount().tolist() == [1000] * 10
    assert first.test_labels.bincount().tolist() == [200] * 10
    everything = torch.cat([first.train_images, first.test_images]).numpy()
    assert len({image.tobytes() for image in everything}) == 12_000


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    def order(count: int, *seed: int) -> torch.Tensor:
        return data.epoch_order(count, 4, data.seeded_generator("cpu", *seed))

    assert order(12, 0, 1).flatten().sort().values.tolist() == list(range(12))
    assert order(14, 0, 1).shape == (3, 4) and len(order(14, 0, 1).unique()) == 12
    assert torch.equal(order(12, 0, 1), order(12, 0, 1))
    assert not torch.equal(order(12, 0, 1), order(12, 0, 2))
    assert not torch.equal(order(12, 0, 1), order(12, 1, 1))
    assert order(3, 0, 1).shape == (1, 4) and len(order(3, 0, 1).unique()) == 3    # fewer: again


def test_augmentation_flips_and_shifts_whole_images():
    images = data.unscale(random_images(400))
    generator = data.seeded_generator("cpu", 0)
    assert data.augment(images, "none", generator) is images
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="reflect").to(torch.uint8)
    for kind, shifts, least in (("flip", [4], 2), ("crop", range(9), 140)):
        seen = collections.Counter()
        for image, result in zip(padded, data.augment(images, kind, generator)):
            way, = [(dy, dx, flip) for dy, dx, flip in itertools.product(shifts, shifts, (0, 1))
                    if result.equal((image.flip(2) if flip else image)[:, dy:, dx:][:, :32, :32])]
            seen[way] += 1
        assert len(seen) >= least                           # of 2 and 162 ways
        assert 150 < sum(count for (*_, flip), count in seen.items() if flip) < 250


def test_colors_change_by_a_saturation_a_contrast_and_a_brightness_of_each_image():
    images = torch.full((500, 3, 32, 32), 100)              # grey: 80 on the left, 120 on the right
    images += torch.where(torch.arange(32) < 16, -20, 20) + torch.tensor([5, 0, -5])[:, None, None]
    images = images.to(torch.uint8)

    def augment(kind: str) -> torch.Tensor:
        return data.augment(images, kind, data.seeded_generator("cpu", 0)).float()

    def parts(images: torch.Tensor) -> torch.Tensor:        # (500, 3)
        light, dark = images.amax(dim=3).mean(dim=(1, 2)), images.amin(dim=3).mean(dim=(1, 2))
        color = images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))
        return torch.stack([images.mean(dim=(1, 2, 3)), light - dark, color], dim=1)

    changed = parts(augment("color")) / parts(augment("crop"))
    factors = torch.stack([changed[:, 0],                               # brightness
                           changed[:, 1] / changed[:, 0],               # contrast
                           changed[:, 2] / changed[:, 1]])              # saturation
    assert 0.599 < factors.min() and factors.max() < 1.401
    assert (factors.amin(dim=1) < 0.62).all() and (factors.amax(dim=1) > 1.38).all()
    assert (factors.mean(dim=1) - 1).abs().max() < 0.04
    assert (torch.corrcoef(factors) - torch.eye(3)).abs().max() < 0.15          # independent
    bright = data.augment(torch.full_like(images, 250), "color", data.seeded_generator("cpu", 0))
    assert bright.min() >= 0 and bright.max() == 255


def test_mixed_labels_are_the_shares_of_what_the_images_show():
    values = torch.arange(0, 250, 5).repeat(20)             # each image of one brightness
    images = values[:, None, None, None].expand(-1, 3, 32, 32).to(torch.uint8)
    labels = torch.eye(50).repeat(20, 1)
    mixed, targets = data.mix(images, labels, data.seeded_generator("cpu", 0))
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), targets @ values[:50].float(),
                               rtol=1e-4, atol=0)
    shares = (targets * labels).sum(dim=1)                  # of the image itself
    torch.testing.assert_close((targets * labels.roll(1, 0)).sum(dim=1), 1 - shares)
    blended = mixed.amax(dim=(1, 2, 3)) == mixed.amin(dim=(1, 2, 3))
    assert 0.45 < blended.float().mean() < 0.55             # mixup or CutMix
    assert 0.45 < shares[blended].mean() < 0.55
    assert 0.63 < shares[~blended].mean() < 0.72            # boxes are cut off at the edges


def test_labelled_batches_are_mixed_repeated_and_noised_if_the_settings_say_so():
    images, labels = data.unscale(random_images(12)), torch.arange(12) % 4
    dataset = data.Dataset("cifar10", ["a class"] * 4, images, labels, images, labels)

    def batches(**changes) -> map:                          # the tensors of all batches, joined
        settings = dict(seed=0, batch_size=4, repeat=2, augment="none", mix=False, mask_ratio=0.0,
                        epochs=3, whole_epochs=0)
        settings = argparse.Namespace(**settings | changes)
        return map(torch.cat, zip(*finetune.labelled_batches(dataset, 16, 1, settings)))

    plain, _ = batches()
    shown = (data.unscale(plain)[:, None] == images).flatten(2).all(dim=2)      # (24, 12)
    assert (shown.sum(dim=0) == 2).all()                    # repeat
    _, _, noise = batches(mask_ratio=0.5, whole_epochs=2)   # this is epoch 1 of 3
    assert noise.shape == (24, 16) and noise.unique().numel() == 24 * 16
    whole, _ = batches(mask_ratio=0.5, whole_epochs=3)      # without noise
    assert whole.equal(plain)
    mixed, targets = batches(mix=True)
    assert targets.shape == (24, 4) and not mixed.equal(plain)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(24))


def test_subsets_are_balanced_or_hold_images_out(data_dir):
    whole = data.load_dataset("shapes", data_dir)
    few, again, others = (whole.balanced(7, seed=seed).train_images for seed in (0, 0, 1))
    assert torch.equal(few, again) and not torch.equal(few, others)
    assert whole.balanced(7, seed=0).train_labels.bincount().tolist() == [7] * 10
    held_out = whole.hold_out(1000)
    for now, before in ((held_out.train_images, whole.train_images[:-1000]),
                        (held_out.train_labels, whole.train_labels[:-1000]),
                        (held_out.test_images, whole.train_images[-1000:]),
                        (held_out.test_labels, whole.train_labels[-1000:])):
        assert torch.equal(now, before)


# ------------------------------------------------------------------------------ the programs


def run(program, *flags) -> tuple[int, str, str]:
    """A program with its command line: exit status, standard output, standard error."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with data.exit_on_bad_input():
                program.main([str(flag) for flag in flags])
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def succeed(program, *flags) -> str:
    status, out, err = run(program, *flags)
    assert status == 0, err
    return out


def read_log(folder: Path) -> list[dict]:
    """The rows of a log without the columns that are measured."""
    with open(folder / "log.csv") as file:
        return [{name: value for name, value in row.items()
                 if name not in ("seconds", "images_per_second", "peak_memory_mb")}
                for row in csv.DictReader(file)]


def read_settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["settings"]


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    return data.load_checkpoint(folder)["model"]


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs have the same files, and weights, optimizers, log and pictures bit for bit."""
    for file in ("checkpoint.pt", "weights.pt"):
        first, second = (data.load_checkpoint(folder / file) for folder in (a, b))
        for key in ("model", "optimizers", "epoch", "probe"):
            torch.testing.assert_close(first.get(key), second.get(key), rtol=0, atol=0)
    assert read_log(a) == read_log(b)
    files = [{name: content if name.endswith(".npy") else ""    # the names, and the tiles
              for name, content in snapshot(folder).items()} for folder in (a, b)]
    assert files[0] == files[1]


def assert_close_logs(a: Path, b: Path, tolerance: float) -> None:
    """Equal up to `tolerance`, and accuracies up to 1 of 40 test or 2 of 96 training images, since
    two classes may be about equally likely."""
    for one, other in zip(read_log(a), read_log(b), strict=True):
        for column, value in one.items():
            images = 2.6 if "accuracy" in column else 0     # in percent
            assert float(other[column]) == pytest.approx(float(value), rel=tolerance,
                                                         abs=images), column


KINDS = {"pretrain": pretrain, "finetune": finetune, "scratch": finetune, "linear": finetune}


@pytest.fixture(scope="session")
def runs(flags, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each kind."""
    return {kind: tmp_path_factory.getbasetemp() / "runs" / kind for kind in KINDS}


@pytest.fixture(scope="session")
def flags(data_dir, tmp_path_factory) -> dict[str, list]:
    """The flags of a run of each kind, without --out: 96 of 200 random images, a small model. Also
    makes these runs: two of them start from the first."""
    folder = tmp_path_factory.getbasetemp() / "runs"
    small = ["--recipe", "laptop", "--dataset", "cifar10", "--data-dir", data_dir, "--limit", 96,
             "--batch-size", 32, "--device", "cpu", "--precision", "fp32"]
    sizes = ["--patch-size", 8, "--dim", 16, "--depth", 1, "--heads", 2]
    init = ["--init", folder / "pretrain"]
    flags = {"pretrain": [*small, *sizes, "--decoder-dim", 16, "--decoder-heads", 2, "--epochs", 3],
             "finetune": [*small, *init, "--epochs", 2, "--mix"],
             "scratch": [*small, *sizes, "--epochs", 2],
             "linear": [*small, *init, "--mode", "linear", "--epochs", 5]}
    for kind, program in KINDS.items():
        succeed(program, *flags[kind], "--out", folder / kind)
    return flags


def test_pretraining_leaves_a_whole_run_folder(runs):
    out = runs["pretrain"]
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert names == {"config.json", "log.csv", "checkpoint.pt", "weights.pt", "curves.png",
                     *(f"reconstructions/epoch-{epoch:04}.{kind}" for epoch in range(4)
                       for kind in ("png", "npy"))}
    log = read_log(out)
    assert [row["epoch"] for row in log] == ["1", "2", "3"] and float(log[-1]["lr"]) == 0
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["dataset"] == "cifar10" and config["settings"]["dim"] == 16
    assert config["versions"]["torch"] == torch.__version__
    half = data.load_checkpoint(out / "weights.pt")
    assert "optimizers" not in half
    for name, value in read_model(out).items():
        assert half["model"][name].equal(value.half())


def test_a_linear_probe_keeps_the_pretrained_encoder_and_fine_tuning_changes_it(runs):
    pretrained = read_model(runs["pretrain"])
    for name, value in read_model(runs["linear"]).items():
        assert name.startswith("head.") or value.equal(pretrained[f"encoder.{name}"]), name
    tuned = read_model(runs["finetune"])["blocks.0.attn.qkv.weight"]
    assert not torch.equal(tuned, pretrained["encoder.blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("kind, hardware", [("finetune", True), ("linear", True),
                                            ("finetune", False)])
def test_evaluate_prints_the_last_row_of_the_log_whether_the_machine_has_bfloat16_or_not(
        kind, hardware, flags, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "multiplies_bf16", lambda device: hardware)
    succeed(finetune, *flags[kind], "--precision", "auto", "--epochs", 10, "--base-lr", 0.1,
            "--out", tmp_path / "run")
    assert read_settings(tmp_path / "run")["precision"] == ("bf16" if hardware else "fp32")
    last = read_log(tmp_path / "run")[-1]
    assert float(last["test_accuracy"]) > 30                # chance is 10: it has learned colours
    monkeypatch.setattr(pretrain, "multiplies_bf16", lambda device: True)
    monkeypatch.chdir(tmp_path)                             # the run knows where its data set is
    out = succeed(finetune, "--evaluate", tmp_path / "run")
    assert out.endswith(f"test accuracy {float(last['test_accuracy']):.2f} %\n")
    loss = float(re.search("loss ([0-9.]+)", out)[1])       # of 4 decimals
    assert loss == pytest.approx(float(last["test_loss"]), abs=0.6e-4)


def test_a_classifier_from_another_machine_is_evaluated_on_the_data_set_here(
        runs, data_dir, tmp_path, monkeypatch):
    checkpoint = data.load_checkpoint(runs["scratch"])
    checkpoint["settings"]["data_dir"] = str(tmp_path / "there")
    data.save_checkpoint(tmp_path / "weights.pt", checkpoint)
    os.symlink(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert "cifar10, 40 test images" in succeed(finetune, "--evaluate", "weights.pt")


def test_other_data_sets_can_be_learned_and_tested_on(flags, runs, data_dir, tmp_path):
    succeed(finetune, *flags["scratch"], "--dataset", "cifar100", "--out", tmp_path / "run")
    assert read_model(tmp_path / "run")["head.weight"].shape == (100, 16)
    status, out, err = run(finetune, "--evaluate", runs["scratch"] / "weights.pt", "--dataset",
                           "shapes", "--data-dir", data_dir)
    assert status == 0 and "note: it was trained on cifar10, not on shapes" in err
    assert "shapes, 2,000 test images" in out


def test_settings_are_chosen_on_images_held_out_and_evaluated_on_the_test_images(
        flags, data_dir, tmp_path):
    out = succeed(finetune, *flags["scratch"], "--limit", 64, "--validation", 24, "--epochs", 1,
                  "--labels-per-class", 1, "--out", tmp_path / "run")
    assert "10 training and 24 validation images" in out
    out = succeed(finetune, "--evaluate", tmp_path / "run", "--data-dir", data_dir)
    assert "40 test images" in out


def test_help_shows_the_default_of_a_number_even_if_it_is_0():
    text = " ".join(succeed(finetune, "--help").split())
    for shown in ("passes over the training images (default: 4)", "labelled images (default: 0)"):
        assert shown in text
    assert "default: None" not in text and "default: False" not in text


def test_a_run_has_a_folder_whose_name_says_what_it_is(flags, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, kind, more in [
            ("linear-cifar10-laptop-96-images", "linear", []),
            ("scratch-cifar10-laptop-96-images-2-labels", "scratch", ["--labels-per-class", 2]),
            ("pretrain-validation-cifar10-laptop-96-images", "pretrain", ["--validation", 8])]:
        succeed(KINDS[kind], *flags[kind], *more, "--epochs", 1)
        assert (tmp_path / "runs" / name / "weights.pt").exists(), name


def test_what_a_reader_should_know_of_the_encoder_is_noted(runs, flags, tmp_path):
    for number, (settings, validation, note) in enumerate([
            (dict(), 0, ""),
            (dict(epochs=5), 0, "has done 3 of its 5 epochs"),
            (dict(), 8, "may have seen validation images, without labels"),
            (dict(validation=8), 8, ""),
            (dict(dataset="shapes"), 8, "was pre-trained on shapes, not on cifar10")]):
        checkpoint = data.load_checkpoint(runs["pretrain"])
        checkpoint["settings"] |= settings
        encoder, out = tmp_path / "encoder.pt", tmp_path / str(number)
        data.save_checkpoint(encoder, checkpoint)
        status, _, err = run(finetune, *flags["finetune"], "--epochs", 1, "--validation",
                             validation, "--init", encoder, "--out", out)
        assert status == 0 and err == (f"note: {encoder} {note}\n" if note else "")


def write_stripes(folder: Path) -> None:
    """2,000 training images of noisy stripes in CIFAR-10's format: the classes are ten angles."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:32, :32]
    folder.mkdir(parents=True)
    for file in (*data.BATCHES, "test_batch.bin"):
        angle = rng.permutation(np.arange(400) % 10)[:, None, None] * np.pi / 10
        waves = np.sin((x * np.cos(angle) + y * np.sin(angle)) * np.pi / 4
                       + rng.uniform(0, 2 * np.pi, (400, 1, 1)))
        pixels = 128 + 50 * waves[:, None] + rng.normal(0, 60, (400, 3, 32, 32))
        records = np.concatenate([np.rint(angle[:, 0] * 10 / np.pi),
                                  pixels.clip(0, 255).reshape(400, 3072)], axis=1)
        (folder / file).write_bytes(records.astype(np.uint8).tobytes())


def test_pretraining_makes_a_linear_probe_better(flags, tmp_path):
    write_stripes(tmp_path / "data" / "cifar-10-batches-bin")
    accuracy, more = {}, ["--data-dir", tmp_path / "data", "--limit", 2000, "--batch-size", 64]
    for name, rate in (("trained", 0.05), ("random", 1e-12)):
        succeed(pretrain, *flags["pretrain"], *more, "--dim", 32, "--epochs", 6, "--base-lr", rate,
                "--augment", "none", "--picture-every", 9, "--out", tmp_path / name)
        succeed(finetune, *flags["linear"], *more, "--init", tmp_path / name, "--epochs", 20,
                "--out", tmp_path / f"{name}-linear")
        accuracy[name] = float(read_log(tmp_path / f"{name}-linear")[-1]["test_accuracy"])
    assert accuracy["trained"] > accuracy["random"] + 30, accuracy


def test_learning_rate_warms_up_and_follows_a_cosine():
    settings = argparse.Namespace(base_lr=1e-3, batch_size=512, warmup_epochs=5, epochs=25)

    def rate(epoch: float) -> float:
        return pretrain.learning_rate(settings, epoch)

    assert rate(0) == 0 and rate(2.5) == pytest.approx(1e-3) and rate(5) == pytest.approx(2e-3)
    assert rate(15) == pytest.approx(1e-3) and rate(25) == pytest.approx(0, abs=1e-12)
    assert rate(10) == pytest.approx(2e-3 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_weight_has_its_optimizer_and_weight_decay(optimizer):
    """Weight decay spares biases, norms, tokens and positions. Muon steps matrices of blocks."""
    model = tiny_mae()
    settings = argparse.Namespace(optimizer=optimizer, weight_decay=0.05, precision="fp32")
    optimizers = pretrain.make_optimizers(model, settings, (0.9, 0.95))
    places = [(parameter, type(one).__name__, group["weight_decay"]) for one in optimizers
              for group in one.param_groups for parameter in group["params"]]
    found = {id(parameter): where for parameter, *where in places}
    assert len(places) == len(found) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        matrix = re.search(r"(qkv|proj|fc1|fc2|embed|head)\.weight$", name)
        assert matrix or re.search(r"(bias|norm\d?\.weight|_token|pos_embed)$", name)
        muon = optimizer == "muon" and re.search(r"blocks\.\d\.(attn|mlp)\.\w+\.weight", name)
        assert found[id(parameter)] == ["Muon" if muon else "AdamW", 0.05 if matrix else 0], name


@pytest.mark.parametrize("dtype, mixed", [(torch.float64, 1e-9), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16)])
def test_orthogonalize_keeps_directions_and_makes_them_equally_long(shape, dtype, mixed):
    generator = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64),
                                full_matrices=False)
    lengths = torch.logspace(-1.5, 0, 16, dtype=torch.float64)  # the longest 30 times the shortest
    result = pretrain.orthogonalize(U @ (lengths[:, None] * Vh), dtype)
    result = U.mT @ result.double() @ Vh.mT
    values = result.diagonal(dim1=1, dim2=2)
    assert (result - torch.diag_embed(values)).abs().max() < mixed  # the directions are kept
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_steps_as_that_of_torch_does():
    """At the same learning rate torch's takes steps half as long. It computes in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(32, 64, generator=generator) for _ in range(2)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [pretrain.Muon([{"params": [ours[0]], "lr": 0.01, "weight_decay": 0.5},
                                 {"params": [ours[1]], "lr": 0.02}])]
    optimizers += [torch.optim.Muon([matrix], lr=2 * lr, weight_decay=decay / 2,
                                    adjust_lr_fn="match_rms_adamw")
                   for matrix, lr, decay in zip(theirs, (0.01, 0.02), (0.5, 0.0))]
    for _ in range(4):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(32, 64, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, matrix in zip(ours, theirs, start):
        assert (one - other).norm() < 0.03 * (one - matrix).norm()


def test_layer_decay_scales_the_learning_rate_of_each_layer(runs, flags, tmp_path):
    model = ViTClassifier(tiny_mae().encoder)               # of 2 blocks
    expected = {"patch_embed": 3, "cls_token": 3, "pos_embed": 3, "blocks.0": 2, "blocks.1": 1,
                "norm": 0, "head": 0}
    for name, _ in model.named_parameters():
        start = next(start for start in expected if name.startswith(start))
        assert finetune.layers_above(name, depth=2) == expected[start], name
    succeed(finetune, *flags["finetune"], "--layer-decay", 0, "--epochs", 1,
            "--out", tmp_path / "run")                      # 0: only the top layer learns
    before = read_model(runs["pretrain"])
    for name, value in read_model(tmp_path / "run").items():
        if not name.startswith("head"):
            changed = not value.equal(before[f"encoder.{name}"])
            assert changed == name.startswith("norm"), name


def test_gradients_add_up_to_the_same_step_whatever_the_micro_batch():
    batch = random_images(16), random_noise(16, 16)

    def gradients(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = tiny_mae()
        settings = argparse.Namespace(batch_size=16, micro_batch_size=size)
        learner = pretrain.Learner(model, pretrain.masked_loss, [])
        loss = pretrain.compute_gradient(learner, batch, settings, CPU)
        return loss, [parameter.grad for parameter in model.parameters()]

    torch.testing.assert_close(gradients(5), gradients(16), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", ["lunch", "strong"])
def test_a_step_makes_every_tensor_on_the_device_of_the_data(recipe, monkeypatch):
    """As a GPU would find out; here on the device `meta`, whose tensors have no values."""
    machine = pretrain.Machine(torch.device("meta"), "fp32")
    monkeypatch.setattr(pretrain.Machine, "autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(data, "seeded_generator", lambda *_: torch.Generator())
    images, labels = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64).long()
    dataset = data.Dataset("shapes", list(data.SHAPES), images, labels, images, labels)
    dataset = dataset.to(machine.device)
    for kind, recipes, objective in (("pretrain", pretrain.RECIPES, pretrain.masked_loss),
                                     ("classifier", finetune.RECIPES, finetune.classify)):
        settings = argparse.Namespace(**recipes.get(recipe, pretrain.RECIPES["full"]) | dict(
            depth=2, decoder_depth=1, seed=0, batch_size=16, micro_batch_size=8, repeat=1,
            precision="fp32", dataset="shapes"))
        model = pretrain.make_model(kind, settings, machine)
        N = (32 // settings.patch_size) ** 2
        batches = (pretrain.mae_batches(dataset.train_images, N, 1, settings)
                   if kind == "pretrain" else
                   finetune.labelled_batches(dataset, N, 1, settings))
        optimizers = pretrain.make_optimizers(model, settings, betas=(0.9, 0.95))
        batch = next(batches)
        assert all(tensor.is_meta for tensor in batch)
        pretrain.compute_gradient(pretrain.Learner(model, objective, optimizers), batch, settings,
                                  machine)
        for optimizer in optimizers[1:]:                    # Muon; AdamW, torch's, refuses meta
            optimizer.step()


def test_another_seed_gives_another_run(runs, flags, tmp_path):
    succeed(pretrain, *flags["pretrain"], "--seed", 1, "--out", tmp_path / "run")
    assert read_log(tmp_path / "run") != read_log(runs["pretrain"])


@pytest.mark.parametrize("kind", ["pretrain", "scratch"])
def test_benchmark_prints_a_speed_and_writes_nothing(kind, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    out = succeed(KINDS[kind], *flags[kind], "--benchmark")
    assert re.search(r"speed +[\d,.]+ images/s", out) and "GFLOP per image" in out
    assert "MiB at the peak" in out and not list(tmp_path.iterdir())


@functools.cache
def cuda_is_here() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=WITH_GPU).returncode == 0


@pytest.mark.parametrize("kind", ["pretrain", "finetune", "linear"])
def test_cuda_computes_what_the_cpu_does(kind, runs, flags, tmp_path):
    if not cuda_is_here():
        pytest.skip("CUDA is not here")
    start = [*flags[kind], "--device", "auto", "--precision", "auto"]   # CUDA, in bfloat16
    for more in (start, ["--resume", "--epochs", 6, "--micro-batch-size", 5]):
        command = [sys.executable, KINDS[kind].__file__, "--out", tmp_path / "run", *more]
        done = subprocess.run(map(str, command), env=WITH_GPU, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "run")
    assert read_settings(tmp_path / "run")["device"] == "cuda" and len(log) == 6
    for row, same in zip(read_log(runs[kind]), log):        # the first epochs
        for name in row.keys() & {"loss", "train_loss", "test_loss"}:
            assert float(same[name]) == pytest.approx(float(row[name]), rel=0.3), name


# ------------------------------------------------------------------------------ interruption


@contextlib.contextmanager
def after_each_write(action):
    """action(path) is called after each file that a program writes."""
    write = data.write_file

    def write_then_act(path, content) -> None:
        write(path, content)
        action(Path(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_file", write_then_act)
        yield


def run_until(stop, program, *flags) -> bool:
    """Kill a program after it has written a file for which stop(path) is true. Returns whether
    that happened."""
    def act(path: Path) -> None:
        if stop(path):
            raise KeyboardInterrupt                         # nothing in the programs catches it

    with after_each_write(act), contextlib.suppress(KeyboardInterrupt):
        succeed(program, *flags)
        return False
    return True


@pytest.mark.parametrize("kind, more", [
    ("pretrain", ["--checkpoint-every", 2]), ("finetune", []),
    ("linear", ["--checkpoint-every", 2])])
def test_a_run_killed_after_any_file_ends_bit_for_bit_as_the_unbroken_one(
        kind, more, flags, runs, tmp_path):
    """Without a checkpoint it starts again, with the same settings."""
    killed, count = True, 0
    while killed:
        out, writes = tmp_path / str(count), itertools.count()
        killed = run_until(lambda _: next(writes) == count, KINDS[kind], *flags[kind], *more,
                           "--out", out)
        succeed(KINDS[kind], "--out", out, "--resume")
        assert_same_run(out, runs[kind])
        count += 1
    assert count > 7


def test_a_linear_probe_killed_while_it_computes_features_can_be_resumed(flags, runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(finetune, "compute_features", lambda *_, **__: 1 / 0)
        succeed(finetune, *flags["linear"], "--out", tmp_path / "run")
    succeed(finetune, "--out", tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", runs["linear"])


@pytest.mark.parametrize("how", ["--compile", "--precision bf16"])
def test_a_resumed_run_computes_as_before_wherever_it_is_resumed(
        how, flags, runs, data_dir, tmp_path, monkeypatch):
    """Compiled or in bfloat16, with the data set in a folder that was named from elsewhere."""
    monkeypatch.chdir(data_dir.parent)
    start = [*flags["pretrain"], "--data-dir", data_dir.name, *how.split(), "--out"]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    status, _, err = run(pretrain, *start, unbroken)
    if "--compile: torch.compile does not work here" in err:
        pytest.skip("torch.compile does not work here")
    assert status == 0, err
    assert run_until(lambda path: path.name == "weights.pt", pretrain, *start, killed)
    assert (killed / "checkpoint.pt").exists()              # of an earlier epoch
    before = read_settings(killed)
    monkeypatch.chdir(tmp_path)
    succeed(pretrain, "--out", "killed", "--resume")
    assert read_settings(killed) == before and before["data_dir"] == str(data_dir)
    assert before["compile"] == (how == "--compile")
    assert before["precision"] == ("bf16" if "bf16" in how else "fp32")
    assert_same_run(killed, unbroken)
    assert_close_logs(killed, runs["pretrain"], 1e-3 if how == "--compile" else 0.03)


def test_a_resumed_run_may_have_more_epochs(runs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(runs["pretrain"], out)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--resume"])
    succeed(pretrain, "--out", out, "--resume", "--epochs", 5, "--micro-batch-size", 5,
            "--checkpoint-every", 2, "--picture-every", 2)
    assert read_settings(out)["micro_batch_size"] == 5
    commands = [json.loads((folder / "config.json").read_text())["command"]
                for folder in (out, runs["pretrain"])]
    assert commands[0] == commands[1]                       # how the run was started
    log = read_log(out)
    assert [row["epoch"] for row in log] == list("12345")
    assert log[:3] == read_log(runs["pretrain"])
    assert float(log[3]["lr"]) > 0 and float(log[4]["lr"]) == 0


def test_the_flags_of_a_run_may_be_repeated_when_it_is_resumed(runs, flags, tmp_path):
    shutil.copytree(runs["finetune"], tmp_path / "run")
    init = os.path.relpath(runs["pretrain"])                # config.json has the absolute path
    succeed(finetune, *flags["finetune"], "--init", init, "--out", tmp_path / "run", "--resume")


@pytest.mark.parametrize("replaced", [False, True], ids=["deleted", "replaced"])
def test_a_run_whose_folder_is_taken_away_ends_and_leaves_another_run_alone(
        replaced, flags, runs, tmp_path):
    out, after = tmp_path / "run", []

    def take_away(path: Path) -> None:
        if path.name == "checkpoint.pt" and not after:      # the end of the first epoch
            after.append("begun")
            shutil.rmtree(out)
            if replaced:
                succeed(finetune, *flags["scratch"], "--out", out)
            after.append(snapshot(tmp_path))

    with after_each_write(take_away):
        status, _, err = run(pretrain, *flags["pretrain"], "--out", out)
    assert status == 2 and snapshot(tmp_path) == after[1]
    assert err == f"error: {out} was deleted or replaced while its run was going on\n"


# What follows runs in processes of its own.


def run_in_child(module: str, flags: list[str], output: str, environment: dict[str, str],
                 at: tuple[str, int] | None) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)

    def raise_signal(path: Path) -> None:
        if at and path.name == at[0]:
            os.kill(os.getpid(), at[1])

    with after_each_write(raise_signal), data.exit_on_bad_input():
        sys.modules[module].main(flags)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(program, *flags) -> a process that runs a program, forked from one that has imported
    torch already; `process.output` is the file with all that it prints.

    at: (name of a file, signal): the process sends itself a signal after it has written it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "test_mae"])
    context.Process(target=int).start()     # starts the server; int() does nothing
    folder, processes = tmp_path_factory.mktemp("output"), []

    def start(program, *flags, output: str | None = None, environment: dict | None = None,
              at: tuple | None = None):
        output = Path(output or folder / str(len(processes)))
        process = context.Process(target=run_in_child, args=(
            program.__name__, [str(flag) for flag in flags], str(output), environment or {}, at))
        process.start()
        process.output = output
        processes.append(process)
        return process
    yield start
    for process in processes:
        end(process)


def end(process) -> None:
    """With kill -9."""
    process.kill()
    process.join()


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def succeed_in_child(process) -> None:
    process.join(120)
    assert process.exitcode == 0, process.output.read_text()


def test_a_run_killed_at_many_random_moments_ends_as_the_unbroken_one(flags, tmp_path, start):
    flags = [*flags["pretrain"], "--epochs", 5, "--picture-every", 2]
    began = time.monotonic()
    succeed_in_child(start(pretrain, *flags, "--out", tmp_path / "unbroken"))
    length, rng, out = time.monotonic() - began, random.Random(0), tmp_path / "killed"
    for seconds in [*(rng.uniform(0.1, 0.6) * length for _ in range(8)), 120]:
        resume = (out / "config.json").exists()
        process = start(pretrain, *(["--resume"] if resume else flags), "--out", out)
        process.join(seconds)
        if process.exitcode is None:
            end(process)
        else:                                               # it came to its end
            succeed_in_child(process)
            assert_same_run(tmp_path / "unbroken", out)
            shutil.rmtree(out)
    assert not out.exists()


def test_no_other_program_can_write_to_the_folder_of_a_running_one(flags, tmp_path, start):
    out = tmp_path / "run"
    process = start(pretrain, *flags["pretrain"], "--out", out, at=("log.csv", signal.SIGSTOP))
    wait_for(lambda: is_stopped(process))
    (out / "checkpoint.pt").write_bytes(b"not to be read before the folder is free")
    for program, command in ((pretrain, flags["pretrain"]), (finetune, flags["scratch"]),
                             (pretrain, ["--resume"])):
        assert_bad_input(tmp_path, f"another program is writing to {out}", program, *command,
                         "--out", out)
    end(process)


def is_stopped(process) -> bool:
    """Whether SIGSTOP has taken effect."""
    assert process.is_alive(), process.output.read_text()
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def full_disk(room: int):
    """No file can have more than `room` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_part_of_a_data_set(flags, tmp_path):
    with full_disk(room=100_000):
        assert_bad_input(tmp_path, f"{tmp_path / 'shapes'}: File too large", pretrain,
                         *flags["pretrain"], "--dataset", "shapes", "--data-dir", tmp_path)


def test_a_full_disk_is_a_clear_error_and_leaves_the_last_checkpoint(runs, tmp_path):
    out = shutil.copytree(runs["pretrain"], tmp_path / "run")
    before = (out / "checkpoint.pt").read_bytes()
    with full_disk(room=len(before) // 2):
        status, _, err = run(pretrain, "--out", out, "--resume", "--epochs", 9, "--picture-every",
                             100)
    assert status == 2 and err == f"error: {out / 'checkpoint.pt'}: File too large\n"
    assert (out / "checkpoint.pt").read_bytes() == before
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("kind, begin, more", [
    ("pretrain", "epoch ", ["--epochs", 10_000]),
    ("linear", "computing features ", ["--init", HERE / "results" / "weights" / "pretrain.pt",
                                       "--dataset", "shapes", "--limit", 10_000])])
def test_progress_is_one_line_of_a_terminal_that_tells_the_time_left(
        kind, begin, more, flags, tmp_path, start):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    os.set_blocking(master, False)
    shown = bytearray()

    def lines() -> list[str]:
        with contextlib.suppress(BlockingIOError):          # nothing new yet
            shown.extend(os.read(master, 4096))
        return re.findall(r"([^\r\n]*)\x1b\[K\r", bytes(shown).decode())

    process = start(KINDS[kind], *flags[kind], *more, "--out", tmp_path / "run",
                    output=os.ttyname(slave))
    wait_for(lambda: len(lines()) > 1)
    end(process)
    for line in lines():
        assert line.startswith(begin) and len(line) <= 79 and re.search(r"\d:\d\d:\d\d left", line)


def python(*command) -> subprocess.Popen:
    """A program as a user would start it, with pipes."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("program, moment", [(pretrain, "start"), (finetune, "start"),
                                             (pretrain, "training")])
def test_ctrl_c_ends_a_program_without_a_traceback(program, moment, flags, tmp_path):
    trace = ["-X", "importtime"] if moment == "start" else []
    process = python(*trace, program.__file__, *flags["pretrain"], "--epochs", 10_000,
                     "--out", tmp_path / "run")
    if moment == "start":                                   # torch is not imported yet
        assert any(line.rstrip().endswith("argparse") for line in process.stderr)
    else:
        assert any(line.startswith("epoch ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_a_closed_pipe_ends_a_program_without_a_traceback(flags, tmp_path):
    """As in `python pretrain.py | head -1`."""
    process = python(pretrain.__file__, *flags["pretrain"], "--epochs", 10_000,
                     "--out", tmp_path / "run")
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 1


# ------------------------------------------------------------------------------ several processes


def start_two(start, program, *flags, at: tuple | None = None) -> list:
    """The two processes of a run, the main one first. `start`: the fixture."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [start(program, *flags, at=at, environment=dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port))) for rank in range(2)]


def test_torchrun_starts_processes_that_compute_what_one_does(flags, runs, tmp_path):
    process = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                     pretrain.__file__, *flags["pretrain"], "--out", tmp_path / "two")
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0 and out.count("epoch 1/") == 1, err     # only one of them prints
    assert_close_logs(tmp_path / "two", runs["pretrain"], 1e-3)


@pytest.mark.parametrize("kind", ["finetune", "linear"])
def test_two_processes_share_batches_of_any_size_and_can_be_resumed(
        kind, flags, tmp_path, start):
    flags = [*flags[kind], "--batch-size", 31, "--micro-batch-size", 7]
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    succeed(KINDS[kind], *flags, "--out", one)
    main, other = start_two(start, KINDS[kind], *flags, "--out", two,
                            at=("curves.png", signal.SIGSTOP))
    wait_for(lambda: is_stopped(main))
    other.join(1)
    assert other.exitcode is None       # it waits: leaving early can end in an abort
    os.kill(main.pid, signal.SIGCONT)
    succeed_in_child(main)
    succeed_in_child(other)
    assert_close_logs(one, two, 1e-3)
    torch.testing.assert_close(read_model(one), read_model(two), rtol=1e-2, atol=1e-4)

    main, other = start_two(start, KINDS[kind], *flags, "--out", resumed, "--checkpoint-every", 1,
                            at=("checkpoint.pt", signal.SIGKILL))
    main.join(120)
    assert main.exitcode == -signal.SIGKILL
    end(other)
    for process in start_two(start, KINDS[kind], "--out", resumed, "--resume"):
        succeed_in_child(process)
    assert_same_run(two, resumed)


# ------------------------------------------------------------------------------ bad input


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file() and os.access(path, os.R_OK)}


def assert_bad_input(folder: Path, message: str, program, *flags) -> None:
    """One line on standard error that holds `message`, status 2, `folder` as it was."""
    before = snapshot(folder)
    status, _, err = run(program, *flags)
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert snapshot(folder) == before


@pytest.mark.parametrize("number, good, bad", [
    (data.COUNT, ["1", "7", "1000000"], ["0", "-3", "2.5", "many", "", "nan", "1e3"]),
    (data.number(int, 0, 9), ["0", "9"], ["-1", "10"]),
    (data.number(float, 0, 1), ["0", "1", "0.5", "1e-3"], ["-0.1", "1.1", "nan", "inf", "x"]),
    (data.number(float, 0, 1, open_ends=True), ["0.5"], ["0", "1", "nan", "-inf"])])
def test_a_number_is_within_its_range(number, good, bad):
    for text in good:
        assert number(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a"):
            number(text)


BAD_INPUT = [
    (pretrain, "--epochs 0", "--epochs: '0' is not a whole number from 1 to 1000000"),
    (pretrain, "--mask-ratio 1", "--mask-ratio: '1' is not a number above 0 and below 1"),
    (pretrain, "--epoch 3", "unrecognized arguments: --epoch 3"),
    (pretrain, "--epochs 2 --warmup-epochs 3", "--warmup-epochs 3 is longer than --epochs 2"),
    (pretrain, "--patch-size 5", "patch size 5 does not divide an image of 32 x 32"),
    (pretrain, "--limit 201", "--limit 201: only 200 training images"),
    (pretrain, "--validation 200", "--validation 200: cifar10 has 200 training images"),
    (pretrain, "--data-dir {data}/cifar-10-batches-bin", "is itself the folder of a data set"),
    (pretrain, "--device cuda", "--device cuda: torch finds no such device here"),
    (pretrain, "--benchmark --out {empty}/x", "--benchmark leaves no run"),
    (pretrain, "--out {empty}/file/run", "file/run: Not a directory"),
    (pretrain, "--out {runs}/finetune", "{runs}/finetune already holds a run"),
    (pretrain, "--out {empty}", "{empty} already holds a run or other files"),
    (pretrain, "--resume", "--resume needs --out RUN"),
    (pretrain, "--resume --out {empty}", "{empty} has no config.json with the settings of a run"),
    (pretrain, "--resume --out {runs}/finetune", "settings of a run of pretrain.py"),
    (pretrain, "--resume --out {runs}/pretrain --dim 32", "--dim is 16 for the run in"),
    (pretrain, "--resume --out {runs}/pretrain --epochs 2", "--epochs is 3 for the run in"),
    (pretrain, "--resume --out {runs}/pretrain --data-dir {data}/other",
     "trained and tested on [96, 40] images"),
    (finetune, "--labels-per-class 5000", "only 10 of the 96 training images"),
    (finetune, "--init {empty}", "{empty}/checkpoint.pt: No such file"),
    (finetune, "--init ''", "checkpoint.pt: No such file"),
    (finetune, "--init {empty}/file", "file is not a checkpoint, or it is damaged"),
    (finetune, "--init {runs}/finetune", "from pretrain.py is needed"),
    (finetune, "--init {runs}/pretrain --dim 32", "--dim is 16 for the encoder of"),
    (finetune, "--resume --out {runs}/finetune --mode linear", "--mode is finetune for the run in"),
    (finetune, "--mode linear", "--mode linear needs --init"),
    *((finetune, f"--mode linear --init {{runs}}/pretrain {flag}", flag.split()[0])
      for flag in ("--augment flip", "--mix", "--whole-epochs 1", "--layer-decay 0.5",
                   "--repeat 2", "--benchmark")),
    (finetune, "--evaluate {runs}/pretrain", "from finetune.py is needed"),
    (finetune, "--evaluate {runs}/finetune --dataset cifar100", "distinguishes 10 classes"),
    (visualize, "--out {empty}/x.jpg", "must end in .png"),
    (visualize, "reconstruct {empty}/x.png --out {empty}/x.png", "is one of the pictures to read"),
    (visualize, "reconstruct --checkpoint {runs}/pretrain --indices 40", "numbered 0 to 39"),
    (visualize, "reconstruct --checkpoint {runs}/pretrain --mask-ratio 0.99", "leaves no visible"),
    (visualize, "attention --checkpoint {runs}/pretrain --block 3", "--block 3: the encoder has 1"),
    (visualize, "attention --checkpoint {runs}/pretrain --patch 4,0", "--patch needs ROW,COLUMN"),
    (visualize, "timeline {runs}/finetune", "has no epoch-*.npy"),
    (visualize, "curves {runs}/finetune --metric loss", "choose from cross-entropy, accuracy, lr"),
]


@pytest.mark.parametrize("program, command, message", BAD_INPUT,
                         ids=[command for _, command, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_harms_nothing(program, command, message, runs, data_dir, flags,
                                                 tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file in the place of a folder")
    names = dict(runs=runs["pretrain"].parent, data=data_dir, empty=tmp_path)
    command = shlex.split(command.format(**names))
    if program is not visualize and not {"--resume", "--evaluate"} & set(command):
        init = "--init" in command
        base = flags["pretrain" if program is pretrain else "finetune" if init else "scratch"]
        command = [*base[:-1], *command] if init else [*base, *command]     # without --mix
    elif {"--evaluate", "reconstruct", "attention"} & set(command):
        command += ["--data-dir", data_dir]
    before = snapshot(names["runs"])
    assert_bad_input(tmp_path, message.format(**names), program, *command)
    assert snapshot(names["runs"]) == before


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_its_checkpoint(flags, tmp_path):
    explosive = ["--base-lr", 999, "--optimizer", "adamw", "--epochs", 50, "--warmup-epochs", 20]
    status, _, err = run(pretrain, *flags["pretrain"], *explosive, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1 and "finite" in err and "--base-lr" in err
    assert all(value.isfinite().all() for value in read_model(tmp_path / "run").values())


def test_a_compiler_that_does_not_work(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: 1 / 0)
    assert_bad_input(tmp_path, "torch.compile does not work here: division by zero", pretrain,
                     *flags["pretrain"], "--compile", "--out", tmp_path / "run")


def test_too_little_memory_is_one_line_and_other_faults_keep_their_traceback(capsys):
    def fail(fault: Exception) -> None:
        raise fault

    for allocate in (lambda: np.empty((2**30, 2**20)), lambda: torch.empty(2**30, 2**20),
                     lambda: fail(RuntimeError("CUDA error: out of memory")),
                     lambda: fail(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"))):
        with pytest.raises(SystemExit, match="2"), data.exit_on_bad_input():
            allocate()
        err = capsys.readouterr().err
        assert err.startswith("error: out of memory") and err.count("\n") == 1
    with pytest.raises(RuntimeError, match="of ours"), data.exit_on_bad_input():
        fail(RuntimeError("of ours"))


@pytest.mark.parametrize("damage, message", [
    (lambda good: None, "No such file"),
    (lambda good: b"", "has 0 bytes"),
    (lambda good: good[:-100], "not a whole number of 3,073-byte CIFAR-10 records"),
    (lambda good: good[:3 * 3073] + bytes([10]) + good[3 * 3073 + 1:], "record 3 has label 10")])
def test_damaged_data_files_are_bad_input(damage, message, data_dir, tmp_path, flags):
    folder = shutil.copytree(data_dir / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-bin")
    file = folder / "data_batch_3.bin"
    content = damage(file.read_bytes())
    file.unlink() if content is None else file.write_bytes(content)
    for dataset in ("cifar10", "auto"):                     # a damaged one is never replaced
        command = [*flags["pretrain"], "--data-dir", tmp_path, "--dataset", dataset]
        assert_bad_input(tmp_path, message, pretrain, *command, "--out", tmp_path / "run")
        assert str(file) in run(pretrain, *command)[2]


@pytest.fixture
def server(data_dir, tmp_path_factory, monkeypatch):
    """A web server on 127.0.0.1 that stands in for CIFAR-10's. server.archive: what it should send;
    server.answer: the status and content that it does send, and seconds until it hangs up."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, content, seconds = server.answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(server.archive)))
            self.end_headers()
            self.wfile.write(content)
            time.sleep(seconds)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        file = shutil.make_archive(tmp_path_factory.mktemp("archive") / "cifar", "gztar", data_dir,
                                   "cifar-10-batches-bin")
        server.archive = Path(file).read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(data.SOURCES, "cifar10", replace(
            data.SOURCES["cifar10"], md5=hashlib.md5(server.archive).hexdigest(),
            url=f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"))
        yield server
        server.shutdown()


@pytest.mark.parametrize("fault", ["404", "cut off", "wrong checksum"])
def test_downloads_that_fail_leave_nothing_and_a_second_try_succeeds(
        fault, server, data_dir, tmp_path, flags):
    server.answer = {"404": (404, b"gone", 0), "cut off": (200, server.archive[:-99], 0),
                     "wrong checksum": (200, server.archive[:-1] + b"!", 0)}[fault]
    command = [*flags["pretrain"], "--data-dir", tmp_path / "data", "--out", tmp_path / "run"]
    assert_bad_input(tmp_path, data.SOURCES["cifar10"].url, pretrain, *command)
    assert not list((tmp_path / "data").iterdir())

    server.answer = 200, server.archive, 0
    succeed(pretrain, *command)
    assert (snapshot(tmp_path / "data" / "cifar-10-batches-bin")
            == snapshot(data_dir / "cifar-10-batches-bin"))


def test_a_killed_download_leaves_nothing_after_the_next_program(server, tmp_path):
    folder, source = tmp_path / "data", data.SOURCES["cifar10"]
    server.answer = 200, server.archive[:-9], 60
    process = multiprocessing.get_context("forkserver").Process(target=data.download,
                                                                args=(source, folder))
    process.start()
    wait_for(lambda: any(path.is_file() and path.stat().st_size for path in folder.rglob("*")))
    end(process)
    assert len(list(folder.iterdir())) == 1                 # what was killed
    server.answer = 200, server.archive, 0
    data.download(source, folder)
    assert [path.name for path in folder.iterdir()] == ["cifar-10-batches-bin"]


def test_auto_falls_back_to_shapes_loudly_and_says_so_everywhere(
        tmp_path, data_dir, flags, monkeypatch):
    source = replace(data.SOURCES["cifar10"], url="http://127.0.0.1:9/x.tar.gz")
    monkeypatch.setitem(data.SOURCES, "cifar10", source)
    shutil.copytree(data_dir / "shapes", tmp_path / "shapes")
    command = [*flags["pretrain"], "--data-dir", tmp_path, "--out", tmp_path / "run"]
    assert_bad_input(tmp_path, f"cannot download {source.url}", pretrain, *command)
    status, out, err = run(pretrain, *command, "--dataset", "auto", "--epochs", 1)
    assert status == 0 and "CIFAR-10 IS NOT HERE" in err and "data       shapes" in out
    assert read_settings(tmp_path / "run")["dataset"] == "shapes"
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "run"}


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(HERE / 'evil-was-here'))}",)


def written(save, *args, **options) -> bytes:
    """What save(file, ...) writes to the file."""
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def bad_checkpoints(file: Path):
    """The bytes of broken files, then changes that spoil a good checkpoint."""
    good = data.load_checkpoint(file)
    settings, log, model = good["settings"], good["log"], good["model"]
    yield from (b"", file.read_bytes()[:-2000], pickle.dumps(Evil()))
    yield from (written(lambda buffer: torch.save(content, buffer))
                for content in ([1, 2, 3], {"state_dict": model}))
    yield from ({"model": Evil()}, {"version": data.CHECKPOINT_VERSION + 1}, {"version": "new"},
                {"kind": "diffusion"}, {"kind": "classifier"}, {"kind": ["pretrain"]}, {"epoch": 2})
    (name, first), *others = model.items()
    yield from ({"model": model} for model in (
        None, dict.fromkeys(model, "heavy"), dict(others), {**dict(others), 7: first},
        {name: value[..., :1] for name, value in model.items()}))
    yield from ({"log": log} for log in (
        None, ["epoch 1", "epoch 2", "epoch 3"], [log[0] | {"loss": "small"}, *log[1:]],
        [log[0] | {"mood": 1.0}, *log[1:]]))
    yield from ({"settings": bad} for bad in (None, list(settings), {"dim": 16}))
    for name, value in [
            ("dim", "16"), ("dim", math.nan), ("dim", None), ("dim", 0), ("dim", [16]), ("dim", 32),
            ("dim", 16.0), ("dim", True), ("heads", 3), ("depth", 10**9), ("mask_ratio", 1.5),
            ("mask_ratio", 0.99), ("dataset", "imagenet"), ("base_lr", math.inf), ("unknown", 1)]:
        yield {"settings": settings | {name: value}}


def test_damaged_checkpoints_are_bad_input(runs, tmp_path):
    out = shutil.copytree(runs["pretrain"], tmp_path / "run")
    file, good = out / "checkpoint.pt", data.load_checkpoint(out)
    for content in bad_checkpoints(runs["pretrain"] / "checkpoint.pt"):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            data.save_checkpoint(file, good | content)
        with pytest.raises(data.BadInput, match=re.escape(str(file))):
            data.load_model(file, "pretrain")
            pytest.fail(f"was loaded: {content}")
        assert_bad_input(out, str(out), pretrain, "--out", out, "--resume")
    assert not (HERE / "evil-was-here").exists()


def test_states_of_optimizers_that_do_not_fit_are_bad_input(runs, tmp_path):
    out = shutil.copytree(runs["pretrain"], tmp_path / "run")
    good = data.load_checkpoint(out)
    adamw, muon = good["optimizers"]
    for states in [
            None, [adamw], [muon, adamw], [{}, {}],
            [dict(zip(adamw, reversed(adamw.values()))), muon],
            [adamw, {i: {"average": state["average"].T} for i, state in muon.items()}],
            [{i: state | {"step": 3} for i, state in adamw.items()}, muon],
            [{i: dict.fromkeys(state, "fast") for i, state in adamw.items()}, muon]]:
        data.save_checkpoint(out / "checkpoint.pt", good | {"optimizers": states})
        assert_bad_input(out, "the state of its optimizers is missing or does not fit",
                         pretrain, "--out", out, "--resume")


NO_SETTINGS = "has no config.json with the settings of a run of pretrain.py"


@pytest.mark.parametrize("config, message", [
    ("", NO_SETTINGS), ("[" * 10**5, NO_SETTINGS), ("\udcff", NO_SETTINGS),
    ('{"settings": null}', NO_SETTINGS), ('{"settings": {"dim": 16}}', NO_SETTINGS),
    ({"epochs": "3"}, NO_SETTINGS), ({"seed": 5}, "--seed is 0 for the run in")],
    ids=lambda value: repr(value)[:30])
def test_a_config_that_does_not_hold_the_settings_of_its_run(config, message, runs, tmp_path):
    out = shutil.copytree(runs["pretrain"], tmp_path / "run")
    if isinstance(config, dict):
        config = json.dumps({"settings": read_settings(out) | config})
    (out / "config.json").write_text(config, errors="surrogateescape")
    assert_bad_input(out, message, pretrain, "--out", out, "--resume")


# ------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_reconstruction_shows_what_was_masked_predicted_and_there(norm_pix_loss, tmp_path):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), data.unscale(random_images(3))
    patches, noise = patchify(data.scale(images), 8), random_noise(3, 16)
    _, pred, mask = model(data.scale(images), noise)
    if norm_pix_loss:
        pred = mae.denormalize_patches(pred, patches)
        assert mae.denormalize_patches(mae.normalize_patches(patches), patches).allclose(
            patches, atol=1e-5)
    hidden = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    predicted = data.unscale(unpatchify(pred, 8))
    tiles, errors = visualize.reconstruct(model, images, noise)
    masked, filled, original = tiles.unbind(dim=1)
    assert torch.equal(original, images)
    assert torch.equal(masked, torch.where(hidden, visualize.HIDDEN, images))
    assert torch.equal(filled, torch.where(hidden, predicted, images))
    assert torch.equal(visualize.reconstruct(model, images, noise, raw=True)[0][:, 1], predicted)
    error = (pred - patches).square().mean(dim=-1)          # (3, 16), of the pixels
    torch.testing.assert_close(errors, (error * mask).sum(dim=1) / mask.sum(dim=1))
    other = tiny_mae(mask_ratio=0.5, norm_pix_loss=norm_pix_loss)
    assert torch.equal(visualize.reconstruct(model, images, noise, mask_ratio=0.5)[0],
                       visualize.reconstruct(other, images, noise)[0])
    for epoch, one in ((12, other), (7, model)):            # what a timeline is drawn from
        visualize.save_epoch(tmp_path / "reconstructions", epoch, one, images, noise, "")
    epochs = visualize.read_epochs(tmp_path)
    assert list(epochs) == [7, 12] and torch.equal(epochs[7], tiles)


PICTURES = [
    "reconstruct --checkpoint {runs}/pretrain --count 2 --raw --mask-ratio 0.5",
    "ratios --checkpoint {runs}/pretrain --indices 3,1,12",
    "timeline {runs}/pretrain",
    "timeline {runs}/pretrain --out x.gif",
    "curves {runs}/finetune {runs}/scratch/log.csv {runs}/linear --x time --log",
    f"compute {HERE}/results/runs.csv scratch finetune",
    "attention --checkpoint {runs}/finetune --patch 1,2 --block 1",
    "embeddings --checkpoint {runs}/linear",
    "architecture --checkpoint {runs}/pretrain"]


@pytest.mark.parametrize("command", PICTURES)
def test_every_picture_is_drawn(command, runs, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, *_ = command = shlex.split(command.format(runs=runs["pretrain"].parent))
    if name not in ("timeline", "curves", "compute", "embeddings"):
        command += ["--data-dir", data_dir]
    out = succeed(visualize, *command)
    file, = tmp_path.iterdir()
    assert out.endswith(f"wrote {file.name}\n")
    assert out.count(": error ") == (2 if name == "reconstruct" else 0)
    with Image.open(file) as picture:
        assert file.suffix == ".png" or picture.n_frames == 4
        assert picture.width >= 640
        below = picture.convert("RGB").crop((0, 200, *picture.size))        # of the caption
        assert len(below.getcolors(1 << 24)) > 20


@pytest.mark.parametrize("patch_size", [1, 32])
def test_embeddings_fit_on_the_page_at_any_patch_size(patch_size):
    """Nothing is drawn on the margins."""
    model = ViTClassifier(mae.Encoder(32, patch_size, 16, 1, 2))
    pixels = np.asarray(visualize.draw_embeddings(model, "a caption"))
    assert (pixels[:, -10:] == 255).all() and (pixels[-10:] == 255).all()


def test_compute_includes_that_of_pre_training(tmp_path):
    (tmp_path / "runs.csv").write_text(TABLE.format("1.5"))
    families = visualize.read_compute(tmp_path / "runs.csv", ["c", "b"])
    assert families == {"from scratch": [(2.5, 60, "c")],
                        "pre-trained, then fine-tuned": [(5.5, 70, "b")]}


def test_compute_draws_a_line_through_the_mean_of_several_seeds():
    """From 60 and 80 % it leads to 70 % without going up or down."""
    points = [(1.0, 60.0, "a"), (1.0, 80.0, "a-1"), (3.0, 70.0, "b")]
    pixels = np.asarray(visualize.draw_compute({"from scratch": points}, "a caption"))
    colored = (pixels == visualize.COLORS[0]).all(axis=-1)
    assert colored.sum(axis=1).max() > pixels.shape[1] // 3


def test_curves_of_runs_of_different_length_differ_in_colour():
    rows = [{"epoch": epoch, "loss": 2 - epoch / 9, "test_loss": 2 - epoch / 10, "lr": 0.1,
             "seconds": 3.0} for epoch in range(1, 9)]
    for runs in ({"long": rows, "short": rows[:3]}, {"one epoch, which is a dot": rows[:1]}):
        pixels = np.asarray(visualize.draw_curves(runs))[200:].reshape(-1, 3)   # below the legend
        for color in visualize.COLORS[:len(runs)]:
            assert (pixels == color).all(axis=1).any()


def test_pictures_are_read_upright_opaque_and_with_8_bits(runs, tmp_path):
    exif, rgb = Image.Exif(), data.unscale(random_images(1))[0].permute(1, 2, 0).numpy()
    exif[0x0112] = 6                                        # stored lying on its left side
    deep = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    square = Image.fromarray(rgb)
    for name, content, expected, tolerance in [
            ("turned.jpg", written(square.rotate(90).save, "JPEG", exif=exif, quality=100,
                                  subsampling=0), rgb, 40),
            ("alpha.png", written(square.convert("RGBA").save, "PNG"), rgb, 0),
            ("16-bit.png", written(Image.fromarray(deep).save, "PNG"), deep[..., None] // 256, 1)]:
        (tmp_path / name).write_bytes(content)
        pixels = visualize.read_image(tmp_path / name, 32).permute(1, 2, 0).numpy()
        assert abs(pixels.astype(int) - expected).max() <= tolerance, name
    out = succeed(visualize, "reconstruct", tmp_path / "alpha.png", "--checkpoint",
                  runs["pretrain"], "--out", tmp_path / "out.png")
    assert "alpha" in out


TILES = np.zeros((5, 3, 3, 32, 32), np.uint8)            # of five images
LOG = "epoch,loss,test_loss,lr,seconds\n"
TABLE = "name,init,pflop,test_accuracy\na,,4,\nc,,2.5,60\nb,a,{},70\n"
BROKEN_FILES = [    # subcommand, content of the file that it reads, message
    ("reconstruct", None, "No such file"),
    ("reconstruct", b"<html>", "cannot read the picture"),
    ("reconstruct", written(Image.new("RGB", (500, 500)).save, "PNG", compress_level=0)[:9000],
     "cannot read the picture"),
    ("reconstruct", written(Image.new("1", (14_000, 14_000)).save, "PNG"),  # a decompression bomb
     "cannot read the picture"),
    ("curves", b"", "is not a log.csv"),
    ("curves", b"\0\xff\2", "is not a log.csv"),
    ("curves", LOG.encode(), "has no epoch yet"),
    ("curves", LOG.encode() + b"1,0.5,0.4,0.1,3\n2,0.4,0.", "line 3"),
    ("curves", LOG.encode() + b"1,much,0.4,0.1,3\n", "line 2"),
    ("compute", TABLE.format("nan").encode(), "has no whole row of each"),
    ("compute", TABLE.format("").encode() + b"b\0\xff,'", "has no whole row of each"),
    ("timeline", pickle.dumps(Evil()), "is damaged"),
    ("timeline", written(np.save, TILES[..., :16, :16]), "is damaged"),
    ("timeline", written(np.save, TILES[:4]), "shows other images")]


@pytest.mark.parametrize("command, content, message", BROKEN_FILES)
def test_files_that_cannot_be_drawn(command, content, message, runs, tmp_path):
    given = file = tmp_path / "file"
    more = {"reconstruct": ["--checkpoint", runs["pretrain"]], "compute": ["b"]}.get(command, [])
    if command == "timeline":
        given, file = tmp_path, tmp_path / "reconstructions" / "epoch-0002.npy"
        file.parent.mkdir()
        np.save(file.with_stem("epoch-0001"), TILES)
    if content is not None:
        file.write_bytes(content)
    assert_bad_input(tmp_path, message, visualize, command, given, *more, "--out",
                     tmp_path / "out.png")
    assert not (HERE / "evil-was-here").exists()


@pytest.mark.parametrize("rows, note", [
    ("1,0.5,0.4,0.1,3\n2,nan,0.4,0.1,3\n", "1 values are not finite"),
    ("1,1e-320,0.4,0.1,3\n2,0.3,1e300,0.1,3\n", "1 values are not finite"),
    ("1,0.5,0.4,0.1,\n", "1 values are not finite"), ("1,0.5,0.4,0.1,3\n", "")])
def test_odd_values_in_a_log_are_gaps_and_are_noted(rows, note, tmp_path):
    (tmp_path / "log.csv").write_text("\ufeff" + LOG + rows)     # as a spreadsheet writes it
    (tmp_path / "config.json").write_text('{"settings": {"dataset": [], "mask_ratio": "x"}}')
    status, _, err = run(visualize, "curves", tmp_path, "--log", "--out", tmp_path / "out.png")
    assert status == 0 and (note in err if note else not err)
    assert (tmp_path / "out.png").exists()


# ------------------------------------------------------------------------------ the README


README = (HERE / "README.md").read_text()
COMMANDS = re.findall(r"^    (?:python|torchrun .*?) ((?:pretrain|finetune|visualize)\.py.*)$",
                      README, re.MULTILINE)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_command_in_the_readme_works(tmp_path, data_dir, monkeypatch):
    """In the order of the README, on 200 images and a small model. A later flag wins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "BENCHMARK_SECONDS", 0)
    for name, target in (("data", data_dir), ("results", HERE / "results"),
                         ("assets", HERE / "assets")):
        os.symlink(target, name)
    assert len(COMMANDS) > 30
    for i, command in enumerate(COMMANDS):
        file, *flags = shlex.split(command)
        if file != "visualize.py" and not {"--resume", "--evaluate"} & set(flags):
            if "--recipe" not in flags:
                flags += ["--recipe", "laptop"]
            if "--init" not in flags:
                flags += shlex.split("--patch-size 8 --dim 48 --depth 1 --heads 3")
            for flag, value in (("--labels-per-class", 2), ("--validation", 8), ("--repeat", 2)):
                flags += [flag, value] if flag in flags else []     # a smaller number, if any
            flags += shlex.split("--epochs 1 --batch-size 100 --device cpu --precision fp32 "
                                 "--no-compile")
        if command in COMMANDS[:i]:                         # shown twice: into another folder
            flags += ["--out", f"runs/{i}"]
        status, _, err = run(sys.modules[file.removesuffix(".py")], *flags)
        assert status == 0, f"{command}: {err}"


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1])
def test_every_snippet_in_the_readme_works(snippet, monkeypatch):
    if "timm" in snippet:
        pytest.importorskip("timm", reason="timm is not installed")
    monkeypatch.chdir(HERE)
    exec(snippet, {})


# ------------------------------------------------------------------------------ the results

RESULTS = HERE / "results"


def collect(runs: Path | str, results: Path) -> dict[str, dict]:
    """Have the script collect runs into a folder like results/. Returns the rows of its table."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", RESULTS / "reproduce.sh", "collect"], check=True, cwd=HERE,
                   env=os.environ | {"RUNS": str(runs), "RESULTS": str(results), "PATH": path})
    with open(results / "runs.csv") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_the_table_of_the_results_says_what_the_logs_say(tmp_path):
    shutil.copytree(RESULTS, tmp_path / "results")
    page = tmp_path / "results" / "README.md"
    page.write_text(re.sub(r"(<!-- runs -->\n).*(<!-- end -->)", r"\1\2", page.read_text(),
                           flags=re.DOTALL))
    rows = collect("none", page.parent)
    assert snapshot(page.parent) == snapshot(RESULTS)
    assert rows.keys() == {path.stem for path in RESULTS.glob("logs/*.csv")}
    for name, row in rows.items():
        last = visualize.read_log(RESULTS / "logs" / f"{name}.csv")[-1]
        assert float(row["test_loss"]) == last["test_loss"], name
        assert float(row["test_accuracy"] or 0) == last.get("test_accuracy", 0), name
    for path in RESULTS.glob("weights/*.pt"):
        log = data.load_model(path)[1]["log"]
        assert float(rows[path.stem]["test_loss"]) == log[-1]["test_loss"]


def test_collected_runs_have_their_arithmetic(runs, tmp_path):
    rows = collect(runs["scratch"].parent, shutil.copytree(RESULTS, tmp_path / "results"))
    # products, each a multiplication and an addition: 8 of 16 patches and the class token
    embed, block, head = 16 * 192 * 16, 9 * 12 * 16**2 + 2 * 9**2 * 16, 16 * 10
    step = 2 * (2 * embed + 3 * (block + head))             # images need no gradient
    for name in ("scratch", "finetune"):                    # 96 images, 2 epochs
        assert float(rows[name]["pflop"]) == pytest.approx(2 * 96 * step / 1e15, rel=0.005)
    assert rows["linear"]["pflop"] == ""
    assert float(rows["pretrain"]["epochs"]) == 3


@pytest.mark.parametrize("tier", ["laptop", "lunch", "afternoon", "gpu", "full"])
def test_the_script_of_the_results_resumes_and_its_commands_work(
        tier, data_dir, tmp_path, monkeypatch):
    """First with a stand-in for python that prints its arguments, then with the commands that it
    printed."""
    script = (RESULTS / "reproduce.sh").read_text()
    trial, = re.findall(r"^#     RUNS=/tmp/try (.*)$", script, re.MULTILINE)
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\nmkdir -p "$3"\ntouch "$3/$LEAVE"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def commands(leave: str) -> list[str]:
        command = f"LEAVE={leave} RUNS=runs {trial} bash {RESULTS}/reproduce.sh {tier}"
        return subprocess.check_output(command, shell=True, text=True).splitlines()

    begun = commands("config.json")
    resumed = [" ".join(command.split()[:3]) + " --resume" for command in begun]
    assert len(begun) >= 2 and commands("curves.png") == resumed and commands("curves.png") == []
    shutil.rmtree(tmp_path / "runs")
    os.symlink(data_dir, "data")
    for command in begun:
        file, *flags = shlex.split(command)
        flags += ["--repeat", 2] if "--repeat" in flags else []
        flags += ["--decoder-depth", 1] if file == "pretrain.py" else []
        succeed(sys.modules[file.removesuffix(".py")], *flags, "--device", "cpu")
