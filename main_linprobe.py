"""Linear probe: classifiers on frozen features, one for each learning rate, in one pass. The defaults are MAE's."""

import argparse
import json

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torchvision import transforms as T

from engine_pretrain import grad_scaler, train_one_epoch, wrap
from models import ENCODERS, build_encoder
from util.args import classifier_parser, run_main
from util.checkpoint.saver import Saver
from util.data.batches import eval_loader, train_loader
from util.data.sources import labelled_sources
from util.data.transforms import T_MODES, Normalize, eval_transform
from util.evaluate.classifier import evaluate_classifier, save_classifier
from util.evaluate.encoder import load_encoder, pooling, read_architecture
from util.evaluate.probes import Probe
from util.evaluate.scores import print_result, validate
from util.rng import SeededTransform
from util.run import start


def get_parser() -> argparse.ArgumentParser:
    schedule = {"batch_size": 2048, "epochs": 90, "warmup_epochs": 10, "blr": [0.1], "min_lr": 0.0, "weight_decay": 0.0}
    parser = classifier_parser(__doc__, ENCODERS, "output/linprobe", pool=True, **schedule)
    add = parser.add_argument_group("probe").add_argument
    add(
        "--probe_as",
        choices=["mae", "mmselfsup"],
        default="mae",
        help="mmselfsup: LARS adapts the bias too, val is resized bilinearly",
    )
    return parser


def lars(model: Probe, run) -> Lars:
    """LARS as facebookresearch/mae has it: plain momentum SGD for the bias (mmselfsup adapts it as well)."""
    groups = []
    for head, blr in zip(model.heads, run.args.blr, strict=True):
        scale = blr / max(run.args.blr)
        groups.append({"params": [head.weight], "always_adapt": True, "lr_scale": scale})
        groups.append({"params": [head.bias], "always_adapt": run.args.probe_as == "mmselfsup", "lr_scale": scale})
    return Lars(groups, run.lr, momentum=0.9, weight_decay=run.args.weight_decay, trust_coeff=0.001)


def probe_loss(normalize):
    """(model, batch) -> sum over the heads of their cross-entropies, so that each learns as if it were alone."""

    def loss(model, batch):
        logits = model(normalize(batch)).float()
        heads = logits.shape[1]
        return F.cross_entropy(logits.flatten(0, 1), batch["label"].repeat_interleave(heads)) * heads

    return loss


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    interpolation = "bilinear" if args.probe_as == "mmselfsup" else "bicubic"
    if args.eval:
        evaluate_classifier(args, build_encoder, weights, interpolation)
        return
    train, val = labelled_sources(args.data_path)
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool))
    run = start(args)
    model = Probe(encoder, len(train.classes), len(args.blr)).to(run.world.device)
    crop = SeededTransform(T.RandomResizedCrop(args.input_size, interpolation=T_MODES["bicubic"]))
    loader = train_loader(run, train, crop, flip=True)
    val_loader = eval_loader(args, run.world, val, eval_transform(args.input_size, interpolation))
    optimizer, scaler = lars(model, run), grad_scaler(run)
    wrapped, loss_fn = wrap(model, run), probe_loss(Normalize(args, run.world.device))
    saver = Saver(run, model, optimizer, scaler, loader)
    progress = saver.resume()
    frozen = {name: value.clone() for name, value in encoder.state_dict().items()}

    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(run, wrapped, loader, optimizer, scaler, loss_fn, progress.within(epoch), saver)
        model.average_statistics(run.world)
        saver.after_epoch(progress)
        results = validate(run, model, val_loader, len(train.classes), epoch + 1)
    saver.close()
    assert all(torch.equal(value, frozen[name]) for name, value in encoder.state_dict().items()), "the encoder changed"
    for blr, result in zip(args.blr, results, strict=True):
        run.log.info(f"--blr {blr:g}: {json.dumps(result)}")
    best = max(range(len(results)), key=lambda i: results[i]["acc1"])
    save_classifier(run, model.classifier(best), train.classes)
    run.close()
    print_result(run.world, {**results[best], "blr": args.blr[best], "selected_on": "val"})


if __name__ == "__main__":
    run_main(main)
