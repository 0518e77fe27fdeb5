from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from colm_scale.config import DataConfig
from colm_scale.data.builtin import builtin_as_rows
from colm_scale.data.examples import Examples, count_lines, joined, tokenise
from colm_scale.data.messages import Message
from colm_scale.data.readers import Row
from colm_scale.errors import UserError
from colm_scale.records import long_tensor

CONFIG = DataConfig()
EOS = "</s>"
APPENDING = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def character_tokenizer(*merges: tuple[str, str], special: bool = True, **kwargs) -> PreTrainedTokenizerFast:
    """One token per byte, except for ``merges``; with BOS and EOS around a text if ``special``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", EOS, "<pad>", *alphabet, *("".join(merge) for merge in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if special:
        inner.post_processor = processors.TemplateProcessing(
            single=f"<s> $A {EOS}", special_tokens=[("<s>", 0), (EOS, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token=EOS,
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **kwargs,
    )


PLAIN = character_tokenizer(special=False)
CHAT = character_tokenizer(special=True, chat_template=APPENDING)


def pair(prompt: str, completion: str, source: str = "s", number: int = 0) -> Row:
    return Row(number, source, (), prompt, completion, f"a.jsonl line {number + 1}")


def chat(*turns: tuple[str, str], source: str = "s", number: int = 0) -> Row:
    return Row(number, source, tuple(Message(*turn) for turn in turns), "", "", f"a.jsonl line {number + 1}")


def pieces(examples: Examples, tokenizer: PreTrainedTokenizerFast, index: int = 0) -> list[tuple[str, bool]]:
    """The text of each run of equally marked tokens."""
    tokens, labelled = examples.example(index)
    runs, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or labelled[end] != labelled[start]:
            runs.append((tokenizer.decode(tokens[start:end]), bool(labelled[start])))
            start = end
    return runs


# Prompt and completion


def test_no_token_straddles_prompt_and_completion():
    tokenizer = character_tokenizer(("a", "b"), ("x", "y"), special=False)
    assert tokenizer.tokenize("xyab") == ["xy", "ab"]
    tokens, labelled = tokenise([pair("xya", "bxy")], tokenizer, CONFIG, 100).example(0)
    assert tokenizer.convert_ids_to_tokens(tokens.tolist()) == ["xy", "a", "b", "xy", EOS]
    assert labelled.tolist() == [False, False, True, True, True]


def test_the_prompt_has_the_leading_special_tokens_and_only_the_completion_ends():
    examples = tokenise([pair("ab", "cd")], character_tokenizer(special=True), CONFIG, 100)
    assert pieces(examples, PLAIN) == [("<s>ab", False), (f"cd{EOS}", True)]


def test_a_tokenizer_that_adds_nothing_gets_no_begin_of_sequence():
    assert pieces(tokenise([pair("ab", "cd")], PLAIN, CONFIG, 100), PLAIN) == [("ab", False), (f"cd{EOS}", True)]


def test_texts_that_were_written_with_begin_and_end_of_sequence_get_no_others():
    rows = [pair("<s>ab", f"cd{EOS}"), pair("", f"<s>cd{EOS}\n"), pair("", "<s>cd")]
    examples = tokenise(rows, character_tokenizer(special=True), CONFIG, 100)
    assert pieces(examples, PLAIN, 0) == [("<s>ab", False), (f"cd{EOS}", True)]
    assert pieces(examples, PLAIN, 1) == [("<s>", False), (f"cd{EOS}\n", True)]
    assert pieces(examples, PLAIN, 2) == [("<s>", False), (f"cd{EOS}", True)]


def test_texts_are_tokenised_verbatim():
    examples = tokenise([pair(" {instruction}\n", " é 😀 \n")], PLAIN, CONFIG, 100)
    assert pieces(examples, PLAIN) == [(" {instruction}\n", False), (f" é 😀 \n{EOS}", True)]


def test_nothing_predicts_the_first_token_so_it_carries_no_loss():
    assert pieces(tokenise([pair("", "cd")], PLAIN, CONFIG, 100), PLAIN) == [("c", False), (f"d{EOS}", True)]
    with_bos = tokenise([pair("", "cd")], character_tokenizer(), CONFIG, 100)
    assert pieces(with_bos, PLAIN) == [("<s>", False), (f"cd{EOS}", True)]


def test_the_built_in_mixture_equals_row_by_row_tokenising(monkeypatch):
    monkeypatch.setattr("colm_scale.data.encoding._ROWS_AT_ONCE", 64)
    rows = builtin_as_rows("eval", CONFIG)
    tokenizer = character_tokenizer(("t", "h"), ("th", "e"), ("Ġ", "="))
    examples = tokenise(rows, tokenizer, CONFIG, 1000)
    assert len(examples) == len(rows) == 14 * 24
    for index, row in enumerate(rows):
        prompt = tokenizer(row.prompt)["input_ids"][:-1]
        completion = [*tokenizer(row.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens, labelled = examples.example(index)
        assert tokens.tolist() == prompt + completion
        assert labelled.tolist() == [False] * len(prompt) + [True] * len(completion)
        assert examples.prompt_and_reference(index) == (prompt, completion)
        assert examples.source_names[examples.sources[index]] == row.source


def test_a_tokenizer_without_end_of_sequence_is_refused():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=PLAIN.backend_tokenizer, pad_token="<pad>")
    with pytest.raises(UserError, match="eos_token"):
        tokenise([pair("a", "b")], tokenizer, CONFIG, 100)


# Chats


def test_only_the_assistants_turns_are_learned_each_with_its_end():
    turns = ("system", "be kind"), ("user", "hi"), ("assistant", "ho"), ("user", "more"), ("assistant", "ha ha")
    assert pieces(tokenise([chat(*turns)], CHAT, CONFIG, 200), PLAIN) == [
        ("<s><system>be kind<end>\n<user>hi<end>\n<assistant>", False),
        ("ho<end>\n", True),
        ("<user>more<end>\n<assistant>", False),
        ("ha ha<end>\n", True),
    ]


def test_rows_of_which_nothing_is_learned_are_dropped_with_that_reason():
    off = Row(0, "s", (Message("user", "a"), Message("assistant", "b", learned=False)), "", "", "a.jsonl line 1")
    examples = tokenise([off, chat(("user", "a"), ("assistant", "b"))], CHAT, CONFIG, 200)
    assert (len(examples), examples.dropped) == (1, {"s": 1})
    assert count_lines(examples.counts)[0].startswith("training examples too long or without anything to learn, ")
    with pytest.raises(UserError, match=r"none of the 1 examples .* within it something must be marked to be learned"):
        tokenise([off], CHAT, CONFIG, 200)


def test_a_turn_without_an_end_ends_in_the_special_token_that_begins_the_next():
    template = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = character_tokenizer(special=True, chat_template=template)
    turns = ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")
    plain = tokenise([chat(*turns)], tokenizer, CONFIG, 200)
    assert pieces(plain, PLAIN)[1] == ("b", True)
    assert plain.no_end == {"s": 1}
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    examples = tokenise([chat(*turns)], tokenizer, CONFIG, 200)
    assert pieces(examples, tokenizer) == [
        ("<s><|user|>a<|assistant|>", False),
        ("b<|user|>", True),
        ("c<|assistant|>", False),
        ("d<|user|>", True),
        ("e", False),
    ]
    assert not examples.no_end
    assert tokenise([chat(*turns[:2])], tokenizer, CONFIG, 200).no_end == {"s": 1}
    marked = template.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    tokenizer.chat_template = marked.replace("<|{{ m.role }}|>", "<|user|>")
    marked_turns = tokenise([chat(("assistant", "b"), ("assistant", "c"))], tokenizer, CONFIG, 200)
    assert pieces(marked_turns, tokenizer)[1:3] == [("b", True), ("<|user|>", False)]


def test_an_end_of_turn_at_which_the_model_does_not_stop_is_counted(tmp_path):
    template = APPENDING.replace("<end>", "<|im_end|>")
    tokenizer = character_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    rows = [chat(("user", "a"), ("assistant", "b"))]
    tokenizer.save_pretrained(tmp_path)

    def no_end(*stops: int) -> dict[str, int]:
        folder = tmp_path / str(len(stops))
        shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("[0-9]"))
        if stops:
            GenerationConfig(eos_token_id=list(stops)).save_pretrained(folder)
        return tokenise(rows, AutoTokenizer.from_pretrained(folder), CONFIG, 100).no_end

    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert no_end() == no_end(tokenizer.eos_token_id, end) == {}
    assert no_end(tokenizer.eos_token_id) == {"s": 1}


def test_what_follows_the_last_answer_is_there_but_not_learned():
    examples = tokenise([chat(("user", "a"), ("assistant", "b"), ("user", "c"))], CHAT, CONFIG, 200)
    assert pieces(examples, PLAIN)[1:] == [("b<end>\n", True), ("<user>c<end>\n", False)]
    prompt, reference = examples.prompt_and_reference(0)
    assert PLAIN.decode(prompt) == "<s><user>a<end>\n<assistant>"
    assert PLAIN.decode(reference) == "b<end>\n"


def test_two_turns_of_the_assistant_in_a_row_are_both_learned():
    examples = tokenise([chat(("user", "a"), ("assistant", "b"), ("assistant", "c"))], CHAT, CONFIG, 200)
    assert pieces(examples, PLAIN)[1:] == [("b<end>\n", True), ("<assistant>", False), ("c<end>\n", True)]


def test_an_assistant_may_speak_first():
    examples = tokenise([chat(("assistant", "b"))], CHAT, CONFIG, 200)
    assert pieces(examples, PLAIN) == [("<s><assistant>", False), ("b<end>\n", True)]


def test_the_last_answer_is_the_reference():
    examples = tokenise([chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))], CHAT, CONFIG, 200)
    prompt, reference = examples.prompt_and_reference(0)
    assert PLAIN.decode(prompt) == "<s><user>a<end>\n<assistant>b<end>\n<user>c<end>\n<assistant>"
    assert PLAIN.decode(reference) == "d<end>\n"


def test_chat_segments_are_tokenised_apart():
    tokenizer = character_tokenizer((">", "b"), special=False, chat_template=APPENDING)
    tokens, labelled = tokenise([chat(("user", "b"), ("assistant", "b"))], tokenizer, CONFIG, 200).example(0)
    names = tokenizer.convert_ids_to_tokens(tokens.tolist())
    assert names.count(">b") == 1  # the user's own
    assert names[labelled.tolist().index(True)] == "b"


def test_chats_and_pairs_mix_in_order():
    rows = [pair("p", "q", number=0), chat(("user", "a"), ("assistant", "b"), number=1), pair("r", "t", number=2)]
    examples = tokenise(rows, CHAT, CONFIG, 200)
    assert [pieces(examples, PLAIN, i)[-1][0] for i in range(3)] == [f"q{EOS}", "b<end>\n", f"t{EOS}"]


def test_a_template_whose_generation_prompt_does_not_begin_the_turn_is_refused():
    template = APPENDING.replace("<assistant>{% endif %}", "<model>{% endif %}")
    with pytest.raises(UserError, match=r'line 1: the generation prompt ends in "model>", but .* message 2 of 2'):
        tokenise([chat(("user", "a"), ("assistant", "b"))], character_tokenizer(chat_template=template), CONFIG, 200)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system turn') }}", "{% for %}", "{{ a.b.c }}"])
def test_a_template_that_fails_is_an_error_of_the_row(template):
    with pytest.raises(UserError, match=r"a\.jsonl line 1: the chat template refuses .*--data\.chat_template"):
        tokenise([chat(("assistant", "b"))], character_tokenizer(chat_template=template), CONFIG, 200)


def test_a_chat_needs_a_template_and_a_pair_does_not():
    rows = [pair("a", "b"), chat(("user", "a"), ("assistant", "b"), number=3)]
    assert len(tokenise(rows[:1], PLAIN, CONFIG, 200)) == 1
    with pytest.raises(UserError, match=r"a\.jsonl line 4 is a chat.*--data\.chat_template FILE"):
        tokenise(rows, PLAIN, CONFIG, 200)


def test_a_template_file_wins_over_the_tokenizers_own(tmp_path: Path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    config = DataConfig(chat_template=str(file))
    row = chat(("user", "a"), ("assistant", "b"))
    for tokenizer in (CHAT, PLAIN):
        assert pieces(tokenise([row], tokenizer, config, 200), PLAIN) == [("[user]a.[assistant]", False), ("b.", True)]


@pytest.mark.parametrize("row", [pair("a", "b"), chat(("assistant", "b"))])
def test_a_missing_template_file_is_named(row):
    with pytest.raises(UserError, match=r"--data\.chat_template nowhere\.jinja cannot be read"):
        tokenise([row], CHAT, DataConfig(chat_template="nowhere.jinja"), 200)


# Too long, or nothing to learn

MIXED = [
    pair("abc", "de", "x", 0),  # 6 tokens with EOS
    pair("abc", "def", "x", 1),  # 7
    pair("abcdef", "g", "y", 2),  # 8, no label within 6
    pair("a", "bcdefgh", "y", 3),  # 9
    pair("a", "b", "z", 4),  # 3
]


def test_examples_above_the_longest_length_are_dropped_and_counted_per_source():
    examples = tokenise(MIXED, PLAIN, CONFIG, 6)
    assert examples.ids.tolist() == [0, 4]
    assert examples.dropped == {"x": 1, "y": 2}
    assert examples.cut == {}
    # A source without examples is none: y must not lower the average size.
    assert examples.source_names == ("x", "z")


def test_cut_examples_keep_their_beginning_and_those_without_a_label_are_dropped():
    examples = tokenise(MIXED, PLAIN, DataConfig(overlong="cut"), 6)
    assert examples.ids.tolist() == [0, 1, 3, 4]
    assert examples.lengths.tolist() == [6, 6, 6, 3]
    assert pieces(examples, PLAIN, 1) == [("abc", False), ("def", True)]
    assert pieces(examples, PLAIN, 2) == [("a", False), ("bcdef", True)]
    assert examples.cut == {"x": 1, "y": 1}
    assert examples.dropped == {"y": 1}


def test_an_example_without_a_token_to_learn_is_dropped_and_counted():
    tokenizer = character_tokenizer(special=False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    examples = tokenise([pair("", "~", "x", 0), pair("a", "~", "y", 1)], tokenizer, CONFIG, 6)
    assert examples.ids.tolist() == [1]  # its end of sequence can be learned; the other example is nothing else
    assert examples.dropped == {"x": 1}


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_nothing_left_is_an_error_with_both_lengths(overlong):
    with pytest.raises(UserError, match=r"none of the 2 examples .* is 3 tokens .* the shortest example has 5"):
        tokenise([pair("abc", "d"), pair("abcdef", "g")], PLAIN, DataConfig(overlong=overlong), 3)


# The record


def test_sources_are_numbered_by_name_whatever_the_order_of_rows():
    rows = [pair("a", "b", source, i) for i, source in enumerate(["m", "c", "m", "z", "c", "m"])]
    examples = tokenise(rows, PLAIN, CONFIG, 10)
    assert examples.source_names == ("c", "m", "z")
    assert examples.sources.tolist() == [1, 0, 1, 2, 0, 1]
    assert examples.sizes.tolist() == [2, 3, 1]


def test_held_out_sources_keep_the_numbers_of_the_training_data_and_new_ones_follow():
    rows = [pair("a", "b", source, i) for i, source in enumerate(["new", "m", "also new", "z"])]
    examples = tokenise(rows, PLAIN, CONFIG, 10, source_names=("z", "c", "m"))
    assert examples.source_names == ("z", "c", "m", "also new", "new")
    assert examples.sources.tolist() == [4, 2, 3, 0]
    assert examples.sizes.tolist() == [1, 0, 1, 1, 1]


def test_storage_is_flat_and_typed():
    examples = tokenise(MIXED, PLAIN, CONFIG, 100)
    assert [t.dtype for t in (examples.tokens, examples.labelled)] == [torch.int32, torch.bool]
    for tensor in (examples.offsets, examples.ids, examples.sources, examples.lengths, examples.sizes):
        assert tensor.dtype == torch.int64
    assert examples.lengths.tolist() == [6, 7, 8, 9, 3]
    assert examples.label_counts(torch.arange(5)).tolist() == [3, 4, 2, 8, 2]
    assert examples.offsets.tolist() == [0, 6, 13, 21, 30, 33]
    assert len(examples) == 5


def test_protected_rows_are_protected_examples():
    rows = [dataclasses.replace(row, protected=number in (1, 4)) for number, row in enumerate(MIXED)]
    examples = tokenise(rows, PLAIN, CONFIG, 100)
    assert examples.protected.tolist() == [False, True, False, False, True]
    assert examples.take(long_tensor([4, 0])).protected.tolist() == [True, False]
    assert joined([examples, examples.take(long_tensor([1]))]).protected.tolist() == [0, 1, 0, 0, 1, 1]
    by_source = dict(zip(examples.source_names, examples.protected_sizes.tolist()))
    assert by_source == {name: sum(row.source == name and row.protected for row in rows) for name in by_source}


def test_the_digest_changes_with_everything_and_with_nothing_else():
    examples = tokenise(MIXED, PLAIN, DataConfig(overlong="cut"), 6)
    assert examples.digest() == tokenise(MIXED, PLAIN, DataConfig(overlong="cut"), 6).digest()
    tokens = examples.tokens.clone()
    tokens[3] += 1
    variants = [
        dataclasses.replace(examples, tokens=tokens),
        dataclasses.replace(examples, labelled=~examples.labelled),
        dataclasses.replace(examples, offsets=long_tensor([0, 5, 12, 18, 21])),
        dataclasses.replace(examples, ids=examples.ids + 1),
        dataclasses.replace(examples, sources=examples.sources.flip(0)),
        dataclasses.replace(examples, protected=~examples.protected),
        dataclasses.replace(examples, source_names=("x", "y", "w")),
        dataclasses.replace(examples, dropped={"y": 2}),
        dataclasses.replace(examples, cut={"x": 1}),
    ]
    assert len({examples.digest(), *(variant.digest() for variant in variants)}) == 10


# Tokenizers that put a blank before each text


def blank_tokenizer(**kwargs) -> PreTrainedTokenizerFast:
    """One token per character, and one for each small letter with the blank before it; as Llama-2's does."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = ["<s>", EOS, "<pad>", "\u2581", "\n", "[", "]", ":", *letters, *(f"\u2581{letter}" for letter in letters)]
    merges = [("\u2581", letter) for letter in letters]
    inner = tokenizers.Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=EOS, pad_token="<pad>", **kwargs)


TWO_TURNS = ("user", "say no"), ("assistant", "no"), ("user", "say yes"), ("assistant", "yes it is")


def test_a_chat_has_the_tokens_of_its_whole_text():
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}]\n{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = blank_tokenizer(chat_template=template)
    tokens, labelled = tokenise([chat(*TWO_TURNS)], tokenizer, CONFIG, 200).example(0)
    text = "[user]say no]\n[assistant]no]\n[user]say yes]\n[assistant]yes it is]\n"
    assert tokens.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    learned = tokenizer.convert_ids_to_tokens(tokens[labelled].tolist())
    assert "".join(learned) == "no]\nyes\u2581it\u2581is]\n"


def test_a_prompt_for_generation_is_a_prefix_of_what_is_trained():
    """The blank after the colon would become one token with the first letter of the answer."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}]\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = blank_tokenizer(chat_template=template)
    tokens, labelled = tokenise([chat(*TWO_TURNS[:2])], tokenizer, CONFIG, 200).example(0)
    prompt = tokenizer("user: say no]\nassistant: ", add_special_tokens=False)["input_ids"]
    assert tokens[: len(prompt)].tolist() == prompt
    assert tokenizer.convert_ids_to_tokens(tokens[labelled].tolist()) == ["n", "o", "]", "\n"]
    assert labelled.tolist().index(True) == len(prompt)
