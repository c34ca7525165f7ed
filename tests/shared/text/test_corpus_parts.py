"""A cache in the making goes on after a kill, whoever writes its parts, and is the same to the byte."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.command_line import UsageError
from shared.text import corpus_parts, document_pool, sentence_cache, token_cache
from shared.text.documents import open_texts
from shared.text.packing import pack_corpus
from shared.text.token_cache import tokenizing_step
from shared.text.wordpiece import train_wordpiece

TEXTS = [f"Text {number} is here. It has {'many ' * (number % 40)}words." for number in range(300)]
FILES = 6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_parts, "PART_CHARACTERS", 6000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Files of different sizes, one of which holds nothing; equal texts in several of them."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(FILES):
        texts = ["", *TEXTS[number * number * 8 : (number + 1) ** 2 * 8], TEXTS[0]] if number != 3 else [""]
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return open_texts(str(folder), config="", split="", text_column="")


@pytest.fixture(scope="module")
def pack(tokenizer: Any) -> Callable[..., None]:
    """Make a cache of some texts for GPT in a folder."""

    def pack(texts: Any, folder: Path, fraction: float = 0.1) -> None:
        pack_corpus(texts, tokenizer, cache_dir=folder, seq_length=16, eval_fraction=fraction, num_processes=1)

    return pack


@pytest.fixture(scope="module")
def split(prose: list[str]) -> Callable[..., None]:
    """The same for BERT."""
    wordpiece = train_wordpiece(prose[:1], vocab_size=300, seq_length=64, lowercase=True)

    def split(texts: Any, folder: Path) -> None:
        options: dict[str, Any] = {"language": "en", "one_sentence_per_line": False, "num_processes": 1}
        sentence_cache.split_corpus(texts, wordpiece, cache_dir=folder, eval_fraction=0.1, **options)

    return split


@pytest.fixture(scope="module", params=["pack", "split"])
def build(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Make either."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def at_once(build: Any, corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a cache that was made of one part, for nothing was changed yet."""
    folder = tmp_path_factory.mktemp("at once")
    build(corpus, folder)
    return files(folder)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are encoded from now on."""
    texts: list[str] = []

    def counting(encode: Any) -> Any:
        return lambda documents, **options: encode(noted(documents), **options)

    def noted(documents: Any) -> Iterator[str]:
        for text in documents:
            texts.append(text)
            yield text

    monkeypatch.setattr(token_cache, "_tokenize", counting(token_cache._tokenize))
    monkeypatch.setattr(sentence_cache, "_split", counting(sentence_cache._split))
    return texts


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(function: Callable[..., None], *arguments: Any) -> None:
    """Run it in another process, which kills itself."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """Texts that end with the process."""

    def __init__(self, texts: Any, number: int) -> None:
        self._texts, self._number, self.fingerprint, self.place = texts, number, texts.fingerprint, texts.place

    def __iter__(self) -> Iterator[str]:
        yield from list(self._texts)[: self._number]
        die()


def test_a_build_that_was_killed_goes_on_behind_its_parts(
    build: Any, corpus: Any, at_once: dict[str, bytes], encoded: list[str], tmp_path: Path
) -> None:
    num_texts = len(list(corpus))
    killed(build, Dying(corpus, num_texts // 2), tmp_path)
    killed(build, Dying(corpus, num_texts - 1), tmp_path)
    [parts] = tmp_path.glob("*/parts-*")
    complete = [json.loads(path.read_text())["texts"] for path in parts.glob("*/[0-9]*/part.json")]
    assert len(complete) > 3
    build(corpus, tmp_path)
    assert len(encoded) == num_texts - sum(complete) < num_texts / 2
    assert files(tmp_path) == at_once


@pytest.mark.parametrize("point", ["_write_json", "rmtree"])
def test_a_merge_that_was_killed_goes_on(
    build: Any, corpus: Any, at_once: dict[str, bytes], encoded: list[str], tmp_path: Path, point: str
) -> None:
    """With a part that is written and not counted, and with one that is counted and not removed."""
    append = corpus_parts.Merge.append

    def append_and_die(merge: Any, arrays: Any) -> None:
        if merge._saved["parts"] == 3:
            patch.setattr(corpus_parts.shutil if point == "rmtree" else corpus_parts, point, die)
        append(merge, arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_parts.Merge, "append", append_and_die)
        killed(build, corpus, tmp_path)
    build(corpus, tmp_path)
    assert encoded == []
    assert files(tmp_path) == at_once


def test_what_was_merged_for_another_share_is_made_anew(pack: Any, corpus: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_parts.Merge, "finish", die)
        killed(pack, corpus, tmp_path / "twice", 0.3)
    pack(corpus, tmp_path / "twice")
    pack(corpus, tmp_path / "at once")
    assert files(tmp_path / "twice") == files(tmp_path / "at once")


def test_without_locks_two_runs_that_merge_the_same_make_the_same(
    pack: Any, corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds that a part is gone, and waits."""
    pack(corpus, tmp_path / "alone")
    context, append = multiprocessing.get_context("fork"), corpus_parts.Merge.append
    both = context.Barrier(2)

    def append_together(merge: Any, arrays: Any) -> None:
        if not merge._saved["parts"]:
            both.wait(30)
        append(merge, arrays)
        time.sleep(0.05)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(corpus_parts.Merge, "append", append_together)
    monkeypatch.setattr("fcntl.flock", no_locks)
    runs = [context.Process(target=pack, args=(corpus, tmp_path / "both")) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert files(tmp_path / "alone") == files(tmp_path / "both")


def test_the_disk_holds_the_cache_and_a_part(
    pack: Any, corpus: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, sizes = corpus_parts.Merge.append, []

    def measure(merge: Any, arrays: Any) -> None:
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*.bin")))
        append(merge, arrays)

    monkeypatch.setattr(corpus_parts.Merge, "append", measure)
    pack(corpus, tmp_path)
    assert len(sizes) > 3
    assert max(sizes) == sizes[0]  # what merging removes is not less than what it writes


def test_tasks_write_parts_that_a_run_merges_or_completes(
    pack: Any, tokenizer: Any, corpus: Any, encoded: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One is killed and begins again, one has no text."""
    pack(corpus, tmp_path / "alone")
    step, num_texts = tokenizing_step(corpus, tokenizer, tmp_path / "tasks"), len(encoded)
    for rank in (3, 2, 0):
        step(None, rank, 4)
    killed(corpus_parts.write_parts, step.parts, 1, 4, Dying(corpus.share(1, 4), 0), step.encode)
    assert len(list(corpus.share(2, 4))) == 0
    shutil.copytree(tmp_path / "tasks", tmp_path / "incomplete")
    step(None, 1, 4)
    assert len(encoded) == 2 * num_texts
    pack(corpus, tmp_path / "tasks")
    assert len(encoded) == 2 * num_texts
    assert "not complete" not in caplog.text
    pack(corpus, tmp_path / "incomplete")
    assert "parts of 1 of 4 tasks are not complete, tokenising these here" in caplog.text
    assert len(encoded) == 2 * num_texts + len(list(corpus.share(1, 4)))
    assert files(tmp_path / "alone") == files(tmp_path / "tasks") == files(tmp_path / "incomplete")


def test_a_step_before_it_is_refused(tokenizer: Any, corpus: Any, tmp_path: Path) -> None:
    step = tokenizing_step(corpus, tokenizer, tmp_path)
    with pytest.raises(UsageError, match=r"^pipeline: 'EncodeShare': expected the first step; what others leave"):
        step(iter(()), 0, 1)
    assert "AddedToken" not in repr(step)


def test_what_killed_builds_left_is_removed_but_not_under_a_builder_and_not_of_several_tasks(
    pack: Any, corpus: Any, tmp_path: Path
) -> None:
    pack(corpus, tmp_path)
    [cache] = (path for path in tmp_path.glob("*/*") if path.name[0] not in ".p")
    folder = cache.parent
    for name, task in (("old", 1), ("new", 1), ("held", 1), ("cluster", 64)):
        part = folder / f"parts-{name}" / f"{0:05d}-of-{task:05d}" / "00000"
        part.mkdir(parents=True)
        if name != "new":
            for path in (part, part.parent, part.parent.parent):
                os.utime(path, (1, 1))
    (folder / ".parts-old.lock").touch()
    with (folder / ".parts-held.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pack(corpus, tmp_path, 0.5)
    left = {path.name for path in folder.iterdir() if "parts" in path.name}
    assert left == {".parts-held.lock", "parts-held", "parts-new", "parts-cluster"}
