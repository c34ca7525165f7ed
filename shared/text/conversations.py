"""What an assistant learns from: conversations, prompts with completions, and plain texts, each as tokens and targets.

The three forms are those of trl: a column `messages` (a list of `role` and `content`); `prompt` and `completion`, both
texts or both lists of messages; or `text`. Conversations are written by the tokenizer's chat template. Learnt is what
the assistant says: from what the template puts before an answer, as a model is asked, to the token that ends it, or an
answer would never end. So a template must only add to a conversation that goes on; whether it marks answers for trl
(`{% generation %}`) does not matter. Words that spell a special token stay words. Of a prompt with a completion the
completion and the end token are learnt, of a text everything.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.data.local_files import split_named
from shared.data.subsets import held_out_of_each
from shared.text import tokenization
from shared.text.tables import in_utf8, load_split, split_names
from shared.text.tokenization import CONVERSATION_TOKENS
from shared.text.vocabulary import special_ids

SAMPLES = Path(__file__).parents[1] / "samples"
FORMS = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
Form = Literal["messages", "prompt and completion", "text"]
Message = dict[str, str]
_TURNS = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- ASSISTANT }}{% generation %}{{ message['content'] | trim + END }}{% endgeneration %}
    {%- elif message['role'] == 'user' %}
        {{- USER + message['content'] | trim + END_OF_OTHERS }}
    {%- else %}
        {{- SYSTEM + message['content'] | trim + END_OF_OTHERS }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ASSISTANT }}
{%- endif %}"""

# Twice, so that what ends an answer can be told from what ends a conversation.
_TRIAL = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2


class Example(NamedTuple):
    """Tokens of one example and which of them are targets; int64 and bool, both (tokens,)."""

    ids: np.ndarray
    is_target: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """N examples of one form.

    Attributes:
        form: which columns they have.
        records: of each example those columns.
        tasks: of each example the name of its task; () = there are none.
    """

    form: Form
    records: Sequence[dict[str, Any]]
    tasks: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.records)

    def fingerprint(self) -> str:
        """Changes when an example does."""
        digest = hashlib.sha256(self.form.encode())
        for record in self.records:
            digest.update(json.dumps(record, sort_keys=True).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def subset(self, chosen: np.ndarray) -> "Conversations":
        """Those at the given positions."""
        places = chosen.tolist()
        tasks = [self.tasks[place] for place in places] if self.tasks else ()
        return dataclasses.replace(self, records=[self.records[place] for place in places], tasks=tasks)

    def talks(self) -> bool:
        """Whether the examples are messages, which a chat template writes."""
        first = self.records[0]
        return self.form == "messages" or (self.form != "text" and isinstance(first["prompt"], list))


def open_conversations(
    data: str, *, config: str, split: str, task_column: str, field: str = "data_split", source: str = "data"
) -> Conversations:
    """Read and check one split.

    Args:
        data: see `split_names`.
        config: configuration of a Hub data set; "" = its only one.
        split: name of the split; a single file has train alone.
        task_column: of the names of tasks; "" = none.
        field: that names the split, for the message.
        source: the field that names the data, likewise.

    Raises:
        UsageError: something is not there, or not what it must be; it names column, row and what was expected.
    """
    splits = split_names(data, config, source)
    name = split_named(split, splits)
    expect(bool(name), field, split, f"one of the splits of {data!r}: {', '.join(splits)}")
    table = load_split(data, config, name, source)
    there = [form for form, columns in FORMS.items() if set(columns) <= set(table.column_names)]
    wanted = "a column messages, or prompt and completion, or text, got"
    expect(bool(there), source, data, f"{wanted} {', '.join(table.column_names)}")
    expect(len(table) > 0, source, data, f"at least one example in the split {split}")
    form: Form = there[0]  # type: ignore[assignment]  # a key of FORMS, which are these
    with in_utf8(data, source):
        records = table.select_columns(list(FORMS[form])).to_list()
    unused = [key for record in records for key in _other_fields(record)]
    more = f"such as {next(iter(unused), '')}"
    left_out.note("fields_of_messages", len(unused), where=f"the split {split} of {data}", more=more)
    records = [_plain(record) for record in records]
    kinds = [type(record[FORMS[form][0]]) for record in records]
    for row, record in enumerate(records):
        where = f"row {row} of the split {split} of {data!r}"
        expect(kinds[row] == kinds[0], FORMS[form][0], _short(record), f"a {kinds[0].__name__} as in row 0, in {where}")
        _check(record, where)
    if task_column:
        expect(task_column in table.column_names, "task_column", task_column, f"a column of {data!r}")
    return Conversations(form, records, [str(task) for task in table[task_column]] if task_column else ())


def hold_out(samples: Conversations, fraction: float) -> tuple[Conversations, Conversations]:
    """Part examples in those to train on and a share to evaluate on.

    Raises:
        UsageError: too few are left for one of both.
    """
    is_held_out = held_out_of_each(np.zeros(len(samples), dtype=np.int64), fraction)
    both = 0 < is_held_out.sum() < len(samples)
    expect(both, "eval_fraction", fraction, "a share that leaves examples on both sides")
    return samples.subset(np.flatnonzero(~is_held_out)), samples.subset(np.flatnonzero(is_held_out))


def read_template(file: str) -> str:
    """A chat template from a file.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        template = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template: {file!r}: expected a file with a template: {error}") from error
    expect(bool(template.strip()), "chat_template", file, "a file with a template, it is empty")
    return template


def with_template(tokenizer: Any, template: str = "", name: str = "") -> Any:
    """The tokenizer with a chat template.

    Args:
        tokenizer: a fast transformers tokenizer; one that has a template keeps it.
        template: Jinja that replaces it; "" = the tokenizer's own, or where it has none the one of this module, which
            takes the tokens that `train_byte_level_bpe` keeps for it, else plain words and the end token.
        name: of the template's file, for the message.

    Raises:
        UsageError: it cannot write a conversation, or rewrites one that goes on, or ends no answer.
    """
    tokenizer.chat_template = template or tokenizer.chat_template or _own_template(tokenizer)
    stop_token(tokenizer, "chat_template" if template else "tokenizer", name)
    return tokenizer


def stop_token(tokenizer: Any, field: str = "tokenizer", name: str = "") -> int:
    """The token with which the chat template ends an answer; without a template the end token.

    Args:
        tokenizer: of which one is asked for.
        field: that names the template, for the message.
        name: of its file; "" = the tokenizer's.

    Raises:
        UsageError: see `with_template`.
    """
    if not tokenizer.chat_template:
        return tokenizer.eos_token_id
    name = name or str(tokenizer.name_or_path)
    try:
        asked = ids_before_answer(tokenizer, _TRIAL[:1])
        one, two = _written(tokenizer, _TRIAL[:2]), _written(tokenizer, _TRIAL)
    except Exception as error:  # Jinja's errors, and what templates raise, have no common class
        reason = one_line(error)
        raise UsageError(f"{field}: {name!r}: expected a chat template that can be filled in: {reason}") from error
    only_adds = "a chat template that only adds tokens to a conversation that goes on"
    only_adds += " (what ends in a blank before an answer would become a part of its first token)"
    expect(one[: len(asked)] == asked, field, name, only_adds)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    answer = [token for token, _ in same][len(asked) :]
    known = tokenizer.added_tokens_decoder
    added = [token for token in answer if token in known and known[token].content.strip()]
    special = [token for token in added if known[token].special]  # added words, such as a line's end, end nothing
    ends = (special or added)[-1:]
    expect(bool(ends), field, name, "a chat template that ends an answer with a special token")
    return ends[0]


def end_tokens(model: Any, tokenizer: Any, stop: int) -> list[int]:
    """Ids that end what the model writes: its own, the tokenizer's, and the one that ends an answer.

    Args:
        model: of transformers that generates.
        tokenizer: its own.
        stop: see `stop_token`.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({stop, tokenizer.eos_token_id, *(token for token in own if token is not None)})


def encode_example(tokenizer: Any, record: dict[str, Any], stop: int) -> Example:
    """Tokens and targets of one example, special tokens included.

    Args:
        tokenizer: with a chat template, if the example is messages.
        record: the example.
        stop: see `stop_token`.

    Raises:
        UsageError: the template cannot write it, or rewrites earlier turns.
    """
    begin, end = special_ids(tokenizer)
    if "messages" in record:
        return _with_answers(tokenizer, record["messages"], 0, stop)
    if "text" in record:
        ids = np.concatenate([[begin], tokenization.encode(tokenizer.backend_tokenizer, record["text"]), [end]])
        return Example(ids, np.arange(len(ids)) > 0)
    if isinstance(record["prompt"], list):
        turns = [*record["prompt"], *record["completion"]]
        return _with_answers(tokenizer, turns, len(record["prompt"]), stop)
    asked, answer = (
        tokenization.encode(tokenizer.backend_tokenizer, record[side]) for side in ("prompt", "completion")
    )
    ids = np.concatenate([[begin], asked, answer, [end]])
    return Example(ids, np.arange(len(ids)) > len(asked))


def prompt_ids(tokenizer: Any, record: dict[str, Any]) -> np.ndarray:
    """What comes before the last answer of an example, int64 (tokens,), as the model is asked for one."""
    asked = _asked(record)
    if isinstance(asked, str):
        ids = tokenization.encode(tokenizer.backend_tokenizer, asked)
        return np.concatenate([[special_ids(tokenizer)[0]], ids])
    return np.array(ids_before_answer(tokenizer, asked), dtype=np.int64)


def ids_before_answer(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """What the chat template puts before an answer to `messages`; words that spell a special token stay words."""
    options = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": False}
    return tokenizer.apply_chat_template(list(messages), **options)


def question_of(record: dict[str, Any]) -> str:
    """What the last answer of an example answers."""
    asked = _asked(record)
    return asked if isinstance(asked, str) else asked[-1]["content"]


def example_of(samples: Conversations) -> Any:
    """What the first example asks, as a pipeline takes it."""
    if samples.form == "text":
        return samples.records[0]["text"][:40]
    return _asked(samples.records[0])


def answer_of(record: dict[str, Any]) -> str:
    """The last answer of an example with a question."""
    if "messages" in record:
        return next(turn["content"] for turn in reversed(record["messages"]) if turn["role"] == "assistant")
    completion = record["completion"]
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _asked(record: dict[str, Any]) -> Any:
    """The text or the messages before the last answer."""
    if "prompt" in record:
        return (
            [*record["prompt"], *record["completion"][:-1]] if isinstance(record["prompt"], list) else record["prompt"]
        )
    turns = record["messages"]
    return turns[: max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")]


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """The example without what messages have beside role and content."""

    def kept(value: Any) -> Any:
        turns = value if isinstance(value, list) else []
        is_right = bool(turns) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)
        return [{key: turn[key] for key in ("role", "content")} for turn in turns] if is_right else value

    return {column: kept(value) for column, value in record.items()}


def _other_fields(record: dict[str, Any]) -> list[str]:
    """What messages say beside role and content: names, tool calls, weights."""
    turns = [turn for value in record.values() if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    return [key for turn in turns for key in turn.keys() - {"role", "content"} if turn[key] not in (None, "", [])]


def _check(record: dict[str, Any], where: str) -> None:
    """Raise `UsageError` for an example from which nothing can be learnt."""
    for column, value in record.items():
        kinds = {"messages": (list,), "text": (str,)}.get(column, (str, list))
        wanted = " or ".join("a list of messages" if kind is list else "a text" for kind in kinds)
        expect(isinstance(value, kinds), column, _short(value), f"{wanted} in {where}")
    if "text" in record:
        expect(bool(record["text"]), "text", "", f"some text in {where}")
    elif "messages" in record:
        _check_turns(record["messages"], "messages", where)
    else:
        prompt, completion = record["prompt"], record["completion"]
        same = type(prompt) is type(completion)
        expect(same, "completion", _short(completion), f"a text or messages, as the prompt is, in {where}")
        if isinstance(prompt, list):
            _check_turns([*prompt, *completion], "prompt, completion", where)
            answers = bool(completion) and completion[-1]["role"] == "assistant"
            expect(answers, "completion", _short(completion), f"a message of the assistant in {where}")
        else:
            expect(bool(completion), "completion", "", f"some text in {where}")


def _check_turns(messages: list[Any], column: str, where: str) -> None:
    for turn in messages:
        is_message = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
        expect(is_message, column, _short(turn), f"role and content, both texts, in {where}")
        says = turn["role"] != "assistant" or bool(turn["content"].strip())
        expect(says, column, _short(turn), f"some text of the assistant in {where}")
    roles = [turn["role"] for turn in messages]
    expect("assistant" in roles, column, ", ".join(roles), f"a message of the assistant in {where}")
    talk = roles[roles[:1] == ["system"] :]
    in_turn = all(role == ("user", "assistant")[place % 2] for place, role in enumerate(talk))
    expect(in_turn, column, ", ".join(roles), f"system or nothing, then user and assistant in turn, in {where}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _own_template(tokenizer: Any) -> str:
    """Turns between the tokens that are kept for them; for a tokenizer without these, words on lines of their own."""
    known = tokenizer.get_vocab()
    end = tokenizer.eos_token
    if all(token in known for token in CONVERSATION_TOKENS):
        system, user, assistant, end = CONVERSATION_TOKENS
        after = end
    else:
        # A line's end, since a blank would become a part of the answer's first token.
        system, user, assistant, after = "", "User:\n", "Assistant:\n", "\n"
    parts = {"SYSTEM": system, "USER": user, "ASSISTANT": assistant, "END_OF_OTHERS": after, "END": end}
    named = re.compile(rf"\b({'|'.join(parts)})\b")
    return named.sub(lambda match: json.dumps(parts[match[0]]), _TURNS)


def _with_answers(tokenizer: Any, messages: Sequence[Message], first: int, stop: int) -> Example:
    """A conversation of which the answers from message `first` on are targets, each with the token that ends it."""
    ids = np.array(_written(tokenizer, messages), dtype=np.int64)
    is_target = np.zeros(len(ids), dtype=bool)
    for place in range(first, len(messages)):
        if messages[place]["role"] == "assistant":
            asked = ids_before_answer(tokenizer, messages[:place])
            ends = np.flatnonzero(ids[len(asked) :] == stop)
            only_adds = "a chat template that writes a conversation that goes on as it was, and ends each answer"
            expect(ids[: len(asked)].tolist() == asked and ends.size > 0, "chat_template", "its turns", only_adds)
            is_target[len(asked) : len(asked) + ends[0] + 1] = True
    return Example(ids, is_target)


def _written(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    return tokenizer.apply_chat_template(list(messages), sanitize_control_tokens=True, return_dict=False)
