#!/usr/bin/env bash
# Make the runs of runs.csv again, from the root of the repository: bash results/reproduce.sh ...
#
#     laptop               the recipe `laptop`, the exercises, 20 + 20 epochs
#     lunch                the recipe `lunch`, training from scratch, few labels
#     wider                the wider network, with small batches and (for a GPU) with larger ones
#     collect [NAME ...]   where runs were made: runs.csv (NOTE="...": a note), logs/, weights/ of those named
#     pictures             assets/, from these and from runs/pretrain-pixels
#
# Called again, it skips what is done and resumes what was stopped. To try it at a tiny size:
#
#     RUNS=/tmp/try LABELS=2 FLAGS="--limit 64 --epochs 1 --batch-size 32 --dim 48 --depth 1 --heads 3 --no-compile"
set -euo pipefail
runs=${RUNS:-runs}

run() {         # run PROGRAM NAME FLAGS...
    if [ -e "$runs/$2/curves.png" ]; then return; fi        # the last file that a run writes
    if [ -e "$runs/$2/checkpoint.pt" ]; then python "$1" --resume "$runs/$2"; return; fi
    python "$1" --out "$runs/$2" --dataset cifar10 "${@:3}" ${FLAGS:-}
}
mae() { run pretrain.py "$@"; }                             # mae NAME FLAGS...
scratch() { run finetune.py "$@"; }                         # scratch NAME FLAGS...
use() { run finetune.py "$2" --init "$runs/$1" "${@:3}"; }  # use MAE NAME FLAGS...
both() { mae "pretrain-$1" "${@:2}"; use "pretrain-$1" "finetune-$1" "${@:2}"; }
probed() { mae "$1" "${@:2}"; use "$1" "linear-$1" --mode linear; }

laptop() {
    mae pretrain --precision fp32
    use pretrain finetune --precision fp32
    mae pretrain-20 --precision fp32 --epochs 20
    use pretrain-20 finetune-20-20 --precision fp32 --epochs 20 --augment crop
    both bf16 --precision bf16
    both bf16-1 --precision bf16 --seed 1
    both bf16-2 --precision bf16 --seed 2
    both default
    use pretrain-default linear-default --mode linear
    scratch scratch
    probed pretrain-3 --epochs 3                            # the exercises
    probed mask-50 --epochs 2 --mask-ratio 0.5
    probed mask-90 --epochs 4 --mask-ratio 0.9
    probed pixels-3 --epochs 3 --no-norm-pix-loss
    probed patch-8 --epochs 3 --patch-size 8
    probed adamw --epochs 3 --optimizer adamw
    mae pretrain-pixels --compile --patch-size 2 --no-norm-pix-loss     # for the pictures
}

lunch() {
    local lunch="--recipe lunch --compile" crop="--augment crop" tuned labels seed few
    both lunch $lunch
    for seed in 1 2 3 4; do both lunch-$seed $lunch --seed $seed; done
    use pretrain-lunch linear-lunch --recipe lunch --mode linear
    use pretrain-lunch finetune-lunch-crop $lunch --epochs 40 $crop
    scratch scratch-lunch-69-mix $lunch --epochs 69 --whole 0.06 $crop --mix
    scratch scratch-lunch-69-mix-1 $lunch --epochs 69 --whole 0.06 $crop --mix --seed 1
    scratch scratch-lunch-69-mix-2 $lunch --epochs 69 --whole 0.06 $crop --mix --seed 2
    scratch scratch-lunch-69-color-mix $lunch --epochs 69 --whole 0.06 --mix
    scratch scratch-lunch-69 $lunch --epochs 69 --whole 0.06
    scratch scratch-lunch-40 $lunch --epochs 40
    scratch scratch-lunch-40-crop $lunch --epochs 40 $crop
    scratch scratch-lunch-40-mix $lunch --epochs 40 $crop --mix
    scratch scratch-lunch-20 $lunch --epochs 20 $crop
    scratch scratch-lunch-10 $lunch --epochs 10 $crop
    tuned="--layer-decay 0.75 --base-lr 2e-2"               # better from scratch with few labels
    for labels in ${LABELS:-10 50 250}; do for seed in 0 1 2; do
        few="--labels-per-class $labels --repeat $((labels < 50 ? 100 : 20)) $crop --mix"
        use pretrain-lunch finetune-$labels-labels-$seed $few --epochs 1 --seed $seed
        scratch scratch-$labels-labels-$seed $few --epochs 1 --seed $seed $tuned
    done; done
    few="--labels-per-class ${LABELS:-50} --repeat 20 $crop --mix --epochs 8"
    use pretrain-lunch finetune-50-labels-long $few
    scratch scratch-50-labels-long $few $tuned
}

wider() {
    local lunch="--recipe lunch --compile" gpu="--batch-size 256"
    mae pretrain-afternoon $lunch --epochs 80 --dim 192 --heads 12
    use pretrain-afternoon finetune-afternoon $lunch --epochs 56
    mae gpu-wide-pretrain $lunch --epochs 100 --dim 192 --heads 12 $gpu --base-lr 5e-3
    use gpu-wide-pretrain gpu-wide-finetune $lunch --epochs 48 --whole 0.08 $gpu --base-lr 1e-2
}

pictures() {
    local sharp="--checkpoint results/weights/pretrain-pixels.pt" logs=results/logs
    python visualize.py reconstruct $sharp --out assets/reconstructions.png
    python visualize.py ratios $sharp --out assets/ratios.png
    python visualize.py architecture $sharp --out assets/architecture.png
    python visualize.py timeline $runs/pretrain-pixels --out assets/timeline.png
    python visualize.py curves $logs/{scratch-lunch-69-mix,finetune-lunch}.csv --out assets/curves.png
}

collect() {
    python - "$runs" "${RESULTS:-results}" "$@" <<'PYTHON'
import csv, json, os, pathlib, shutil, sys
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
import data

def count_pflop(model, settings, images):   # of training, without tests and the optimizer
    if settings.get("mode") == "linear":
        return ""
    encoder = getattr(model, "encoder", model)
    image = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    def count(*noise):                      # of one image, forward and backward
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sum(out.sum() for out in model(image, *noise)).backward()
        return counter.get_total_flops()
    whole = round(settings.get("whole", 0) * settings["epochs"])    # epochs without PatchDropout
    flop = count() * whole if whole else 0
    flop += count(torch.rand(1, encoder.num_patches)) * (settings["epochs"] - whole)
    steps = max(1, images[0] * settings.get("repeat", 1) // settings["batch_size"])
    return f"{flop * steps * settings['batch_size'] / 1e15:.3g}"

runs, results = map(pathlib.Path, sys.argv[1:3])
for name in sys.argv[3:]:
    checkpoint = data.load_checkpoint(runs / name / "weights.pt")
    for key in {"data_dir", "init"} & checkpoint["settings"].keys():    # as seen from here
        checkpoint["settings"][key] = checkpoint["settings"][key] and os.path.relpath(
            checkpoint["settings"][key])
    data.save_checkpoint(results / "weights" / f"{name}.pt", checkpoint)
with open(results / "runs.csv") as file:
    table = csv.DictReader(file)
    rows, columns = {row["name"]: row for row in table}, table.fieldnames
for out in sorted(path.parent for path in runs.glob("*/weights.pt")):
    model, checkpoint = data.load_model(out / "weights.pt")
    settings, log = checkpoint["settings"], checkpoint["log"]
    known = rows.get(out.name, {}).get("test_loss") == str(log[-1]["test_loss"])
    if known or settings["validation"]:                     # on held-out images: not in the table
        continue
    config = json.loads((out / "config.json").read_text())
    machine = config["machine"]             # what the settings meant there
    gpu = machine["device"] == "cuda" and torch.cuda.get_device_name()
    rows[out.name] = dict(zip(columns, (
        out.name, settings["command"], pathlib.Path(settings.get("init") or "").stem,
        len(log), log[-1]["test_loss"], log[-1].get("test_accuracy", ""),
        count_pflop(model, settings, checkpoint["images"]),
        f"{sum(row['seconds'] for row in log) / 60:.1f}",
        gpu or torch.cpu.get_capabilities()["cpu_name"], machine["threads"],
        machine["precision"], config["versions"]["torch"].split("+")[0], config["commit"] or "",
        os.environ.get("NOTE", "")), strict=True))
    shutil.copy(out / "log.csv", results / "logs" / f"{out.name}.csv")
with open(results / "runs.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
PYTHON
}

if [ $# = 0 ]; then sed -n '2,/^set/s/^# *//p' "$0"; exit 2; fi
"$@"
