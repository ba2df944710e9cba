"""Properties of models_mff.py. test_reference.py compares it with the reference implementation."""

import pytest
import torch
from test_models import perturb, scribble
from torch import nn
from torch.testing import assert_close

from models_mff import ENCODERS, MFFViT, default_layers
from models_pixmim import MaskedViT, PixMIM, mask_from_noise

SIZES = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


def plain_twin(encoder: MFFViT) -> MaskedViT:
    """MAE's encoder with the same weights."""
    twin = MaskedViT(**SIZES)
    state = encoder.state_dict()
    twin.load_state_dict({k: v for k, v in state.items() if k.split(".")[0] not in encoder.pretraining_only})
    return twin


def test_fusion_weights_on_the_last_layer_only_give_mae():
    encoder = perturb(MFFViT(fuse_layers=(0, 1, 3), **SIZES))
    encoder.proj_weights.data = torch.tensor([-1e4, -1e4, 0.0]).view(-1, 1, 1, 1)
    options = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    fused, mae = (PixMIM(e, nn.Identity(), **options) for e in (encoder, plain_twin(encoder)))
    mae.decoder.load_state_dict(fused.decoder.state_dict())
    images, noise = torch.randn(2, 3, 32, 48), torch.rand(2, 24)
    losses = [model(images, noise)[0] for model in (fused, mae)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    ours = dict(fused.named_parameters())
    for name, p in mae.named_parameters():
        if p.requires_grad:
            assert_close(ours[name].grad, p.grad, rtol=1e-5, atol=1e-7)
    assert ours["encoder.proj_layers.0.weight"].grad.abs().max() == 0


def test_tokens_are_the_norm_of_the_weighted_sum_of_the_layers():
    encoder = perturb(MFFViT(fuse_layers=(1, 2, 3), **SIZES))
    images = torch.randn(2, 3, 32, 48)
    mask = mask_from_noise(torch.rand(2, 24), 0.75, encoder.grid)
    outputs: list[torch.Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: outputs.append(output))
    tokens = encoder.encode(images, mask)
    weights = encoder.proj_weights.flatten().exp() / encoder.proj_weights.exp().sum()
    first, second = (layer(x) for layer, x in zip(encoder.proj_layers, outputs[1:3], strict=True))
    assert_close(tokens, encoder.norm(weights[0] * first + weights[1] * second + weights[2] * outputs[3]))
    assert torch.equal(tokens, encoder.encode(scribble(images, mask), mask))


def test_features_equal_those_of_the_plain_vit():
    encoder, images = perturb(MFFViT(**SIZES)).eval(), torch.randn(2, 3, 32, 48)
    assert torch.equal(encoder(images), plain_twin(encoder).eval()(images))


def test_gradient_checkpointing_changes_no_gradient():
    encoder, images = perturb(MFFViT(**SIZES)), torch.randn(2, 3, 32, 48)
    mask, gradients = mask_from_noise(torch.rand(2, 24), 0.75, encoder.grid), []
    for enable in (False, True):
        encoder.set_grad_checkpointing(enable)
        encoder.zero_grad()
        encoder.encode(images, mask).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_initial_fusion_weights_are_equal():
    encoder = MFFViT(**SIZES)
    share = encoder.proj_weights.flatten().softmax(0)
    assert_close(share, torch.full_like(share, 1 / len(share)))


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(12, (0, 2, 4, 6, 8, 11)), (24, (0, 4, 8, 13, 17, 23)), (6, (0, 1, 2, 3, 4, 5)), (2, (0, 1)), (1, (0,))],
)
def test_default_fused_layers_scale_with_the_depth(depth, layers):
    assert default_layers(depth) == layers


def test_default_fused_layers_of_vit_base_are_those_of_the_release():
    with torch.device("meta"):
        assert ENCODERS["mff_vit_base"]().fuse_layers == (0, 2, 4, 6, 8, 11)


@pytest.mark.parametrize("layers", [(0, 1), (3, 1), (0, 0, 3), (0, 4), (1, 3, 5)])
def test_fused_layers_must_ascend_to_the_last_layer(layers):
    with pytest.raises(ValueError, match=f"--fuse_layers {' '.join(map(str, layers))}: .*3"):
        MFFViT(fuse_layers=layers, **SIZES)
