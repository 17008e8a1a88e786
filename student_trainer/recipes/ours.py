"""Ours: runs on one's own pictures, the demos, and runs for machines without a GPU.

Numbers were measured here (docs/LOG.md), not by the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from student_trainer.config import Config, DataConfig, OptimConfig, StudentConfig, TeacherConfig
from student_trainer.recipes.recipe import Recipe
from views.setting import ViewSetting


def own_teacher() -> Config:
    """A teacher for your own pictures: a large network, fine-tuned on their labels.

    For a thousand to some ten thousand pictures, in half an hour on a CPU core for the first. All but the warm-up is as
    in flowers102/laptop_teacher, which came to 84.39 %; mild crops, for it shall be right and not patient. Another
    network: --student.architecture and --student.weights, both.
    """
    network = "tf_efficientnet_lite2"
    return Config(
        recipe="own/teacher",
        targets="labels",
        data=DataConfig(root=Path()),
        views=ViewSetting(setting="same/ic+mix", min_area=0.25),
        student=StudentConfig(architecture=network, size=128, weights=f"{network}.in1k"),
        optim=OptimConfig(batch_size=64, epochs=40, lr=5e-4, weight_decay=1e-4, warmup_steps=0.05),
        evaluate_every=200,
        checkpoint_every=200,
    )


def own_student() -> Config:
    """A student of your own teacher: function matching; with --targets labels, what it learns without one.

    From scratch, in the paper's views. 300 epochs are a beginning: more of them help before anything else does.
    """
    return Config(
        recipe="own/student",
        data=DataConfig(root=Path()),
        student=StudentConfig(architecture="mobilenetv3_small_100", size=128),
        optim=OptimConfig(batch_size=128, epochs=300, lr=3e-3, weight_decay=1e-4, warmup_steps=0.05, temperature=2.0),
        evaluate_every=200,
        checkpoint_every=200,
    )


def digits_demo_teacher() -> Config:
    """For the demo: a small BiT learns handwritten digits.

    From labels. Crops are mild and nothing is mirrored: a mirrored 2 is no digit.
    """
    return Config(
        recipe="digits/demo_teacher",
        targets="labels",
        data=DataConfig(root=Path("runs/data/digits"), evaluate="test", eval_crop="rs"),
        views=ViewSetting(setting="same/rc+mix", flip=False),
        student=StudentConfig(architecture="resnetv2_26x05_bit", size=32),
        optim=OptimConfig(batch_size=128, epochs=30, lr=3e-3, weight_decay=1e-3, warmup_steps=50),
        evaluate_every=100,
        checkpoint_every=100,
    )


def digits_demo() -> Config:
    """The demo: function matching on handwritten digits."""
    return Config(
        recipe="digits/demo",
        data=DataConfig(root=Path("runs/data/digits"), evaluate="test", eval_crop="rs"),
        views=ViewSetting(setting="same/ic+mix"),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=32),
        teacher=TeacherConfig(audit_every=20),
        optim=OptimConfig(batch_size=128, epochs=45, lr=3e-3, weight_decay=3e-4, warmup_steps=60, temperature=2.0),
        evaluate_every=100,
        checkpoint_every=100,
        decode_threads=1,
    )


def flowers102_demo_teacher() -> Config:
    """For the demo: a small BiT learns flowers, quickly.

    From scratch and from labels, at 64 px: no good teacher.
    """
    return Config(
        recipe="flowers102/demo_teacher",
        targets="labels",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        views=ViewSetting(setting="same/rc+mix"),
        student=StudentConfig(architecture="resnetv2_26x05_bit", size=64),
        optim=OptimConfig(batch_size=64, epochs=25, lr=2e-3, weight_decay=1e-3, warmup_steps=50),
        evaluate_every=0,
        checkpoint_every=100,
    )


def flowers102_demo() -> Config:
    """The demo on flowers, at 64 px: minutes on two cores."""
    return Config(
        recipe="flowers102/demo",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=64),
        teacher=TeacherConfig(audit_every=20),
        optim=OptimConfig(batch_size=64, epochs=25, lr=2e-3, weight_decay=3e-4, warmup_steps=60, temperature=2.0),
        evaluate_every=0,
        checkpoint_every=100,
        decode_threads=1,
    )


def flowers102_laptop_teacher() -> Config:
    """A teacher of flowers at 128 px in half an hour on a core.

    Fine-tuned from ImageNet weights by the labels; test top-1 84.39 %.

    Needs --student.weights FILE: timm's EfficientNet-Lite2 weights as .safetensors (docs/LOG.md, 2026-11-24).
    """
    return Config(
        recipe="flowers102/laptop_teacher",
        targets="labels",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        views=ViewSetting(setting="same/ic+mix", min_area=0.25),
        student=StudentConfig(architecture="tf_efficientnet_lite2", size=128),
        optim=OptimConfig(batch_size=64, epochs=40, lr=5e-4, weight_decay=1e-4, warmup_steps=60),
        evaluate_every=160,
        checkpoint_every=160,
    )


def flowers102_laptop() -> Config:
    """Function matching of flowers in an hour on two cores.

    MobileNetV3-small x0.5 at 96 px; test top-1 42.85 %.

    Teacher: that of flowers102/laptop_teacher. Far too short for more, and BatchNorm costs it 5 points (docs/LOG.md).
    """
    return Config(
        recipe="flowers102/laptop",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        student=StudentConfig(architecture="mobilenetv3_small_050", size=96),
        optim=OptimConfig(batch_size=128, epochs=180, lr=3e-3, weight_decay=1e-4, warmup_steps=150, temperature=2.0),
        evaluate_every=200,
        checkpoint_every=200,
    )


def flowers102_laptop_study_teacher() -> Config:
    """The study's teacher, in 12 minutes on a CPU core.

    EfficientNet-Lite0 fine-tuned by the labels at 64 px; test top-1 74.01 %.

    Starts from timm's published weights; without network, --student.weights FILE.
    """
    return Config(
        recipe="flowers102/laptop_study_teacher",
        targets="labels",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        views=ViewSetting(setting="same/ic+mix", min_area=0.25),
        student=StudentConfig(architecture="tf_efficientnet_lite0", size=64, weights="tf_efficientnet_lite0.in1k"),
        optim=OptimConfig(batch_size=64, epochs=80, lr=1e-3, weight_decay=1e-4, warmup_steps=60),
        evaluate_every=320,
        checkpoint_every=160,
        decode_threads=1,
    )


def flowers102_laptop_study() -> Config:
    """The consistency study for two CPU cores.

    A small BiT at 48 px, 150 epochs; benchmarks/study.py runs all view settings.

    Teacher: EfficientNet-Lite0 fine-tuned at 64 px, test top-1 74.01.
    """
    return Config(
        recipe="flowers102/laptop_study",
        data=DataConfig(root=Path("runs/data/flowers102"), evaluate="test"),
        views=ViewSetting(num_crops=100),
        student=StudentConfig(architecture="resnetv2_14x05_bit", size=48),
        optim=OptimConfig(batch_size=128, epochs=150, lr=3e-3, weight_decay=3e-4, warmup_steps=100, temperature=2.0),
        evaluate_every=200,
        checkpoint_every=400,
        log_every=10,
        decode_threads=1,
    )


def recipes() -> Iterator[Recipe]:
    """All of them."""
    for make in (
        own_teacher,
        own_student,
        digits_demo_teacher,
        digits_demo,
        flowers102_demo_teacher,
        flowers102_demo,
        flowers102_laptop_teacher,
        flowers102_laptop,
        flowers102_laptop_study_teacher,
        flowers102_laptop_study,
    ):
        yield Recipe(config=make(), says=(make.__doc__ or "").partition("\n")[0])
