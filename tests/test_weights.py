"""models/: architectures by name, weight files of every naming, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.resnetv2 import ResNetV2
from torch.nn import functional

import models
from models import bit
from models.architectures import default_cfg

CARD = models.ModelCard(
    architecture="resnetv2_14x05_bit",
    num_classes=7,
    size=32,
    mean=(0.5, 0.4, 0.3),
    std=(0.1, 0.2, 0.3),
    data_set="digits",
)


def images(num: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(5))


def random_bit(num_classes: int = 7, name: str = "resnetv2_14x05_bit") -> ResNetV2:
    """A small BiT in which every parameter is random: norms and head too, so that no swap goes unseen."""
    torch.manual_seed(3)
    model = models.create(name, num_classes).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.5)
    return model


def in_big_transfer_naming(model: ResNetV2, conv: str = "standardized_conv2d") -> dict[str, np.ndarray]:
    """The arrays of a file as big_transfer writes it."""

    def hwio(weight: torch.Tensor) -> np.ndarray:
        return weight.detach().permute(2, 3, 1, 0).numpy().copy()

    tree = {
        f"resnet/root_block/{conv}/kernel": hwio(model.stem.conv.weight),
        "resnet/group_norm/gamma": model.norm.weight.detach().numpy(),
        "resnet/group_norm/beta": model.norm.bias.detach().numpy(),
        "resnet/head/conv2d/kernel": hwio(model.head.fc.weight),
        "resnet/head/conv2d/bias": model.head.fc.bias.detach().numpy(),
    }
    for b, stage in enumerate(model.stages, 1):
        for u, unit in enumerate(stage.blocks, 1):
            at = f"resnet/block{b}/unit{u:02d}"
            for i, branch in enumerate("abc", 1):
                norm = getattr(unit, f"norm{i}")
                tree[f"{at}/{branch}/{conv}/kernel"] = hwio(getattr(unit, f"conv{i}").weight)
                tree[f"{at}/{branch}/group_norm/gamma"] = norm.weight.detach().numpy()
                tree[f"{at}/{branch}/group_norm/beta"] = norm.bias.detach().numpy()
            if unit.downsample is not None:
                tree[f"{at}/a/proj/{conv}/kernel"] = hwio(unit.downsample.conv.weight)
    return tree


def in_big_vision_naming(model: ResNetV2) -> dict[str, np.ndarray]:
    """The arrays of a file as big_vision's bit_paper.py names its parameters."""
    tree = {}
    for name, array in in_big_transfer_naming(model).items():
        parts = name.removeprefix("resnet/").split("/")
        leaf = {"gamma": "scale", "beta": "bias"}.get(parts[-1], parts[-1])
        if parts[0] == "root_block":
            tree["root_block/conv_root/kernel"] = array
        elif parts[0] == "group_norm":
            tree[f"norm-pre-head/{leaf}"] = array[None, None, None]
        elif parts[0] == "head":
            tree[f"head/{leaf}"] = array[0, 0] if leaf == "kernel" else array
        elif "proj" in parts:
            tree[f"{parts[0]}/{parts[1]}/conv_proj/kernel"] = array
        else:
            number = "abc".index(parts[2]) + 1
            kind = "gn" if parts[3] == "group_norm" else "conv"
            tree[f"{parts[0]}/{parts[1]}/{kind}{number}/{leaf}"] = array[None, None, None] if kind == "gn" else array
    return tree


def numbered(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keras-like numbering: each convolution's scope gets a number of its own, the root excepted."""
    return {
        name.replace("standardized_conv2d", f"standardized_conv2d_{i}" if i else "standardized_conv2d"): array
        for i, (name, array) in enumerate(tree.items())
    }


NAMINGS = {
    "big_transfer": in_big_transfer_naming,
    "numbered": lambda model: numbered(in_big_transfer_naming(model)),
    "big_vision": in_big_vision_naming,
    "big_vision params": lambda model: {
        **{f"params/{name}": array for name, array in in_big_vision_naming(model).items()},
        "opt/0/mu/root_block/conv_root/kernel": np.zeros(3, np.float32),
    },
    "big_vision flax optimizer": lambda model: {
        f"opt/target/{name}": array for name, array in in_big_vision_naming(model).items()
    },
}


def bit_forward(tree: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """BiT's forward pass, from the paper's code (bit_paper.py) written out in numpy and float64, with its names.

    The stem's pool pads with zeros, as in the code that the released weights came with.
    """
    p = {name: np.asarray(array, np.float64) for name, array in tree.items()}

    def patches(x: np.ndarray, size: int, stride: int) -> np.ndarray:
        """[n, h, w, c, size, size]: what each output sees, with zeros around the picture."""
        x = np.pad(x, [(0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)])
        return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]

    def conv(x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        w = p[f"{name}/kernel"]  # HWIO
        centred = w - w.mean(axis=(0, 1, 2))
        w = centred / np.sqrt((centred**2).mean(axis=(0, 1, 2)) + 1e-10)
        return np.tensordot(patches(x, len(w), stride), w, axes=([4, 5, 3], [0, 1, 2]))

    def norm_relu(x: np.ndarray, name: str) -> np.ndarray:
        n, h, w, c = x.shape
        grouped = x.reshape(n, h, w, 32, c // 32)
        centred = grouped - grouped.mean(axis=(1, 2, 4), keepdims=True)
        y = centred / np.sqrt((centred**2).mean(axis=(1, 2, 4), keepdims=True) + 1e-5)
        return np.maximum(y.reshape(n, h, w, c) * p[f"{name}/scale"].ravel() + p[f"{name}/bias"].ravel(), 0)

    y = conv(x.numpy().transpose(0, 2, 3, 1).astype(np.float64), "root_block/conv_root", 2)
    y = patches(y, 3, 2).max(axis=(4, 5))
    for block in range(1, 5):
        for unit in range(1, 100):
            at = f"block{block}/unit{unit:02d}"
            if f"{at}/conv1/kernel" not in p:
                break
            stride = 2 if block > 1 and unit == 1 else 1
            active = norm_relu(y, f"{at}/gn1")
            shortcut = conv(active, f"{at}/conv_proj", stride) if f"{at}/conv_proj/kernel" in p else y
            z = norm_relu(conv(active, f"{at}/conv1"), f"{at}/gn2")
            z = norm_relu(conv(z, f"{at}/conv2", stride), f"{at}/gn3")
            y = conv(z, f"{at}/conv3") + shortcut
    pooled = norm_relu(y, "norm-pre-head").mean(axis=(1, 2))
    return torch.from_numpy(pooled @ p["head/kernel"] + p["head/bias"])


@pytest.mark.parametrize("name", ["resnetv2_14x05_bit", "resnetv2_26x05_bit"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_a_bit_file_of_every_naming_gives_the_logits_of_the_forward_pass_written_out(tmp_path, naming, name):
    original = random_bit(name=name)
    path = tmp_path / "any.npz"
    np.savez(path, **NAMINGS[naming](original))

    model, card = models.load(path)

    assert (card.architecture, card.num_classes, card.mean, card.size) == (name, 7, (0.5, 0.5, 0.5), 128)
    x = images()
    with torch.no_grad():
        logits = model.eval()(x)
        assert torch.equal(logits, original(x))
        torch.testing.assert_close(
            model.double()(x.double()), bit_forward(in_big_vision_naming(original), x), rtol=1e-8, atol=1e-8
        )


def test_a_network_written_under_big_visions_names_is_read_back_bit_for_bit(tmp_path):
    original = random_bit()
    tensors = {name: tensor.numpy() for name, tensor in original.state_dict().items()}
    np.savez(tmp_path / "ours.npz", **bit.native(tensors))
    model, _ = models.load(tmp_path / "ours.npz")
    assert models.weights_digest(model) == models.weights_digest(original)
    ours, theirs = bit.native(tensors), in_big_vision_naming(original)
    assert {n: a.shape for n, a in ours.items()} == {n: np.squeeze(a, axis=tuple(range(a.ndim - 1))).shape
            if "gn" in n or "norm" in n else a.shape for n, a in theirs.items()}  # fmt: skip


def test_the_released_naming_gives_the_logits_of_timms_own_loader(tmp_path):
    path = tmp_path / "R14x05_224.npz"
    np.savez(path, **in_big_transfer_naming(random_bit()))
    theirs = models.create("resnetv2_14x05_bit", 7).eval()
    theirs.load_pretrained(str(path))

    ours, card = models.load(path)

    assert card.size == 224, "the released files say their size in their names"
    with torch.no_grad():
        assert torch.equal(ours.eval()(images()), theirs(images()))


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "resnetv2_101x3_bit", "resnetv2_152x2_bit"])
def test_depth_and_width_name_the_published_architectures(name):
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    # Zero strides: the shapes of a large network without its memory.
    arrays = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in shapes.items()}
    assert bit.architecture(arrays, Path("x.npz")) == name


def test_bfloat16_arrays_of_jax_are_read(tmp_path):
    tree = in_big_vision_naming(random_bit())
    bits = {name: torch.from_numpy(a).bfloat16() for name, a in tree.items()}
    path = tmp_path / "bf16.npz"
    np.savez(path, **{name: b.view(torch.int16).numpy().view("V2") for name, b in bits.items()})
    model, _ = models.load(path)
    assert torch.equal(model.head.fc.bias, bits["head/bias"].float())


def _without(tree: dict, name: str) -> dict:
    return {key: array for key, array in tree.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda t: _without(t, "resnet/block3/unit01/b/group_norm/beta"),
            r"missing: stages\.2\.blocks\.0\.norm2\.bias",
        ),
        (lambda t: _without(t, "resnet/head/conv2d/kernel"), r"head\.fc\.weight"),
        (lambda t: {**t, "resnet/block1/unit01/a/extra": np.zeros(2)}, "does not have: resnet/block1/unit01/a/extra"),
        (
            lambda t: {**t, "resnet/group_norm/gamma": np.zeros(5)},
            r"misshapen: norm\.weight \(5,\) instead of \(1024,\)",
        ),
        (lambda t: {**t, "resnet/group_norm/gamma": np.zeros((2, 512))}, r"norm-pre-head/scale has shape \(2, 512\)"),
        (lambda t: {**t, "resnet/root_block/standardized_conv2d/kernel": np.zeros(3)}, "conv_root/kernel has shape"),
        (lambda t: {"some/kernel": np.zeros(2)}, "no BiT file.*some/kernel"),
        (lambda t: {k: a for k, a in t.items() if "block4" not in k}, r"blocks of \(1, 1, 1, 0\) units"),
    ],
)
def test_a_bit_file_that_does_not_fit_is_refused_by_the_tensors_name(tmp_path, damage, sentence):
    path = tmp_path / "damaged.npz"
    np.savez(path, **damage(in_big_transfer_naming(random_bit())))
    with pytest.raises(ValueError, match=sentence):
        models.load(path)


def test_pickled_arrays_inside_an_npz_are_refused(tmp_path):
    path = tmp_path / "pickled.npz"
    np.savez(path, **{"root_block/conv_root/kernel": np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="plain arrays"):
        models.load(path)


def test_a_truncated_file_is_refused_in_a_sentence(tmp_path):
    whole = tmp_path / "whole.npz"
    np.savez(whole, **in_big_transfer_naming(random_bit()))
    for name in ("cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(whole.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=name):
            models.load(tmp_path / name)


def test_a_saved_model_comes_back_bit_for_bit_with_its_card(tmp_path):
    model = random_bit().to(memory_format=torch.channels_last)
    models.save(tmp_path / "m.safetensors", model, CARD)
    loaded, card = models.load(tmp_path / "m.safetensors")
    assert card == CARD
    assert models.weights_digest(loaded) == models.weights_digest(model)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"], "no partial file stays behind"


def test_the_digest_sees_one_bit_of_one_weight():
    model = random_bit()
    before = models.weights_digest(model)
    model.norm.bias.data[3] = torch.nextafter(model.norm.bias.data[3], torch.tensor(9.0))
    assert models.weights_digest(model) != before


def test_another_number_of_classes_gives_a_zero_head_on_the_same_body(tmp_path):
    models.save(tmp_path / "m.safetensors", random_bit(), CARD)
    model, card = models.load(tmp_path / "m.safetensors", num_classes=5)
    assert (card.num_classes, card.data_set) == (5, "")
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), torch.zeros(2, 5))
    assert torch.equal(model.stem.conv.weight, random_bit().stem.conv.weight)


def test_a_foreign_file_needs_the_architecture_and_then_knows_its_classes(tmp_path):
    model = models.create("resnet18", 11)
    path = tmp_path / "foreign.safetensors"
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(tensors, path)
    with pytest.raises(ValueError, match="--architecture"):
        models.load(path)
    loaded, card = models.load(path, "resnet18")
    assert (card.num_classes, card.mean) == (11, tuple(default_cfg("resnet18")["mean"]))
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        models.load(path, "tf_efficientnet_lite0")
    with pytest.raises(ValueError, match=r"misshapen|missing|unexpected"):
        models.load(path, "resnet50")


def test_a_damaged_card_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(random_bit().state_dict(), path, metadata={"funmatch": json.dumps({"architecture": "resnet18"})})
    with pytest.raises(ValueError, match="card"):
        models.load(path)


def test_pickles_are_refused_unopened(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="safetensors"):
        models.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        models.load(tmp_path / "nowhere.npz")


def test_an_unknown_name_lists_the_nearest_known_ones():
    with pytest.raises(ValueError, match="resnetv2_14x05_bit"):
        models.create("resnetv2_14x5_bit", 10)
    with pytest.raises(ValueError, match="goog_in21k"):
        models.create("resnetv2_50x1_bit.goog", 10)
    with pytest.raises(ValueError, match="no published weights"):
        models.load("resnetv2_14x05_bit")


def test_a_zero_head_answers_zero_and_can_learn():
    model = random_bit()
    models.zero_head(model)
    logits = model(images())
    assert torch.equal(logits, torch.zeros(2, 7))
    functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert model.head.fc.weight.grad.abs().max() > 0
