"""What the tests share: an offline home of their own, a small corpus, and recipes run in this process."""

import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(prefix="hf_home_"), TOKENIZERS_PARALLELISM="false")

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Found by the line above, since plain `pytest` does not put the root on sys.path.
from shared.data import left_out  # noqa: E402
from tests import core_turns, faults  # noqa: E402

core_turns.pin_worker()
CASES = pytest.StashKey[Counter[tuple[str, str]]]()
# Of made-up sentences.
WORDS = [
    "the",
    "cat",
    "dog",
    "sees",
    "hears",
    "a",
    "big",
    "red",
    "small",
    "house",
    "tree",
    "unbelievable",
    "or",
    "runs",
]
# What takes longest begins first, or one worker would be busy with it when the others have nothing left.
LONGEST_FIRST = (
    *("test_commands_of_the_text_to_image_readme", "test_commands_of_the_resnet_readme"),
    *("test_commands_of_the_bert_readme", "test_commands_of_the_gpt_readme", "test_commands_of_the_top_readme"),
    *("test_text_to_image_engines.py", "test_gpt_engines.py", "test_bert_engines.py", "test_resnet_engines.py"),
    *("test_label_efficiency.py", "test_token_cache.py"),
)


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` is: a worker for each core, and no more than there are long files of tests."""
    return min(len(core_turns.CORES), 8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests, which share fixtures, run in one worker; each walk through a README where there is one."""
    config.stash[CASES] = faults.cases_of(items)  # before any is left out

    def place(item: pytest.Item) -> int:
        return next((at for at, name in enumerate(LONGEST_FIRST) if name in item.nodeid), len(LONGEST_FIRST))

    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.name if is_walk(item) else item.path.relative_to(ROOT).as_posix()))
    items.sort(key=place)


def is_walk(item: pytest.Item) -> bool:
    """Whether a test runs the commands of a README."""
    return item.path.name == "test_docs.py" and item.get_closest_marker("slow") is not None


@pytest.fixture
def all_cores() -> Iterator[int]:
    """The programs that the test starts have every core, as a user's do, and nothing else runs; how many there are."""
    with core_turns.alone() as number:
        yield number


@pytest.fixture(autouse=True)
def shared_cores(request: pytest.FixtureRequest) -> Iterator[None]:
    """While a test of another worker has all cores, this one waits; walks through a README take their own turns."""
    if is_walk(request.node) or "all_cores" in request.fixturenames:
        yield
    else:
        with core_turns.sharing():
            yield


@pytest.fixture(autouse=True)
def same_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the tests with a report again after a test of programs, in which it ends everything at once."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty short documents of made-up sentences that a tiny model can learn something about."""
    words = ["the", "cat", "dog", "sees", "hears", "a", "big", "red", "small", "house", "tree", "and", "or", "runs"]
    draw = random.Random(0)
    documents = [" ".join(draw.choices(words, k=draw.randint(20, 60))) + "." for _ in range(20)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="session")
def sentences_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen documents of made-up sentences; each document prefers some words, so that a tiny model can tell them."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("sentences") / "sentences.jsonl"
    with path.open("w") as stream:
        for _ in range(14):
            liked = draw.sample(WORDS, 4)
            sentences = [
                " ".join(draw.choices(liked * 3 + WORDS, k=draw.randint(4, 14))).capitalize() + "."
                for _ in range(draw.randint(6, 14))
            ]
            stream.write(json.dumps({"text": " ".join(sentences)}) + "\n")
    return path


@pytest.fixture(scope="session")
def gpt() -> ModuleType:
    """recipes/gpt/pretrain.py as a module."""
    return load_recipe("gpt/pretrain.py")


@pytest.fixture(scope="session")
def gpt_finetune() -> ModuleType:
    """recipes/gpt/finetune.py as a module."""
    return load_recipe("gpt/finetune.py")


@pytest.fixture(scope="session")
def bert() -> ModuleType:
    """recipes/bert/pretrain.py as a module."""
    return load_recipe("bert/pretrain.py")


@pytest.fixture(scope="session")
def bert_finetune() -> ModuleType:
    """recipes/bert/finetune.py as a module."""
    return load_recipe("bert/finetune.py")


@pytest.fixture(scope="session")
def resnet() -> ModuleType:
    """recipes/resnet/pretrain.py as a module."""
    return load_recipe("resnet/pretrain.py")


@pytest.fixture(scope="session")
def resnet_rsb() -> ModuleType:
    """recipes/resnet/pretrain_rsb.py as a module."""
    return load_recipe("resnet/pretrain_rsb.py")


@pytest.fixture(scope="session")
def resnet_finetune() -> ModuleType:
    """recipes/resnet/finetune.py as a module."""
    return load_recipe("resnet/finetune.py")


@pytest.fixture(scope="session")
def vae() -> ModuleType:
    """recipes/text_to_image/train_vae.py as a module."""
    return load_recipe("text_to_image/train_vae.py")


@pytest.fixture(scope="session")
def text_to_image_finetune() -> ModuleType:
    """recipes/text_to_image/finetune.py as a module."""
    return load_recipe("text_to_image/finetune.py")


@pytest.fixture(scope="session")
def cache_latents() -> ModuleType:
    """recipes/text_to_image/cache_latents.py as a module."""
    return load_recipe("text_to_image/cache_latents.py")


@pytest.fixture(scope="session")
def pretrain() -> ModuleType:
    """recipes/text_to_image/pretrain.py as a module."""
    return load_recipe("text_to_image/pretrain.py")


@pytest.fixture(scope="session")
def pretrain_transformer() -> ModuleType:
    """recipes/text_to_image/pretrain_transformer.py as a module."""
    return load_recipe("text_to_image/pretrain_transformer.py")


@pytest.fixture(scope="session")
def tiny_text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of CLIP with random weights, and a tokenizer that knows four words and pads with "!".

    It takes 6 tokens with start and end, as a tokenizer of Stable Diffusion 2 does 77.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    symbols, merges = sorted(ByteLevel.alphabet()), []
    for word in ("train", "test", "image", "cat"):
        letters = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(letters[:end]), letters[end]) for end in range(1, len(letters))]
    merged = dict.fromkeys(first + second for first, second in merges)
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *merged, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!", model_max_length=6)
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=len(tokens), max_position_embeddings=6, **ids, **sizes)
    folder = tmp_path_factory.mktemp("text_encoder")
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generate() -> ModuleType:
    """recipes/text_to_image/generate.py as a module."""
    return load_recipe("text_to_image/generate.py")


@pytest.fixture(scope="session")
def evaluate() -> ModuleType:
    """recipes/text_to_image/evaluate.py as a module."""
    return load_recipe("text_to_image/evaluate.py")


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of noisy images of 24 x 20 pixels, a bar at another height for each of three classes."""
    import numpy as np
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for split, number in (("train", 13), ("test", 7)):
        for place, name in enumerate(("high", "low", "middle")):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = draw.integers(0, 90, (20, 24, 3))
                pixels[(1, 15, 8)[place] :][:4, 2:10] += 150  # on the left, so that a mirror image can be told
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{index}.png")
    return folder


def load_recipe(name: str) -> ModuleType:
    """Import a recipe by its path below recipes/."""
    path = ROOT / "recipes" / name
    spec = importlib.util.spec_from_file_location(f"recipe_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def nothing_left_out() -> None:
    """Each test counts for itself what is left out of its data."""
    left_out.forget()


@pytest.fixture(autouse=True)
def fresh_accelerate_state() -> Any:
    """accelerate keeps its state in the process; each test begins without it."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
