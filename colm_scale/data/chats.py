"""Chats as text: a Jinja template renders them, and the assistant's turns, with the end of each, are learned.

Where a turn begins and ends is read from one rendering. A template's own ``{% generation %}`` marks decide. Without
them, every loop over the messages is made to mark which message it writes, and a turn is what its message wrote after
the generation prompt. Only a template that marks nothing is rendered again for each turn, as far as that turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

from colm_scale.data.formats import said, shown
from colm_scale.data.messages import Message
from colm_scale.data.readers import Row
from colm_scale.data.written import is_written_by_python, stands_in, texts_of
from colm_scale.errors import UserError

Span = tuple[int, int]
"""Begin and end of a part of a text, in characters."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Around marks: code points that no text may hold."""
_MARK = re.compile(f"{_OPEN}(/?)(\\d+|learned){_CLOSE}")
_GENERATION = "learned"
_FORMS = ((False, False), (False, True), (True, False), (True, True))
"""Whether arguments of calls are given as JSON in a text (DeepSeek's templates read that, others write it twice), and a
call without a text as one without a content (None): the first with which a template leaves nothing out is taken."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        text: All of it, without a generation prompt.
        learned: Parts that carry loss, in their order.
        left_out: Keys of messages whose text the template leaves out, as ``messages[1].reasoning_content``.
        marked: Whether the template's own marks say what is learned.
    """

    text: str
    learned: tuple[Span, ...]
    left_out: tuple[str, ...] = ()
    marked: bool = False


class ChatTemplate:
    """Renders chats.

    Args:
        source: The Jinja template.
        special_tokens: The tokenizer's special tokens, by the names that templates use, such as ``eos_token``.
        now: Date and time that templates may write.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, object], now: datetime):
        self._source = source
        self._variables = {**special_tokens, "strftime_now": now.strftime, "documents": None}

    def render(self, row: Row) -> RenderedChat:
        """Render the chat of a row.

        Raises:
            UserError: The template fails on this chat, or its turns cannot be told apart.
        """
        calls = [call for message in row.messages for call in message.more.get("tool_calls", ())]
        results: list[RenderedChat | UserError] = []
        for as_json, as_none in _FORMS if calls else _FORMS[:1]:
            try:
                found = self._rendered(row, as_json, as_none)
            except UserError as error:
                results.append(error)
                continue
            if not found.left_out and not any(is_written_by_python(call, found.text) for call in calls):
                return found
            results.append(found)
        first = results[0]
        if isinstance(first, UserError):
            raise first
        return first

    def _rendered(self, row: Row, as_json: bool, as_none: bool) -> RenderedChat:
        try:
            chat = _Chat(row, [self._as_dict(message, as_json, as_none) for message in row.messages])
        except TemplateError as error:
            raise _refused(row, error) from error
        text = self._write(_plain(self._source), chat)
        marks = _read_marks(self._write(_marking(self._source), chat), text)
        turns = marks.turns(len(row.messages))
        learned = self._learned(chat, text, marks, turns)
        _check_apart(row, text, turns, learned)
        spans = [span for turn, span in sorted(learned.items()) if row.messages[turn].learned]
        return RenderedChat(text, tuple(spans), tuple(self._left_out(row, text, turns)), bool(marks.generated))

    def _learned(self, chat: _Chat, text: str, marks: _Marks, turns: Mapping[int, Span]) -> dict[int, Span]:
        """Find the part of each of the assistant's turns that is learned."""
        assistant = chat.assistant_turns
        if marks.generated:
            return _assigned(marks.generated, assistant, turns, chat.row)
        if not set(assistant) <= turns.keys():
            return self._by_prefixes(chat, text)
        learned: dict[int, Span] = {}
        prompts: dict[str, str] = {}
        for turn in assistant:
            begin, end = turns[turn]
            if turn == len(chat.messages) - 1:
                end = len(text)  # a template may end the whole chat with an end token
            asked = turn or next((later for later in assistant if later), 0)
            role = chat.messages[asked - 1]["role"] if asked else ""  # after a tool some write another prompt
            if role not in prompts:
                prompts[role] = self._generation_prompt(chat.until(asked))
            prompt = prompts[role]
            place = text.find(prompt, begin, end)  # some write a system's message first, in the same turn
            if place < 0:
                raise _other_prompt(chat.row, turn, prompt, text[begin:end])
            learned[turn] = place + len(prompt), end
        return learned

    def _generation_prompt(self, before: _Chat) -> str:
        """Return what the template writes after a chat if an answer is to be generated."""
        marked = self._write(_marking(self._source), before, prompts=True)
        *others, last = _MARK.split(marked)
        return last if others else marked.removeprefix(self._write(_plain(self._source), before))

    def _by_prefixes(self, chat: _Chat, text: str) -> dict[int, Span]:
        """Render the chat up to each turn of the assistant, once with the turn and once with a prompt for it."""
        learned: dict[int, Span] = {}
        done = ""
        for turn in chat.assistant_turns:
            before = self._write(_plain(self._source), chat.until(turn), prompts=True)
            after = self._write(_plain(self._source), chat.until(turn + 1))
            if not (before.startswith(done) and after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{chat.row.where}: the chat template renders message {turn + 1} of {len(chat.messages)} "
                    "differently when it is the last one, so the assistant's turn cannot be told from the rest: use a "
                    "template that only appends, with --data.chat_template FILE"
                )
            learned[turn] = len(before), len(after)
            done = after
        return learned

    def _left_out(self, row: Row, text: str, turns: Mapping[int, Span]) -> Iterator[str]:
        """List the keys of messages that have a text that is not in what the template wrote."""
        for number, message in enumerate(row.messages):
            begin, end = turns.get(number, (0, len(text)))
            places = [text[begin:end], *([text] if message.role != "assistant" else [])]  # others may be written apart
            for key, value in {"content": message.content, **message.more}.items():
                if key in ("content", "reasoning_content", "tool_calls"):
                    stands = all(any(stands_in(part, place) for place in places) for part in texts_of(value))
                else:  # how the template uses it is unknown
                    stands = key in _UNSAID or re.search(rf"\b{re.escape(key)}\b", self._source) is not None
                if not stands:
                    yield f"messages[{number}].{key}"

    def _as_dict(self, message: Message, as_json: bool, as_none: bool) -> dict[str, Any]:
        """Make what a template reads of a message, in one of `_FORMS`."""
        content: object = message.content
        if _only_takes_parts(self._source):
            content = [{"type": "text", "text": part} for part in message.parts or (message.content,)]
        more = dict(message.more)
        if "reasoning_content" in more:
            more = {"thinking": more["reasoning_content"], **more}  # gpt-oss reads that
        if as_json and "tool_calls" in more:
            more["tool_calls"] = [_with_arguments_as_json(call) for call in more["tool_calls"]]
        if as_none and "tool_calls" in more and not message.content:
            content = None
        return {"role": message.role, "content": content, **more}

    def _write(self, template: Template, chat: _Chat, *, prompts: bool = False) -> str:
        numbers = {id(message): number for number, message in enumerate(chat.messages)}

        def mark(item: object, sign: str) -> str:
            return f"{_OPEN}{sign}{numbers[id(item)]}{_CLOSE}" if id(item) in numbers else ""

        try:
            return template.render(
                messages=chat.messages,
                tools=list(chat.row.tools) or None,
                add_generation_prompt=prompts,
                colm_scale_mark=mark,
                **self._variables,
            )
        except Exception as error:  # a template is a program, and may raise anything, jinja2's errors among others
            raise _refused(chat.row, error) from error


_UNSAID = ("name", "tool_call_id", "id")
"""Keys that link messages and hold no text to learn; many templates leave them out."""


@dataclass(frozen=True, slots=True)
class _Chat:
    """A row's messages as a template reads them; each is an object of its own."""

    row: Row
    messages: list[dict[str, Any]]

    @property
    def assistant_turns(self) -> list[int]:
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]

    def until(self, turn: int) -> _Chat:
        return _Chat(self.row, self.messages[:turn])


@dataclass(frozen=True, slots=True)
class _Marks:
    """Marks in a rendering: the parts each message wrote, and those between generation marks."""

    written: Sequence[tuple[int, Span]]
    generated: Sequence[Span]

    def turns(self, messages: int) -> dict[int, Span]:
        """The part of each message that wrote exactly one."""
        parts: dict[int, list[Span]] = {}
        for number, span in self.written:
            parts.setdefault(number, []).append(span)
        return {number: parts[number][0] for number in range(messages) if len(parts.get(number, ())) == 1}


def _read_marks(marked: str, text: str) -> _Marks:
    """Read and remove the marks; there are none if they have changed what a template wrote."""
    written: list[tuple[int, Span]] = []
    generated: list[Span] = []
    begins: dict[str, int] = {}
    pieces: list[str] = []
    place = done = 0
    for match in _MARK.finditer(marked):
        pieces.append(marked[done : match.start()])
        place, done = place + len(pieces[-1]), match.end()
        if not match[1]:
            begins[match[2]] = place
        elif (begin := begins.pop(match[2], place)) < place:
            if match[2] == _GENERATION:
                generated.append((begin, place))
            else:
                written.append((int(match[2]), (begin, place)))
    pieces.append(marked[done:])
    return _Marks(written, generated) if "".join(pieces) == text else _Marks((), ())


def _assigned(
    generated: Sequence[Span], assistant: Sequence[int], turns: Mapping[int, Span], row: Row
) -> dict[int, Span]:
    """Assign the parts between generation marks to the assistant's turns."""
    if len(generated) == len(assistant):
        return dict(zip(assistant, generated))
    found: dict[int, Span] = {}
    for begin, end in generated:
        for turn in assistant:
            if turn in turns and turns[turn][0] <= begin and end <= turns[turn][1]:
                found[turn] = found.get(turn, (begin, end))[0], end
    if len(found) < len(assistant):
        missing = next(turn for turn in assistant if turn not in found)
        raise UserError(
            f"{row.where}: the chat template has {{% generation %}} marks, but none around message {missing + 1} of "
            f"{len(row.messages)}, which is the assistant's: correct the template (--data.chat_template FILE)"
        )
    return found


def _refused(row: Row, error: Exception) -> UserError:
    return UserError(
        f"{row.where}: the chat template refuses these messages: {said(error)}. Correct the row, or give another "
        "template with --data.chat_template FILE"
    )


def _check_apart(row: Row, text: str, turns: Mapping[int, Span], learned: Mapping[int, Span]) -> None:
    """Check that no message of another role stands in what is learned."""
    for number, message in enumerate(row.messages):
        said = message.content.strip()
        if message.role == "assistant" or number in turns or not said:
            continue
        for turn, (begin, end) in learned.items():
            if turn < number and said in text[begin:end] and said not in text[:begin] + text[end:]:
                raise UserError(
                    f"{row.where}: the chat template writes message {number + 1} of {len(row.messages)}, of the role "
                    f"{message.role}, inside message {turn + 1}, which is the assistant's, so it would be learned too: "
                    "use a template that writes them apart, with --data.chat_template FILE"
                )


def _other_prompt(row: Row, turn: int, prompt: str, written: str) -> UserError:
    same = next((place for place, (a, b) in enumerate(zip(prompt, written)) if a != b), min(len(prompt), len(written)))
    return UserError(
        f"{row.where}: the generation prompt ends in {shown(prompt[same:])}, but the chat template writes message "
        f"{turn + 1} of {len(row.messages)}, which is the assistant's, without it ({shown(written[same:])}): what is "
        "trained would not continue what the model is given later. Use a template that writes both alike, with "
        "--data.chat_template FILE"
    )


def _with_arguments_as_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


@lru_cache
def _plain(source: str) -> Template:
    template: Template = _compile_jinja_template(source)  # with transformers' sandbox, filters and functions
    return template


@lru_cache
def _marking(source: str) -> Template:
    """Compile a template so that it marks what each message writes, and what stands between generation marks."""
    environment: Environment = _plain(source).environment
    tree = _AddMarks().visit(environment.parse(source)).set_environment(environment)
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


class _AddMarks(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        if isinstance(node.target, nodes.Name):
            name = node.target.name
            node.body = [_marked(name, ""), *node.body, _marked(name, "/")]
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> list[nodes.Node] | nodes.CallBlock:
        self.generic_visit(node)
        extension = node.call.node
        if not isinstance(extension, nodes.ExtensionAttribute) or extension.name != "_generation_support":
            return node
        begin, end = (nodes.TemplateData(f"{_OPEN}{sign}{_GENERATION}{_CLOSE}") for sign in ("", "/"))
        return [nodes.Output([begin]), *node.body, nodes.Output([end])]


def _marked(name: str, sign: str) -> nodes.Output:
    mark = nodes.Name("colm_scale_mark", "load")
    return nodes.Output([nodes.Call(mark, [nodes.Name(name, "load"), nodes.Const(sign)], [], None, None)])


@lru_cache
def _only_takes_parts(source: str) -> bool:
    """Tell whether a template can only read a message's content as a list of parts."""
    tree = _plain(source).environment.parse(source)
    if any(test.name == "string" for test in tree.find_all(nodes.Test)):
        return False
    names = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _is_content(node.node)
    }
    return any(
        _is_content(loop.iter) or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names)
        for loop in tree.find_all(nodes.For)
    )


def _is_content(node: nodes.Node) -> bool:
    match node:
        case nodes.Filter(node=nodes.Expr() as filtered):
            return _is_content(filtered)
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
    return False
