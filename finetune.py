"""Use the encoder: `python finetune.py --init runs/pretrain-cifar10-laptop`.

What goes in: labelled images and, with --init, an encoder from pretrain.py. What comes out: a
classifier's run folder (config.json, log.csv, checkpoint.pt, weights.pt, curves.png).

    --init RUN                  fine-tuning: all weights go on learning (MAE, appendix A.1)
    --init RUN --mode linear    linear probe: the encoder is frozen, only the head learns (A.1)
    (neither)                   the same network and recipe from scratch, to compare with
    --evaluate RUN              no training: the test accuracy of a saved classifier

The saved classifier's weights load into timm's VisionTransformer. `main` at the bottom is the
story; settings, machine, optimisation and run folder come from pretrain.py.
"""
import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import data
import mae
import pretrain as shared
from data import BadInput
from pretrain import MODELS, Machine

# ------------------------------------------------------------------------------ settings

RECIPES = {
    "full": dict(
        MODELS["full"], pool="cls", epochs=100, warmup_epochs=5, batch_size=128, base_lr=1e-3,
        optimizer="adamw", weight_decay=0.05, layer_decay=1.0, augment="none", mask_ratio=0.0,
        mix=False, label_smoothing=0.0),
    "laptop": dict(
        MODELS["laptop"], pool="mean", epochs=3, warmup_epochs=0.375, batch_size=64, base_lr=2e-2,
        optimizer="muon", weight_decay=0.05, layer_decay=0.75, augment="crop", mask_ratio=0.5,
        mix=False, label_smoothing=0.0),
    "strong": dict(
        MODELS["full"], pool="mean", epochs=100, warmup_epochs=5, batch_size=128, base_lr=2e-3,
        optimizer="adamw", weight_decay=0.05, layer_decay=0.8, augment="crop", mask_ratio=0.0,
        mix=True, label_smoothing=0.0),
}
LINEAR = dict(                      # with --mode linear, over those of the recipe
    epochs=100, warmup_epochs=10, batch_size=512, base_lr=1e-2, optimizer="adamw", weight_decay=0.0,
    layer_decay=1.0, augment="none", mask_ratio=0.0, mix=False, label_smoothing=0.0)


def make_parser() -> data.Parser:
    linear = " ".join(shared.spell(name, value) for name, value in LINEAR.items())
    parser = data.Parser(
        description="Fine-tune a pre-trained encoder, probe it, or train from scratch. Defaults "
        "are in parentheses, per recipe where they differ.",
        epilog=f"Defaults with --mode linear, whatever the recipe: {linear}", allow_abbrev=False)
    shared.add_common_flags(parser, RECIPES)

    def flag(name: str, text: str, **kwargs) -> None:
        shared.add_flag(parser, RECIPES, name, text, **kwargs)

    flag("--pool", "what the head reads: the class token, or the mean over the patches",
         choices=["cls", "mean"])
    flag("--layer-decay", "learning rate of each layer, as a factor of that of the layer above",
         type=data.number(float, 0, 1), metavar="F")
    flag("--mask-ratio", "part of the patches left out of training images, at least 0",
         type=data.number(float, 0, 1), metavar="R")
    flag("--mix", "mixup or CutMix: each training image, and its label, mixed with another",
         action=argparse.BooleanOptionalAction)
    flag("--label-smoothing", "part of a label's probability spread over all classes in training",
         type=data.number(float, 0, 0.9), metavar="S")
    parser.add_argument("--init", help="checkpoint or run folder of pretrain.py; its encoder is "
                        "the start (none: from scratch)", metavar="CHECKPOINT",
                        type=lambda text: str(Path(text)))
    parser.add_argument("--mode", help="finetune: all weights learn; linear: only the head "
                        "(finetune)", choices=["finetune", "linear"])
    parser.add_argument("--labels-per-class", help="train on N random images of each class (all)",
                        type=data.number(int, 1, 10**6), metavar="N")
    parser.add_argument("--repeat", help="show each training image N times an epoch, for few "
                        "images (1)", type=data.number(int, 1, 10**4), metavar="N")
    parser.add_argument("--evaluate", help="print the test accuracy of a classifier and train "
                        "nothing", metavar="CHECKPOINT")
    return parser


def resolve_settings(given: dict, machine: Machine) -> tuple[argparse.Namespace, dict | None]:
    """The settings, and the checkpoint of --init. Raises BadInput."""
    mode, checkpoint = given.get("mode", "finetune"), None
    fixed = dict(LINEAR if mode == "linear" else {}, mode=mode, init=None, labels_per_class=None,
                 repeat=1)
    if "init" in given:
        checkpoint = data.load_checkpoint(given["init"], "pretrain")
        for name in mae.MODEL_SIZES:
            fixed[name] = size = checkpoint["settings"][name]
            if given.get(name, size) != size:
                raise BadInput(f"{shared.spell(name, given[name])} contradicts {given['init']}, "
                               f"whose encoder has {size}: leave the flag out")
    recipes = {name: {**recipe, **fixed} for name, recipe in RECIPES.items()}
    settings = shared.resolve_settings(given, recipes, machine)
    if mode == "linear":
        if checkpoint is None:
            raise BadInput("--mode linear needs --init CHECKPOINT: there is no encoder to probe")
        for name in ("optimizer", "layer_decay", "augment", "mask_ratio", "mix", "label_smoothing",
                     "repeat"):
            if given.get(name, fixed[name]) != fixed[name]:
                raise BadInput(f"{shared.spell(name, given[name])}: a linear probe trains one "
                               "layer on features computed once; leave the flag out")
        if settings.batch_size < 2:
            raise BadInput("--batch-size 1: the linear probe normalises over a batch; give 2 or "
                           "more")
    return settings, checkpoint


# ------------------------------------------------------------------------------ training


def layers_above(name: str, depth: int) -> int:
    """How many layers of a ViT stand above the one that a parameter belongs to: none above norm
    and head, then the blocks from the last to the first, then the embeddings. For the layer-wise
    decay of the learning rate (Clark et al. 2020, arXiv 2003.10555; MAE, table 9)."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        return depth - int(rest.split(".")[0])
    return depth + 1 if part in ("patch_embed", "cls_token", "pos_embed") else 0


def classify(model: nn.Module, inputs: Tensor, labels: Tensor, *noise: Tensor):
    """The loss, and what to log: the loss, and the accuracy in percent (of the likeliest label).

    inputs: images of 0..255 (B, 3, H, W) or features (B, D); labels: (B,), or as probabilities
    (B, classes); noise: (B, N), where patches are left out.
    """
    logits = model(data.scale(inputs) if inputs.ndim == 4 else inputs, *noise).float()
    loss = F.cross_entropy(logits, labels)
    labels = labels if labels.ndim == 1 else labels.argmax(dim=1)
    accuracy = 100 * (logits.argmax(dim=1) == labels).float().mean()
    return loss, torch.stack([loss, accuracy])


def smooth(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2015, arXiv 1512.00567): a part of the probability is shared
    by all classes: (B,) -> (B, classes)."""
    return F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def epoch_batches(inputs: Tensor, labels: Tensor, settings: argparse.Namespace, num_patches: int,
                  epoch: int):
    """The global batches of an epoch: inputs (B, ...), labels (B,) or, where images are mixed or
    labels smoothed, (B, classes), and, where patches are left out, noise (B, N)."""
    device = inputs.device
    generator = data.seeded_generator(device, settings.seed, epoch)
    count = len(inputs) * settings.repeat
    for ids in data.epoch_order(count, settings.batch_size, generator) % len(inputs):
        images, targets = data.augment(inputs[ids], settings.augment, generator), labels[ids]
        if settings.mix or settings.label_smoothing:
            targets = smooth(targets, settings.num_classes, settings.label_smoothing)
        if settings.mix:
            images, targets = data.mix(images, targets, generator)
        if not settings.mask_ratio:
            yield images, targets
        else:
            noise = torch.rand(len(ids), num_patches, generator=generator, device=device)
            yield images, targets, noise


@torch.no_grad()
def test(model: nn.Module, inputs: Tensor, labels: Tensor, machine: Machine) -> list[float]:
    """Mean loss and accuracy in percent over a whole set: inputs (n, ...), labels (n,)."""
    model.eval()
    total = torch.zeros(2, device=inputs.device)
    parts = list(zip(machine.part(inputs).split(250), machine.part(labels).split(250)))
    with machine.eager(), machine.autocast():
        for part in shared.with_progress("testing", parts, machine):
            if len(part[0]):
                total += classify(model, *part)[1] * len(part[0])
    return (machine.sum(total) / len(inputs)).tolist()


# ------------------------------------------------------------------------------ linear probe


@torch.no_grad()
def compute_features(model: mae.ViTClassifier, images: Tensor, machine: Machine) -> Tensor:
    """What the frozen encoder makes of each image, once: uint8 (n, 3, H, W) -> (n, D)."""
    model.eval()
    parts = shared.with_progress("computing features", images.split(250), machine)
    with machine.autocast():
        return torch.cat([model.features(data.scale(part)).float() for part in parts])


def make_probe(model: mae.ViTClassifier) -> nn.Sequential:
    """Batch normalisation without affine parameters, then a linear layer (MAE, appendix A.1)."""
    head = nn.Linear(model.dim, model.head.out_features)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.BatchNorm1d(model.dim, affine=False, eps=1e-6), head)


@torch.no_grad()
def fold_probe(probe: nn.Sequential, head: nn.Linear) -> None:
    """Write normalisation and linear layer of the probe into the classifier's one linear layer:
    W (x - m) / s + b = (W / s) x + (b - (W / s) m)."""
    normalize, linear = probe
    weight = linear.weight / (normalize.running_var + normalize.eps).sqrt()
    head.weight.copy_(weight)
    head.bias.copy_(linear.bias - weight @ normalize.running_mean)


# ------------------------------------------------------------------------------ the program


def main(argv: list[str] | None = None) -> None:
    given = shared.parse_flags(make_parser(), argv)
    if "evaluate" in given:
        for name in given.keys() - {"evaluate", "dataset", "data_dir", "device", "precision"}:
            raise BadInput(f"{shared.spell(name, given[name])} does nothing with --evaluate: leave "
                           "it out")
    checkpoint = init = None
    if given.get("resume"):
        checkpoint = shared.load_run(given["out"], "classifier")
        settings = shared.resumed_settings(checkpoint, given)
        given["precision"] = settings.precision
    with shared.on_machine(given) as machine:
        if "evaluate" in given:
            return evaluate(given, machine)
        if not checkpoint:
            settings, init = resolve_settings(given, machine)
        finetune(settings, checkpoint, init, given, machine)


def evaluate(given: dict, machine: Machine) -> None:
    """Print the test accuracy of a saved classifier. Raises BadInput."""
    checkpoint = data.load_checkpoint(given["evaluate"], "classifier")
    settings = argparse.Namespace(**{**checkpoint["settings"], "limit": None, "validation": 0,
                                     **given})
    vars(settings).pop("images", None)                      # the counts it learned from
    model = shared.build("classifier", settings)
    data.load_weights(model, checkpoint["model"], given["evaluate"])
    dataset = shared.load_data(settings, machine)
    if len(dataset.classes) != settings.num_classes:
        raise BadInput(f"{given['evaluate']} tells {settings.num_classes} classes apart, "
                       f"{dataset.name} has {len(dataset.classes)}: name the right data set with "
                       "--dataset")
    if machine.main and dataset.name != checkpoint["settings"]["dataset"]:
        print(f"note: it learned from {checkpoint['settings']['dataset']}, not from {dataset.name}",
              file=sys.stderr)
    model.to(machine.device)
    loss, accuracy = test(model, dataset.test_images, dataset.test_labels, machine)
    if machine.main:
        print(f"{dataset.name}, {len(dataset.test_images):,} test images: loss {loss:.4f}\n"
              f"test accuracy {accuracy:.2f} %")


def usual_folder(settings: argparse.Namespace) -> Path:
    """Where a run goes that was given no --out."""
    kind = settings.mode if settings.init else "scratch"
    labels = f"-{settings.labels_per_class}-labels" if settings.labels_per_class else ""
    held_out = "-validation" if settings.validation else ""
    return Path("runs") / f"{kind}{held_out}-{settings.dataset}-{settings.recipe}{labels}"


def load_encoder(classifier: mae.ViTClassifier, init: dict, path: str) -> None:
    """The encoder of a checkpoint of pretrain.py under the head that is there. Raises BadInput."""
    encoder = {name.removeprefix("encoder."): value for name, value in init["model"].items()
               if name.startswith("encoder.")}
    head = {f"head.{name}": value for name, value in classifier.head.state_dict().items()}
    data.load_weights(classifier, {**encoder, **head}, path)


def note_pretraining(init: dict, settings: argparse.Namespace) -> None:
    """Say where the encoder is unfinished or has seen the validation images."""
    learned = init["settings"]
    if init["epoch"] < learned["epochs"]:
        print(f"note: {settings.init} has done {init['epoch']} of its {learned['epochs']} epochs",
              file=sys.stderr)
    if settings.validation > learned.get("validation", 0):
        print(f"note: {settings.init} has seen the validation images, without labels",
              file=sys.stderr)


def finetune(settings: argparse.Namespace, checkpoint: dict | None, init: dict | None, given: dict,
             machine: Machine) -> None:
    benchmark = given.get("benchmark", False)
    if benchmark:
        shared.shorten_steps(settings, given, machine)
    dataset = shared.load_data(settings, machine)
    if settings.labels_per_class:
        dataset = dataset.balanced(settings.labels_per_class, settings.seed)
    settings.num_classes = len(dataset.classes)
    classifier = shared.build("classifier", settings)
    tokens = 1 + classifier.count_visible()
    if settings.mode == "linear":
        if settings.micro_batch_size:
            raise BadInput("--micro-batch-size does nothing with --mode linear: leave it out")
        machine = dataclasses.replace(machine, processes=1)     # each trains the same small probe
        micro = settings.batch_size
    else:
        micro = shared.fit_micro_batch(settings, machine, tokens * settings.dim * settings.depth)
    out = given.get("out") or usual_folder(settings)
    if init:
        load_encoder(classifier, init, settings.init)
        if machine.main:
            note_pretraining(init, settings)
    if checkpoint:
        data.load_weights(classifier, checkpoint["model"], out)
    elif machine.main and not benchmark:
        shared.check_free(out, "finetune.py")               # early; again under the lock

    steps = max(1, len(dataset.train_images) * settings.repeat // settings.batch_size)
    images = steps * settings.batch_size
    if machine.main:
        shared.describe_run(settings, machine, dataset, steps, micro, classifier,
                            None if benchmark else out, checkpoint["epoch"] if checkpoint else 0)
        print(f"start      {settings.init or 'from scratch'}, mode {settings.mode}", flush=True)
    plain, train_inputs, test_inputs = classifier, dataset.train_images, dataset.test_images
    if settings.mode == "linear":
        classifier.to(machine.device)
        plain = make_probe(classifier)
        train_inputs = compute_features(classifier, dataset.train_images, machine)
        test_inputs = compute_features(classifier, dataset.test_images, machine)
        if checkpoint:
            data.load_weights(plain, checkpoint["probe"], out)
    model = shared.prepare_model(plain, machine)
    optimizers = shared.make_optimizers(
        plain, settings, betas=(0.9, 0.999),
        lr_scale=lambda name: settings.layer_decay ** layers_above(name, settings.depth))
    log = shared.restore(optimizers, checkpoint)

    def batches(epoch: int):
        return epoch_batches(train_inputs, dataset.train_labels, settings, classifier.num_patches,
                             epoch)

    pace = shared.Pace()

    def save() -> None:
        more = {}
        if settings.mode == "linear":
            fold_probe(plain, classifier.head)
            more = {"probe": plain.state_dict()}
        shared.save_epoch(out, "classifier", settings, classifier, optimizers, log, pace, **more)

    if benchmark:
        return shared.run_benchmark(model, classify, batches, optimizers, micro, settings, machine)
    if settings.mode == "finetune":                         # a probe takes seconds
        tests = len(test_inputs) * (1 + classifier.num_patches) / tokens / 3    # forward alone
        left = settings.epochs - len(log)
        shared.say_expected(model, classify, batches(0), (images + tests) * left, steps * left,
                            optimizers, micro, machine)
    with shared.run_folder(out, "finetune.py", checkpoint is not None, machine):
        if machine.main:
            shared.begin_run(out, save, log, settings, machine, micro)
        started = time.monotonic()
        for epoch in range(len(log) + 1, settings.epochs + 1):
            begun = time.monotonic()
            train_loss, train_accuracy = shared.train_epoch(
                model, classify, batches(epoch), steps, optimizers, epoch, micro, settings, machine)
            speed = images / (time.monotonic() - begun)
            test_loss, test_accuracy = test(plain, test_inputs, dataset.test_labels, machine)
            values = {"train_loss": train_loss, "train_accuracy": train_accuracy,
                      "test_loss": test_loss, "test_accuracy": test_accuracy}
            log.append(shared.log_row(epoch, values, shared.learning_rate(settings, epoch),
                                      time.monotonic() - started, speed, machine))
            started = time.monotonic()
            if not machine.main:
                continue
            save()
            print(f"epoch {epoch}/{settings.epochs}  train {train_loss:.4f} "
                  f"{train_accuracy:.2f} %  test {test_loss:.4f} {test_accuracy:.2f} %  "
                  f"{log[-1]['images_per_second']:,.0f} images/s  "
                  f"{shared.time_left(log, settings.epochs)} left", flush=True)
        if machine.main:
            shared.draw_log(out, dataset, log)
            print(f"done: {out}, {shared.tested_on(settings)} accuracy "
                  f"{log[-1]['test_accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    with data.exit_on_bad_input():
        main()
