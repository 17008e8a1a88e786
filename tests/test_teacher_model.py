"""teacher_server/model.py and gate.py: folding, precision, fixed shapes, and what may not be served."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import models
from teacher_server import gate
from teacher_server.batcher import Part
from teacher_server.config import Config
from teacher_server.frozen import fold_standardisation, halve
from teacher_server.model import (
    Scene,
    Teacher,
    _made_fast,
    be_reproducible,
    choose_device,
    choose_precision,
    fingerprint,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    be_reproducible(1)


@pytest.fixture
def loaded(tiny_model) -> tuple[nn.Module, models.ModelCard]:
    return models.load(tiny_model)


def make(loaded, precision="float32", batch_rows=8) -> Teacher:
    module, card = loaded
    return Teacher(copy.deepcopy(module), card, device=CPU, precision=precision, batch_rows=batch_rows)


def rows(num: int, size: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["resnetv2_14x05_bit", "resnetv2_26x05_bit", "resnetv2_50x1_bit"])
def test_folding_changes_no_bit_of_the_logits(name):
    torch.manual_seed(0)
    raw = models.create(name, 10).eval()
    folded = copy.deepcopy(raw)
    assert fold_standardisation(folded) > 10
    assert not any("Std" in type(module).__name__ for module in folded.modules())
    with torch.inference_mode():
        assert torch.equal(folded(rows(2)), raw(rows(2)))


def test_folding_keeps_each_layers_own_eps():
    """With tiny raw filters eps matters: ours has the paper's 1e-10, timm's published nets 1e-8."""
    for name, eps in (("resnetv2_14x05_bit", 1e-10), ("resnetv2_50x1_bit", 1e-8)):
        model = models.create(name, 10)
        weight = model.stem.conv.weight.data.mul_(1e-4)
        centred = weight.double() - weight.double().mean(dim=(1, 2, 3), keepdim=True)
        expected = centred / torch.sqrt(centred.square().mean(dim=(1, 2, 3), keepdim=True) + eps)
        fold_standardisation(model)
        torch.testing.assert_close(model.stem.conv.weight.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_net_without_standardised_weights_is_left_as_it_is():
    model = models.create("mobilenetv3_small_050", 10)
    before = models.weights_digest(model)
    assert fold_standardisation(model) == 0
    assert models.weights_digest(model) == before


def test_the_teacher_answers_what_the_network_says(loaded):
    module, _ = loaded
    with torch.inference_mode():
        expected = module.eval()(rows(5))
    torch.testing.assert_close(make(loaded).logits(rows(5)), expected, rtol=1e-5, atol=1e-5)


def test_a_rows_logits_do_not_depend_on_batch_mates_place_or_padding(loaded):
    teacher = make(loaded, batch_rows=8)
    x = rows(8)
    full = teacher.logits(x)
    for order in (torch.arange(8).flip(0), torch.tensor([3, 3, 1]), torch.tensor([7])):
        assert torch.equal(teacher.logits(x[order]), full[order])


def test_answering_in_parts_mixes_as_the_whole(loaded):
    teacher = make(loaded, batch_rows=8)
    generator = torch.Generator().manual_seed(0)
    scene = Scene(
        torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8, generator=generator),
        torch.tensor([1, 2, 8, 0, 4, 3, 7]),
        torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0, 0.3, 0.7]),
    )
    whole = teacher.answer([Part(scene, 0, 7)])
    parts = [teacher.answer([Part(scene, 0, 2)]), teacher.answer([Part(scene, 5, 7), Part(scene, 2, 5)])]
    np.testing.assert_array_equal(whole, np.concatenate([parts[0], parts[1][2:], parts[1][:2]]))
    mean, std = torch.tensor(teacher.card.mean), torch.tensor(teacher.card.std)
    view = ((scene.pixels.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    lam = scene.lam.double().reshape(-1, 1, 1, 1)
    mixed = lam * view[:7] + (1 - lam) * view[scene.partner]
    torch.testing.assert_close(torch.from_numpy(whole), teacher.logits(mixed.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_norms_and_head_are_float32_and_the_rest_is_half(loaded, precision):
    teacher = make(loaded, precision)
    dtype = getattr(torch, precision)
    kinds = {
        name: {p.dtype for p in module.parameters(recurse=False)}
        for name, module in teacher._module.named_modules()
        if list(module.parameters(recurse=False))
    }
    for name, dtypes in kinds.items():
        assert dtypes == ({torch.float32} if "norm" in name or name == "head.fc" else {dtype}), name
    logits = teacher.logits(rows(3))
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.to(dtype).float()), "logits were rounded to half"


def test_norms_survive_activations_whose_squares_overflow_in_half(loaded):
    """60000 is a float16, its square is not: statistics in half would be infinite."""
    teacher = make(loaded, "float16")
    norm = teacher._module.norm
    x = (torch.rand(1, 1024, 2, 2, generator=torch.Generator().manual_seed(0)) * 120_000 - 60_000).half()
    expected = functional.relu(functional.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(norm(x), expected.half())


def test_a_teacher_put_into_training_mode_refuses_to_answer(loaded):
    teacher = make(loaded)
    teacher._module.train()
    with pytest.raises(AssertionError, match="frozen"):
        teacher.logits(rows(1))


def test_no_answer_carries_a_gradient(loaded):
    assert not make(loaded).logits(rows(1).requires_grad_()).requires_grad


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224", "convnext_atto"])
def test_other_families_run_in_half_precision_too(name):
    """BatchNorm, LayerNorm and attention: a trained net's norms are not needed to see that dtypes fit."""
    torch.manual_seed(0)
    card = models.ModelCard(architecture=name, num_classes=5, size=224, mean=(0.5,) * 3, std=(0.5,) * 3)
    module = models.create(name, 5)
    x = rows(2, 224)
    kwargs = {"device": CPU, "batch_rows": 2}
    full = Teacher(copy.deepcopy(module), card, precision="float32", **kwargs).logits(x)
    half = Teacher(module, card, precision="bfloat16", **kwargs).logits(x)
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)


def test_the_gate_passes_float32_and_measures_invariance(loaded):
    report = gate.measure(make(loaded), None, gate.synthetic_pixels(10, 32))
    assert report == gate.Report(
        num_images=10, finite=True, max_difference=0.0, mean_kl=0.0, agreement_top1=1.0, batch_invariant=True
    )
    gate.judge(report, Config(model="x"))


def test_the_gate_measures_the_distance_of_half_precision(loaded):
    pixels = gate.synthetic_pixels(16, 32)
    served, reference = make(loaded, "bfloat16"), make(loaded)
    report = gate.measure(served, reference, pixels)
    x = Scene.unmixed(pixels).rows(0, 16, served.card)
    ours, theirs = served.logits(x[:8]), reference.logits(x[:8])
    assert report.max_difference >= float((ours - theirs).abs().max()) > 0
    kl = functional.kl_div(
        torch.cat([served.logits(p) for p in torch.split(x, 8)]).double().log_softmax(1),
        torch.cat([reference.logits(p) for p in torch.split(x, 8)]).double().log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    assert report.mean_kl == pytest.approx(float(kl), rel=1e-6)
    assert 0 < report.mean_kl < 1e-2
    assert report.finite


GOOD = gate.Report(
    num_images=8, finite=True, max_difference=0.1, mean_kl=1e-4, agreement_top1=1.0, batch_invariant=True
)


@pytest.mark.parametrize(
    ("seen", "sentence"),
    [
        ({"finite": False}, "not finite"),
        ({"max_difference": 1.5}, "1.5, bound 1 .--gate-max-difference"),
        ({"mean_kl": 0.02}, "0.02 nats, bound 0.01"),
        ({"agreement_top1": 0.5}, "50.0%"),
        ({"max_difference": float("nan")}, "nan"),
    ],
)
def test_the_gate_refuses_beyond_its_bounds_and_says_which(seen, sentence):
    gate.judge(GOOD, Config(model="x"))
    with pytest.raises(gate.GateError, match=sentence):
        gate.judge(dataclasses.replace(GOOD, **seen), Config(model="x"))


def test_the_gate_sees_infinite_logits_and_those_too_large_for_the_wire(loaded):
    pixels = gate.synthetic_pixels(4, 32)
    for bias, precision, finite in ((float("inf"), "float32", False), (1e5, "float32", True), (1e5, "float16", False)):
        module, card = copy.deepcopy(loaded)
        module.head.fc.bias.data[2] = bias
        served = Teacher(module, card, device=CPU, precision=precision, batch_rows=8)
        assert gate.measure(served, None, pixels).finite == finite, (bias, precision)


def test_a_network_that_looks_at_its_batch_mates_is_found_out(loaded):
    class Gossip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=(2, 3)) + 1e-6 * x.mean()

    served = Teacher(Gossip(), loaded[1], device=CPU, precision="float32", batch_rows=8)
    assert not gate.measure(served, None, gate.synthetic_pixels(8, 32)).batch_invariant


def test_synthetic_pictures_are_the_same_everywhere_and_not_flat():
    pixels = gate.synthetic_pixels(5, 40)
    assert pixels.shape == (5, 40, 40, 3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, gate.synthetic_pixels(5, 40))
    assert pixels.float().std(dim=(1, 2)).min() > 20
    assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize(
    ("name", "disabled", "kernels"),
    [
        ("resnetv2_14x05_bit", "0", "fused"),
        ("mobilenetv3_small_050", "0", "compiled"),
        ("resnetv2_14x05_bit", "1", "own"),
    ],
)
def test_a_teacher_knows_whose_kernels_it_would_run_on_a_gpu(name, disabled, kernels, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", disabled)
    module = models.create(name, 5).eval().requires_grad_(False)
    fold_standardisation(module)
    halve(module, torch.float16)
    assert _made_fast(module)[1] == kernels


def test_on_a_cpu_they_are_the_networks_own(loaded):
    assert make(loaded, "float16").kernels == "own"


def test_fingerprints_differ_with_every_fact():
    facts = {"weights": "ab", "precision": "float32", "batch_rows": 32}
    others = [{**facts, "weights": "ac"}, {**facts, "precision": "float16"}, {**facts, "batch_rows": 64}]
    assert len({fingerprint(f) for f in [facts, *others]}) == 4
    assert fingerprint(dict(reversed(facts.items()))) == fingerprint(facts)


def test_devices_and_precisions_resolve_or_are_refused():
    assert choose_device("cpu") == CPU
    assert choose_precision("auto", CPU) == "float32"
    assert choose_precision("auto", torch.device("cuda", 0)) == "float16"
    assert choose_precision("bfloat16", CPU) == "bfloat16"
    for name in ("gpu", "cuda:x", f"cuda:{torch.cuda.device_count()}"):
        with pytest.raises(ValueError, match="--device"):
            choose_device(name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 8},
        {"batch_rows": 0},
        {"max_rows": 0},
        {"max_rows": 5000},
        {"batch_rows": 4096, "max_pending_rows": 2000},
        {"threads": -1},
        {"gate_images": 0},
        {"gate_max_kl": 0.0},
        {"gate_min_agreement": 1.5},
        {"drain_s": -1.0},
    ],
)
def test_settings_out_of_range_are_refused_by_their_flag(wrong):
    with pytest.raises(ValueError, match="--"):
        Config(model="x", **wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_compiled_float16_teacher_passes_the_gate(loaded):
    module, card = loaded
    shape = {"device": torch.device("cuda", 0), "batch_rows": 16}
    reference = Teacher(copy.deepcopy(module), card, precision="float32", **shape)
    served = Teacher(copy.deepcopy(module), card, precision="float16", **shape)
    report = gate.measure(served, reference, gate.synthetic_pixels(32, 32))
    gate.judge(report, Config(model="x"))
    assert report.batch_invariant
