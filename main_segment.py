"""python main_segment.py --checkpoint FILE --data_path DIR: semantic segmentation with an encoder.

Default: linear heads on frozen patch tokens, one for each --blr. --method knn trains nothing. --finetune trains a DPT end to end.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import util.args as cli
import util.evaluate.segmentation as seg
from engine_pretrain import LossFn, TrainState, prepare_training, train_one_epoch
from models import ENCODERS, build_encoder
from util.checkpoint.resume import recorded_args
from util.checkpoint.saver import Saver
from util.data.batches import train_loader
from util.data.masks import MaskFolder, mask_folder, multi_scale_crop, split_masks
from util.data.ranges import resolve_pixels
from util.data.sources import Subset
from util.data.transforms import Normalize
from util.dist import World, init_world
from util.evaluate.encoder import load_encoder, pooling, read_architecture
from util.evaluate.scores import print_result
from util.rng import SUBSET, generator
from util.run import Run, start_run

# values of flags that are not given; with --eval those of the segmenter
UNSET = {"ignore_index": 255, "mask_column": "mask"}
LINEAR = UNSET | {"blr": [0.016], "weight_decay": 1e-4}
FINETUNE = UNSET | {"blr": [1.6e-3], "weight_decay": 0.05}


class Outcome(NamedTuple):
    result: dict
    world: World  # the ranks, still joined
    args: Namespace  # as resolved


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    # fmt: off
    group = cli.add_data_arguments(parser, "folder with {train,val}/{images,masks}, ADE20K's with {images,annotations}/{training,validation}, or a "
                               ".csv or .tsv with the paths of images and masks", packed=False)
    group.add_argument("--mask_column", metavar="NAME", help="column of a table with the masks (default: mask)")
    group.add_argument("--classes", nargs="+", metavar="NAME",
                       help="names of classes 0, 1, ... (default: as many as the masks of train, or ADE20K's)")
    group.add_argument("--palette", nargs="+", type=colour, metavar="RRGGBB",
                       help="colours of classes 0, 1, ... in coloured masks (default: masks hold class numbers)")
    group.add_argument("--ignore_index", type=cli.number(int, 0, 65535), help="class number of pixels that are ignored (default: 255)")
    group.add_argument("--short_side", type=cli.number(int, 0),
                       help="short side of the resized images in pixels; 0 = unchanged (default: the shorter side of --input_size)")
    cli.add_checkpoint_arguments(parser, pools=())
    cli.add_model_arguments(parser, ENCODERS)
    add = parser.add_argument_group("segmentation").add_argument
    add("--method", choices=["linear", "knn"], default="linear", help="linear = train heads; knn = vote of the nearest training patches")
    add("--layers", nargs="+", type=cli.number(int, 1), help="blocks whose patch tokens are concatenated, counted from 1 (default: the last)")
    add("--k", nargs="+", type=cli.number(int, 1), default=[1, 5, 20, 50], help="knn: numbers of neighbours; the best on a tenth of train is used")
    add("--temperature", type=cli.number(float, 1e-3), default=0.07, help="knn: a vote has the weight exp(cosine similarity / temperature)")
    add("--bank_patches", type=cli.number(int, 1), default=2**18, help="knn: maximum number of training patches, the same share of each image")
    add("--finetune", action="store_true", help="train the encoder and a DPT, and the same from an untrained encoder for comparison")
    add("--layer_decay", type=cli.number(float, 0.01, 1), default=0.65,
        help="finetune: factor of the learning rate from a layer to the layer before it")
    add("--drop_path", type=cli.number(float, 0, 0.99), default=0.1, help="finetune: drop-path rate of the last block, rising linearly from 0")
    add("--untrained", default="auto", metavar="auto|none|DIR",
        help="finetune: output folder of the untrained encoder's run, which is trained first if it is not complete; auto = OUTPUT_DIR/untrained")
    cli.add_schedule_arguments(parser, blr=[], batch_size=16, epochs=32, warmup_epochs=1.2, min_lr=0.0, weight_decay=None)
    parser.set_defaults(blr=None)
    cli.explain_defaults(parser, {name: f"{value}, with --finetune {FINETUNE[name]}" for name, value in LINEAR.items()})
    cli.add_device_arguments(parser)
    group = cli.add_run_arguments(parser, "output/segment")
    group.add_argument("--eval", action="store_true", help="only evaluate --checkpoint, a segmenter.pth, on val")
    cli.add_results_argument(group, "OUTPUT_DIR/results.jsonl; none with --eval")
    # fmt: on
    return parser


def colour(text: str) -> str:
    """argparse type: RRGGBB."""
    if len(text) != 6 or not set(text.lower()) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError(f"{text} is not a colour such as ff8000")
    return text.lower()


def parse_args() -> Namespace:
    """The arguments, with what depends on --finetune; ValueError for flags that exclude each other."""
    args = get_parser().parse_args()
    conflicts = {"--method knn": args.finetune and args.method == "knn", "--layers": args.finetune and args.layers}
    conflicts["several --blr"] = args.finetune and len(args.blr or ()) > 1
    for flag, given in conflicts.items():
        if given:
            raise ValueError(f"{flag}: not with --finetune; omit one of them")
    if args.crop_pct:
        raise ValueError(f"--crop_pct {args.crop_pct:g}: segmentation uses whole images; omit it")
    if args.eval:
        return args
    defaults = FINETUNE if args.finetune else LINEAR
    return Namespace(**vars(args) | {name: value for name, value in defaults.items() if getattr(args, name) is None})


def segmentation_loss(normalize: Normalize) -> LossFn:
    """Sum over the heads of the cross-entropy at the size of the mask; ignored pixels have the loss 0, as in mmsegmentation.

    The mean over all pixels makes equal parts of a batch count the same, so that several ranks equal one.
    """

    def loss(model, batch):
        batch, truth = split_masks(batch)
        logits = seg.upscale(model(normalize(batch)), truth.shape[1:])
        heads = logits.shape[1]
        truth = truth.repeat_interleave(heads, dim=0)
        return F.cross_entropy(logits.flatten(0, 1), truth, ignore_index=-1, reduction="none").mean() * heads

    return loss


def build_adamw(model: Any, run: Run) -> torch.optim.AdamW:
    """AdamW with a learning rate for each head, or with layer decay of the encoder."""
    args = run.args
    if args.finetune:
        encoder, decay = model.encoder.model, args.layer_decay
        decoder = nn.ModuleList([model.decoder, model.segmentation_head])
        groups = param_groups_layer_decay(encoder, args.weight_decay, encoder.no_weight_decay(), layer_decay=decay)
        for group in groups:
            group["lr_scale"] *= decay  # the decoder is the layer after the last block
        groups += param_groups_weight_decay(decoder, args.weight_decay)
    else:
        groups = []
        for head, blr in zip(model.heads, args.blr, strict=True):
            scale = {"lr_scale": blr / (max(args.blr) or 1.0)}
            groups += [group | scale for group in param_groups_weight_decay(head, args.weight_decay)]
    return torch.optim.AdamW(groups, run.lr, fused=True)


def setup(args: Namespace, begin: Callable[[Namespace], Run] = start_run) -> tuple[TrainState, MaskFolder]:
    """(training state, validation images): data, model, optimiser, loss."""
    args, weights = read_architecture(args, ENCODERS)
    train = mask_folder(args, "train")
    val = mask_folder(args, "val", train.classes)
    args = resolve_pixels(args, train, recorded_args(args))
    run = begin(args)
    model = seg.build_segmenter(args, build_encoder, weights, len(train.classes), run.world, len(args.blr))
    loader = train_loader(run, train, partial(multi_scale_crop, args=args), flip=True)
    loss_fn = segmentation_loss(Normalize(args, run.world.device))
    return prepare_training(run, model, build_adamw(model, run), loss_fn, loader), val


def train(args: Namespace, world: World | None = None) -> Outcome:
    """Result of the best head; the ranks stay joined."""
    state, val = setup(args, partial(start_run, world=world))
    run, args, model = state.run, state.run.args, state.model
    saver = Saver(state)
    progress = saver.resume()
    for epoch in range(progress.epoch, args.epochs):
        progress = train_one_epoch(state, progress.start_of(epoch), saver)
        saver.after_epoch(progress)
        results = seg.validate_segmenter(run, model, val, epoch + 1)
    saver.close()
    for blr, result in zip(args.blr, results, strict=True):
        run.log.info(f"--blr {blr:g}: {json.dumps(result)}")
    best = max(range(len(results)), key=lambda i: results[i]["miou"])
    seg.save_segmenter(run, model, best, val.classes)
    run.log.close()
    selected = {"blr": args.blr[best], "selected_on": "val"} if len(results) > 1 else {}
    return Outcome({**results[best], **selected}, run.world, args)


def finetune(args: Namespace) -> Outcome:
    """Result of --finetune and, as `miou_untrained`, that of the same training from an untrained encoder."""
    if args.untrained == "none" or args.checkpoint == "none":
        return train(args)
    known, _ = read_architecture(args, ENCODERS)  # the untrained encoder needs --model
    folder = f"{args.output_dir}/untrained" if args.untrained == "auto" else args.untrained
    control, world, _ = train(Namespace(**vars(known) | {"checkpoint": "none", "output_dir": folder, "crop_pct": None}))
    tuned = train(args, world)
    return tuned._replace(result={**tuned.result, "miou_untrained": control["miou"]})


def run_knn(args: Namespace) -> Outcome:
    """Result of --method knn."""
    args, weights = read_architecture(args, ENCODERS)
    world = init_world(args.device, args.amp, args.timeout_minutes)
    train = mask_folder(args, "train")
    if len(args.k) > 1 and len(train) < 2:
        ks = " ".join(map(str, args.k))
        raise ValueError(f"--k {ks}: train has one image, none to choose on; give one number")
    val = mask_folder(args, "val", train.classes)
    args = resolve_pixels(args, train)
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights)).to(world.device).eval()
    bank, classes = seg.build_bank(args, world, encoder, train), len(train.classes)
    single = Namespace(**vars(args) | {"batch_size": 1})  # windows at a time: their votes need much memory
    chosen, held = {"k": args.k[0]}, generator(args.seed, SUBSET, 2).permutation(len(train))[: -(-len(train) // 10)]
    if len(args.k) > 1:
        model = seg.PatchVotes(encoder, bank.exclude_images(held.tolist()), classes, args.k, args)
        results = seg.evaluate_segmenter(single, world, model, Subset(train, held))
        mious = {k: result["miou"] for k, result in zip(args.k, results, strict=True)}
        chosen = {"k": max(mious, key=lambda k: mious[k]), "selected_on": "train", "miou_of_k": mious}
    model = seg.PatchVotes(encoder, bank, classes, [chosen["k"]], args)
    found = seg.evaluate_segmenter(single, world, model, val)[0]
    return Outcome({**found, **chosen, "patches": len(bank.features)}, world, args)


def evaluate(args: Namespace) -> Outcome:
    """Result of a saved segmenter on val (--eval)."""
    args, weights = read_architecture(args, ENCODERS)
    world = init_world(args.device, args.amp, args.timeout_minutes)
    model, args = seg.load_segmenter(args, build_encoder, weights, world)
    val = mask_folder(args, "val")
    args = resolve_pixels(args, val)
    return Outcome(seg.evaluate_segmenter(args, world, model, val)[0], world, args)


def main() -> None:
    args = parse_args()
    run = evaluate if args.eval else run_knn if args.method == "knn" else finetune if args.finetune else train
    outcome = run(args)
    print_result(outcome.world, outcome.result, outcome.args)
    outcome.world.close()


if __name__ == "__main__":
    cli.run_main(main)
