"""Semantic segmentation with an encoder: linear heads, patch neighbours, DPT; sliding windows and IoU, exact over all ranks.

Letters: B images or windows, C channels, D width, h w patches, H W pixels, K classes, M patches of the bank.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.checkpoint.resume import average_statistics
from util.checkpoint.state import copy_to_host, read_checkpoint, write_checkpoint
from util.data.batches import DevicePrefetcher, eval_loader
from util.data.folders import Source
from util.data.masks import fit_size, split_masks, whole_image
from util.data.transforms import Normalize
from util.dist import World, autocast
from util.evaluate.encoder import Encoder, forward_blocks, load_encoder, pooling
from util.files import import_package
from util.formats.keys import to_mae
from util.formats.weights import Weights
from util.formats.write import select_tensors, write_weights
from util.meters import log_bad_images
from util.rng import SUBSET, generator
from util.run import Run, args_to_dict

# ------------------------------------------------------------------------------------------------------------- models


def patch_maps(encoder: Encoder, images: Tensor, layers: Sequence[int] | None = None) -> Tensor:
    """Patch tokens (B, D x layers, h, w) after these blocks, counted from 1, before the final norm; None = the last block.

    The final norm is fitted to the decoder of pre-training, see `knn_layer`. ValueError for blocks that do not exist.
    """
    if not hasattr(encoder, "blocks"):  # ConvMAE
        if layers:
            raise ValueError("--layers: ConvMAE has one stage of blocks on patches; omit it")
        return encoder.forward_features(images)[-1]
    depth = len(encoder.blocks)
    if layers and max(layers) > depth:
        raise ValueError(f"--layers {max(layers)}: --checkpoint has {depth} blocks")
    chosen = layers or [depth]
    _, tokens = forward_blocks(encoder, images, {*chosen})
    maps = torch.cat([tokens[layer] for layer in chosen], dim=2)[:, encoder.num_prefix_tokens :]
    return maps.mT.unflatten(2, encoder.grid)


class SharedNorm(nn.BatchNorm1d):
    """Batch norm without parameters of (B, D, L), by the statistics of all ranks, which have equal B and L. No gradient."""

    world: World
    running_mean: Any
    running_var: Any
    num_batches_tracked: Any

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        var, mean = torch.var_mean(x, (0, 2), correction=0)
        moments = self.world.sum(torch.stack([mean, var + mean**2]).double()) / self.world.size
        mean, var = moments[0].float(), (moments[1] - moments[0] ** 2).float()
        count = self.world.size * len(x) * x.shape[2]
        self.running_mean.lerp_(mean, 0.1)
        self.running_var.lerp_(var * count / max(count - 1, 1), 0.1)
        self.num_batches_tracked += 1
        return F.batch_norm(x, mean, var, eps=self.eps)


class DenseProbe(nn.Module):
    """Frozen encoder, batch norm, parallel 1 x 1 convolutions: images -> logits (B, heads, K, h, w)."""

    def __init__(self, encoder: Encoder, layers: Sequence[int] | None, num_classes: int, num_heads: int, world: World):
        super().__init__()
        self.encoder, self.layers = encoder.requires_grad_(False), layers
        width = encoder.embed_dim * len(layers or [0])
        self.bn = SharedNorm(width, affine=False, eps=1e-6)
        self.bn.world = world
        head: Any = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(deepcopy(head) for _ in range(num_heads))

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = patch_maps(self.encoder, images, self.layers).float()
        x = self.bn(x.flatten(2)).unflatten(2, x.shape[2:])
        return torch.stack([head(x) for head in self.heads], dim=1)


def build_dpt(args: Namespace, encoder: Encoder, num_classes: int, drop_path: float) -> nn.Module:
    """DPT of segmentation_models_pytorch on this encoder: images -> logits (B, K, H, W). ValueError without the package."""
    smp = import_package("segmentation_models_pytorch", "--finetune", "segmentation-models-pytorch")
    if len(getattr(encoder, "blocks", ())) < 4:
        raise ValueError(f"--finetune: DPT needs a ViT of four blocks or more, which --model {args.model} is not")
    if encoder.patch not in (4, 8, 16, 32) or any(side % 32 for side in args.input_size):
        size, needed = " ".join(map(str, args.input_size)), "sides of a multiple of 32 and patches of 4, 8, 16 or 32"
        raise ValueError(f"--input_size {size}, --patch_size {encoder.patch}: DPT needs {needed}")
    weights = Weights.from_state(copy_to_host(encoder.state_dict()), args_to_dict(args))
    with TemporaryDirectory() as folder:
        write_weights(Path(folder, "vit"), weights, select_tensors(weights, "timm"), "timm", folder=True)
        model = smp.DPT(
            f"tu-local-dir:{folder}/vit", encoder_weights=True, classes=num_classes, in_channels=args.in_chans,
            dynamic_img_size=True, drop_path_rate=drop_path,
        )  # fmt: skip
    for name in ("norm", "fc_norm"):  # DPT reads blocks
        getattr(model.encoder.model, name).requires_grad_(False)
    return model


def build_segmenter(
    args: Namespace, build_encoder: Callable, weights: Weights | None, num_classes: int, world: World, heads: int = 1
) -> nn.Module:
    """Linear heads on the frozen encoder of --checkpoint, or with --finetune a DPT, on the device."""
    encoder = load_encoder(args, build_encoder, weights, **pooling(weights))
    if args.finetune:
        return build_dpt(args, encoder, num_classes, args.drop_path).to(world.device)
    return DenseProbe(encoder, args.layers, num_classes, heads, world).to(world.device)


def save_segmenter(run: Run, model: nn.Module, best: int, classes: list[str]) -> None:
    """Write OUTPUT_DIR/segmenter.pth: the encoder as any --checkpoint, and beside it head number `best` for --eval."""
    if not run.world.is_main:
        return
    prefix = "encoder.model." if run.args.finetune else "encoder."
    state, head = copy_to_host(model.state_dict()), f"heads.{best}."
    encoder = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    rest = {name: value for name, value in state.items() if not name.startswith((prefix, "heads."))}
    rest |= {name.replace(head, "heads.0."): value for name, value in state.items() if name.startswith(head)}
    args = args_to_dict(run.args) | {"classes": classes}
    path = write_checkpoint(run.folder / "segmenter.pth", {"model": to_mae(encoder), "segmenter": rest, "args": args})
    run.log.info(f"wrote {path}: main_segment.py --eval and visualize.py --segment read it, others its encoder")


def load_segmenter(args, build_encoder: Callable, weights: Weights | None, world: World) -> tuple[nn.Module, Namespace]:
    """(model of a segmenter.pth, arguments completed by its own); ValueError for other files."""
    content = read_checkpoint(Path(args.checkpoint)) if weights and weights.source == "pixmim" else {}
    if weights is None or "segmenter" not in content:
        remedy = "use a segmenter.pth of main_segment.py"
        raise ValueError(f"--checkpoint {args.checkpoint} has no segmentation head; {remedy}")
    own = {name: weights.args[name] for name in ("finetune", "layers", "classes", "drop_path")}
    flags = ("palette", "ignore_index", "short_side", "image_column", "mask_column", "split_column")
    own |= {name: weights.args[name] for name in flags if vars(args).get(name) is None}
    args = Namespace(**vars(args) | own)
    model = build_segmenter(args, build_encoder, weights, len(args.classes), world)
    missing, unknown = model.load_state_dict(content["segmenter"], strict=False)
    assert not unknown
    assert all(name.startswith("encoder.") for name in missing)
    return model, args


# ------------------------------------------------------------------------------------------------- windows and scores


def window_starts(side: int, window: int) -> list[int]:
    """Starts of windows in a side: two thirds of a window apart, as in MAE's segmenter, the last one at the end."""
    step = max(1, 2 * window // 3)
    return sorted({min(start, side - window) for start in range(0, side - window + step, step)})


def upscale(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, heads, K, h, w) or (B, K, h, w) -> (B, heads, K, H, W) float32, bilinear."""
    logits = logits.float() if logits.ndim == 5 else logits.float().unsqueeze(1)
    return F.interpolate(logits.flatten(0, 1), [*size], mode="bilinear").unflatten(0, logits.shape[:2])


def cut_windows(images: Tensor, args: Namespace) -> Iterator[tuple[list[tuple[int, ...]], Tensor]]:
    """((top, left) of each window, windows (B, C, h, w) of --input_size) of images (1, C, H, W), --batch_size at a time."""
    height, width = args.input_size
    places = [*product(*map(window_starts, images.shape[2:], args.input_size))]
    for first in range(0, len(places), args.batch_size):
        part = places[first : first + args.batch_size]
        yield part, torch.cat([images[:, :, y : y + height, x : x + width] for y, x in part])


def predict(model: nn.Module, images: Tensor, args: Namespace, device: torch.device) -> Tensor:
    """Logits (heads, K, H, W) of one normalised image (1, C, H, W): the mean over windows of --input_size."""
    (height, width), total = args.input_size, torch.zeros(())
    counts = images.new_zeros(images.shape[2:])
    for places, windows in cut_windows(images, args):
        with autocast(args.amp, device):
            logits = model(windows)
        for (y, x), window in zip(places, logits, strict=True):
            scores = upscale(window.unsqueeze(0), args.input_size)[0]
            if not total.ndim:
                total = scores.new_zeros(*scores.shape[:2], *images.shape[2:])
            total[:, :, y : y + height, x : x + width] += scores
            counts[y : y + height, x : x + width] += 1
    return total / counts


class Prediction(NamedTuple):
    image: int  # index in its source
    classes: Tensor  # (heads, H, W) int64
    truth: Tensor  # (H, W) int64, -1 = ignored
    pixels: Tensor  # (H, W, C) uint8


def resized_images(args: Namespace, world: World, loader: DevicePrefetcher) -> Iterator[tuple[dict, Tensor, Tensor]]:
    """(batch without masks, normalised image (1, C, H', W') of `fit_size`, classes (1, H, W)) of each image of this rank."""
    normalize = Normalize(args, world.device)
    for batch in loader:
        batch, truth = split_masks(batch)
        size = fit_size(truth.shape[1], truth.shape[2], args)
        yield batch, F.interpolate(normalize(batch), size, mode="bilinear", antialias=True), truth


@torch.inference_mode()
def predict_images(args: Namespace, world: World, model: nn.Module, loader: DevicePrefetcher) -> Iterator[Prediction]:
    """Predictions of this rank's images at the size of their masks."""
    model.eval()
    for batch, images, truth in resized_images(args, world, loader):
        logits = predict(model, images, args, world.device)
        heads = [upscale(head[None], truth.shape[1:])[0, 0].argmax(0) for head in logits]  # one by one: less memory
        yield Prediction(batch["index"].item(), torch.stack(heads), truth[0], batch["images"][0])


class Confusion:
    """Pixels of each pair of (true, predicted) class on this rank, (K, K) int64; ignored pixels are not counted."""

    def __init__(self, num_classes: int, device: torch.device):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, truth: Tensor, predicted: Tensor) -> None:
        """Count pixels of classes `truth`, -1 = ignored, predicted as `predicted` (same shape)."""
        size, known = len(self.counts), truth >= 0
        pairs = truth[known] * size + predicted[known]
        self.counts += torch.bincount(pairs, minlength=size**2).view(size, size)

    def result(self, world: World, classes: Sequence[str]) -> dict[str, Any]:
        """miou, mean_class_acc, pixel_acc in percent, iou of each class (None without a pixel), over all ranks.

        Classes without a true pixel do not count in mean_class_acc, those without a predicted one either not in miou.
        """
        counts = world.sum(self.counts).double()
        if not counts.sum():
            raise ValueError("--data_path: every pixel of the masks is ignored (--ignore_index)")
        right, true, guessed = counts.diagonal(), counts.sum(1), counts.sum(0)
        union = true + guessed - right
        iou = right / union
        means = {"miou": iou[union > 0], "mean_class_acc": (right / true)[true > 0]}
        means["pixel_acc"] = right.sum() / true.sum()
        rounded = [round(100 * value, 3) if value == value else None for value in iou.tolist()]
        by_class = dict(zip(classes, rounded, strict=True))
        return {name: round(100 * value.mean().item(), 3) for name, value in means.items()} | {"iou": by_class}


def evaluate_segmenter(args, world: World, model: nn.Module, source: Source, run: Run | None = None) -> list[dict]:
    """One `Confusion.result` and the number of images `n` for each head of the model, over all ranks."""
    loader = mask_loader(args, world, source)
    confusions: list[Confusion] = []
    images = 0
    for found in predict_images(args, world, model, loader):
        images += 1
        confusions = confusions or [Confusion(len(source.classes), world.device) for _ in found.classes]
        for confusion, predicted in zip(confusions, found.classes, strict=True):
            confusion.add(found.truth, predicted)
    bad = log_bad_images(world, [loader], run)
    images, heads = sum(world.gather(images)), max(world.gather(len(confusions)))
    if not heads:
        raise ValueError("--data_path: no image can be read")
    confusions += [Confusion(len(source.classes), world.device) for _ in range(heads - len(confusions))]
    return [confusion.result(world, source.classes) | {"n": images} | bad for confusion in confusions]


def mask_loader(args: Namespace, world: World, source: Source) -> DevicePrefetcher:
    """Batches of one image of any size, spread over the ranks."""
    return eval_loader(Namespace(**vars(args) | {"batch_size": 1}), world, source, partial(whole_image, args=args))


def validate_segmenter(run: Run, model: nn.Module, source: Source, epoch: int) -> list[dict]:
    """Results of `evaluate_segmenter`; logs those of the best head. Averages batch-norm statistics over the ranks first."""
    average_statistics(model, run.world)
    results = evaluate_segmenter(run.args, run.world, model, source, run)
    best = max(results, key=lambda result: result["miou"])
    run.log.scalars({"epoch": epoch, **{f"val_{name}": value for name, value in best.items()}})
    run.log.info(f"epoch {epoch}  val {json.dumps(best)}")
    return results


# --------------------------------------------------------------------------------------------------- nearest patches


class PatchBank(NamedTuple):
    """Patches of the training images."""

    features: Tensor  # (M, D) of unit length
    labels: Tensor  # (M, p x p) uint8, class + 1 of each pixel, 0 = ignored
    images: Tensor  # (M,) index of the image, ascending

    def exclude_images(self, indices: Sequence[int]) -> "PatchBank":
        """The patches of all other images."""
        kept = ~torch.isin(self.images, torch.tensor(indices, device=self.images.device))
        return PatchBank(*(part[kept] for part in self))


@torch.inference_mode()
def build_bank(args: Namespace, world: World, encoder: Encoder, source: Source) -> PatchBank:
    """Patches of all windows of the source's images, of each image at most its share of --bank_patches, drawn by --seed."""
    parts: list[PatchBank] = []
    count, limit = len(source), args.bank_patches
    for batch, images, truth in resized_images(args, world, mask_loader(args, world, source)):
        i = batch["index"].item()
        masks = F.interpolate((truth + 1).unsqueeze(1).float(), images.shape[2:], mode="nearest-exact")
        features: list[Tensor] = []
        labels: list[Tensor] = []
        for _, windows in cut_windows(torch.cat([images, masks], dim=1), args):
            with autocast(args.amp, world.device):
                tokens = patch_maps(encoder, windows[:, :-1], args.layers)
            features.append(tokens.float().flatten(2).mT.flatten(0, 1))
            labels.append(F.unfold(windows[:, -1:], encoder.patch, stride=encoder.patch).mT.flatten(0, 1))
        total = sum(map(len, features))
        share = (i + 1) * limit // count - i * limit // count
        chosen = torch.from_numpy(generator(args.seed, SUBSET, 1, i).permutation(total)[:share]).sort().values
        rows = F.normalize(torch.cat(features), dim=1)[chosen.to(world.device)]
        parts.append(PatchBank(rows.cpu(), torch.cat(labels).byte().cpu()[chosen], torch.full((len(chosen),), i)))
    shares = [part for rank in world.gather(parts) for part in rank]
    if not shares:
        raise ValueError("--data_path: no image can be read")
    shares.sort(key=lambda part: part.images[:1].tolist())  # the order of one rank
    return PatchBank(*(torch.cat(part).to(world.device) for part in zip(*shares, strict=True)))


class PatchVotes(nn.Module):
    """Votes of the nearest patches of a bank, pixel by pixel: images -> shares (B, k's, K, H, W).

    A vote weighs exp(cosine similarity / temperature); ignored pixels do not vote.
    """

    def __init__(self, encoder: Encoder, bank: PatchBank, num_classes: int, ks: Sequence[int], args: Namespace):
        super().__init__()
        self.encoder, self.bank, self.num_classes, self.ks = encoder, bank, num_classes, ks
        self.layers, self.temperature = args.layers, args.temperature

    def votes(self, queries: Tensor) -> Tensor:
        """(Q, D) of unit length -> (Q, k's, K, p x p)."""
        similarity, nearest = (queries @ self.bank.features.T).topk(min(max(self.ks), len(self.bank.features)), dim=1)
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
        labels = self.bank.labels[nearest].long()  # (Q, k, p x p)
        weights = weights.unsqueeze(2).expand_as(labels)
        empty = queries.new_zeros(len(queries), self.num_classes + 1, labels.shape[2])
        votes = torch.stack([empty.scatter_add(1, labels[:, :k], weights[:, :k]) for k in self.ks], dim=1)[:, :, 1:]
        return votes / votes.sum(2, keepdim=True).clamp(min=1e-12)

    def forward(self, images: Tensor) -> Tensor:
        x = patch_maps(self.encoder, images, self.layers).float()
        (b, _, h, w), p = x.shape, self.encoder.patch
        queries = F.normalize(x.flatten(2).mT.flatten(0, 1), dim=1)
        values = max(len(self.bank.features), self.num_classes * p * p * len(self.ks))
        rows = max(1, 2**26 // values)  # 256 MiB at a time
        with torch.autocast(queries.device.type, enabled=False):
            votes = torch.cat([self.votes(part) for part in queries.split(rows)])
        votes = votes.view(b, h, w, len(self.ks), self.num_classes, p, p)
        return votes.permute(0, 3, 4, 1, 5, 2, 6).flatten(5, 6).flatten(3, 4)
