"""Properties of models_pixmim.py. test_reference.py compares it with the reference implementation."""

from functools import partial
from inspect import signature

import pytest
import timm
import torch
from timm.layers import GluMlp, PatchEmbed, RmsNorm
from timm.models.vision_transformer import Attention, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close

from models_mff import MFFViT
from models_pixmim import (
    ENCODERS,
    LowPass,
    MaskedViT,
    PixMIM,
    ShortAttention,
    low_pass_disc,
    mask_from_noise,
    mask_units,
    patch_statistics,
    patchify,
    sincos_pos_embed,
    unpatchify,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def perturb(module: nn.Module) -> nn.Module:
    """Module with noise on every parameter: zero biases and unit norms would hide errors."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return module


def small_encoder(img_size=(32, 48), **kwargs) -> MaskedViT:
    return perturb(MaskedViT(img_size=img_size, patch_size=8, embed_dim=24, depth=2, num_heads=3, **kwargs))


def small_pixmim(target: nn.Module | None = None, in_chans: int = 3, **kwargs) -> PixMIM:
    encoder = small_encoder(in_chans=in_chans)
    return perturb(PixMIM(encoder, target or nn.Identity(), decoder_dim=16, decoder_depth=1, decoder_heads=2, **kwargs))


# ---------------------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize(
    ("length", "amp", "fused"),
    [(5, False, True), (256, False, True), (5, True, False), (1024, True, False), (1025, True, True)],
)
def test_attention_equals_timms_unfused_in_bf16_up_to_1024_tokens_else_fused(length, amp, fused):
    x, timms, ours = torch.randn(2, length, 24), Attention(24, 3, qkv_bias=True), ShortAttention(24, 3, qkv_bias=True)
    ours.load_state_dict(perturb(timms).state_dict())
    timms.fused_attn = fused
    outputs, gradients = [], []
    for attention in (timms, ours):
        with torch.autocast("cpu", enabled=amp):
            outputs.append(attention(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in attention.parameters()])
    assert_close(*outputs, rtol=0, atol=0)
    assert_close(*gradients, rtol=0, atol=0)


def test_attention_with_a_mask_equals_timms():
    x, mask, attention = torch.randn(1, 5, 24), torch.ones(5, 5, dtype=torch.bool).tril(), ShortAttention(24, 3)
    with torch.autocast("cpu"):
        assert torch.equal(attention(x, mask), Attention.forward(attention, x, mask))
        assert not torch.equal(attention(x, mask), attention(x))


@pytest.mark.parametrize("option", ["qk_norm", "scale_norm", "gated"])
def test_attention_with_an_option_of_timm_equals_timms(option):
    attention = perturb(ShortAttention(24, 3, norm_layer=nn.LayerNorm, **{option: True}))
    attention.fused_attn = False
    x = torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(x), Attention.forward(attention, x))


def scribble(images: Tensor, mask, patch: int = 8, grid=(4, 6)) -> Tensor:
    """Copy of the images with other pixels in every removed patch."""
    patches = patchify(images, patch)
    return unpatchify(torch.where(mask.removed.unsqueeze(-1), 100 * torch.randn_like(patches), patches), patch, grid)


def test_removed_pixels_do_not_reach_the_encoder():
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 48)
    mask = mask_from_noise(torch.rand(2, 24), 0.75, encoder.grid)
    other = scribble(images, mask)
    assert not torch.equal(images, other)
    assert torch.equal(encoder.encode(images, mask), encoder.encode(other, mask))  # bit for bit


def test_removed_pixels_get_no_gradient_from_the_tokens_and_visible_ones_do():
    encoder, images = small_encoder(), torch.randn(2, 3, 32, 48, requires_grad=True)
    mask = mask_from_noise(torch.rand(2, 24), 0.75, encoder.grid)
    encoder.encode(images, mask).square().sum().backward()
    touched = patchify(images.grad, 8).ne(0).any(-1)
    assert torch.equal(touched, ~mask.removed)


def test_removed_pixels_do_not_reach_the_prediction():
    model, images, noise = small_pixmim(), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    _, prediction, mask = model(images, noise)
    assert torch.equal(prediction, model(scribble(images, mask), noise)[1])


def test_encode_refuses_images_of_another_size_as_timm_does():
    encoder = small_encoder()
    mask = mask_from_noise(torch.rand(1, 24), 0.75, encoder.grid)
    with pytest.raises(ValueError, match=r"\(48, 32\).*\(32, 48\)"):
        encoder.encode(torch.zeros(1, 3, 48, 32), mask)


@pytest.mark.parametrize(("in_chans", "img_size"), [(3, (32, 48)), (1, (32, 32)), (5, (48, 16))])
def test_mask_ratio_0_gives_the_features_of_timm(in_chans, img_size):
    encoder, images = small_encoder(img_size, in_chans=in_chans), torch.randn(2, in_chans, *img_size)
    in_order = torch.arange(encoder.patch_embed.num_patches).float().expand(2, -1)
    mask = mask_from_noise(in_order, 0.0, encoder.grid)
    assert_close(encoder.encode(images, mask), encoder.forward_features(images), rtol=1e-5, atol=1e-5)


OPTIONS = {  # every parameter of timm's VisionTransformer -> values that are not its default
    "img_size": [(32, 32)], "patch_size": [4, (8, 4)], "in_chans": [5], "num_classes": [7], "global_pool": ["avg", "map"],
    "embed_dim": [12], "depth": [3], "num_heads": [2], "mlp_ratio": [2.0], "qkv_bias": [False], "qk_norm": [True],
    "scale_attn_norm": [True], "scale_mlp_norm": [True], "proj_bias": [False], "init_values": [0.1],
    "class_token": [False], "pos_embed": ["none"], "no_embed_class": [True], "reg_tokens": [1, 3], "pre_norm": [True],
    "final_norm": [False], "fc_norm": [True], "pool_include_prefix": [True], "dynamic_img_size": [True],
    "dynamic_img_pad": [True], "drop_rate": [0.5], "pos_drop_rate": [0.5], "patch_drop_rate": [0.5],
    "proj_drop_rate": [0.5], "attn_drop_rate": [0.5], "drop_path_rate": [0.5], "weight_init": ["jax"],
    "fix_init": [True], "embed_layer": [partial(PatchEmbed, bias=False)], "embed_norm_layer": [nn.LayerNorm],
    "norm_layer": [RmsNorm], "act_layer": [nn.ReLU], "block_fn": [ParallelScalingBlock],
    "mlp_layer": [partial(GluMlp, gate_last=False)], "attn_layer": [partial(Attention, gated=True)],
    "device": ["cpu"], "dtype": [torch.float64],
}  # fmt: skip


def test_the_tested_options_are_all_options_of_timm():
    assert OPTIONS.keys() == signature(VisionTransformer).parameters.keys()


@pytest.mark.parametrize("host", [MaskedViT, MFFViT])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OPTIONS.items() for value in values])
def test_each_option_of_timm_gives_its_features_in_training_or_is_refused(host, name, value):
    """`encode` of all patches equals timm's forward_features, dropout included, in float32 and in bf16."""
    options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | {name: value}
    try:
        ours = perturb(host(**options))
    except ValueError as error:
        assert name in str(error)  # noqa: PT017 - most options are accepted
        return
    if host is MFFViT:
        ours.proj_weights.data = torch.full_like(ours.proj_weights, -1e4).index_fill(0, torch.tensor(-1), 1.0)
    theirs = VisionTransformer(**{"num_classes": 0} | options)
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k.split(".")[0] not in host.pretraining_only})
    images = torch.randn(4, ours.in_chans, *ours.patch_embed.img_size, dtype=ours.cls_token.dtype)
    mask = mask_from_noise(torch.arange(ours.patch_embed.num_patches).float().expand(4, -1), 0.0, ours.grid)
    for amp, atol in ((False, 1e-5), (True, 1e-2)):  # bf16: up to 2e-4 seen
        features = []
        for attention in (m for m in theirs.modules() if isinstance(m, Attention)):
            attention.fused_attn = not amp  # as ours, so that dropout draws the same numbers
        for forward in (lambda: ours.encode(images, mask), lambda: theirs.forward_features(images)):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                features.append(forward())
        assert_close(*features, rtol=0, atol=atol, check_dtype=False)


def test_encoder_loads_strictly_into_timm_and_gives_its_features():
    encoder = perturb(ENCODERS["vit_tiny"](img_size=64, depth=3)).eval()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=3).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    in_order = torch.arange(16).float().expand(2, -1)
    tokens = encoder.encode(images, mask_from_noise(in_order, 0.0, encoder.grid))
    assert_close(tokens, theirs.forward_features(images), rtol=1e-5, atol=1e-5)
    assert_close(tokens[:, 0], theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_has_the_keys_and_shapes_of_timm(name):
    theirs_of = {"vit_huge": "vit_huge_patch14_224", "vit_pico": "vit_tiny_patch16_224"}
    sizes = {"embed_dim": 48, "depth": 2} if name == "vit_pico" else {}
    with torch.device("meta"):
        theirs = timm.create_model(theirs_of.get(name, f"{name}_patch16_224"), num_classes=0, **sizes)
        ours = ENCODERS[name]()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads


def test_forward_methods_of_timm_are_not_overridden():
    assert MaskedViT.forward is VisionTransformer.forward
    assert MaskedViT.forward_features is VisionTransformer.forward_features


# ------------------------------------------------------------------------------------------------------- initial values


def test_initial_values_equal_those_of_mae():
    """xavier-uniform with the patch projection as a linear layer, zero biases, unit norms, tokens normal(0.02)."""
    model = PixMIM(ENCODERS["vit_tiny"](img_size=64), nn.Identity(), decoder_dim=128, decoder_depth=2, decoder_heads=4)
    for name, p in model.named_parameters():
        if name.endswith("_token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.3), name  # 128 and 192 draws
        elif "norm" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif name.endswith("bias"):
            assert (p == 0).all(), name
        elif not name.endswith("pos_embed"):
            fan_out, fan_in = p.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.98 * bound < p.abs().max().item() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name  # of a uniform distribution


def test_position_embeddings_are_fixed_and_not_zero():
    model = small_pixmim()
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert fixed == ["encoder.pos_embed", "decoder.pos_embed"]
    assert all(p.abs().sum() > 0 for p in (model.encoder.pos_embed, model.decoder.pos_embed))


def test_position_embedding_of_a_patch_is_the_sine_and_cosine_of_its_column_then_row():
    embed = sincos_pos_embed(8, (2, 3), num_prefix_tokens=1)[0]
    row, col = 1, 2
    w = torch.tensor([1.0, 0.01])  # 1 / 10000 ** (0 / 2), 1 / 10000 ** (1 / 2)
    assert_close(embed[1 + 3 * row + col], torch.cat([f(x * w) for x in (col, row) for f in (torch.sin, torch.cos)]))
    assert (embed[0] == 0).all()


def test_position_embeddings_require_a_width_divisible_by_4():
    with pytest.raises(ValueError, match="30"):
        sincos_pos_embed(30, (2, 2), 1)


# --------------------------------------------------------------------------------------------------------- the low-pass


def explicit_low_pass(images: Tensor, radius: float, kind: str) -> Tensor:
    """Shifted DFT, disc and inverse as matrix products in float64, on pixels; independent of LowPass."""

    def shifted_dft(n: int) -> Tensor:  # row i: frequency i - n // 2
        k = torch.arange(n, dtype=torch.float64)
        return torch.exp(-2j * torch.pi * (k - n // 2).unsqueeze(1) * k / n)

    h, w = images.shape[-2:]
    rows, cols = shifted_dft(h), shifted_dft(w)
    spectrum = rows @ images.to(torch.complex128) @ cols.T
    middle = ((h - 1) / 2, (w - 1) / 2) if kind == "reference" else (h // 2, w // 2)
    disc = torch.tensor(
        [[(i - middle[0]) ** 2 + (j - middle[1]) ** 2 <= radius**2 for j in range(w)] for i in range(h)]
    )
    low = rows.conj().T @ (spectrum * disc) @ cols.conj() / (h * w)
    return low.abs() if kind == "reference" else low.real


def unit_filter(size, radius, kind="reference", channels=3) -> LowPass:
    return LowPass(size, radius, [0.0] * channels, [1.0] * channels, kind)


@pytest.mark.parametrize("kind", ["reference", "centered"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 12), (9, 6), (6, 11)])
@pytest.mark.parametrize("radius", [0.5, 1, 2, 3, 4.5])
def test_low_pass_equals_an_explicit_dft(size, radius, kind):
    pixels = torch.rand(2, 3, *size)
    expected = explicit_low_pass(pixels, radius, kind).float()
    assert_close(unit_filter(size, radius, kind)(pixels), expected, rtol=0, atol=2e-6)  # float32


@pytest.mark.parametrize("kind", ["reference", "centered"])
def test_low_pass_works_on_pixels_and_returns_normalised_values(kind):
    images = torch.randn(2, 3, 8, 12)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    expected = (explicit_low_pass(images * std + mean, 2, kind) - mean) / std
    assert_close(LowPass((8, 12), 2, MEAN, STD, kind)(images), expected.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "kept"), [("reference", 5024), ("centered", 5025)])
def test_number_of_bins_kept_at_224_px_and_radius_40(kind, kept):
    assert low_pass_disc((224, 224), 40, kind).sum() == kept


def test_reference_disc_on_an_even_side_differs_from_its_mirror_image_and_centered_does_not():
    disc = low_pass_disc((224, 224), 40, "reference")
    partner = disc.flip(0, 1).roll((1, 1), (0, 1))
    assert (disc ^ partner).sum() == 226  # 113 bins kept without their conjugate partner, and those 113 partners
    centered = low_pass_disc((224, 224), 40, "centered")
    assert torch.equal(centered, centered.flip(0, 1).roll((1, 1), (0, 1)))


@pytest.mark.parametrize("size", [(7, 9), (31, 31)])
def test_both_discs_agree_on_odd_sides(size):
    assert torch.equal(low_pass_disc(size, 3, "reference"), low_pass_disc(size, 3, "centered"))


@pytest.mark.parametrize("kind", ["reference", "centered"])
@pytest.mark.parametrize("size", [(16, 16), (15, 22)])
def test_a_radius_beyond_the_largest_frequency_changes_nothing(size, kind):
    pixels = torch.rand(1, 3, *size)  # non-negative: equal to its magnitude, which `reference` returns
    assert_close(unit_filter(size, 40, kind)(pixels), pixels, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["reference", "centered"])
def test_low_pass_does_not_change_a_constant_image(kind):
    images = torch.tensor([1.0, -0.5, 0.3]).view(1, 3, 1, 1).expand(1, 3, 32, 20)
    assert_close(LowPass((32, 20), 3, MEAN, STD, kind)(images), images, rtol=0, atol=1e-5)


def test_centered_low_pass_is_idempotent():
    low_pass, images = LowPass((32, 32), 6, MEAN, STD, "centered"), torch.randn(2, 3, 32, 32)
    once = low_pass(images)
    assert_close(low_pass(once), once, rtol=0, atol=1e-5)


def test_centered_low_pass_commutes_with_mirroring_and_reference_does_not():
    images = torch.randn(2, 3, 32, 32)
    centered, reference = (LowPass((32, 32), 6, MEAN, STD, kind) for kind in ("centered", "reference"))
    assert_close(centered(images.flip(-1)), centered(images).flip(-1), rtol=0, atol=1e-5)
    assert (reference(images.flip(-1)) - reference(images).flip(-1)).abs().max() > 0.01


def test_low_pass_ignores_autocast():
    low_pass, images = LowPass((32, 32), 6, MEAN, STD), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = low_pass(images)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, low_pass(images))


def test_low_pass_has_no_gradient_and_saves_no_buffers():
    low_pass = LowPass((16, 16), 4, MEAN, STD)
    assert not low_pass(torch.randn(1, 3, 16, 16, requires_grad=True)).requires_grad
    assert not low_pass.state_dict()


def test_low_pass_refuses_another_image_size():
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(16, 24\)"):
        LowPass((16, 16), 4, MEAN, STD)(torch.zeros(1, 3, 16, 24))


@pytest.mark.parametrize("channels", [1, 5])
def test_low_pass_filters_each_channel_separately(channels):
    pixels = torch.rand(2, channels, 12, 10)
    together = unit_filter((12, 10), 3, channels=channels)(pixels)
    alone = torch.cat([unit_filter((12, 10), 3, channels=1)(c) for c in pixels.split(1, 1)], 1)
    assert_close(together, alone)


# ---------------------------------------------------------------------------------------------------- patches and masks


def test_unpatchify_inverts_patchify():
    images = torch.randn(2, 5, 24, 40)
    assert torch.equal(unpatchify(patchify(images, 8), 8, (3, 5)), images)


def test_values_of_a_patch_are_ordered_row_column_channel():
    images = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6).float()
    patches = patchify(images, 2)  # grid 2 x 3
    for b, row, col, i, j, c in ((0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 0, 2), (0, 1, 0, 0, 1, 1)):
        assert patches[b, 3 * row + col, (2 * i + j) * 3 + c] == images[b, c, 2 * row + i, 2 * col + j]


@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (1, 9)])
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.75, 0.9])
@pytest.mark.parametrize("unit", [1, 2, 3])
def test_the_number_of_removed_patches_is_exact(grid, ratio, unit):
    length = grid[0] * grid[1]
    mask = mask_from_noise(torch.rand(4, mask_units(grid, unit)), ratio, grid, unit)
    removed = length - int(length * (1 - ratio))
    assert (mask.removed.sum(1) == removed).all()
    assert mask.predict.shape == (4, removed)
    assert mask.keep.shape == (4, length - removed)


@pytest.mark.parametrize("unit", [1, 2])
def test_visible_and_removed_patches_are_consistent(unit):
    grid = (5, 7)
    mask = mask_from_noise(torch.rand(3, mask_units(grid, unit)), 0.6, grid, unit)
    assert torch.equal(torch.cat([mask.keep, mask.predict], 1).sort(1).values, torch.arange(35).expand(3, -1))
    assert mask.removed.gather(1, mask.predict).all()
    assert not mask.removed.gather(1, mask.keep).any()


def test_patches_with_the_lowest_noise_are_kept():
    noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    mask = mask_from_noise(noise, 0.5, (2, 2))
    assert mask.keep.tolist() == [[1, 3]]
    assert mask.removed.tolist() == [[True, False, True, False]]


def test_units_are_kept_or_removed_as_a_whole():
    mask = mask_from_noise(torch.rand(8, 16), 0.75, (8, 8), unit=2)
    blocks = mask.removed.unflatten(1, (4, 2, 4, 2)).transpose(2, 3).flatten(3)  # (B, 4, 4, the patches of a unit)
    assert torch.equal(blocks.all(-1), blocks.any(-1))
    assert len({tuple(x.tolist()) for x in mask.removed}) > 1  # images differ


def test_noise_of_a_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"10 .*3 x 4"):
        mask_from_noise(torch.rand(1, 10), 0.5, (3, 4))


# -------------------------------------------------------------------------------------------------------------- the loss


def slow_loss(model: PixMIM, images: Tensor, prediction: Tensor, mask) -> float:
    """Loss by a loop over removed patches in float64: mean over a patch, then over patches."""
    target = patchify(model.target(images).double(), model.encoder.patch)
    losses = []
    for b in range(len(images)):
        for place, patch in enumerate(mask.predict[b].tolist()):
            values = target[b, patch]
            if model.norm_pix_loss:
                spread = (values - values.mean()).square().sum() / (len(values) - 1)
                values = (values - values.mean()) / (spread + 1e-6).sqrt()
            losses.append((prediction[b, place].double() - values).square().mean().item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(
    ("target", "in_chans"),
    [
        (nn.Identity(), 3),
        (LowPass((32, 48), 9, MEAN, STD), 3),
        (nn.Identity(), 1),
        (unit_filter((32, 48), 9, channels=5), 5),
    ],
)
def test_loss_equals_a_loop_over_removed_patches(target, in_chans, norm_pix_loss):
    model, images = small_pixmim(target, in_chans, norm_pix_loss=norm_pix_loss), torch.randn(2, in_chans, 32, 48)
    loss, prediction, mask = model(images)
    assert prediction.shape == (2, 18, 64 * in_chans)
    assert loss.item() == pytest.approx(slow_loss(model, images, prediction, mask), rel=1e-5)


def test_loss_ignores_the_target_of_visible_patches():
    """Control for the loop above: only removed patches count."""
    images, noise = torch.rand(2, 3, 32, 48), torch.rand(2, 24)
    model = small_pixmim()
    loss, _, mask = model(images, noise)
    visible = ~mask.removed.unsqueeze(-1)
    model.target.forward = lambda x: unpatchify(patchify(x, 8).masked_fill(visible, 7.0), 8, (4, 6))
    assert torch.equal(model(images, noise)[0], loss)


def test_loss_of_constant_patches_is_finite():
    loss, _, _ = small_pixmim()(torch.zeros(1, 3, 32, 48))
    assert loss.isfinite()
    assert_close(patch_statistics(torch.zeros(1, 1, 64))[1], torch.full((1, 1, 1), 1e-3))  # sqrt(1e-6)


def test_loss_is_float32_under_autocast():
    model = small_pixmim(LowPass((32, 48), 9, MEAN, STD))
    with torch.autocast("cpu", torch.bfloat16):
        loss, prediction, _ = model(torch.randn(2, 3, 32, 48))
    assert loss.dtype == prediction.dtype == torch.float32


def test_noise_length_is_the_number_of_mask_units():
    model = small_pixmim(mask_unit=2)
    assert model.noise_length == 6  # grid 4 x 6
    _, _, mask = model(torch.randn(1, 3, 32, 48), torch.rand(1, 6))
    assert mask.removed.sum() == 18


def test_gradient_checkpointing_gives_the_same_gradients():
    model, images, noise = small_pixmim(), torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images, noise)[0].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *grads))


def test_every_trainable_parameter_gets_a_gradient():
    model = small_pixmim()
    model(torch.randn(2, 3, 32, 48))[0].backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]


def test_predictions_depend_on_the_position_embedding_of_the_decoder():
    """With the decoder's position embedding at zero all removed patches of an image get one prediction."""
    model = small_pixmim()
    images = torch.randn(1, 3, 32, 48)
    assert model(images)[1].std(1).min() > 0
    nn.init.zeros_(model.decoder.pos_embed)
    prediction = model(images)[1]
    assert_close(prediction, prediction[:, :1].expand_as(prediction))


def test_encoders_accept_other_depths_sizes_and_channels():
    encoder = partial(ENCODERS["vit_tiny"], depth=1)(img_size=(32, 64), patch_size=8, in_chans=2)
    assert (encoder.grid, encoder.patch, encoder.in_chans) == ((4, 8), 8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.0}, "16 of 16"),
        ({"mask_ratio": 1.0}, "0 of 16"),
        ({"mask_unit": 5}, "units of 5 patches"),
        ({"decoder_heads": 7}, "32 .*7"),
    ],
    ids=["mask_ratio 0", "mask_ratio 1", "mask_unit 5", "decoder_heads 7"],
)
def test_invalid_mask_and_decoder_settings_are_refused(options, message):
    encoder = MaskedViT(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    with pytest.raises(ValueError, match=message):
        PixMIM(encoder, nn.Identity(), **{"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2} | options)
