from typing import Any
import numpy as np
import torch
def load_text_encoder(name, field): ...
def token_ids(tokenizer: Any, captions) -> tuple[np.ndarray, int]:
    ids = tokenizer(list(captions), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="np").input_ids
    return ids.astype(np.int64), 0
def encode_text(encoder, ids): ...
