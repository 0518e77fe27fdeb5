"""Loading of base models and tokenizers. Checks come first, before any weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME as CONFIG
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, cached_file
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_kernels_available,
)

from colm_scale.base import BASE_MODEL
from colm_scale.config import ModelConfig, TrainConfig
from colm_scale.data.hub import use_cache_without_hub
from colm_scale.errors import UserError, one_line
from colm_scale.modeling.causal import moved
from colm_scale.modeling.multimodal import sees_or_hears, text_class, whole_class
from colm_scale.modeling.probe import error_on_text, few_blocks
from colm_scale.modeling.weights import META, WHOLE, FileWeights, Weights, weight_files
from colm_scale.records import Json

_LONGEST_DEFAULT = 2048
_OPTION = "model.name"
_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' layers. Where true, the first forward in evaluation mode packs the weights anew, and from
then on products are in bfloat16 and have no gradients."""


def check_model(config: ModelConfig, option: str = _OPTION) -> PretrainedConfig:
    """Read a model's configuration, without its weights.

    Args:
        option: The option with the model's name, for messages; here and below.

    Raises:
        UserError: There is no such model, it brings its own code, or it is not a causal language model.
    """
    _check_no_adapter(_name(config), option)
    use_cache_without_hub(_name(config))
    with _one_line(config, option):
        found: PretrainedConfig = AutoConfig.from_pretrained(_name(config), **_hub_arguments(config))
    causal = type(found) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in getattr(found, "auto_map", {})
    architectures = getattr(found, "architectures", None) or []
    # An encoder such as BERT can be loaded as a decoder, but was not trained as one: its own architecture decides.
    causal &= not architectures or any(re.search(r"CausalLM|LMHead", name) for name in architectures)
    if not causal and not sees_or_hears(found):
        what = ", ".join(architectures) or type(found).__name__
        raise UserError(f"--{option} {_name(config)} is not a causal language model, it is a {what}")
    return found


def _check_no_adapter(name: str, option: str) -> None:
    """Check that a folder is not that of an adapter, which has no weights of a model."""
    folder = Path(name)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
        try:
            base = json.loads((folder / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        raise UserError(
            f"--{option} {name} is the folder of an adapter, not of a model: name its base model ({base or 'unknown'}) "
            f"there, and the adapter with --lora.adapter {name} to train it further, or merge it with colm-scale merge"
        )


def context_length(config: PretrainedConfig, most: int = _LONGEST_DEFAULT) -> int:
    """The model's context length in tokens, at most ``most``; by default that of ``--data.max_length``."""
    text = config.get_text_config()
    known: Iterator[int | None]
    known = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return min([most, *(length for length in known if length)])


def check_kernels(config: ModelConfig, train: TrainConfig) -> None:
    """Check that flash attention and 4-bit weights, if asked for, can run here.

    Raises:
        UserError: A library is missing, or the device or dtype does not support it.
    """
    if config.attention == "flash_attention_2":
        if not torch.cuda.is_available() or train.dtype == "float32":
            raise UserError(
                f"--model.attention flash_attention_2 runs on a GPU in bfloat16 or float16, and this is "
                f"{'a GPU' if torch.cuda.is_available() else 'a CPU'} with --train.dtype {train.dtype}: use sdpa"
            )
        if not _has_flash_attention():
            raise UserError(
                "--model.attention flash_attention_2: neither flash-attn nor kernels is installed: "
                "pip install 'colm_scale[flash]', or use sdpa"
            )
    if config.quantize == "nf4" and not is_bitsandbytes_available():
        raise UserError("--model.quantize nf4 requires bitsandbytes: pip install 'colm_scale[quantize]'")


def _has_flash_attention() -> bool:
    return bool(is_flash_attn_2_available() or is_kernels_available())


def load_tokenizer(config: ModelConfig, option: str = _OPTION) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer. If it has no padding token, it pads with its end token, which the mask hides."""
    with _one_line(config, option, what="a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(_name(config), **_hub_arguments(config))
        tokenizer.chat_template = tokenizer.chat_template or _template_of_processor(config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template_of_processor(config: ModelConfig) -> str | None:
    """The chat template in an older file of a processor, which tokenizers do not read; None if there is none."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = cached_file(_name(config), LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE, revision=config.revision, **missing)
    return json.loads(Path(file).read_text("utf-8")).get("chat_template") if file else None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: PretrainedConfig, option: str = _OPTION) -> None:
    """Check that the model has an embedding for each token of its tokenizer.

    Raises:
        UserError: It has not: on a GPU the first such token would end in an assertion without a name.
    """
    rows = getattr(model.get_text_config(), "vocab_size", None)
    vocabulary = tokenizer.get_vocab()
    last = max(vocabulary, key=vocabulary.__getitem__, default="")
    if rows is not None and last and vocabulary[last] >= rows:
        beyond = sum(number >= rows for number in vocabulary.values())
        raise UserError(
            f"--{option}: the tokenizer has ids up to {vocabulary[last]} ({last!r}), but the model's embedding has "
            f"{rows} rows: {beyond} tokens have none. Resize the model's embedding and save it, or use the tokenizer "
            "that the model was trained with"
        )


def load_model(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    option: str = _OPTION,
    *,
    prefers_flash: bool = False,
    whole: bool = False,
) -> PreTrainedModel:
    """Load the base model, frozen, in ``dtype`` on ``device``: of one that sees or hears, what text runs, or the
    ``whole``.

    On the meta device no weights are read, only the names and shapes in the files; `weights_of` reads the weights. A
    model whose files are quantised goes to the CPU instead, whole.

    With ``--model.attention auto`` and ``prefers_flash`` it uses flash attention where that runs, else the model's own
    choice.

    Raises:
        UserError: The weights cannot be read, or do not match the model's configuration.
    """
    of = check_model(config, option)
    if device == META and getattr(of, "quantization_config", None):
        device = torch.device("cpu")
    read = (whole_class if whole else text_class)(of).from_pretrained
    named = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    flash = prefers_flash and not named and torch.cuda.is_available() and dtype != torch.float32
    if flash and _has_flash_attention():
        try:
            model, report = _load(read, config, dtype, device, option, attn_implementation="flash_attention_2")
        except UserError:  # the model does not support it, or its kernel is not available
            model, report = _load(read, config, dtype, device, option)
    else:
        model, report = _load(read, config, dtype, device, option, **named)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if capped and not named and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa leaves the cap out, and transformers before 5.21 chooses it
    # Weights missing in the files were drawn at random, differently on every rank.
    drawn = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if drawn:
        raise UserError(
            f"--{option} {_name(config)}: {len(drawn)} weights that its config.json asks for are missing in its files "
            f"or have another shape, the first is {drawn[0]}: the folder is incomplete or mixes two models"
        )
    for layer in model.modules():
        if hasattr(layer, _REPACKS):
            setattr(layer, _REPACKS, False)
    if sees_or_hears(of) and (why := error_on_text(few_blocks(model, [0]))):
        raise UserError(
            f"--{option} {_name(config)}: a {type(model).__name__} does not run on text alone with transformers "
            f"{transformers.__version__} ({why}): use a model of text, if there is one of its language part"
        )
    return moved(model.requires_grad_(False), device)


def _load(
    read: Callable[..., object],  # its annotations lack the pair
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    option: str,
    **options: object,
) -> tuple[PreTrainedModel, Json]:
    """The model, and transformers' report on its weights."""
    if config.quantize == "nf4" and device != META:
        from colm_scale.modeling.quantised import nf4

        options["quantization_config"] = nf4(dtype)
    with _one_line(config, option):
        found = read(
            _name(config),
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused in one line
            output_loading_info=True,
            **options,
            **_hub_arguments(config),
        )
    assert isinstance(found, tuple)
    model, report = found
    return model, report


def weights_of(model: PreTrainedModel, config: ModelConfig, device: torch.device) -> Weights:
    """The weights of a loaded model: those in its files if it is on the meta device.

    Args:
        device: Of the run.
    """
    if not any(weight.is_meta for weight in model.parameters()):
        return WHOLE
    only = getattr(model.config, "transformers_weights", None)
    files = weight_files(_name(config), config.revision, only)
    if config.quantize == "none":
        return FileWeights(model, files)
    from colm_scale.modeling.quantised import PackedWeights

    return PackedWeights(model, files, device, model.dtype)


def keep_block_inputs_only(model: PreTrainedModel) -> None:
    """Enable activation checkpointing, in its non-reentrant variant.

    Raises:
        UserError: The model does not support it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"--train.activation_checkpointing true: {type(model).__name__} cannot checkpoint its blocks; leave it out"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _name(config: ModelConfig) -> str:
    return config.name or str(BASE_MODEL)


def _hub_arguments(config: ModelConfig) -> dict[str, object]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextmanager
def _one_line(config: ModelConfig, option: str, what: str = "a model") -> Iterator[None]:
    """Turn errors of the hub library into one line that names the place it looked in."""
    name = _name(config)
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            # The first for commands on their own, the second for runs.
            trusting = "trust_remote_code" if option == "model" else "model.trust_remote_code"
            message = f"--{option} {name} brings its own code, which is run only with --{trusting} true"
            raise UserError(message) from None
        where = "the folder" if Path(name).exists() else "there is no such folder, and the hub id"
        raise UserError(f"--{option} {name}: cannot load {what} ({where} was tried: {one_line(error)})") from None
