"""Generate text from a run of pretrain.py or finetune.py, or from any causal language model's folder or Hub id.

python recipes/gpt/generate.py --model outputs/gpt --prompt "It was a truth"
python recipes/gpt/generate.py --model outputs/gpt_finetuned --chat
python recipes/gpt/generate.py --model outputs/gpt_finetuned --chat --prompt "What does cat mean?"
python recipes/gpt/generate.py --model openai-community/gpt2 --max_new_tokens 200 --temperature 0.7
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.command_line import Place
from shared.fields import Count, ShareAboveZero


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to generate."""

    # Data
    prompt: str = ""
    """Text to continue. "" = none, the model begins by itself. With chat a question; "" = what is typed, to an empty
    line."""
    max_new_tokens: Count = 128  # Tokens to add at most; the end token ends earlier.
    chat: bool = False  # Answer as the model's chat template has it; the conversation goes on.

    # Model
    model: Place = "outputs/gpt"  # Run folder, folder of save_pretrained or of an adapter, or Hub id.
    temperature: Annotated[float, cli.Limit(lambda value: value >= 0, "0 or more")] = 0.8
    """Below 1 sharpens, above 1 flattens the distribution. 0 = always the likeliest token."""
    top_p: ShareAboveZero = 0.95  # Smallest probability mass to draw from (nucleus sampling). 1 = all.

    # Run
    config: Place = ""  # YAML file with differences from the defaults; flags override it. "" = none.
    seed: Annotated[int, cli.Limit(lambda value: 0 <= value < 1 << 63, "0 or more, and less than 2^63")] = 0
    """The same seed gives the same text."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import torch
from transformers import AutoModelForCausalLM, TextStreamer

from shared.data.randomness import derive_seed
from shared.models.adapters import load_with_adapter
from shared.text.conversations import end_tokens, ids_before_answer, stop_token
from shared.text.generation import continue_ids, continue_prompt, room_for_prompt
from shared.text.tokenization import load_tokenizer


def talk(cfg: Config, model: Any, tokenizer: Any, drawing: dict[str, Any]) -> None:
    """Answer a question, or one after the other; where a conversation has no room its first turns are forgotten."""
    messages: list[dict[str, str]] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ends = {"eos_token_id": end_tokens(model, tokenizer, stop_token(tokenizer))}
    while question := cfg.prompt or read_line():
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes that are no UTF-8
        messages.append({"role": "user", "content": question})
        ids = ids_before_answer(tokenizer, messages)
        while len(ids) > room_for_prompt(model, cfg.max_new_tokens) and len(messages) > 1:
            messages = messages[2:]
            ids = ids_before_answer(tokenizer, messages)
        ids = ids[-room_for_prompt(model, cfg.max_new_tokens) :]
        seed = derive_seed(cfg.seed, "turn", len(messages))
        answer = continue_ids(model, tokenizer, ids, seed, streamer=streamer, **ends, **drawing)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        if cfg.prompt:
            return


def read_line() -> str:
    """What is typed; "" at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main(cfg: Config) -> None:
    """Load the model and stream a continuation, or answers, to the terminal."""
    cli.check_limits(cfg)
    model = load_with_adapter(AutoModelForCausalLM, cfg.model, "model")
    tokenizer = load_tokenizer(cfg.model)
    has_template = bool(tokenizer.chat_template) or not cfg.chat
    cli.expect(
        has_template, "chat", True, f"a model with a chat template, as finetune.py leaves one; {cfg.model!r} has none"
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = model.to(device)
    drawing = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p}
    if cfg.chat:
        sys.stdin.reconfigure(errors="surrogateescape")  # a byte that is no UTF-8 ends no conversation
        talk(cfg, model, tokenizer, drawing)
        return
    continue_prompt(
        model, tokenizer, cfg.prompt, cfg.seed, streamer=TextStreamer(tokenizer, skip_special_tokens=True), **drawing
    )


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
