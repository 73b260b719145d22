#!/usr/bin/env bash
# Make the runs of this folder again, from the root of the repository:
#
#     bash results/reproduce.sh lunch      the recipe `lunch`, as much training from scratch, few labels
#     bash results/reproduce.sh afternoon  the best accuracy: a wider network for longer
#     bash results/reproduce.sh gpu        a wider and a larger network
#     bash results/reproduce.sh laptop     all other runs in the table
#     bash results/reproduce.sh full       the recipes `full` and `strong`, not run yet (EPOCHS=200: sooner)
#     bash results/reproduce.sh collect [NAME ...]
#                                          logs/, runs.csv and the table in README.md of this folder,
#                                          from all runs in runs/; weights/ of those that are named
#     bash results/reproduce.sh pictures   assets/, from these and from runs/pretrain-pixels
#
# By the arithmetic `lunch` takes twelve to thirteen hours on two cores of a Zen 5, `afternoon` five; `gpu` took half
# an hour of an H100 and an H200. Without bfloat16 in hardware `lunch` and `afternoon` compute in float32, five times
# as long. A command may be stopped at any time: called again, it skips the runs that are done and resumes the other
# one.
# To try it at a tiny size, put this in front of a command that trains:
#
#     RUNS=/tmp/try LABELS=2 EPOCHS=1 FLAGS="--limit 64 --epochs 1 --batch-size 32 --dim 48 --depth 1 --heads 3 --no-compile"
set -euo pipefail
runs=${RUNS:-runs}

run() {         # run PROGRAM NAME FLAGS...
    local program=$1 out=$runs/$2
    shift 2
    if [ -e "$out/curves.png" ]; then return; fi            # the last file that a run writes
    if [ -e "$out/config.json" ]; then set -- --resume; else set -- "$@" ${FLAGS:-}; fi
    python "$program" --out "$out" "$@"
}

use() {         # use PRETRAINING NAME FLAGS...
    local start=$runs/$1 name=$2
    shift 2
    run finetune.py "$name" --init "$start" "$@"
}

laptop() {
    local flags="--recipe laptop --dataset cifar10 --precision fp32" start seed
    # the defaults
    run pretrain.py pretrain $flags
    run finetune.py scratch $flags
    use pretrain finetune $flags
    use pretrain linear $flags --mode linear
    # as much arithmetic without pre-training
    run finetune.py scratch-10 $flags --epochs 10
    # the defaults in bfloat16
    run pretrain.py pretrain-bf16 $flags --precision bf16
    use pretrain-bf16 finetune-bf16 $flags --precision bf16
    for seed in 1 2; do
        run pretrain.py pretrain-bf16-$seed $flags --precision bf16 --seed $seed
        use pretrain-bf16-$seed finetune-bf16-$seed $flags --precision bf16 --seed $seed
    done
    # the pictures
    run pretrain.py pretrain-pixels $flags --precision auto --compile --patch-size 2 \
        --no-norm-pix-loss
    # what to predict, and how much to hide, in about equal time
    run pretrain.py pretrain-3 $flags --epochs 3
    run pretrain.py pixels-3 $flags --no-norm-pix-loss --epochs 3
    run pretrain.py mask-50 $flags --mask-ratio 0.5 --epochs 2
    run pretrain.py mask-90 $flags --mask-ratio 0.9 --epochs 4
    for start in pretrain-3 pixels-3 mask-50 mask-90; do
        use $start linear-$start $flags --mode linear
    done
    # two hours of two cores without bfloat16
    run pretrain.py pretrain-20 $flags --epochs 20
    use pretrain-20 finetune-20-20 $flags --epochs 20 --augment crop
}

lunch() {
    local flags="--recipe lunch --dataset cifar10" crop="--augment crop --epochs 40" seed labels
    run pretrain.py pretrain-lunch $flags --compile
    use pretrain-lunch finetune-lunch $flags --compile
    use pretrain-lunch finetune-lunch-crop $flags --compile $crop
    use pretrain-lunch linear-lunch $flags --mode linear
    for seed in 1 2; do
        run pretrain.py pretrain-lunch-$seed $flags --compile --seed $seed
        use pretrain-lunch-$seed finetune-lunch-$seed $flags --compile --seed $seed
        use pretrain-lunch-$seed finetune-lunch-crop-$seed $flags --compile --seed $seed $crop
    done
    run pretrain.py pretrain-lunch-3 $flags --compile --seed 3
    use pretrain-lunch-3 finetune-lunch-3 $flags --compile --seed 3
    # from scratch, with the layer decay and the rate that are best there
    local scratch="$flags --compile --layer-decay 1.0 --base-lr 1.75e-3"
    run finetune.py scratch-lunch-10 $scratch --augment crop --epochs 10 --whole-epochs 1
    run finetune.py scratch-lunch-20 $scratch --augment crop --epochs 20 --whole-epochs 2
    run finetune.py scratch-lunch-40-crop $scratch $crop
    run finetune.py scratch-lunch-40-mix $scratch $crop --mix
    run finetune.py scratch-lunch-40 $scratch --epochs 40
    run finetune.py scratch-lunch-69-mix $scratch --augment crop --epochs 69 --mix
    for seed in 1 2; do
        run finetune.py scratch-lunch-69-mix-$seed $scratch --augment crop --epochs 69 --mix \
            --seed $seed
    done
    run finetune.py scratch-lunch-69 $scratch --epochs 69
    run finetune.py scratch-lunch-69-color-mix $scratch --epochs 69 --mix
    # few labels: three draws of labels; each image shown 20 times, or 100 if there are very few
    flags="--recipe laptop --dataset cifar10 --epochs 1 --mix --augment crop"
    for seed in 0 1 2; do
        for labels in ${LABELS:-10 50 250}; do
            local few="--labels-per-class $labels --repeat $((labels < 50 ? 100 : 20)) --seed $seed"
            use pretrain-lunch finetune-$labels-labels-$seed $flags $few
            run finetune.py scratch-$labels-labels-$seed $flags $few
        done
    done
    flags+=" --labels-per-class ${LABELS:-50} --repeat 20 --epochs 8"       # eight times as long
    use pretrain-lunch finetune-50-labels-long $flags
    run finetune.py scratch-50-labels-long $flags
}

afternoon() {
    local flags="--recipe lunch --dataset cifar10 --compile"
    run pretrain.py pretrain-afternoon $flags --epochs 80 --dim 192 --heads 12
    use pretrain-afternoon finetune-afternoon $flags --epochs 56 --whole-epochs 6
    # without changed colours
    use pretrain-afternoon finetune-afternoon-crop $flags --epochs 70 --whole-epochs 7 \
        --augment crop
}

gpu() {
    local flags="--recipe lunch --dataset cifar10" sizes="--dim 384 --depth 12 --heads 12"
    run pretrain.py gpu-wide-pretrain $flags --dim 192 --heads 12 --epochs 100 --batch-size 256 \
        --base-lr 5e-3 --picture-every 25 --checkpoint-every 5
    use gpu-wide-pretrain gpu-wide-finetune $flags --epochs 48 --batch-size 256 --base-lr 1e-2 \
        --checkpoint-every 5
    run pretrain.py gpu-pretrain $flags $sizes --decoder-dim 128 --decoder-depth 2 --epochs 50 \
        --batch-size 512 --base-lr 2.5e-3 --picture-every 20 --checkpoint-every 50
    use gpu-pretrain gpu-linear $flags --mode linear
    flags+=" --augment crop --mix --epochs 20 --whole-epochs 2 --batch-size 256"
    flags+=" --checkpoint-every 20"
    use gpu-pretrain gpu-finetune $flags --layer-decay 0.85 --base-lr 7e-3
    run finetune.py gpu-scratch $flags $sizes --layer-decay 1.0 --base-lr 1.25e-3
    run finetune.py gpu-scratch-75 $flags $sizes --layer-decay 1.0 --base-lr 1e-3 --epochs 75 \
        --whole-epochs 7 --batch-size 512
}

full() {
    local flags="--recipe full --dataset cifar10" epochs=${EPOCHS:-2000}
    run pretrain.py full-pretrain-$epochs $flags --epochs $epochs
    use full-pretrain-$epochs full-finetune-$epochs $flags
    use full-pretrain-$epochs full-linear-$epochs $flags --mode linear
    run finetune.py full-scratch $flags
    use full-pretrain-$epochs strong-$epochs $flags --recipe strong
}

pictures() {
    local sharp="--checkpoint results/weights/pretrain-pixels.pt"
    python visualize.py reconstruct $sharp --out assets/reconstructions.png
    python visualize.py ratios $sharp --out assets/ratios.png
    python visualize.py architecture $sharp --out assets/architecture.png
    python visualize.py timeline $runs/pretrain-pixels --out assets/timeline.png
    python visualize.py curves results/logs/scratch-lunch-69-mix.csv results/logs/finetune-lunch.csv \
        --metric cross-entropy --metric accuracy --out assets/curves.png
    python visualize.py compute results/runs.csv scratch scratch-lunch-10 scratch-lunch-20 \
        scratch-lunch-40 scratch-lunch-69-mix scratch-lunch-69-mix-1 scratch-lunch-69-mix-2 \
        finetune-bf16 finetune-bf16-1 finetune-bf16-2 finetune-20-20 finetune-lunch \
        finetune-lunch-1 finetune-lunch-2 finetune-lunch-3 --out assets/compute.png
}

collect() {     # collect [NAME ...]
    python - "$runs" "${RESULTS:-results}" "$@" <<'PYTHON'
import csv, json, os, pathlib, re, shutil, sys
import torch
import data, finetune, pretrain, visualize

def count_pflop(kind, settings, images, **_):           # of a run's training, without its tests
    if settings.get("mode") == "linear":
        return ""
    model = data.build_model(kind, settings)
    image, label, noise = torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.long), []
    if settings["mask_ratio"]:
        noise = [torch.rand(1, (data.SIDE // settings["patch_size"]) ** 2)]
    count, labels = images[0], settings.get("labels_per_class")
    if labels:
        count = labels * data.SOURCES[settings["dataset"]].num_classes
    steps = max(1, count * settings.get("repeat", 1) // settings["batch_size"])
    objective = pretrain.masked_loss if kind == "pretrain" else finetune.classify
    learner = pretrain.Learner(model, objective, [])
    inputs = [image] if kind == "pretrain" else [image, label]
    whole = min(settings.get("whole_epochs", 0), settings["epochs"])    # epochs without noise, at the end
    flop = pretrain.count_flop(learner, [*inputs, *noise]) * (settings["epochs"] - whole)
    if whole:
        flop += pretrain.count_flop(learner, inputs) * whole
    return f"{flop * steps * settings['batch_size'] / 1e15:.3g}"

runs, results = map(pathlib.Path, sys.argv[1:3])
for name in sys.argv[3:]:
    checkpoint = data.load_checkpoint(runs / name / "weights.pt")
    for folder in ("data_dir", "init"):                 # where they lie here is of no use elsewhere
        if checkpoint["settings"].get(folder):
            checkpoint["settings"][folder] = os.path.relpath(checkpoint["settings"][folder])
    data.save_checkpoint(results / "weights" / f"{name}.pt", checkpoint)
with open(results / "runs.csv") as file:
    rows = {row["name"]: row for row in csv.DictReader(file)}
columns = ["name", "command", "init", "epochs", "test_loss", "test_accuracy", "pflop", "minutes",
           "processor", "threads", "precision", "torch", "commit"]
(results / "logs").mkdir(exist_ok=True)
for out in sorted(path.parent for path in runs.glob("*/weights.pt")):
    config = json.loads((out / "config.json").read_text())
    settings, machine = config["settings"], config["machine"]
    if settings["validation"]:                          # on no test images
        continue
    with open(out / "log.csv") as file:
        log = list(csv.DictReader(file))
    minutes = sum(float(row["seconds"]) for row in log) / 60
    init = settings.get("init")                         # the run that it starts from, if any
    rows[out.name] = dict(zip(columns, (
        out.name, config["command"], visualize.run_label(pathlib.Path(init), {}) if init else "",
        log[-1]["epoch"], log[-1]["test_loss"], log[-1].get("test_accuracy", ""),
        count_pflop(**data.load_checkpoint(out / "weights.pt")), f"{minutes:.1f}",
        machine["processor"], machine["threads"], settings["precision"],
        config["versions"]["torch"].split("+")[0], config["commit"] or ""), strict=True))
    shutil.copy(out / "log.csv", results / "logs" / f"{out.name}.csv")
with open(results / "runs.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
table = ["| run | epochs | test loss | accuracy | PFLOP | minutes | threads | commit |",
         "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"]
for name in sorted(rows):
    row = rows[name]
    accuracy = f"{float(row['test_accuracy']):.2f} %" if row["test_accuracy"] else ""
    table.append(f"| `{name}` | {row['epochs']} | {float(row['test_loss']):.4f} | {accuracy} | "
                 f"{row['pflop']} | {float(row['minutes']):.1f} | {row['threads']} | {row['commit']} |")
page = results / "README.md"
text = re.sub(r"(<!-- runs -->\n).*?(<!-- end -->)", lambda match: match[1] + "\n".join(table)
              + "\n" + match[2], page.read_text(), flags=re.DOTALL)
page.write_text(text)
PYTHON
}

if [ $# = 0 ]; then sed -n '2,/^set/s/^# *//p' "$0"; exit 2; fi
"$@"
