"""Use the encoder: `python finetune.py --init runs/pretrain-cifar10-laptop`.

Input: images with labels and, with --init, an encoder from pretrain.py. Output: the run folder of a
classifier (config.json, log.csv, checkpoint.pt, weights.pt, curves.png).

    --init RUN                  fine-tuning: all weights are trained (MAE, appendix A.1)
    --init RUN --mode linear    linear probe: the encoder is frozen, only the head is trained (A.1)
    (without --init)            the same network and recipe from scratch, to compare with
    --evaluate RUN              no training: the test accuracy of a saved classifier

The weights of the saved classifier load into timm's VisionTransformer. In this order: recipes,
`main`, the two ways to train (`finetune` and `probe`), then what they call. The settings, the
training loop, the optimizers and the run folder come from pretrain.py.
"""
import signal

if __name__ == "__main__":      # Ctrl-C ends the program at once: a run can be killed at any time
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import os
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
from data import BadInput
from pretrain import (MODELS, Learner, Machine, check_given, choose_defaults, describe, evaluate,
                      in_batches, load_data, make_model, make_optimizers, on_machine, open_run,
                      parse_settings, run_benchmark, train_epoch)

RECIPES = {                     # warmup: part of the epochs in which the learning rate rises
    "full": dict(
        MODELS["full"], pool="cls", epochs=100, warmup=0.05, batch_size=128, base_lr=1e-3,
        optimizer="adamw", weight_decay=0.05, layer_decay=1.0, augment="none", mask_ratio=0.0,
        mix=False, whole_epochs=0, checkpoint_every=1),
    "laptop": dict(
        MODELS["laptop"], pool="mean", epochs=4, warmup=0.125, batch_size=64, base_lr=2e-2,
        optimizer="muon", weight_decay=0.05, layer_decay=0.75, augment="flip", mask_ratio=0.5,
        mix=False, whole_epochs=0, checkpoint_every=1),
}
RECIPES["lunch"] = RECIPES["laptop"] | dict(
    epochs=44, whole_epochs=4, batch_size=128, base_lr=1.4e-2, augment="color")
RECIPES["strong"] = RECIPES["full"] | dict(
    pool="mean", base_lr=2e-3, layer_decay=0.8, augment="crop", mix=True)
LINEAR = dict(                  # with --mode linear, instead of the recipe's values
    epochs=100, warmup=0.1, batch_size=512, micro_batch_size=512, base_lr=1e-2, optimizer="adamw",
    weight_decay=0.0, layer_decay=1.0, augment="none", mask_ratio=0.0, mix=False, whole_epochs=0,
    compile=False, checkpoint_every=10)
HELP = """Fine-tune a pre-trained encoder, probe it, or train from scratch. With --evaluate
CHECKPOINT instead: print the test accuracy of a saved classifier, in float32 unless --precision
says otherwise, and train nothing."""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(flag.split("=")[0] == "--evaluate" for flag in argv):
        return evaluate_classifier(argv)
    first, defaults = choose_defaults("classifier", RECIPES, argv)
    sizes = {} if first.init is None or first.resume else encoder_sizes(first.init)
    if first.mode == "linear" and not first.resume:
        defaults |= LINEAR
    settings = parse_settings("classifier", HELP, defaults | sizes, argv)
    check_given(settings, sizes, f"the encoder of {first.init}")
    if settings.mode == "linear":
        check_linear(settings)
    train = probe if settings.mode == "linear" else finetune
    with on_machine(settings) as machine:
        train(settings, machine)


def finetune(settings: argparse.Namespace, machine: Machine) -> None:
    """Train all weights with labels, from a pre-trained encoder or from scratch (MAE, section 4 and
    appendix A.1)."""
    dataset = load_data(settings, machine)
    model = make_model("classifier", settings, machine)
    optimizers = make_optimizers(
        model, settings, betas=(0.9, 0.999),                # MAE, table 9
        lr_scale=lambda name: settings.layer_decay ** layers_above(name, settings.depth))
    learner = Learner(machine.compiled(model, settings), classify, optimizers)

    def train_batches(epoch: int):
        return labelled_batches(dataset, model.num_patches, epoch, settings)

    describe("classifier", settings, machine, model, dataset)
    if settings.benchmark:
        return run_benchmark(learner, train_batches, settings, machine)
    with open_run("classifier", settings.mode if settings.init else "scratch", settings,
                  machine) as run:
        resumed = run.restore(optimizers, model=model)
        if settings.init and not resumed:
            load_encoder(model, settings, machine)
        for epoch in run.epochs_left():
            trained, speed = train_epoch(learner, train_batches(epoch), epoch, run.progress,
                                         settings, machine)
            if machine.main:
                test_batches = in_batches(dataset.test_images, dataset.test_labels)
                tested = evaluate(model, classify, test_batches, machine,
                                  exact=epoch == settings.epochs)
                run.end_epoch([*trained, *tested], speed, model, optimizers)


def probe(settings: argparse.Namespace, machine: Machine) -> None:
    """Train a linear layer on the features of a frozen encoder (MAE, section 4.1 and appendix A.1).
    The features are computed once; the main process does all of it."""
    dataset = load_data(settings, machine)
    if not machine.main:
        return
    machine = dataclasses.replace(machine, processes=1)
    classifier = make_model("classifier", settings, machine)
    describe("classifier", settings, machine, classifier, dataset)
    probe_head = nn.Linear(classifier.dim, len(dataset.classes), device=machine.device)
    nn.init.zeros_(probe_head.weight)
    nn.init.zeros_(probe_head.bias)
    optimizers = make_optimizers(probe_head, settings, betas=(0.9, 0.999))
    learner = Learner(probe_head, classify, optimizers)
    with open_run("classifier", "linear", settings, machine) as run:
        resumed = run.restore(optimizers, model=classifier, probe=probe_head)
        if not resumed:
            load_encoder(classifier, settings, machine)
        features = compute_features(classifier, dataset.train_images, machine, exact=False)
        test_features = compute_features(classifier, dataset.test_images, machine, exact=True)
        var, mean = torch.var_mean(features, dim=0, correction=0)           # (D,)
        std = (var + 1e-6).sqrt()
        features, test_features = (features - mean) / std, (test_features - mean) / std
        for epoch in run.epochs_left():
            batches = feature_batches(features, dataset.train_labels, epoch, settings)
            trained, speed = train_epoch(learner, batches, epoch, run.progress, settings, machine)
            tested = evaluate(probe_head, classify, [(test_features, dataset.test_labels)], machine,
                              exact=True)
            fold_probe(probe_head, mean, std, classifier.head)
            run.end_epoch([*trained, *tested], speed, classifier, optimizers,
                          probe=probe_head.state_dict())


# ------------------------------------------------------------------------------ batches


def labelled_batches(dataset: data.Dataset, num_patches: int, epoch: int,
                     settings: argparse.Namespace):
    """The batches of an epoch: images (B, 3, H, W) of -1..1; labels (B,) or, if images are mixed,
    (B, classes); and, if patches are left out, noise (B, N)."""
    images, labels = dataset.train_images, dataset.train_labels
    drop = settings.mask_ratio > 0 and epoch <= settings.epochs - settings.whole_epochs
    generator = data.seeded_generator(images.device, settings.seed, epoch)
    order = data.epoch_order(len(images) * settings.repeat, settings.batch_size, generator)
    for ids in order % len(images):                         # each image `repeat` times
        pixels, targets = data.augment(images[ids], settings.augment, generator), labels[ids]
        if settings.mix:
            targets = F.one_hot(targets, len(dataset.classes)).float()
            pixels, targets = data.mix(pixels, targets, generator)
        batch = [data.scale(pixels), targets]
        if drop:
            batch.append(torch.rand(len(ids), num_patches, generator=generator,
                                    device=images.device))
        yield batch


def classify(model: nn.Module, inputs: Tensor, labels: Tensor,
             *noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and what to log: the loss and the accuracy in percent, (2,).

    inputs: images (B, 3, H, W) or features (B, D); labels: (B,), or (B, classes) as probabilities,
    of which the largest counts for the accuracy; noise: (B, N), if patches are left out.
    """
    logits = model(inputs, *noise).float()                  # (B, classes)
    loss = F.cross_entropy(logits, labels)
    labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
    accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
    return loss, torch.stack([loss.detach(), accuracy])


# ------------------------------------------------------------------------------ encoder


def encoder_sizes(init: str) -> dict:
    """The sizes of the encoder in a checkpoint. Raises BadInput, OSError."""
    settings = data.load_checkpoint(init, "pretrain")["settings"]
    return {name: settings[name] for name in data.ENCODER_SIZES}


def load_encoder(classifier: mae.ViTClassifier, settings: argparse.Namespace,
                 machine: Machine) -> None:
    """Copy the encoder of --init into a classifier. Says so if it is unfinished, of another data
    set or may have seen validation images. Raises BadInput, OSError."""
    autoencoder, checkpoint = data.load_model(settings.init, "pretrain")
    classifier.load_state_dict(autoencoder.encoder.state_dict(), strict=False)  # all but the head
    saved, notes = checkpoint["settings"], []
    if checkpoint["epoch"] < saved["epochs"]:
        notes.append(f"has done {checkpoint['epoch']} of its {saved['epochs']} epochs")
    if saved["dataset"] != settings.dataset:
        notes.append(f"was pre-trained on {saved['dataset']}, not on {settings.dataset}")
    elif settings.validation > saved["validation"]:
        notes.append("may have seen validation images, without labels")
    if machine.main:
        for note in notes:
            print(f"note: {settings.init} {note}", file=sys.stderr)


def layers_above(name: str, depth: int) -> int:
    """How many layers of a ViT are above that of a parameter: 0 for norm and head, 1 for the last
    block, `depth` for the first block, depth + 1 for the embeddings. For the layer-wise decay of
    the learning rate (Clark et al. 2020, arXiv 2003.10555; MAE, table 9)."""
    part, *rest = name.split(".")
    if part == "blocks":
        return depth - int(rest[0])
    return depth + 1 if part in ("patch_embed", "cls_token", "pos_embed") else 0


# ------------------------------------------------------------------------------ linear probe


def check_linear(settings: argparse.Namespace) -> None:
    """Raises BadInput if a setting means nothing to a linear probe."""
    if not settings.init:
        raise BadInput("--mode linear needs --init CHECKPOINT: there is no encoder to probe")
    fixed = dict(repeat=1, benchmark=False) | {name: LINEAR[name] for name in (
        "optimizer", "layer_decay", "augment", "mask_ratio", "mix", "whole_epochs", "compile")}
    check_given(settings, fixed, "a linear probe")


@torch.no_grad()
def compute_features(classifier: mae.ViTClassifier, images: Tensor, machine: Machine,
                     exact: bool) -> Tensor:
    """What the head reads of each image: uint8 (n, 3, H, W) -> (n, D).

    exact: in float32, so that the log has the accuracy that --evaluate prints.
    """
    classifier.eval()
    progress, features = data.Progress(len(images)), []
    with machine.autocast(exact):
        for (batch,) in in_batches(images):
            features.append(classifier.features(batch).float())
            if progress.advance(len(batch)):
                progress.show("computing features")
    return torch.cat(features)


def feature_batches(features: Tensor, labels: Tensor, epoch: int, settings: argparse.Namespace):
    """The batches of an epoch: features (B, D), labels (B,)."""
    generator = data.seeded_generator(features.device, settings.seed, epoch)
    for ids in data.epoch_order(len(features), settings.batch_size, generator):
        yield features[ids], labels[ids]


@torch.no_grad()
def fold_probe(probe_head: nn.Linear, mean: Tensor, std: Tensor, head: nn.Linear) -> None:
    """Write the probe, which reads normalised features, into the head, which reads plain ones:
    W (x - m) / s + b = (W / s) x + (b - (W / s) m)."""
    head.weight.copy_(probe_head.weight / std)
    head.bias.copy_(probe_head.bias - head.weight @ mean)


# ------------------------------------------------------------------------------ evaluation


def evaluate_classifier(argv: list[str]) -> None:
    """Print the test accuracy of a saved classifier, in float32 unless --precision says otherwise.
    Raises BadInput, OSError."""
    parser = data.Parser(description=HELP)
    parser.add_argument("--evaluate", metavar="CHECKPOINT", required=True)
    parser.add_flags({name: data.FLAGS["classifier"][name] for name in (
        "dataset", "data_dir", "device", "precision")})
    parser.set_defaults(dataset=None, data_dir=None, precision="fp32")
    given = vars(parser.parse_args(argv))
    model, checkpoint = data.load_model(given["evaluate"], "classifier")
    saved = checkpoint["settings"]
    given["dataset"] = given["dataset"] or saved["dataset"]
    if not given["data_dir"]:                               # the weights may be from elsewhere
        given["data_dir"] = saved["data_dir"] if os.path.isdir(saved["data_dir"]) else "data"
    settings = argparse.Namespace(**saved | given | dict(
        limit=None, validation=0, labels_per_class=None, compile=False))
    with on_machine(settings) as machine:
        dataset = load_data(settings, machine)
        if len(dataset.classes) != model.head.out_features:
            raise BadInput(f"{settings.evaluate} distinguishes {model.head.out_features} classes, "
                           f"{dataset.name} has {len(dataset.classes)}: name its data set with "
                           "--dataset")
        if not machine.main:
            return
        if dataset.name != saved["dataset"]:
            print(f"note: it was trained on {saved['dataset']}, not on {dataset.name}",
                  file=sys.stderr)
        batches = in_batches(dataset.test_images, dataset.test_labels)
        loss, accuracy = evaluate(model.to(machine.device), classify, batches, machine, exact=False)
        print(f"{dataset.name}, {len(dataset.test_images):,} test images: loss {loss:.4f}\n"
              f"test accuracy {accuracy:.2f} %")


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
