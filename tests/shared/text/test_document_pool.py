"""Results come in the order of the documents, and few documents are read ahead."""

import os
from collections.abc import Iterator

import pytest

from shared.text import document_pool
from shared.text.document_pool import map_documents

SETTING: dict[str, str] = {}


def start(ending: str) -> None:
    SETTING["ending"] = ending


def lengthen(documents: list[str]) -> list[tuple[str, int]]:
    return [(document + SETTING["ending"], os.getpid()) for document in documents]


def results(documents: Iterator[str], num_processes: int) -> Iterator[tuple[str, int]]:
    return map_documents(
        lengthen, documents, start=start, arguments=("!",), num_processes=num_processes, description="lengthening"
    )


@pytest.mark.parametrize("num_processes", [1, 3])
def test_results_come_in_order_from_other_processes(monkeypatch: pytest.MonkeyPatch, num_processes: int) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 10)
    documents = [f"document {number}" for number in range(50)]
    found = list(results(iter([*documents, ""]), num_processes))  # an empty document has no result
    assert [text for text, _ in found] == [f"{document}!" for document in documents]
    assert os.getpid() not in {process for _, process in found}


def test_few_documents_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_pool, "_BATCH_CHARACTERS", 1)
    handed_over = 0

    def documents() -> Iterator[str]:
        nonlocal handed_over
        for number in range(40):
            handed_over += 1
            yield f"document {number}"

    ahead = [handed_over - done for done, _ in enumerate(results(documents(), 2))]
    assert len(ahead) == 40
    assert max(ahead) <= 2 * 2 + 1


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(KeyError):
        list(map_documents(lengthen, ["a"], start=len, arguments=("",), num_processes=1, description="failing"))
