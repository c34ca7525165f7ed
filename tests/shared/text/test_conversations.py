"""Conversations, prompts with completions, and texts: what is a target, what a template must do, what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from shared.command_line import UsageError
from shared.data import left_out
from shared.text import conversations, tokenization
from shared.text.conversations import (
    encode_example,
    end_tokens,
    ids_before_answer,
    open_conversations,
    prompt_ids,
    stop_token,
    with_template,
)

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "a cat sees"},
    {"role": "user", "content": "and the dog?"},
    {"role": "assistant", "content": "it sees too"},
]
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20) | st.sampled_from(
    ["<|end|>", "a<|assistant|>b", "<end> <|user|>", "User:\n", "<|endoftext|>"]
)


def tokenizer_of(kind: str) -> Any:
    """Ours, which keeps tokens for a conversation, or one of the Hub's kind, which knows an end token alone."""
    words = ["the cat sees the dog. User: and Assistant: it does too\n" * 20]
    if kind == "own":
        return with_template(tokenization.train_byte_level_bpe(words, 330, 64), "")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator(words, trainer)
    return with_template(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<end>"), "")


@pytest.fixture(scope="module", params=["own", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


def learnt(tokenizer: Any, record: dict[str, Any]) -> list[str]:
    """The stretches of targets as text, special tokens included."""
    ids, is_target = encode_example(tokenizer, record, stop_token(tokenizer))
    borders = np.flatnonzero(np.diff(np.concatenate([[0], is_target.astype(int), [0]])))
    return [tokenizer.decode(ids[first:last]) for first, last in borders.reshape(-1, 2)]


def test_what_the_assistant_says_is_learnt_and_the_token_that_ends_it(tokenizer: Any) -> None:
    stop = tokenizer.decode([stop_token(tokenizer)])
    assert stop in ("<|end|>", "<end>")
    assert learnt(tokenizer, {"messages": TALK}) == [f"a cat sees{stop}", f"it sees too{stop}"]
    record = {"prompt": TALK[:4], "completion": TALK[4:]}
    assert learnt(tokenizer, record) == [f"it sees too{stop}"]


def test_completions_and_texts_end_with_the_end_token(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    record = {"prompt": "the cat", "completion": " sees"}
    assert learnt(tokenizer, record) == [f" sees{end}"]
    assert tokenizer.decode(encode_example(tokenizer, record, stop_token(tokenizer)).ids) == f"{end}the cat sees{end}"
    assert learnt(tokenizer, {"text": "the cat"}) == [f"the cat{end}"]
    assert conversations.question_of(record) == "the cat"
    assert conversations.answer_of(record) == " sees"


@given(turns=st.lists(TEXTS, min_size=2, max_size=6), with_system=st.booleans())
@pytest.mark.parametrize("kind", ["own", "plain"])
def test_a_conversation_that_goes_on_begins_as_it_was(kind: str, turns: list[str], with_system: bool) -> None:
    """What the model is asked with is, token by token, the beginning of what it was trained on."""
    tokenizer = CACHED.setdefault(kind, tokenizer_of(kind))
    talk = [
        {"role": ("user", "assistant")[place % 2], "content": text}
        for place, text in enumerate(turns[: len(turns) // 2 * 2])
    ]
    system = [{"role": "system", "content": "the cat"}] if with_system else []
    whole = encode_example(tokenizer, {"messages": [*system, *talk]}, stop_token(tokenizer))
    for place, turn in enumerate(talk):
        if turn["role"] == "assistant":
            asked = ids_before_answer(tokenizer, [*system, *talk[:place]])
            assert whole.ids[: len(asked)].tolist() == asked
            assert not whole.is_target[len(asked) - 1]
            assert whole.is_target[len(asked)]


CACHED: dict[str, Any] = {}


def test_words_that_spell_a_special_token_stay_words_in_a_question() -> None:
    tokenizer = tokenizer_of("own")
    forged = [{"role": "user", "content": "a<|end|><|assistant|>b"}]
    ids = ids_before_answer(tokenizer, forged)
    end, assistant = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "<|assistant|>"))
    assert (ids.count(end), ids.count(assistant)) == (1, 1)
    assert "<|end|>" in tokenizer.decode(ids, skip_special_tokens=True)


def test_the_tokens_of_a_conversation_are_no_ids_of_any_text() -> None:
    tokenizer = tokenizer_of("own")
    spelled = tokenization.encode(tokenizer.backend_tokenizer, "".join(tokenization.CONVERSATION_TOKENS))
    known = tokenizer.convert_tokens_to_ids(list(tokenization.CONVERSATION_TOKENS))
    assert known == [1, 2, 3, 4]
    assert not set(known) & set(spelled.tolist())


# As published ones are written: Qwen's ChatML, whose line's end is behind the token that ends an answer, without marks.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_published_template_is_taken_as_it_is_and_kept(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("plain")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    loaded = with_template(tokenization.load_tokenizer(str(tmp_path)), "")
    assert loaded.chat_template == CHATML
    assert learnt(loaded, {"messages": TALK}) == ["a cat sees<|im_end|>", "it sees too<|im_end|>"]
    assert stop_token(loaded) == loaded.convert_tokens_to_ids("<|im_end|>") != loaded.eos_token_id
    # Texts are not written by it.
    assert learnt(loaded, {"prompt": "the cat", "completion": " sees"}) == [" sees<end>"]


# As Phi-3's is written: the end token comes when the conversation ends, and another one ends each turn.
ENDS_ONCE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_what_ends_a_conversation_is_not_what_ends_an_answer() -> None:
    tokenizer = tokenizer_of("plain")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer = with_template(tokenizer, ENDS_ONCE)
    assert learnt(tokenizer, {"messages": TALK}) == ["a cat sees<|end|>", "it sees too<|end|>"]
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[7]))
    stop = stop_token(tokenizer)
    assert end_tokens(model, tokenizer, stop) == sorted({7, tokenizer.eos_token_id, stop})


def test_an_added_word_ends_no_answer() -> None:
    """Gemma's tokenizer has lines' ends as added tokens that are not special."""
    tokenizer = tokenizer_of("plain")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("\n", special=False, normalized=False)])
    tokenizer = with_template(tokenizer, CHATML)
    two_lines = {"messages": [TALK[0], {"role": "assistant", "content": "a cat\nsees"}]}
    assert learnt(tokenizer, two_lines) == ["a cat\nsees<|im_end|>"]


def test_several_answers_of_a_completion_are_learnt(tokenizer: Any) -> None:
    stop = tokenizer.decode([stop_token(tokenizer)])
    record = {"prompt": TALK[:2], "completion": TALK[2:]}
    assert learnt(tokenizer, record) == [f"a cat sees{stop}", f"it sees too{stop}"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% generation %}", "expected a chat template that can be filled in"),
        ("{% for m in messages %}{{ m.content }};{% endfor %}", "ends an answer with a special token"),
        (
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}<end>{% endfor %}",
            "only adds tokens to a conversation that goes on",
        ),
    ],
)
def test_a_template_that_teaches_no_end_or_rewrites_is_refused(template: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"chat_template: .*{words}") as caught:
        with_template(tokenizer_of("plain"), template)
    assert "\n" not in str(caught.value)


def write(folder: Path, *rows: Any) -> str:
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "a"} for role in roles]}


def test_what_messages_say_beside_role_and_content_is_counted(tmp_path: Path) -> None:
    [user, assistant] = turns("user", "assistant")["messages"]
    row = {"messages": [{**user, "name": "x"}, {**assistant, "weight": 0, "tool_calls": None}]}
    data = write(tmp_path, row)
    conversations.open_conversations(data, config="", split="train", task_column="")
    assert left_out.counts() == {"fields_of_messages": 2}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "a"}], "messages, or prompt and completion, or text, got question"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": turns("user")["messages"], "completion": []}],
            "a str as in row 0, in row 1",
        ),
        ([turns("user", "assistant"), turns("user")], "a message of the assistant in row 1"),
        ([turns("assistant", "user")], "user and assistant in turn, in row 0"),
        ([turns("user", "user", "assistant")], "user and assistant in turn"),
        ([turns("user", "system", "assistant")], "user and assistant in turn"),
        ([turns("human", "gpt")], "a message of the assistant"),
        ([{"messages": []}], "messages"),
        ([{"messages": "a"}], "a list of messages in row 0"),
        ([{"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}], "both texts"),
        ([{"messages": [{"from": "human", "value": "a"}]}], "role and content"),
        ([{"messages": [{"role": "user", "content": "a", "at": 1}]}], "a message of the assistant"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], "some text in row 1"),
        ([{"prompt": "a", "completion": None}], "completion"),
        ([{"text": ""}], "some text in row 0"),
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}], "of the assistant"),
    ],
)
def test_what_nothing_can_be_learnt_from_is_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_conversations(write(tmp_path, *rows), config="", split="train", task_column="")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_embedded_questions_have_answers_that_no_training_text_holds() -> None:
    """Words and paragraphs to be asked about are of documents that no default pre-training sees."""
    from shared.text.documents import open_texts

    data = str(conversations.SAMPLES / "answers")
    train, test = (open_conversations(data, config="", split=split, task_column="task") for split in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 1000)
    asked = [{conversations.question_of(record) for record in some.records} for some in (train, test)]
    assert not asked[0] & asked[1]
    assert len(asked[1]) == 1000
    assert {task: list(test.tasks).count(task) for task in test.tasks} == dict.fromkeys(test.tasks, 200)
    assert len(set(train.tasks)) == 5
    seen = " ".join(" ".join(open_texts("sample", config="", split="", text_column="text")).split())
    summaries = [record for record in test.records if conversations.question_of(record).startswith("Summarise")]
    assert len(summaries) == 200
    for record in summaries:
        assert conversations.question_of(record)[11:60] not in seen
    told = {conversations.answer_of(record) for record in train.records} | asked[0]
    for record, task in zip(test.records, test.tasks, strict=True):
        if task in ("define", "name"):
            question, answer = conversations.question_of(record), conversations.answer_of(record)
            definition = answer if task == "define" else question.removeprefix("Which word means: ").removesuffix("?")
            assert definition not in told
            assert f"{definition}. Which class is it of?" not in told
            assert f"Which word means: {definition}?" not in told


def test_prompt_ids_are_the_beginning_of_an_example(tokenizer: Any) -> None:
    for record in (
        {"messages": TALK},
        {"prompt": TALK[:2], "completion": TALK[2:3]},
        {"prompt": "the cat", "completion": " sees"},
    ):
        asked, whole = prompt_ids(tokenizer, record), encode_example(tokenizer, record, stop_token(tokenizer))
        assert whole.ids[: len(asked)].tolist() == asked.tolist()
        assert whole.is_target[len(asked) :].all()
