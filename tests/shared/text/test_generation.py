"""Generated text depends on the seed alone, fits the model's rows, and leaves the model as it was."""

from typing import Any

import pytest
import torch
from torch import nn

from shared.text.generation import continue_prompt

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0}


@pytest.fixture(scope="module")
def model() -> Any:
    """A model that ignores what came before: every token is always about as likely as the others."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, initializer_range=0.01))
    nn.init.zeros_(model.transformer.ln_f.weight)
    nn.init.ones_(model.transformer.ln_f.bias)
    return model


class Ids:
    """A streamer that keeps the token ids."""

    def __init__(self) -> None:
        self.prompt: list[int] = []
        self.new: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.prompt = value.flatten().tolist()
        else:
            self.new += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_the_same_seed_gives_the_same_text_and_another_another(model, tokenizer):
    texts = [continue_prompt(model, tokenizer, "It was", seed, **OPTIONS) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("It was")


def test_temperature_0_takes_the_likeliest_whatever_the_seed(model, tokenizer):
    texts = {continue_prompt(model, tokenizer, "It was", seed, **{**OPTIONS, "temperature": 0}) for seed in range(3)}
    assert len(texts) == 1


def test_a_small_top_p_and_a_small_temperature_come_near_the_likeliest(model, tokenizer):
    greedy = continue_prompt(model, tokenizer, "It was", 0, **{**OPTIONS, "temperature": 0})
    assert continue_prompt(model, tokenizer, "It was", 5, **{**OPTIONS, "top_p": 1e-6}) == greedy
    assert continue_prompt(model, tokenizer, "It was", 5, **{**OPTIONS, "temperature": 1e-5}) == greedy


def test_all_tokens_can_be_drawn_not_the_fifty_likeliest_alone(model, tokenizer):
    drawn = set()
    for seed in range(8):
        ids = Ids()
        continue_prompt(model, tokenizer, "", seed, **{**OPTIONS, "max_new_tokens": 16}, streamer=ids)
        drawn |= set(ids.new)
    assert len(drawn) > 60


def test_the_begin_token_stands_before_the_prompt(model, tokenizer):
    for prompt in ("", "It was a truth"):
        ids = Ids()
        text = continue_prompt(model, tokenizer, prompt, 0, **OPTIONS, streamer=ids)
        assert ids.prompt == [tokenizer.eos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        assert len(ids.new) == 8
        assert text == tokenizer.decode([*ids.prompt, *ids.new], skip_special_tokens=True)


@pytest.mark.parametrize(("words", "max_new_tokens"), [(1, 31), (1, 200), (20, 20), (500, 8), (500, 200)])
def test_rows_longer_than_the_model_has_are_not_asked_for(model, tokenizer, words, max_new_tokens):
    ids = Ids()
    options = {**OPTIONS, "max_new_tokens": max_new_tokens}
    continue_prompt(model, tokenizer, "word " * words, 0, **options, streamer=ids)
    assert ids.prompt
    assert 0 < len(ids.new) <= max_new_tokens
    assert len(ids.prompt) + len(ids.new) <= 32


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_no_gradient_kept(model, tokenizer, training):
    model.train(training)
    continue_prompt(model, tokenizer, "It", 0, **OPTIONS)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 1024, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, embd_pdrop=0.9, resid_pdrop=0.9))
    model.train()
    texts = {continue_prompt(model, tokenizer, "It was", seed, **{**OPTIONS, "temperature": 0}) for seed in range(3)}
    assert len(texts) == 1
