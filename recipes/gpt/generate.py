"""Generate text from a run of pretrain.py, or from any causal language model's folder or Hub id, token by token.

python recipes/gpt/generate.py --model outputs/gpt --prompt "It was a truth"
python recipes/gpt/generate.py --model openai-community/gpt2 --max_new_tokens 200 --temperature 0.7
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.fields import Count, ShareAboveZero


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to generate."""

    # Data
    prompt: str = "The President of the United States"  # Text to continue; may be empty.
    max_new_tokens: Count = 128  # Tokens to add at most; the end token ends earlier.

    # Model
    model: str = "outputs/gpt"  # Run folder, folder of save_pretrained, or Hub id.
    temperature: Annotated[float, cli.Limit(lambda value: value >= 0, "0 or more")] = 0.8
    """Below 1 sharpens, above 1 flattens the distribution. 0 = always the likeliest token."""
    top_p: ShareAboveZero = 0.95  # Smallest probability mass to draw from (nucleus sampling). 1 = all.

    # Run
    config: str = ""  # YAML file with differences from the defaults; flags override it. "" = none.
    seed: int = 0  # The same seed gives the same text.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import torch

from shared.models.pretrained import load_pretrained
from shared.text.generation import continue_prompt
from shared.text.tokenization import load_tokenizer


def main(cfg: Config) -> None:
    """Load the model and stream a continuation to the terminal."""
    cli.check_limits(cfg)
    from transformers import AutoModelForCausalLM, TextStreamer

    model = load_pretrained(AutoModelForCausalLM, cfg.model, "model")
    tokenizer = load_tokenizer(cfg.model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    continue_prompt(
        model.to(device),
        tokenizer,
        cfg.prompt,
        cfg.seed,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
    )


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
