"""Every setting of a run, typed, with its unit. A recipe is a function that returns a full Config (recipes.py)."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from student_trainer.logit_store import redacted
from views.setting import ViewSetting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The pictures."""

    root: Annotated[Path, tyro.conf.arg(aliases=["--data"])] = Path("data")
    """Folder that `python -m data_prep.prepare` wrote. `.`, as recipes own/ have it: it must be given."""
    train: str = "train"
    """Split to train on."""
    evaluate: str = "val"
    """Split to evaluate on."""
    eval_crop: Literal["rs", "cc"] = "cc"
    """View of evaluation: the whole picture (rs) or its centre (cc)."""
    eval_keep: float = 128 / 160
    """cc: share of the short side that the centre keeps. Small sets 128/160, ImageNet 224/256."""
    evaluate_root: Path | None = None
    """Evaluate on this data set instead: the teacher's, when the pictures of training are others (section 3.8). The
    labels of the training pictures are then never used."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The network that learns, and how it sees views."""

    architecture: str = "resnetv2_50x1_bit"
    """A name of timm's, or one of our small BiTs (models/architectures.py)."""
    size: int = 128
    """Height and width of its views, 8 to 1024 pixels."""
    interpolation: Literal["linear", "cubic"] = "linear"
    """How a box is resized, for student and teacher alike. The reference: linear."""
    antialias: bool = False
    """Low-pass filter before shrinking, for student and teacher alike. The reference: no."""
    weights: str = ""
    """Start from these weights instead of from scratch: a file (.safetensors, BiT .npz), a released BiT file by name
    (bit:BiT-M-R50x1), or timm's name of published weights. The head is made anew when the number of classes differs."""
    zero_head: bool = True
    """Head kernel and bias start at zero (big_vision bit_paper.py, head_zeroinit)."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who answers, and how long we wait."""

    addresses: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--teacher"])] = ()
    """One entry a teacher: the addresses of its replicas with commas between: host:port, unix:/path; dns:///name:port
    or host:first-last (ports) are looked up again and again, so that replicas may come and go. Several entries are an
    ensemble (section 3.6). None: start teachers beside this run."""
    model: tuple[str, ...] = ()
    """Without addresses: models to start beside this run, one a teacher (.safetensors, .npz, bit:NAME, timm name)."""
    ensemble: Literal["logits", "probabilities", "sum_kl"] = "logits"
    """How the answers of several teachers become one target: their logits are averaged (the paper, section 3.6), their
    probabilities, or each has a KL of its own and these are added up (the released code, distill.py)."""
    store: str = "runs/logits"
    """fix/: where the constant logits are kept, filled once and shared by all runs: a folder, or redis://, rediss://
    (TLS) or unix:// with user and password."""
    store_failure: Literal["stop", "ask"] = "stop"
    """fix/: when the store cannot be reached in the middle of a run: stop with an error, or ask the teacher again."""
    size: int = 0
    """Without addresses: size of the teacher's views in pixels; 0: the model's own."""
    transport: Literal["auto", "reference", "encoded", "pixels"] = "auto"
    """How pictures reach the teacher. auto: by reference if it sees the same data set, else as files, else as
    rendered pixels."""
    rows_per_request: int = 64
    """A rank's batch is sent in requests of at most so many rows."""
    window: int = 0
    """Requests in flight per replica. 0: as many as keep it busy, by measured latency."""
    hedge: float = 0.0
    """A request that takes so many times the usual time is sent to an idle replica too; the first answer is taken.
    0: never. Useful: 3 and more."""
    tls_ca: Path | None = None
    """Certificate of the authority that signed the teachers' (PEM): speak TLS to them."""
    tls_cert: Path | None = None
    """Our own certificate (PEM), for teachers that ask for one (mTLS)."""
    tls_key: Path | None = None
    """The key of tls_cert (PEM)."""
    tls_name: str = ""
    """The name in the teachers' certificates, where it is not the one in their address."""
    token_file: Path | None = None
    """File whose first line is the token that teachers want to see; read again when it changes."""
    deadline_s: float = 120.0
    """A request without an answer for so many seconds goes to another teacher; one of more than rows_per_request rows
    (fix/ic_ens) gets proportionally more."""
    patience_s: float = 600.0
    """Give up when no teacher has answered for so many seconds."""
    audit_every: int = 50
    """Every so many steps compare rendered views with the teacher's (view_mismatch). 0: never."""
    audit_views: int = 4
    """Views compared each time, per rank."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule. The defaults are the reference's (big_vision optax.py): Adam, one cosine, weight
    decay that is not multiplied by lr."""

    optimizer: Literal["adam", "sgdm", "shampoo"] = "adam"
    """Adam; SGD with momentum (section 3.9, and BiT's fine-tuning); Shampoo with grafting (section 3.4, appendix D)."""
    decay: Literal["cosine", "quadratic", "staircase"] = "cosine"
    """The schedule after the warm-up: cosine to zero; (1 - t)^2 to zero (Shampoo); divided by 10 at each of `stairs`
    (BiT-HyperRule)."""
    stairs: tuple[float, ...] = (0.3, 0.6, 0.9)
    """staircase: where it divides, as shares of the run."""
    batch_size: int = 512
    """Rows of the global batch, over all ranks."""
    epochs: float = 10_000.0
    """Length of the run: round(epochs * pictures / batch_size) steps."""
    lr: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 3e-4
    """Decay of kernels per step at the schedule's peak."""
    warmup_steps: int | float = 1500
    """Linear warm-up, multiplied with the cosine: steps or, below 1, a share of the run, which fits any length."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    mu_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """adam: the first moment is kept in this precision. The reference: bfloat16."""
    momentum: float = 0.9
    """sgdm."""
    inverse_every: int = 1
    """shampoo: steps between the inverse roots of its statistics, most of its cost. Appendix D: every step."""
    temperature: float = 1.0
    """Of the distillation loss."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    recipe: str
    """Name of the recipe this config came from."""
    targets: Literal["teacher", "labels"] = "teacher"
    """Learn from a teacher's logits (function matching), or from labels (supervised mode)."""
    run_dir: Path = Path("runs/latest")
    """Where everything of this run is written. A run that was stopped goes on from here."""
    seed: int = 0
    """Of initial weights, order, views and mixup."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewSetting = field(default_factory=ViewSetting)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one CUDA device per process where there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the student's forward and backward pass (autocast on CUDA)."""
    channels_last: bool = True
    """Memory format of the student's convolutions."""
    prefetch: int = 3
    """Batches that are read, sent to the teacher and rendered ahead."""
    decode_threads: int = 2
    """Threads that decode pictures, per process."""
    evaluate_every: int = 500
    """Steps between evaluations; there is always one at the end. 0: only at the end."""
    eval_batch: int = 128
    """Pictures of an evaluation batch, per process."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl: a run of two million steps wants more than 1."""
    log_format: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object a line."""
    metrics_address: str = ""
    """HOST:PORT where Prometheus finds this machine's first process, the second one port higher. Empty: nowhere."""
    wandb: str = ""
    """Project of Weights & Biases, or ENTITY/PROJECT, that gets the numbers too. Empty: none."""
    checkpoint_every: int = 500
    """Steps between checkpoints; there is always one at the end."""

    def __post_init__(self) -> None:
        for name in (
            "optim.batch_size", "optim.epochs", "optim.lr", "optim.inverse_every", "teacher.rows_per_request",
            "prefetch", "eval_batch", "log_every", "checkpoint_every",
        ):  # fmt: skip
            if get_setting(self, name) <= 0:
                raise ValueError(f"{flag(name)} is {get_setting(self, name)}; it must be greater than 0")
        if self.optim.warmup_steps > 1 and self.optim.warmup_steps % 1:
            raise ValueError(
                f"--optim.warmup-steps is {self.optim.warmup_steps}; give whole steps, or a share of the run below 1"
            )
        if not 8 <= self.student.size <= 1024:
            raise ValueError(f"--student.size is {self.student.size}; give 8 to 1024 pixels")
        if self.teacher.window < 0:
            raise ValueError(f"--teacher.window is {self.teacher.window}; give a number of requests, or 0 to measure")
        if self.teacher.hedge != 0 and self.teacher.hedge <= 1:
            raise ValueError(f"--teacher.hedge is {self.teacher.hedge}; give more than 1 usual time, or 0 for never")
        if self.device == "cpu" and self.precision == "float16":
            raise ValueError("--precision float16 needs a CUDA device; use bfloat16 or float32 on the CPU")


# May change when a run goes on: none of them changes a row, a weight or a number of the optimiser.
FREE_ON_RESUME = frozenset({
    "run_dir", "data.root", "device", "prefetch", "decode_threads", "evaluate_every", "eval_batch", "log_every",
    "log_format", "metrics_address", "wandb",
    "checkpoint_every", "teacher.addresses", "teacher.model", "teacher.size", "teacher.transport", "teacher.store",
    "teacher.store_failure", "teacher.rows_per_request", "teacher.window", "teacher.hedge", "teacher.deadline_s",
    "teacher.tls_ca", "teacher.tls_cert", "teacher.tls_key", "teacher.tls_name", "teacher.token_file",
    "teacher.patience_s", "teacher.audit_every", "teacher.audit_views", "data.evaluate", "data.evaluate_root",
    "data.eval_crop", "data.eval_keep", "student.weights",
})  # fmt: skip


def flag(name: str) -> str:
    """How a setting is spelled on a command line."""
    return "--" + name.replace("_", "-")


def get_setting(config: Config, name: str) -> Any:
    """The value of a setting by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by dotted name, as JSON can hold them."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= settings(value, f"{prefix}{entry.name}.")
        else:
            if prefix + entry.name == "teacher.store":
                value = redacted(value)  # may hold a password, and this is printed and saved
            flat[prefix + entry.name] = str(value) if isinstance(value, Path) else value
            if isinstance(value, tuple):
                flat[prefix + entry.name] = list(value)
    return flat


def override(config: Config, args: Sequence[str]) -> Config:
    """Apply command line settings; an unknown one ends the program with the known ones listed."""
    result, unknown = tyro.cli(
        Config, default=config, args=list(args), return_unknown_args=True, prog="student_trainer/main.py"
    )
    if unknown:
        known = [flag(name) for name in settings(config)]
        guess = difflib.get_close_matches(unknown[0].replace("_", "-"), known, n=3)
        hint = f" Did you mean {' or '.join(guess)}?" if guess else ""
        sys.exit(f"unknown setting {unknown[0]}.{hint}\nknown settings:\n  " + "\n  ".join(known))
    return result
