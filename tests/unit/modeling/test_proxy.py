"""A smaller model, or the first blocks of the same, sketches as itself and leaves the model that is trained alone."""

from __future__ import annotations

import re

import pytest
import tokenizers
import torch
import transformers
from support.families import BLOCKS, FAMILIES, PROBES, ROWS, base_model, batch_of

from colm_scale.checkpoint.identity import model_digest
from colm_scale.config import LoraConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.distributed.engine import trainable
from colm_scale.errors import UserError
from colm_scale.modeling.load import add_adapters, check_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.proxy import add_probes, check_proxy, describe_proxy, first_blocks, load_proxy
from colm_scale.sketch import last_layer
from colm_scale.sketch.tap import Tap

CPU = torch.device("cpu")
WORDS = ("<unk>", "<end>", "one", "two")


def save(folder, *words: str, **options) -> str:
    """A small Llama whose tokenizer knows these words, in this order."""
    base_model("llama", **options).save_pretrained(folder)
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture
def name(tmp_path) -> str:
    """The model that is trained."""
    return save(tmp_path / "model", *WORDS, num_hidden_layers=3)


def configured(name: str | None, dtype: str = "float32", rank: int = 4, **selection) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=name),
        selection=SelectionConfig(**selection),
        lora=LoraConfig(rank=rank, dropout=0.5),
        train=TrainConfig(dtype=dtype),
    )


def check(config: RunConfig, longest: int = 64) -> None:
    check_proxy(config, check_model(config.model), load_tokenizer(config.model), longest)


def refused(match: str):
    return pytest.raises(UserError, match=match)


# What may stand for the model


def test_a_smaller_model_with_the_same_tokens_may(name, tmp_path):
    check(configured(name, proxy=save(tmp_path / "same", *WORDS, hidden_size=16)))
    check(configured(name, proxy=save(tmp_path / "more", *WORDS, "three")))
    check(configured(name))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("<unk>", "<end>", "two", "one"), r"'one' is token 2 of the model, and 3 of the proxy"),
        (WORDS[:3], r"'two' is token 3 of the model, and none of the proxy"),
    ],
)
def test_another_tokenizer_is_refused_with_the_first_token_that_differs(name, tmp_path, words, said):
    proxy = save(tmp_path / "proxy", *words)
    told = rf"^--selection\.proxy {re.escape(proxy)} has another tokenizer than {re.escape(name)}: {said}\. Give"
    with refused(told):
        check(configured(name, proxy=proxy))


def test_a_context_too_short_for_the_examples_is_refused(name, tmp_path):
    proxy = save(tmp_path / "proxy", *WORDS, max_position_embeddings=32)
    check(configured(name, proxy=proxy), longest=32)
    with refused(r"was made for 32 tokens, and examples may have 33: give --data\.max_length 32, or another proxy$"):
        check(configured(name, proxy=proxy), longest=33)


def test_a_proxy_that_is_not_there_is_named_by_its_option(name, tmp_path):
    nowhere = str(tmp_path / "a" / "b")
    with refused(rf"^--selection\.proxy {re.escape(nowhere)}: cannot load a model \(there is no such folder") as error:
        check(configured(name, proxy=nowhere))
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_named_by_the_option(name, tmp_path):
    proxy = save(tmp_path / "proxy", *WORDS)
    (tmp_path / "proxy" / "model.safetensors").unlink()
    with refused(r"^--selection\.proxy .*no file named model\.safetensors"):
        load_proxy(configured(name, proxy=proxy), base_model("llama"), CPU)


@pytest.mark.parametrize(("named", "blocks"), [(True, 3), (False, 8)])
def test_there_must_be_fewer_blocks_than_the_model_has(name, named, blocks):
    model = name if named else None
    check(configured(model, proxy_blocks=blocks - 1))
    with refused(rf"^--selection\.proxy_blocks is {blocks}, but must be below the {blocks} blocks of "):
        check(configured(model, proxy_blocks=blocks))


def test_for_lengths_no_proxy_is_loaded():
    for proxy in ({"proxy": "x"}, {"proxy_blocks": 2}):
        with refused(r"--selection\.estimator length looks at no model: leave out --selection\.proxy"):
            SelectionConfig(estimator="length", **proxy)


def test_two_proxies_exclude_each_other():
    with refused(r"--selection\.proxy x and --selection\.proxy_blocks 2 exclude each other"):
        SelectionConfig(proxy="x", proxy_blocks=2)


def test_where_nothing_is_sketched_nothing_is_looked_at(name):
    check(configured(name, method="stratified", proxy="nowhere"))


# The model itself


def test_without_a_proxy_the_model_sketches(name):
    assert load_proxy(configured(name), base_model("llama"), CPU) is None


def test_another_model_is_loaded_frozen_in_the_type_of_the_run(name, tmp_path):
    proxy = save(tmp_path / "proxy", *WORDS, hidden_size=16)
    model = load_proxy(configured(name, "bfloat16", proxy=proxy), base_model("llama"), CPU)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert model.config.hidden_size == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_blocks_are_a_model_of_so_many_blocks_on_the_same_weights(family):
    base = base_model(family, num_hidden_layers=3).requires_grad_(False)
    whole, batch = base.state_dict(), batch_of([7, 5])
    expected = base_model(family, num_hidden_layers=2).eval()
    expected.load_state_dict({key: whole[key] for key in expected.state_dict()})
    proxy = first_blocks(base, 2).eval()
    assert torch.equal(losses(proxy, batch), losses(expected, batch))
    places = {key: value.data_ptr() for key, value in base.named_parameters()}
    assert {key: value.data_ptr() for key, value in proxy.named_parameters()}.items() <= places.items()
    assert proxy.state_dict().keys() == expected.state_dict().keys()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_what_becomes_of_the_base_leaves_its_first_blocks_alone(family):
    """Engines empty parameters whose shards they keep, and wrap layers."""
    base, batch = base_model(family).requires_grad_(False), batch_of([7, 5])
    proxy = first_blocks(base, 1).eval()
    before = losses(proxy, batch)
    add_adapters(base, LoraConfig(), seed=0)
    for parameter in base.parameters():
        parameter.data = torch.empty(0)
    assert torch.equal(losses(proxy, batch), before)


def losses(model, batch):
    return ExampleLoss(model)(batch)


# Its probes


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_adapters_are_on_the_probe_alone_and_change_nothing(family):
    base, batch = base_model(family).requires_grad_(False), batch_of([7, 5])
    proxy = first_blocks(base, 1)
    before = losses(proxy.eval(), batch)
    state = torch.get_rng_state()
    module, (probe,) = add_probes(proxy, configured(None, rank=3, proxy_blocks=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.layer == PROBES[family].replace(BLOCKS[family], BLOCKS[family][:-1] + "0")
    assert probe.rows.tolist() == list(ROWS[family])
    adapters = trainable(module)
    assert [name.rpartition(".lora_")[0] for name in adapters] == [f"model.base_model.model.{probe.layer}"] * 2
    assert all((p == 0).all() == ("lora_B" in name) and 3 in p.shape for name, p in adapters.items())
    assert torch.equal(module.eval()(batch), before)


def test_the_sketch_is_the_gradient_of_the_proxy_without_dropout():
    base, batch = base_model("llama", num_hidden_layers=3).requires_grad_(False), batch_of([7, 5])
    module, (probe,) = add_probes(first_blocks(base, 2), configured(None, proxy_blocks=2))
    tap = Tap(module, probe)
    assert tap.size == len(probe.rows) * 4
    _, _, gradients = last_layer.sketch(tap, batch, torch.arange(2))
    (_, found), *_ = gradients.blocks()
    for row, loss in enumerate(module(batch)):
        (expected,) = torch.autograd.grad(loss, tap.probes[0].lora_b.weight, retain_graph=True)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found[row], expected.flatten(), rtol=1e-4, atol=1e-6)


def test_as_many_blocks_are_probed_as_are_asked_for():
    base = base_model("llama", num_hidden_layers=3).requires_grad_(False)
    module, probes = add_probes(first_blocks(base, 2), configured(None, proxy_blocks=2, probe_blocks=2, probe="q"))
    assert [probe.layer for probe in probes] == [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    assert len(Tap(module, *probes).probes) == 2
    with refused(r"--selection\.probe_blocks is 2, but LlamaForCausalLM has 1 blocks"):
        add_probes(first_blocks(base, 1), configured(None, proxy_blocks=1, probe_blocks=2))


def test_the_seed_decides_which_adapters():
    drawn = []
    for seed in (0, 0, 1):
        proxy = first_blocks(base_model("llama").requires_grad_(False), 1)
        config = RunConfig(selection=SelectionConfig(proxy_blocks=1), train=TrainConfig(seed=seed))
        drawn.append(trainable(add_probes(proxy, config)[0]))
    first, again, other = ({name: p for name, p in one.items() if "lora_A" in name} for one in drawn)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_digests_tell_proxies_apart():
    base = base_model("llama", num_hidden_layers=3).requires_grad_(False)
    digests = [model_digest(add_probes(first_blocks(base, count), configured(None))[0]) for count in (1, 2, 2)]
    assert digests[0] != digests[1] == digests[2]


def test_the_line_about_it_says_what_it_is_and_how_large():
    base = base_model("llama", num_hidden_layers=3).requires_grad_(False)
    config = configured(None, proxy_blocks=1)
    proxy, _ = add_probes(first_blocks(base, 1), config)
    # 97 x 32 in embedding and head each, and 7,776 or so in each block
    said = describe_proxy(config, proxy, ExampleLoss(add_adapters(base, LoraConfig(targets=["v_proj"]), seed=0)))
    assert re.fullmatch(r"sketched by the first 1 of its 3 blocks, on the same weights: 0\.4\d of the .*", said)
