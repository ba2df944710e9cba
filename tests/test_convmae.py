"""Properties of models_convmae.py. test_reference.py compares it with the reference implementation."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_models import perturb, scribble
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.testing import assert_close

from models_convmae import ENCODERS, ConvViT
from models_pixmim import PixMIM, mask_from_noise, patchify, sincos_pos_embed, take

GRID, SIZE, PATCH = (3, 5), (24, 40), 8


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def small_encoder(**kwargs) -> ConvViT:
    sizes = {"embed_dim": (8, 12, 24), "depth": (2, 1, 2), "num_heads": 3} | kwargs
    return perturb(ConvViT(SIZE, PATCH, **sizes))


def small_mask(batch: int = 2):
    return mask_from_noise(torch.rand(batch, 15), 0.7, GRID)


def dense(encoder: ConvViT, images: Tensor, removed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B, D, h, w) of the stages; removed patches are zeroed before each depthwise convolution, as published."""

    def norm(x, layer):
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], layer.weight, layer.bias, 1e-5).permute(0, 3, 1, 2)

    def conv(x, layer, **kwargs):
        return F.conv2d(x, layer.weight, layer.bias, **kwargs)

    def embed(x, layer):
        return F.gelu(norm(conv(x, layer.proj, stride=layer.proj.kernel_size), layer.norm))

    def stage(x, blocks, scale):
        seen = torch.ones(len(x), 1, *GRID) if removed is None else (~removed).float().view(-1, 1, *GRID)
        seen = F.interpolate(seen, scale_factor=scale, mode="nearest")
        for block in blocks:
            inner = conv(seen * conv(norm(x, block.norm1), block.conv1), block.attn, padding=2, groups=x.shape[1])
            x = x + conv(inner, block.conv2)
            x = x + conv(F.gelu(conv(norm(x, block.norm2), block.mlp.fc1)), block.mlp.fc2)
        return x

    first = stage(embed(images, encoder.patch_embed1), encoder.blocks1, 4)
    second = stage(embed(first, encoder.patch_embed2), encoder.blocks2, 2)
    return first, second, embed(second, encoder.patch_embed3)


def dense_encode(encoder: ConvViT, images: Tensor, mask) -> Tensor:
    """Tokens of the visible patches, selected after computing those of all patches."""
    first, second, third = dense(encoder, images, mask.removed)
    x = take(encoder.patch_embed4(third.flatten(2).mT) + encoder.pos_embed, mask.keep)
    x = encoder.blocks3(x)
    for maps, layer in ((first, encoder.stage1_output_decode), (second, encoder.stage2_output_decode)):
        fused = F.conv2d(maps, layer.weight, layer.bias, stride=layer.kernel_size)
        x = x + take(fused.flatten(2).mT, mask.keep)
    return encoder.norm(x)


def test_tokens_and_gradients_equal_those_of_dense_masked_convolutions():
    encoder, images, mask = small_encoder(), torch.randn(2, 3, *SIZE), small_mask()
    answers = []
    for encode in (encoder.encode, partial(dense_encode, encoder)):
        encoder.zero_grad()
        tokens = encode(images, mask)
        (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
        answers.append({"tokens": tokens} | {k: p.grad for k, p in encoder.named_parameters() if p.requires_grad})
    assert answers[0].keys() == answers[1].keys()
    for name, value in answers[0].items():
        assert_close(value, answers[1][name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_removed_pixels_reach_no_visible_token_at_any_depth():
    encoder, images, mask = small_encoder(), torch.randn(2, 3, *SIZE), small_mask()
    seen: list[list[Tensor]] = []
    for block in (*encoder.blocks1, *encoder.blocks2, *encoder.blocks3):
        block.register_forward_hook(lambda _block, _inputs, output: seen[-1].append(output))
    for picture in (images, scribble(images, mask, PATCH, GRID)):
        seen.append([])
        seen[-1].append(encoder.encode(picture, mask))
    assert len(seen[0]) == 2 + 1 + 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))  # bit for bit


def test_convolutions_reach_neighbouring_visible_patches():
    """Control: the convolution reaches beyond the patch; otherwise the test above could not fail."""
    encoder, images = small_encoder(), torch.randn(1, 3, *SIZE)
    mask = mask_from_noise(torch.arange(15.0)[None], 0.7, GRID)  # 0, 1, 2, 3: neighbours in the first row
    other = images.clone()
    other[:, :, :PATCH, :PATCH] += 1
    first, changed = (encoder.stages(x, mask.keep)[0] for x in (images, other))
    assert not torch.equal(first[:, 1], changed[:, 1])
    assert torch.equal(first[:, 3], changed[:, 3])  # two 5 x 5 convolutions reach 4 positions, the side of one patch


def test_features_are_maps_of_all_three_stages():
    encoder, images = small_encoder(), torch.randn(2, 3, *SIZE)
    first, second, third = dense(encoder, images)
    maps = encoder.forward_features(images)
    tokens = encoder.blocks3(encoder.patch_embed4(third.flatten(2).mT) + encoder.pos_embed)
    for ours, theirs in zip(maps, (first, second, tokens.mT.unflatten(2, GRID)), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [SIZE[0] // m.shape[2] for m in maps] == [SIZE[1] // m.shape[3] for m in maps] == [2, 4, 8]


def test_strides_of_the_maps_are_4_8_and_16_at_patch_16():
    encoder = ENCODERS["convvit_tiny"](img_size=(32, 48)).eval()
    assert [tuple(m.shape[1:]) for m in encoder.forward_features(torch.randn(1, 3, 32, 48))] == [
        (64, 8, 12), (96, 4, 6), (192, 2, 3),
    ]  # fmt: skip


def test_masked_stages_without_removed_patches_equal_the_dense_stages():
    encoder, images = small_encoder(), torch.randn(2, 3, *SIZE)
    everything = torch.arange(15).expand(2, 15)
    for masked, whole in zip(encoder.stages(images, everything), encoder.stages(images, None), strict=True):
        assert_close(masked, whole, rtol=1e-5, atol=1e-5)


def test_pooling_is_the_normalised_mean_of_the_patches():
    images = torch.randn(2, 3, *SIZE)
    frozen, classifier = small_encoder(), small_encoder(num_classes=5, global_pool="avg")
    for encoder in (frozen, classifier):
        mean = encoder.forward_features(images)[-1].flatten(2).mean(2)
        affine = () if encoder is frozen else (encoder.fc_norm.weight, encoder.fc_norm.bias)
        pooled = F.layer_norm(mean, (24,), *affine, eps=1e-6)
        assert_close(encoder.forward_head(encoder.forward_features(images), pre_logits=True), pooled)
    assert_close(classifier(images), F.linear(pooled, classifier.head.weight, classifier.head.bias))
    parts = {name.split(".")[0] for name in classifier.state_dict()} ^ {n.split(".")[0] for n in frozen.state_dict()}
    assert parts == {"norm", "fc_norm", "head"}


def convmae_layer(name: str, depth: int) -> int:
    """Layer in util/lr_decay.py of Alpha-VL/ConvMAE: 0 = stem and convolution stages, then the ViT blocks, then the rest."""
    if name == "pos_embed" or name.startswith(("patch_embed", "blocks1", "blocks2")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks3") else depth + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_layer_decay_of_every_parameter_equals_that_of_convmae(name):
    with torch.device("meta"):
        model = ENCODERS[name](num_classes=10, global_pool="avg").requires_grad_(True)
    for part in model.pretraining_only:
        delattr(model, part)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.65)
    names = {p: name for name, p in model.named_parameters()}
    seen = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert seen.keys() == set(names.values())
    depth = len(model.blocks3)
    assert depth == (2 if name == "convvit_pico" else 11)
    for p, name in names.items():
        assert seen[name][0] == pytest.approx(0.65 ** (depth + 1 - convmae_layer(name, depth))), name
        assert seen[name][1] == (0.0 if p.ndim == 1 or name == "pos_embed" else 0.05), name


def test_drop_path_rises_over_all_three_stages():
    encoder = small_encoder(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for block in (*encoder.blocks1, *encoder.blocks2)]
    rates += [getattr(block.drop_path1, "drop_prob", 0.0) for block in encoder.blocks3]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_initial_values_equal_those_of_convmae():
    encoder = ConvViT(SIZE, PATCH, embed_dim=(8, 12, 24), depth=(1, 1, 1), num_heads=3)
    bound = (6 / (24 + 12 * 4)) ** 0.5  # xavier-uniform over the flattened kernel, as in MAE
    weight = encoder.patch_embed3.proj.weight
    assert 0.95 * bound < weight.abs().max() <= bound
    assert encoder.blocks1[0].conv1.weight.abs().max() <= 8**-0.5  # torch's default for convolutions
    assert torch.equal(encoder.pos_embed.data, sincos_pos_embed(24, GRID, 0))
    assert not encoder.pos_embed.requires_grad
    eps = {name: m.eps for name, m in encoder.named_modules() if isinstance(m, nn.LayerNorm)}
    assert {name for name, value in eps.items() if value == 1e-5} == {
        *(f"patch_embed{i}.norm" for i in (1, 2, 3)), *(f"blocks{i}.0.norm{j}" for i in (1, 2) for j in (1, 2)),
    }  # fmt: skip
    assert all(value in (1e-5, 1e-6) for value in eps.values())


def test_gradient_checkpointing_changes_no_gradient():
    model = PixMIM(small_encoder(), nn.Identity(), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    images, noise, gradients = torch.randn(2, 3, *SIZE), torch.rand(2, 15), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, noise)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_loss_is_the_mean_over_removed_patches():
    model = perturb(PixMIM(small_encoder(), nn.Identity(), decoder_dim=16, decoder_depth=1, decoder_heads=2))
    images = torch.randn(2, 3, *SIZE)
    loss, prediction, mask = model(images, torch.rand(2, 15))
    patches = take(patchify(images, PATCH), mask.predict)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-6)
    assert torch.equal(
        prediction,
        model(scribble(images, mask, PATCH, GRID), torch.cat([mask.keep, mask.predict], 1).argsort(1).float())[1],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 6, "img_size": (24, 24)}, "--patch_size 6"),
        ({"img_size": (24, 30), "patch_size": 8}, "24 x 30 .*patch size 8"),
        ({"img_size": (32, 32), "global_pool": "token"}, "--pool token: .*--pool mean"),
        ({"img_size": (32, 32), "global_pool": "max"}, "--pool max: .*--pool mean"),
    ],
    ids=["patch_size", "img_size", "class token", "another pooling"],
)
def test_invalid_sizes_and_pooling_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ConvViT(**options)


@pytest.mark.parametrize(("global_pool", "fc_norm"), [("", True), ("", False), ("avg", True), ("avg", False)])
def test_fc_norm_selects_a_learned_norm_with_and_without_pooling(global_pool, fc_norm):
    encoder = small_encoder(global_pool=global_pool, fc_norm=fc_norm)
    assert ("fc_norm.weight" in encoder.state_dict(), "norm.weight" in encoder.state_dict()) == (fc_norm, not fc_norm)
