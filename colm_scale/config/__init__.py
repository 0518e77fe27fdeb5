"""Every option of a run, with its unit and default. The tree is frozen: a run never changes its configuration.

Each class checks its own fields at construction, and `RunConfig` checks combinations of them. A wrong value is a
`UserError` that names the option as the user writes it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import yaml

from colm_scale.config.checks import require, require_least, require_positive
from colm_scale.config.data import COLUMN_ROLES as COLUMN_ROLES  # imported from here by the other rooms, as the next
from colm_scale.config.data import DataConfig as DataConfig
from colm_scale.config.data import RowConfig as RowConfig
from colm_scale.config.rules import FORWARD_REUSE, RUN, TRAIN, check, refusal
from colm_scale.config.selection import SelectionConfig as SelectionConfig  # imported from here by the other rooms
from colm_scale.errors import UserError

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
EXPERTS = "experts"
"""The target of adapters that stands for the weights of routed experts."""
OptimizerName = Literal["adamw", "sgd", "lion", "adafactor", "muon"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    name: str | None = None
    """Hub id or folder of a causal language model. Default: the small base model that ships with the package."""
    revision: str | None = None
    """Branch, tag or commit of the hub model."""
    trust_remote_code: bool = False
    """Run code from the hub repository. Off: a model that needs it is refused."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation. auto: the model's own choice, nearly always sdpa, which is also the only one that takes
    packed micro-batches (with torch's flash kernel on a GPU in half precision). With --train.packing off, auto uses
    flash_attention_2 on a GPU in half precision if flash-attn or its hub kernel is installed."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: store the frozen weights of the blocks in 4 bits, with bitsandbytes (QLoRA)."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The LoRA adapters, made by peft."""

    rank: int = 16
    """Rank r of every adapter."""
    alpha: float = 32.0
    """Scale: the output of an adapter is multiplied by alpha / rank."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that the update does not shrink as the rank grows."""
    dropout: float = 0.0
    """Dropout before every adapter in training; sketches use none."""
    targets: list[str] | None = None
    """Names of the linear layers that get adapters. Default: every linear layer of the blocks; in a mixture of experts
    those outside the feed-forward layers, in Mamba's mixers the first layer. The name experts stands for the weights of
    the routed experts: each expert gets an adapter of that rank. The run prints which layers have adapters."""
    adapter: str | None = None
    """Folder or hub id of an existing adapter to start from; its own rank, alpha and targets are used."""

    def __post_init__(self) -> None:
        require_least(self, "lora.", rank=1)
        require_positive(self, "lora.", "alpha")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")
        if self.dropout and EXPERTS in (self.targets or ()):
            raise UserError(
                f"--lora.dropout {self.dropout} has no place before adapters on {EXPERTS} (--lora.targets), which are "
                "added to the weights: leave one out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule, precision and micro-batches."""

    steps: int | None = None
    """Optimizer steps. Default: the steps of `epochs` if that is given, else 80."""
    epochs: float | None = None
    """Passes over the training data, counted in candidates; an alternative to `steps`."""
    seed: int = 0
    """Seed of every random draw of the run."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of the adapters; the selection compares candidates by the update it would make for each."""
    learning_rate: float | None = None
    """Peak learning rate. Default: with adamw and adafactor 1e-2 for the built-in base model and 2e-4 for any other;
    with sgd 50 times, with muon 3 times, with lion a fifth of that."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW and Lion; the first one is the momentum of SGD and Muon. The selection uses the same."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW and Adafactor. The selection uses the same."""
    max_grad_norm: float = 1.0
    """Global norm to which larger gradients are clipped. 0: no clipping."""
    loss: Literal["example", "token"] = "example"
    """example: weighted mean of the examples' mean token losses (CoLM). token: weighted mean over all label tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights and of the computation; the adapters are float32. float16 uses loss scaling."""
    activation_checkpointing: bool = False
    """Save only the inputs of each block for the backward and recompute the rest: less memory, more time."""
    forward_reuse: Literal["auto", "off", "device", "cpu"] = "auto"
    """Hold the block inputs of sketched candidates, on the device or in CPU memory, and start the coreset's backward
    from them instead of repeating its forward. Selected candidates are then trained on the rank that sketched them.
    Requires activation checkpointing and no dropout. auto: on the device wherever that is possible."""
    forward_reuse_gib: float = 8.0
    """Most memory for the block inputs held by `forward_reuse`, in GiB per rank; with auto also at most a tenth of a
    GPU's. Candidates that do not fit are trained as usual."""
    compile: bool = False
    """Compile the decoder blocks below the probe's block with torch.compile (all blocks if nothing is sketched). The
    first steps are slower and later ones faster; rounding differs, so selected ids may too."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Concatenate the examples of a micro-batch, each attending only to itself, instead of padding them to the longest.
    auto: pack if the model computes the same losses that way, else pad."""
    micro_batch_tokens: int = 1024
    """Most tokens (padding included) of one micro-batch per rank, in sketching and in training. A longer example forms
    a micro-batch alone."""
    threads: int | None = None
    """CPU threads per rank. Default: the cores that it may use, divided by the ranks that share them."""
    timeout: float = 600.0
    """Seconds after which a rank that is stuck in one phase of a step ends the run. Raise it for slower steps."""

    def __post_init__(self) -> None:
        check(self, TRAIN)
        require_least(
            self, "train.", steps=1, weight_decay=0, max_grad_norm=0, micro_batch_tokens=1, threads=1
        )
        require_positive(self, "train.", "epochs", "learning_rate", "adam_epsilon", "forward_reuse_gib", "timeout")
        require(0 <= self.warmup_ratio <= 1, "train.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        require(
            self.optimizer != "adafactor" or self.adam_epsilon >= 1e-15,
            "train.adam_epsilon",
            self.adam_epsilon,
            "at least 1e-15 with --train.optimizer adafactor, which divides by it",
        )


@dataclass(frozen=True, kw_only=True)
class FsdpConfig:
    """Sharding with FSDP2 (--engine fsdp)."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again for the backward. false: hold them until
    the backward (more memory, less communication)."""
    cpu_offload: bool = False
    """Hold each rank's shards, gradients and optimizer state in CPU memory, and copy a block to the GPU when it
    runs."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints to resume a run from, in OUTPUT_DIR/checkpoints."""

    every: int = 50
    """Steps between checkpoints; one more is written at the end and when the run is told to stop. 0: no checkpoints."""
    keep: int = 2
    """Number of checkpoints that are retained, the newest ones."""
    fallback: bool = False
    """With --resume auto: if the newest checkpoint is damaged, resume from the newest intact one."""

    def __post_init__(self) -> None:
        require_least(self, "checkpoint.", every=0, keep=1)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss and exact match, per source."""

    every: int | None = None
    """Steps between evaluations. Default: a fifth of the run, which makes six with the one before the first step. 0:
    only before and after training."""
    sample: int = 128
    """Examples, equally many of each source, in an evaluation between the first and the last; it computes losses and
    generates nothing. The first and the last cover all examples and report this sample too, so curves and the best
    adapter always compare the same examples."""
    generate: int = 24
    """Examples per source whose answer is generated and compared. 0: loss only."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    limit: int = 1000
    """Most held-out examples per source. The examples left out are counted."""

    def __post_init__(self) -> None:
        require_least(self, "eval.", every=0, sample=1, generate=0, max_new_tokens=1, limit=1)


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Timing and display."""

    floor_every: int = 20
    """Steps between measurements of the bare floor, a step on the same tokens without selection (each costs one such
    step). 0: never."""
    display: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a display that updates in place. plain: one line per step. auto: live on a terminal, else plain."""

    def __post_init__(self) -> None:
        require_least(self, "profile.", floor_every=0)


@dataclass(frozen=True, kw_only=True)
class SourcesConfig:
    """Refreshing the sources during a run."""

    refresh_every: int = 0
    """Steps between refreshes of the sources; 0: never. With --data.sources, the examples seen since the last refresh
    are re-clustered by the model's hidden states, taken from the forwards of sketching and training. Without it (for a
    mixture that drifts), the sources that were small among the candidates since then become the kept ones, and the
    moments restart."""

    def __post_init__(self) -> None:
        require_least(self, "sources.", refresh_every=0)


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Experiment trackers that receive every step and evaluation from rank 0."""

    to: list[str] = field(default_factory=list)
    """Any of tensorboard (written to OUTPUT_DIR/tensorboard), wandb, mlflow and trackio. Each must be installed, and
    takes its server and credentials from its own environment variables. Default: none."""
    project: str = "colm_scale"
    """Project (wandb, trackio) or experiment (mlflow) of the run."""

    def __post_init__(self) -> None:
        for name in self.to:
            require(name in TRACKERS, "track.to", name, f"one or more of {', '.join(TRACKERS)}")
        require(len(set(self.to)) == len(self.to), "track.to", self.to, "each tracker once")
        require(bool(self.project), "track.project", self.project, "a name")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Fine-tune a causal language model with LoRA on mini-batch coresets (CoLM)."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    sources: SourcesConfig = field(default_factory=SourcesConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    audit: bool = True
    """Write every candidate of every step, its outcome and the reason to OUTPUT_DIR/audit (Parquet)."""
    output_dir: str | None = None
    """Directory of the run. Default: runs/ and the date and time."""
    ds_config: str | None = None
    """DeepSpeed configuration: ZeRO stage, offload and communication, but nothing that the run decides. A JSON file, or
    zero1, zero2, zero2_offload, zero3 or zero3_offload, which ship with the package. Requires the extra
    colm_scale[deepspeed]."""
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """Engine that shards the model. auto: deepspeed with --ds_config, else ddp on several ranks, else single."""
    resume: str = "none"
    """auto: resume from the newest checkpoint in OUTPUT_DIR, or start if there is none. A folder: resume from that
    checkpoint, or from the newest one of that run. none: start from the beginning."""

    def __post_init__(self) -> None:
        check(self, RUN)
        self.require_forward_reuse(self.forward_reuse_excluded)

    @property
    def reclusters(self) -> bool:
        """True if a refresh re-clusters examples, rather than choosing the kept sources again."""
        return self.sources.refresh_every > 0 and self.data.sources is not None

    @property
    def forward_reuse_excluded(self) -> str:
        """Why forward reuse is impossible with these options, whatever the model; empty if it is possible."""
        return refusal(self, FORWARD_REUSE)

    def require_forward_reuse(self, excluded: str) -> None:
        """Refuse a request for forward reuse, if there is one, for the reason why it is ``excluded``.

        Raises:
            UserError: ``excluded`` is not empty, and forward reuse neither off nor automatic.
        """
        if excluded and self.train.forward_reuse in ("device", "cpu"):
            raise UserError(f"--train.forward_reuse {self.train.forward_reuse}: {excluded}; leave it out")


def as_yaml(config: RunConfig) -> str:
    """A configuration as a file that ``--config`` reads back to the same configuration."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
