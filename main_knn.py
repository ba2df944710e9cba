"""python main_knn.py --checkpoint output/pixmim/last.pth --data_path DIR: k-NN accuracy of a frozen encoder."""

import argparse

from models import ENCODERS, build_encoder
from util.args import (
    CLASSES,
    Parser,
    add_checkpoint_arguments,
    add_data_arguments,
    add_device_arguments,
    add_model_arguments,
    add_results_argument,
    add_subset_arguments,
    number,
    run_main,
)
from util.data.ranges import resolve_pixels
from util.data.sources import labelled_sources, select_training_images
from util.dist import init_world
from util.evaluate.encoder import knn_layer, load_encoder, pooling, read_architecture
from util.evaluate.knn import knn
from util.evaluate.scores import print_result

LAYERS = ("before_norm", "after_norm")


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_arguments(parser, CLASSES)
    add_subset_arguments(parser)
    add_checkpoint_arguments(parser)
    add_model_arguments(parser, ENCODERS)
    add_device_arguments(parser)
    add_results_argument(parser)
    add = parser.add_argument_group("kNN").add_argument
    add("--batch_size", type=number(int, 1), default=256, help="images per rank and forward pass")
    add("--knn_features", choices=["auto", *LAYERS], default="auto",
        help="features before or after the encoder's final norm; auto = after_norm for classifiers, else before_norm. Both are printed, "
             "the chosen one last")  # fmt: skip
    add("--k", type=number(int, 1), default=20, help="number of neighbours that vote")
    add(
        "--temperature",
        type=number(float, 1e-3),
        default=0.07,
        help="a vote has the weight exp(cosine similarity / temperature)",
    )
    return parser


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    world = init_world(args.device, args.amp, args.timeout_minutes)
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool)).to(world.device)
    train, val = labelled_sources(args.data_path, args)
    args = resolve_pixels(args, train)
    sources, chosen = (select_training_images(train, args), val), knn_layer(weights, args.knn_features)
    other = next(layer for layer in LAYERS if layer != chosen)
    results = knn(args, world, encoder, sources, (other, chosen), args.k, args.temperature)
    print_result(world, results[0], args)
    print_result(world, {**results[1], f"acc1_{other}": results[0]["acc1"]}, args)  # the last line is the result
    world.close()


if __name__ == "__main__":
    run_main(main)
