"""python main_knn.py --checkpoint FILE --data_path DIR: k-NN accuracy of a frozen encoder."""

import argparse
from argparse import Namespace

import util.args as cli
from models import ENCODERS, build_encoder
from util.data.ranges import resolve_pixels
from util.data.sources import labelled_sources, select_training_images
from util.dist import init_world
from util.evaluate.encoder import Encoder, encoder_blocks, knn_layer, load_encoder, pooling, read_architecture
from util.evaluate.knn import knn
from util.evaluate.scores import print_result
from util.plots.charts import draw_lines
from util.plots.grids import save_picture

NORMS = ("before_norm", "after_norm")


def get_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(__doc__)
    cli.add_data_arguments(parser, cli.CLASSES)
    cli.add_subset_arguments(parser)
    cli.add_checkpoint_arguments(parser)
    cli.add_model_arguments(parser, ENCODERS)
    cli.add_device_arguments(parser)
    cli.add_results_argument(parser)
    # fmt: off
    add = parser.add_argument_group("kNN").add_argument
    add("--batch_size", type=cli.number(int, 1), default=256, help="images per rank and forward pass")
    add("--knn_features", choices=["auto", *NORMS], default="auto",
        help="features before or after the encoder's final norm; auto = after_norm for classifiers, else before_norm. Both are printed, "
             "the chosen one last")
    add("--k", type=cli.number(int, 1), nargs="+", default=[20],
        help="numbers of neighbours that vote; the result is that of 20 if listed, else of the first")
    add("--temperature", type=cli.number(float, 1e-3), nargs="+", default=[0.07],
        help="a vote has the weight exp(cosine similarity / temperature); the result is that of 0.07 if listed, else of the first")
    add("--layers", type=cli.number(int, 1, words=["all"]), nargs="+", default=[], metavar="N|all",
        help="also measure the features after these blocks, counted from 1; all = each block")
    add("--layers_chart", type=cli.picture, metavar="FILE", help="chart of the accuracy of --layers to write, .png or .jpg (default: none)")
    # fmt: on
    return parser


def find_layers(args: Namespace, encoder: Encoder) -> list[int]:
    """Blocks that --layers names; ValueError if the encoder lacks one, or if there are none for --layers_chart."""
    depth = len(encoder_blocks(encoder))
    layers = [*range(1, depth + 1)] if "all" in args.layers else sorted({*args.layers})
    if layers and layers[-1] > depth:
        raise ValueError(f"--layers {layers[-1]}: the encoder has {depth} blocks")
    if args.layers_chart and not layers:
        raise ValueError(f"--layers_chart {args.layers_chart} requires --layers, such as --layers all")
    return layers


def main() -> None:
    args, weights = read_architecture(get_parser().parse_args(), ENCODERS)
    world = init_world(args.device, args.amp, args.timeout_minutes)
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights, args.pool)).to(world.device)
    layers, chosen = find_layers(args, encoder), knn_layer(weights, args.knn_features)
    train, val = labelled_sources(args.data_path, args)
    args = resolve_pixels(args, train)
    sources = select_training_images(train, args), val
    other = next(layer for layer in NORMS if layer != chosen)
    results = knn(args, world, encoder, sources, [*layers, other, chosen], args.k, args.temperature)
    k, t = (usual if usual in given else given[0] for usual, given in ((20, args.k), (0.07, args.temperature)))
    if args.layers_chart and world.is_main:
        lines = {f"k = {k}": (layers, [results[n, k, t]["acc1"] for n in layers]) for k in args.k}
        save_picture(args.layers_chart, draw_lines(lines, "kNN top-1 accuracy in %, before the final norm", "block"))
    # the last line is the result
    for setting, result in sorted(results.items(), key=lambda item: item[0] == (chosen, k, t)):
        layer = setting[0] if setting[0] in NORMS else f"block_{setting[0]}"
        row = {"knn_features": layer, "k": setting[1], "temperature": setting[2], **result}
        both = {f"acc1_{other}": results[other, k, t]["acc1"]} if setting == (chosen, k, t) else {}
        print_result(world, row | both, args)
    world.close()


if __name__ == "__main__":
    cli.run_main(main)
