from pathlib import Path

import pytest
from training import corpus


def document(path: str, text: str, kind: corpus.Kind = "library") -> corpus.Document:
    return corpus.Document(path, kind, text)


@pytest.fixture
def documents() -> list[corpus.Document]:
    return [
        document(f"Lib/module{number}.py", f"def function_number_{number}(argument): pass\n" * 2)
        for number in range(300)
    ]


def test_the_split_is_deterministic_disjoint_and_complete(
    documents: list[corpus.Document],
) -> None:
    split = corpus.build(documents, share=0.2)
    again = corpus.build(reversed(documents), share=0.2)

    assert split == again
    train = {document.path for document in split.train}
    held_out = {document.path for document in split.held_out}
    assert train.isdisjoint(held_out)
    assert train | held_out == {document.path for document in documents}
    assert 0.1 < len(held_out) / len(documents) < 0.3


def test_a_file_keeps_its_side_when_others_come_and_go(documents: list[corpus.Document]) -> None:
    whole = {document.path for document in corpus.build(documents, share=0.2).held_out}
    half = {document.path for document in corpus.build(documents[::2], share=0.2).held_out}
    assert half == whole & {document.path for document in documents[::2]}


def test_equal_texts_cannot_be_on_both_sides(documents: list[corpus.Document]) -> None:
    copies = [document(f"Lib/copy_of_{doc.path[4:]}", doc.text) for doc in documents]
    split = corpus.build([*documents, *copies], share=0.2)
    texts = [document.text for document in (*split.train, *split.held_out)]
    assert len(texts) == len(set(texts)) == len(documents)


def test_a_near_copy_of_another_file_is_not_held_out(documents: list[corpus.Document]) -> None:
    held_out = corpus.build(documents, share=0.2).held_out
    near = [document(f"Lib/near{doc.path[4:]}", doc.text + "x = 1\n") for doc in held_out]
    chosen = {document.path for document in corpus.build([*documents, *near], 0.2).held_out}
    assert chosen.isdisjoint({document.path for document in held_out})


def test_tests_are_limited_to_their_budget() -> None:
    tests = [document(f"Lib/test/test_{n}.py", "x" * 999 + "\n", "test") for n in range(20)]
    kept = corpus.with_test_budget([*tests, document("Lib/a.py", "y\n")], 5_000)
    assert sum(doc.kind == "test" for doc in kept) == 5
    assert kept[-1].path == "Lib/a.py"


def test_files_that_are_not_text_or_are_tables_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_bytes(b"\xef\xbb\xbfx = 'text'\r\ny = x\r\r\n")
    (tmp_path / "latin.py").write_bytes("é = 1\n".encode("latin-1"))
    (tmp_path / "table.py").write_text("table = [" + "0x12, " * 500 + "]\n")
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "cp437.py").write_text("decoding_map = None\n")
    found = list(corpus.library_documents(tmp_path))
    assert [(doc.path, doc.text) for doc in found] == [("Lib/good.py", "x = 'text'\ny = x\n")]


def test_jsonl_round_trip(tmp_path: Path, documents: list[corpus.Document]) -> None:
    file = tmp_path / "part.jsonl"
    first = corpus.write_jsonl(documents, file)
    assert list(corpus.read_jsonl(file)) == [(doc.path, doc.text) for doc in documents]
    assert corpus.write_jsonl(documents, file) == first
