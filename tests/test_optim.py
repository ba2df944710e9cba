"""Optimisers and parameter groups against independent versions of the rules of facebookresearch/mae."""

import pytest
import torch
from conftest import MODEL, one_rank
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.testing import assert_close

import main_linprobe
import main_pretrain
from engine_pretrain import optimizer_step
from models import build_model
from models_pixmim import ENCODERS
from muon import build_muon
from util.args import resolve_defaults
from util.evaluate.probes import Probe
from util.lr_sched import set_lr


class SlowLARS:
    """LARS for the parameters of a head: of facebookresearch/mae (util/lars.py), or of the release of PixMIM (mmselfsup 1.0.0).

    MAE leaves 1-d parameters alone; its trust ratio has the norm of gradient and decay together. The release adapts and
    decays the bias too, and adds the two norms.
    """

    def __init__(self, parameters, release: bool, decay: float):
        self.parameters, self.release, self.decay = parameters, release, decay
        self.momenta = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients, lr: float) -> None:
        for p, momentum, gradient in zip(self.parameters, self.momenta, gradients, strict=True):
            update = gradient
            if p.ndim > 1 or self.release:
                update = gradient + self.decay * p
                norm = gradient.norm() + self.decay * p.norm() if self.release else update.norm()
                both = gradient.norm() > 0 if self.release else norm > 0
                if p.norm() > 0 and both:
                    update = update * (0.001 * p.norm() / norm)
            momentum.mul_(0.9).add_(update)
            p.sub_(lr * momentum)


@pytest.mark.parametrize("decay", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("probe_as", ["mae", "mmselfsup"])
@pytest.mark.parametrize("pools", [["token"], ["ep"]])
def test_lars_matches_the_reference_at_every_step_for_every_head(pools, probe_as, decay, tmp_path):
    rates = [0.1, 0.025]
    run = one_rank(tmp_path, batch_size=512, blr=rates, probe_as=probe_as, weight_decay=decay)
    run = run._replace(lr=max(rates) * 512 / 256)
    model, release = Probe(ENCODERS["vit_tiny"](img_size=16), 7, pools, rates, 4), probe_as == "mmselfsup"
    optimizer = main_linprobe.build_lars(model, run)
    slow = [SlowLARS([p.detach().clone() for p in head.parameters()], release, decay) for head in model.heads]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert {*map(id, trained)} == {id(p) for p in model.heads.parameters()}  # no parameter of the encoder
    for step in range(6):
        share = 1 - step / 10  # the learning rate changes while momentum is kept
        set_lr(optimizer, run.lr * share, 0)
        for head, other, blr in zip(model.heads, slow, rates, strict=True):
            # step 3 has no gradient
            gradients = [torch.randn_like(p) * (step != 3) for p in head.parameters()]
            for p, gradient in zip(head.parameters(), gradients, strict=True):
                p.grad = gradient.clone()
            other.step(gradients, blr * 512 / 256 * share)
        optimizer.step()
    for head, other in zip(model.heads, slow, strict=True):
        for mine, theirs in zip(head.parameters(), other.parameters, strict=True):
            assert_close(mine.detach(), theirs, rtol=1e-5, atol=1e-7)


def mae_layer(name: str, depth: int) -> int:
    """get_layer_id_for_vit of facebookresearch/mae: 0 the embeddings, 1 ... depth the blocks, then the rest."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else depth + 1


@pytest.mark.parametrize(("name", "decay"), [("vit_tiny", 0.65), ("vit_base", 0.65), ("vit_large", 0.75)])
def test_layer_decay_and_weight_decay_match_mae_for_every_parameter(name, decay):
    with torch.device("meta"):
        model = ENCODERS[name](num_classes=1000, global_pool="avg").requires_grad_(True)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=decay)
    names = {p: name for name, p in model.named_parameters()}
    seen = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert seen.keys() == set(names.values())
    depth = len(model.blocks)
    for p, name in names.items():
        scale, weight_decay = seen[name]
        assert scale == pytest.approx(decay ** (depth + 1 - mae_layer(name, depth)))
        assert weight_decay == (0.0 if p.ndim == 1 or name in ("cls_token", "pos_embed") else 0.05)


def test_pretraining_decays_only_weights_and_excludes_fixed_position_embeddings():
    args = resolve_defaults(main_pretrain.get_parser().parse_args([*MODEL, "--data_path", "x", "--decoder_depth", "2"]))
    model = build_model(args)
    groups = param_groups_weight_decay(model, args.weight_decay)
    names = {p: name for name, p in model.named_parameters()}
    decay = {group["weight_decay"]: {names[p] for p in group["params"]} for group in groups}
    assert decay.keys() == {0.0, 0.05}
    fixed = {"encoder.pos_embed", "decoder.pos_embed"}
    assert decay[0.0] | decay[0.05] == set(names.values()) - fixed
    # facebookresearch/mae (through timm's add_weight_decay): no decay of biases and 1-d parameters, decay of the tokens
    assert all(name.endswith("bias") or "norm" in name for name in decay[0.0])
    assert not any(name.endswith("bias") or "norm" in name for name in decay[0.05])
    assert {"encoder.cls_token", "decoder.mask_token"} <= decay[0.05]


def test_lr_scale_of_a_group_is_applied_by_set_lr():
    model = ENCODERS["vit_tiny"](img_size=16, num_classes=3, global_pool="avg").requires_grad_(True)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    optimizer = torch.optim.AdamW(groups, 1.0)
    set_lr(optimizer, 8.0, 0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model.head.weight)] == 8.0
    assert rate[id(model.blocks[11].mlp.fc1.weight)] == 4.0
    assert rate[id(model.cls_token)] == 8 * 0.5**13


# ----------------------------------------------------------------------------------------------------------------- Muon

FUSED_CROSS = "--decoder cross --fuse_levels --class_tokens 2 --decoder_depth 4 --patch_size 8"


def muon_of(flags: str):
    """(model, its Muon optimiser at learning rate 0.01) of these flags."""
    words = ["--data_path", "x", *MODEL, "--decoder_depth", "2", *flags.split()]
    args = resolve_defaults(main_pretrain.get_parser().parse_args(words))
    model = build_model(args)
    return model, build_muon(param_groups_weight_decay(model, args.weight_decay), model, 0.01)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five steps of the quintic Newton-Schulz iteration (leloykun.github.io, "muon-opt-coeffs"), in float64."""
    x = x.double() / x.double().norm()
    steps = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037)]
    for a, b, c in [*steps, (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)]:
        product = x @ x.T
        x = a * x + b * product @ x + c * product @ product @ x
    return x


@pytest.mark.parametrize(
    ("flags", "name", "matrices"),
    [
        ("", "encoder.blocks.0.attn.qkv.weight", 3),
        ("", "encoder.blocks.1.mlp.fc1.weight", 1),
        ("", "decoder.embed.weight", 1),
        (FUSED_CROSS, "decoder.blocks.0.cross_attn.kv.weight", 2),
        (FUSED_CROSS, "decoder.blocks.0.cross_attn.q.weight", 1),
        ("--model convvit_pico", "encoder.blocks3.1.attn.qkv.weight", 3),
        ("--model convvit_pico", "encoder.blocks1.0.mlp.fc1.weight", 1),  # (64, 16, 1, 1)
        ("--model convvit_pico", "encoder.patch_embed2.proj.weight", 1),  # (24, 16, 2, 2): 24 x 64
    ],
)
def test_muon_updates_equal_those_of_an_explicit_newton_schulz_iteration(flags, name, matrices):
    model, optimizer = muon_of(flags)
    weight = dict(model.named_parameters())[name]
    expected, momentum = weight.detach().double(), torch.zeros_like(weight, dtype=torch.float64)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        weight.grad[: len(weight) // 3] *= 9  # matrices of different sizes: as one matrix the result is another
        momentum = 0.95 * momentum + 0.05 * weight.grad
        look_ahead = (0.05 * weight.grad + 0.95 * momentum).flatten(1)
        parts = [orthogonal(part) * 0.2 * max(part.shape) ** 0.5 for part in look_ahead.chunk(matrices)]
        expected = expected * (1 - 0.01 * 0.05) - 0.01 * torch.cat(parts).view_as(weight)
        optimizer.step()
        assert weight.grad is None or matrices == 1
        optimizer.zero_grad()
    assert_close(weight.detach().double(), expected, rtol=0, atol=1e-3)  # steps of 2e-3 RMS; timm iterates in bfloat16
    assert (weight - expected).square().mean().sqrt() < 1e-4


def test_the_other_parameters_are_updated_as_by_adamw():
    model, optimizer = muon_of("")
    other, _ = muon_of("")
    other.load_state_dict(model.state_dict())
    adamw = torch.optim.AdamW(param_groups_weight_decay(other, 0.05), 0.01, betas=(0.9, 0.95))
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    theirs = {p for group in optimizer.param_groups if group["matrices"] == 0 for p in group["params"]}
    assert len(theirs) > 20
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if p in theirs:
            assert_close(p, q, rtol=1e-5, atol=1e-7)
        elif p.requires_grad:
            assert (p - q).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("flags", "adamw"),
    [
        ("--class_tokens 3 --pos_embed learned", "encoder.reg_token encoder.pos_embed decoder.pos_embed"),
        (FUSED_CROSS, "encoder.reg_token decoder.fusion.weight"),
        ("--model mff_vit_pico", "encoder.proj_weights"),
        ("--model convvit_pico", "encoder.blocks1.0.attn.weight encoder.blocks2.0.attn.weight"),  # depthwise
    ],
)
def test_tokens_positions_patch_embedding_prediction_biases_and_norms_are_in_the_adamw_part(flags, adamw):
    model, optimizer = muon_of(flags)
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: group["matrices"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == {name for p, name in names.items() if p.requires_grad}
    embedding = {"encoder.patch_embed.proj.weight", "encoder.patch_embed1.proj.weight"}
    expected = {*adamw.split(), "encoder.cls_token", "decoder.mask_token", "decoder.pred.weight", *embedding}
    vectors = {name for p, name in names.items() if p.ndim == 1}
    parts = {n: {name for name, count in found.items() if count == n} for n in range(4)}
    assert parts[0] == (expected | vectors) & found.keys()
    assert parts[3] == {name for name in found if name.endswith(".qkv.weight")}
    assert parts[2] == {name for name in found if name.endswith(".kv.weight")}


@pytest.mark.parametrize("scaling", [False, True])
def test_muon_skips_an_update_with_a_nonfinite_gradient(scaling):
    model, optimizer = muon_of("")
    scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=4.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for finite in (True, False):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p)
        parameters[-1].grad[0] = 1.0 if finite else torch.inf
        states = {
            p: state["momentum_buffer"].clone() for p, state in optimizer.state.items() if "momentum_buffer" in state
        }
        scaler.scale(torch.ones(()))
        assert optimizer_step(optimizer, scaler, parameters).isfinite() == finite
        assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)) == finite
        assert all(torch.equal(optimizer.state[p]["momentum_buffer"], old) for p, old in states.items())
        assert all(p.grad is None for p in parameters)
    assert states
