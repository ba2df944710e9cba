"""python main_linprobe.py --checkpoint FILE --data_path DIR: train linear and attentive classifiers on frozen features.

Each --pool is combined with each --blr; all heads train in the same pass. The defaults are MAE's for ViT-B/16 on 8 devices.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable

import torch.nn.functional as F
from timm.optim import Lars

from engine_pretrain import LossFn, TrainState, prepare_training, train_one_epoch
from models import ENCODERS, build_encoder
from util.args import classifier_parser, number, run_main
from util.checkpoint.resume import average_statistics, recorded_args
from util.checkpoint.saver import Saver
from util.data.batches import eval_loader, train_loader
from util.data.folders import Source
from util.data.ranges import resolve_pixels
from util.data.sources import labelled_sources, select_training_images, write_list
from util.data.transforms import Normalize, eval_transform, probe_transform
from util.evaluate.classifier import evaluate_classifier, save_classifier, val_interpolation
from util.evaluate.encoder import load_encoder, pool_name, pooling, read_architecture
from util.evaluate.probes import Probe, order_pools
from util.evaluate.scores import best_of, print_result, validate
from util.run import Run, start_run


def get_parser() -> argparse.ArgumentParser:
    schedule = {"batch_size": 2048, "epochs": 90, "warmup_epochs": 10, "blr": [0.1], "min_lr": 0.0, "weight_decay": 0.0}
    parser = classifier_parser(__doc__, ENCODERS, "output/linprobe", ("token", "mean", "ep"), **schedule)
    add = parser.add_argument_group("probe").add_argument
    add("--probe_as", choices=["mae", "mmselfsup"],
        help="protocol: facebookresearch/mae's, or mmselfsup's, where LARS also adapts the bias and val is resized bilinearly "
             "(default: mae; with --eval as the classifier was trained)")  # fmt: skip
    add("--ep_queries", type=number(int, 1), default=32, help="queries of --pool ep; divides the encoder's width")
    return parser


def build_lars(model: Probe, run: Run) -> Lars:
    """LARS of facebookresearch/mae: no weight decay and no trust ratio for biases. --probe_as mmselfsup: both for biases too."""
    release, decay, groups = run.args.probe_as == "mmselfsup", run.args.weight_decay, []
    for head in model.heads:
        scale = head.blr / (max(run.args.blr) or 1.0)
        matrices, biases = ([p for p in head.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups.append({"params": matrices, "always_adapt": True, "lr_scale": scale})
        groups.append({"params": biases, "always_adapt": release, "lr_scale": scale})
    optimizer = Lars(groups, run.lr, momentum=0.9, weight_decay=decay if release else 0, trust_coeff=0.001)
    if decay and not release:
        # MAE adds the decay to the gradient before it takes the norm; timm and the release add the two norms
        def add_decay(*_) -> None:
            for matrix in (p for p in model.heads.parameters() if p.ndim > 1):
                matrix.grad.add_(matrix.detach(), alpha=decay)

        optimizer.register_step_pre_hook(add_decay)
    return optimizer


def probe_loss(normalize: Normalize) -> LossFn:
    """Sum of the cross-entropies of all heads, so that each head learns as if it were alone."""

    def loss(model, batch):
        logits = model(normalize(batch)).float()
        labels = batch["label"].repeat_interleave(logits.shape[1])
        losses = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        # in this order the gradient of a head is the same bits whatever the others are
        return losses.view(logits.shape[:2]).mean(0).sum()

    return loss


def setup(args: Namespace, begin: Callable[[Namespace], Run] = start_run) -> tuple[TrainState, Source]:
    """(training state, validation images): data, frozen encoder with heads, optimiser, loss."""
    args, weights = read_architecture(Namespace(**vars(args) | {"probe_as": args.probe_as or "mae"}), ENCODERS)
    train, val = labelled_sources(args.data_path, args)
    args = resolve_pixels(args, train, recorded_args(args))
    train = select_training_images(train, args)
    requested = [args.pool] if isinstance(args.pool, str) else args.pool or []  # a string if read from --checkpoint
    # each must exist in the encoder; "ep" reads tokens
    options = [pooling(weights, pool) for pool in requested if pool != "ep"] or [pooling(weights)]
    encoder = load_encoder(args, build_encoder, weights, **options[0])
    pools = order_pools(weights, requested or [pool_name(encoder)])
    run = begin(args)
    if run.world.is_main:
        write_list(run.folder, train)
    model = Probe(encoder, len(train.classes), pools, args.blr, args.ep_queries, args.seed).to(run.world.device)
    loader = train_loader(run, train, probe_transform(args.input_size), flip=True)
    loss_fn = probe_loss(Normalize(args, run.world.device))
    return prepare_training(run, model, build_lars(model, run), loss_fn, loader), val


def format_table(results: list[dict], best: dict) -> list[str]:
    """Lines of a table of the results of all heads, in which a star marks the one that is reported."""
    columns = ("pool", "blr", "acc1", "acc5", "mean_class_acc", "loss")
    rows = [("", *columns), *(("*" if x is best else "", *(f"{x[name]}" for name in columns)) for x in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = f"* --pool {best['pool']}, fixed by the training of the encoder, with its best --blr on val: classifier.pth"
    return [*lines, rule]


def main() -> None:
    args = get_parser().parse_args()
    if args.eval:
        evaluate_classifier(*read_architecture(args, ENCODERS), build_encoder)
        return
    state, val = setup(args)
    run, args, model = state.run, state.run.args, state.model
    transform = eval_transform(args.input_size, args.crop_pct, val_interpolation(args.probe_as))
    val_loader = eval_loader(args, run.world, val, transform)
    saver, pool = Saver(state), model.heads[0].pool  # the pooling whose result is reported
    progress = saver.resume()

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(state, progress.start_of(epoch), saver)
        average_statistics(model, run.world)
        saver.after_epoch(progress)
        results = validate(run, model, val_loader, len(val.classes), epoch + 1, pool)
    saver.close()
    best = best_of(results, pool)
    if len(results) > 1:
        for line in format_table(results, best):
            run.log.info(line)
    stated = pool if args.pool and pool != "ep" else None
    save_classifier(run, model.classifier(results.index(best)), val.classes, stated)
    run.close()
    pools = {head.pool: best_of(results, head.pool) for head in model.heads}
    others = {"pools": pools} if len(pools) > 1 else {}
    print_result(run.world, {**best, "selected_on": "val", **others}, args)


if __name__ == "__main__":
    run_main(main)
