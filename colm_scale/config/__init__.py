"""Every option of a run, with its unit and default. The tree is frozen: a run never changes its own configuration.

Each class checks its own fields when it is made; `RunConfig` checks what fields mean together. A wrong value is a
`UserError` that names the option as the user writes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Literal

import yaml

from colm_scale.config.checks import require
from colm_scale.config.selection import SelectionConfig as SelectionConfig  # whoever needs it has it from here
from colm_scale.config.sources import SourcesConfig as SourcesConfig
from colm_scale.config.track import TrackConfig
from colm_scale.config.user_functions import is_own
from colm_scale.errors import UserError

COLUMN_ROLES = ("source", "protected", "instruction", "input", "output", "prompt", "completion", "messages")
"""What a column can be; without `RowConfig.columns` it has the name of its role."""
OptimizerName = Literal["adamw", "sgd", "lion", "adafactor", "muon"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    name: str | None = None
    """Hub id or folder of a causal language model. Default: the small base model in the package."""
    revision: str | None = None
    """Branch, tag or commit of the hub model."""
    trust_remote_code: bool = False
    """Run code that a hub repository brings along. Off: such a model is refused."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation. auto: what the model picks (sdpa nearly everywhere, and only that takes packed
    micro-batches: on a GPU in half precision by torch's own flash kernel); with --train.packing off, flash_attention_2
    on a GPU in half precision where flash-attn or its hub kernel is installed."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the frozen weights of the blocks in 4 bits, by bitsandbytes (QLoRA)."""


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """How a row of the user's data becomes an example."""

    columns: dict[str, str] = field(default_factory=dict)
    """Columns that the files call something else, by role: '{instruction: question, output: answer}'. A row needs
    instruction and output (an input, where there is one, follows the instruction on a new line), or prompt and
    completion, or messages (a list of {role, content}; loss on the assistant's turns only). It may have a source (else
    the file's name is one) and protected, which is true for an example that colm and stratified train on whenever it is
    a candidate."""
    protected_sources: list[str] | None = None
    """Sources whose every example is protected, as if its row said so; whatever sources the selection keeps besides."""
    chat_template: str | None = None
    """File with a Jinja chat template for `messages`. Default: the tokenizer's own."""
    template: str = "{instruction}\n"
    """How a prompt is written before it is tokenised; `{instruction}` is the row's prompt."""
    max_length: int | None = None
    """Longest example in tokens. Default: the model's context, at most 2,048."""

    def __post_init__(self) -> None:
        for role in self.columns:
            _check_role(role)
        require("{instruction}" in self.template, "data.template", self.template, "text with {instruction} in it")
        require(self.max_length is None or self.max_length >= 2, "data.max_length", self.max_length, "at least 2")

    def column(self, role: str) -> str:
        """The column that has the role in the user's files."""
        return self.columns.get(role, role)


def _check_role(role: str) -> None:
    """Refuse a role that no column has."""
    if role not in COLUMN_ROLES:
        near = difflib.get_close_matches(role, COLUMN_ROLES, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ":"
        raise UserError(f"--data.columns names a column for {role!r}{hint} The roles are {', '.join(COLUMN_ROLES)}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowConfig):
    """Where the examples come from and how a row becomes tokens."""

    train: list[str] | None = None
    """Files (.jsonl, .json, .parquet, .csv, .xlsx) or hub data sets (ORG/NAME or ORG/NAME:SPLIT), one or more.
    Default: the built-in mixture of maths problems."""
    eval: list[str] | None = None
    """Held-out data, the same kinds. Default: the built-in held-out split with built-in training data, else none."""
    sources: str | None = None
    """File with the source of each row of `train`, as `colm-scale sources` writes it; whatever the rows say."""
    overlong: Literal["drop", "cut"] = "drop"
    """What happens to an example above `max_length`: dropped, or cut at the end. Both are counted per source."""
    streaming: bool = False
    """Read the training data (.jsonl files or hub data sets) as it is needed, on rank 0, instead of holding it in
    memory. It is read once before, to check every row and count the sources."""
    shuffle_rows: int = 16384
    """With `streaming`: rows that are held and shuffled at a time."""

    @property
    def has_held_out(self) -> bool:
        """Whether there is held-out data: the user's, or the built-in with built-in training data."""
        return bool(self.eval) or not self.train

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shuffle_rows >= 1, "data.shuffle_rows", self.shuffle_rows, "at least 1")
        if self.streaming and not self.train:
            raise UserError("--data.streaming true streams what --data.train names: name it, or leave it out")
        if self.sources and not self.train:
            raise UserError(
                f"--data.sources {self.sources} says where the rows of --data.train come from: name that too, or leave "
                "it out (the built-in data has sources)"
            )


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The adapters (made by peft)."""

    rank: int = 16
    """Rank r of every adapter."""
    alpha: float = 32.0
    """Scale: an adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before every adapter, while training; the sketch never drops."""
    targets: list[str] | None = None
    """Names of the linear layers that get adapters. Default: every linear layer of the blocks."""
    adapter: str | None = None
    """Folder or hub id of an existing adapter to start from; its own rank, alpha and targets are used."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "lora.rank", self.rank, "at least 1")
        require(self.alpha > 0, "lora.alpha", self.alpha, "positive")
        require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimizer, schedule and batch arithmetic."""

    steps: int | None = None
    """Optimizer steps. Default: `epochs` where given, else 80."""
    epochs: float | None = None
    """Passes over the training data as candidates; instead of `steps`."""
    seed: int = 0
    """Seed of every random draw of the run."""
    optimizer: OptimizerName = "adamw"
    """What updates the adapters; the selection compares candidates by the update that it would make of each."""
    learning_rate: float | None = None
    """Peak learning rate. Default: with AdamW 1e-2 for the built-in base and 2e-4 for any other model; sgd 50 times,
    muon 3 times, adafactor once, lion a fifth of that."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW and Lion; the first one is the momentum of SGD and Muon. The selection uses the same."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW and Adafactor; the selection's too."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which the gradient is scaled down. 0: no clipping."""
    loss: Literal["example", "token"] = "example"
    """example: weighted mean of the examples' mean token losses (CoLM). token: weighted mean over all label tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen weights and of the computation; the adapters are float32. float16 scales the loss."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each block for the backward pass and compute the rest again: less memory, more time."""
    forward_reuse: Literal["off", "device", "cpu"] = "off"
    """Keep what goes into each block while candidates are sketched, on the device or in CPU memory, and start the
    coreset's backward from there instead of running its forward again. Selected candidates are then trained on the rank
    that sketched them. Needs activation checkpointing and no dropout."""
    forward_reuse_gib: float = 8.0
    """With `forward_reuse`: most memory for what is kept, in GiB per rank. Candidates beyond it are trained as
    usual."""
    compile: bool = False
    """Compile the decoder blocks below the one that the sketch looks into (all of them, where nothing is sketched) by
    torch.compile. The first steps take longer, every other one less; rounding is another, and so ids may be."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Put the examples of a micro-batch one after the other, none of which sees another, instead of padding them to the
    longest. auto: where the model computes the same with them; else, and with off, they are padded."""
    micro_batch_tokens: int = 1024
    """Most tokens (padding included) of one micro-batch per rank, while sketching and training. A longer example forms
    a micro-batch of its own."""
    threads: int | None = None
    """CPU threads per rank. Default: the machine's cores shared out among its ranks."""
    timeout: float = 600.0
    """Seconds after which a rank that is stuck in one phase of a step ends the run. Raise it for slower steps."""

    def __post_init__(self) -> None:
        require(self.steps is None or self.steps >= 1, "train.steps", self.steps, "at least 1")
        require(self.epochs is None or self.epochs > 0, "train.epochs", self.epochs, "positive")
        if self.steps is not None and self.epochs is not None:
            raise UserError(f"--train.steps {self.steps} and --train.epochs {self.epochs} exclude each other: give one")
        require(
            self.learning_rate is None or self.learning_rate > 0, "train.learning_rate", self.learning_rate, "positive"
        )
        require(0 <= self.warmup_ratio <= 1, "train.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        require(self.adam_epsilon > 0, "train.adam_epsilon", self.adam_epsilon, "positive")
        require(
            self.optimizer != "adafactor" or self.adam_epsilon >= 1e-15,
            "train.adam_epsilon",
            self.adam_epsilon,
            "at least 1e-15 with --train.optimizer adafactor, which divides by it",
        )
        require(self.max_grad_norm >= 0, "train.max_grad_norm", self.max_grad_norm, "0 or more")
        require(self.forward_reuse_gib > 0, "train.forward_reuse_gib", self.forward_reuse_gib, "positive")
        require(self.micro_batch_tokens >= 1, "train.micro_batch_tokens", self.micro_batch_tokens, "at least 1")
        require(self.threads is None or self.threads >= 1, "train.threads", self.threads, "at least 1")
        require(self.timeout > 0, "train.timeout", self.timeout, "positive")


@dataclass(frozen=True, kw_only=True)
class FsdpConfig:
    """How FSDP2 shards, with --engine fsdp."""

    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward and gather them again for the backward. false: keep them until
    the backward (more memory, less communication)."""
    cpu_offload: bool = False
    """Keep each rank's shards, gradients and optimizer in CPU memory, and bring a block to the GPU when it runs."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved so that a run that is killed goes on as if nothing had happened. Under OUTPUT_DIR/checkpoints."""

    every: int = 50
    """Steps between checkpoints; one more is written at the end and when the run is told to stop. 0: none at all."""
    keep: int = 2
    """How many checkpoints are kept, the newest."""
    fallback: bool = False
    """With --resume auto: where the newest checkpoint is damaged, go on from the newest one that is not."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "0 or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss and exact match, per source."""

    every: int | None = None
    """Steps between evaluations. Default: a fifth of the run, which makes six with the one before the first step. 0:
    only before and after."""
    sample: int = 128
    """Examples, as many of each source, whose loss an evaluation between the first and the last computes; it generates
    nothing. The first and the last compute all examples, and say how these do too: curves and the best adapter compare
    the same examples throughout."""
    generate: int = 24
    """Examples per source whose answer is generated and compared. 0: loss only."""
    max_new_tokens: int = 64
    """Longest generated answer, in tokens."""
    limit: int = 1000
    """Most held-out examples per source. What is left out is counted."""

    def __post_init__(self) -> None:
        require(self.every is None or self.every >= 0, "eval.every", self.every, "0 or more")
        require(self.sample >= 1, "eval.sample", self.sample, "at least 1")
        require(self.generate >= 0, "eval.generate", self.generate, "0 or more")
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.limit >= 1, "eval.limit", self.limit, "at least 1")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What a run measures about itself."""

    floor_every: int = 20
    """Steps between re-runs of the bare floor (costs one step each). 0: never."""
    display: Literal["auto", "live", "plain", "off"] = "auto"
    """live: a display that updates in place. plain: a line per step. auto: live on a terminal, else plain."""

    def __post_init__(self) -> None:
        require(self.floor_every >= 0, "profile.floor_every", self.floor_every, "0 or more")


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
    """Write every candidate of every step, and what became of it and why, to OUTPUT_DIR/audit (Parquet)."""
    output_dir: str | None = None
    """Folder of the run. Default: runs/ and the date and time."""
    ds_config: str | None = None
    """DeepSpeed configuration: ZeRO stage, offload, communication; nothing that the run decides. A JSON file, or zero1,
    zero2, zero2_offload, zero3 or zero3_offload, which the package brings. Needs the extra colm_scale[deepspeed]."""
    engine: Literal["auto", "single", "ddp", "fsdp", "deepspeed"] = "auto"
    """What shards the model. auto: deepspeed with --ds_config, else ddp with several ranks, else single."""
    resume: str = "none"
    """auto: go on from the newest checkpoint in OUTPUT_DIR, or begin where there is none. A folder: go on from that
    checkpoint, or from the newest of that run. none: begin."""

    def __post_init__(self) -> None:
        if self.train.packing == "on" and self.model.attention in ("eager", "flash_attention_2"):
            raise UserError(
                f"--train.packing on goes with attention sdpa only, not with --model.attention {self.model.attention}: "
                f"leave one out"
            )
        if self.train.forward_reuse != "off":
            self._check_reusable()
        if self.sources.refresh_every and not self.reclusters and isinstance(self.selection.kept_sources, list):
            raise UserError(
                f"--sources.refresh_every {self.sources.refresh_every} without --data.sources chooses the kept sources "
                f"again, but --selection.kept_sources names them: leave one out"
            )
        if self.engine == "deepspeed" and self.ds_config is None:
            raise UserError("--engine deepspeed needs --ds_config, for instance --ds_config zero2")
        if self.ds_config is not None and self.engine in ("single", "ddp", "fsdp"):
            raise UserError(f"--ds_config {self.ds_config} contradicts --engine {self.engine}: leave one out")
        if self.resume == "auto" and self.output_dir is None:
            raise UserError("--resume auto looks for checkpoints in the run's folder: name it with --output_dir")

    @property
    def reclusters(self) -> bool:
        """Whether a refresh of the sources clusters examples again, rather than choosing the kept sources again."""
        return self.sources.refresh_every > 0 and self.data.sources is not None

    def _check_reusable(self) -> None:
        selection, option = self.selection, f"--train.forward_reuse {self.train.forward_reuse}"
        if selection.method != "colm" or selection.estimator == "length":
            what = "estimator length" if selection.method == "colm" else f"method {selection.method}"
            raise UserError(f"{option} uses the candidates' forward, and {what} has none: leave it out")
        if is_own(selection.estimator):
            raise UserError(
                f"{option} uses the candidates' forward, and whether --selection.estimator {selection.estimator} runs "
                f"one is not known: leave it out"
            )
        if not self.train.activation_checkpointing:
            raise UserError(
                f"{option} saves what activation checkpointing computes twice: give "
                f"--train.activation_checkpointing true, or leave it out"
            )
        if self.lora.dropout:
            raise UserError(
                f"{option} needs forwards that are the same each time: give --lora.dropout 0 instead of "
                f"{self.lora.dropout}, or leave it out"
            )


def as_yaml(config: RunConfig) -> str:
    """A configuration as a file that ``--config`` reads back to the same configuration."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
