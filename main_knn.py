"""python main_knn.py --checkpoint output/pixmim/last.pth --data_path DIR: k-NN accuracy of a frozen encoder."""

import argparse

from models import ENCODERS, build_encoder
from util.args import (
    Parser,
    add_checkpoint_arguments,
    add_data_arguments,
    add_device_arguments,
    add_model_arguments,
    add_subset_arguments,
    number,
    run_main,
)
from util.data.sources import labelled_sources
from util.data.subset import select_training_images
from util.dist import init_world
from util.evaluate.encoder import load_encoder, pooling, read_architecture
from util.evaluate.knn import knn
from util.evaluate.scores import print_result


def get_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add_data_arguments(parser, "folder with train/<class>/ and val/<class>/")
    add_subset_arguments(parser)
    add_checkpoint_arguments(parser)
    add_model_arguments(parser, ENCODERS)
    add_device_arguments(parser)
    add = parser.add_argument_group("kNN").add_argument
    add("--batch_size", type=number(int, 1), default=256, help="images per rank and forward pass")
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
    train, val = labelled_sources(args.data_path)
    train = select_training_images(train, args)
    print_result(world, knn(args, world, encoder, (train, val), args.k, args.temperature))
    world.close()


if __name__ == "__main__":
    run_main(main)
