import http.server
import threading
from dataclasses import replace

import numpy as np
import pytest

from gptcore import corpus
from gptcore.config import CorpusConfig, InputError
from gptcore.corpus import (
    CORPORA,
    CorpusUnavailable,
    canonical_subset,
    load_corpus,
    strip_gutenberg,
)
from gptcore.tokenizer import TOKENIZERS, gpt2_encoding


def load(name, subset="all", context=8):
    return load_corpus(CorpusConfig(name=name, subset=subset, windows=2), context)


def decode(found):
    return gpt2_encoding().decode(found.tokens.tolist())


def split(windows):
    """The inputs and the targets of sequences."""
    return windows[:, :-1], windows[:, 1:]


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def serve():
    """Return a function that serves bytes on loopback, and returns their address."""
    servers = []

    def start(body):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/pg829.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", CORPORA)
def test_every_corpus_gives_text_and_slices_that_tile_it(name, book):
    whole = load(name)
    assert len(whole.tokens) > 100
    assert len(whole.digest) == 64
    assert whole.origin
    halves = [load(name, subset) for subset in ("0-0.5", "0.5-1")]
    assert np.array_equal(np.concatenate([half.tokens for half in halves]), whole.tokens)
    assert {half.digest for half in halves} == {whole.digest}
    with pytest.raises(InputError, match=r"corpus\.subset 'part-9' is unknown"):
        load(name, "part-9")


def test_gullivers_parts_begin_at_their_headings_and_follow_one_another(book):
    parts = [load("gulliver", f"part-{i}") for i in range(1, 5)]
    texts = [decode(part) for part in parts]
    assert [text.split(".")[0] for text in texts] == ["PART I", "PART II", "PART III", "PART IV"]
    assert decode(load("gulliver")).endswith("".join(texts))


def test_gutenbergs_own_words_are_stripped(book):
    text = decode(load("gulliver"))
    assert text.startswith("GULLIVER’S TRAVELS")
    assert "PROJECT GUTENBERG" not in text
    assert "Licence" not in text
    assert strip_gutenberg("no markers\n") == "no markers\n"


def test_the_real_book_has_its_known_size(real_gulliver):
    whole = load("gulliver")
    assert (len(whole.tokens), len(np.unique(whole.tokens))) == (143_691, 9_786)
    parts = [load("gulliver", f"part-{i}") for i in range(1, 5)]
    assert [len(part.tokens) for part in parts] == [32_137, 36_136, 32_339, 40_068]
    assert decode(parts[2]).startswith("PART III. A VOYAGE TO LAPUTA")


def test_line_ends_and_a_byte_order_mark_do_not_change_the_digest(tmp_path):
    (tmp_path / "unix.txt").write_bytes(b"one two\n" * 20)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + b"one two\r\n" * 20)
    unix, dos = (load(str(tmp_path / name)) for name in ("unix.txt", "dos.txt"))
    assert unix.digest == dos.digest


def test_tokens_are_made_once_and_memory_mapped(empty_cache, monkeypatch):
    first = load("pydocs")
    assert isinstance(first.tokens.base, np.memmap) or isinstance(first.tokens, np.memmap)
    monkeypatch.setattr(corpus, "encode", lambda *_: pytest.fail("tokenised twice"))
    assert np.array_equal(load("pydocs").tokens, first.tokens)
    assert [file.name for file in empty_cache.iterdir()] == [f"{first.digest}.npy"]


def emptied(tokens):
    return b""


def cut_short(tokens):
    return tokens[: len(tokens) // 2]


def change_a_token(tokens):
    middle = len(tokens) // 2
    return tokens[:middle] + bytes([tokens[middle] ^ 1]) + tokens[middle + 1 :]


def without_a_digest(tokens):
    return tokens[:-32]


def not_an_array(tokens):
    return b"x" * len(tokens)


@pytest.mark.parametrize(
    "damage", [emptied, cut_short, change_a_token, without_a_digest, not_an_array]
)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_damaged_cache_of_tokens_is_made_anew(empty_cache, damage, tokenizer):
    config = CorpusConfig(name="pydocs", tokenizer=tokenizer)
    right = load_corpus(config, 8).tokens.tolist()
    (file,) = empty_cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert load_corpus(config, 8).tokens.tolist() == right
    assert file.read_bytes() == whole


@pytest.mark.parametrize("shape", ["floats", "table", "ids of no token"])
def test_another_array_in_the_place_of_tokens_is_made_anew(empty_cache, shape):
    right = np.array(load("pydocs").tokens)  # not of the file, which is about to change
    (file,) = empty_cache.iterdir()
    others = {
        "floats": right.astype(float),
        "table": right[:100].reshape(10, 10),
        "ids of no token": np.full(10, 2**16 - 1, dtype=np.uint16),
    }
    np.save(file, others[shape])
    assert np.array_equal(load("pydocs").tokens, right)


def test_a_batch_is_a_function_of_step_and_seed_alone():
    found = load("pydocs")
    ids, targets = split(found.batch(3, batch_size=4, seed=0))
    assert ids.shape == targets.shape == (4, 8)
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    again, _ = split(found.batch(3, batch_size=4, seed=0))
    assert np.array_equal(ids, again)
    for step, seed in ((4, 0), (3, 1)):
        assert not np.array_equal(ids, split(found.batch(step, batch_size=4, seed=seed))[0])


def test_no_batch_meets_the_held_out_text_and_every_other_window_can_be_drawn(tmp_path):
    """A text whose tokens name their place, so that a batch shows where it was cut."""
    found = replace(load("pydocs"), tokens=np.arange(200, dtype=np.uint16), windows=3)
    held_out = set(found.fixed_texts()["held_out"].flatten().tolist())
    assert len(held_out) == 3 * 9
    ids, targets = split(found.batch(0, batch_size=20_000, seed=0))
    windows = np.concatenate([ids, targets[:, -1:]], axis=1)
    assert np.array_equal(windows - windows[:, :1], np.broadcast_to(np.arange(9), windows.shape))
    possible = {start for start in range(200 - 8) if held_out.isdisjoint(range(start, start + 9))}
    assert set(windows[:, 0].tolist()) == possible
    assert found.counts()[sorted(held_out)].sum() == 0
    assert found.counts().sum() == 200 - 27


def test_the_fixed_texts_lie_apart_all_over_the_subset():
    whole, part = load("pydocs"), load("pydocs", "0-0.1")
    for found in (whole, part):
        starts = found.fixed_starts()
        every = np.sort(np.concatenate(list(starts.values())))
        assert np.diff(every).min() >= 9
        assert every[0] == 0
        assert every[-1] + 9 == len(found.tokens)
        for row in found.fixed_text_rows():
            assert row.starts == starts[row.text].tolist()
            windows = [found.tokens[start : start + 9].tolist() for start in row.starts]
            assert row.tokens == [token for window in windows for token in window]
    digests = {row.digest for found in (whole, part) for row in found.fixed_text_rows()}
    assert len(digests) == 4  # those of two texts of two subsets
    assert whole.fixed_text_rows() == load("pydocs").fixed_text_rows()


def test_the_shortest_text_with_room_for_its_fixed_texts_is_enough(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text(" a" * 36)
    ids, targets = split(load(str(file)).batch(0, batch_size=2, seed=0))
    assert ids.shape == targets.shape == (2, 8)
    with pytest.raises(
        InputError,
        match=r"has 36 tokens: a context of 9 with 2 corpus\.windows needs at least 40",
    ):
        load(str(file), context=9)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is neither a corpus (gulliver, pydocs) nor a text file"),
        (b"", "is empty"),
        (b" \n ", "is empty"),
        (b"\xff\xfe\x00a", "cannot be read as UTF-8 text"),
        (b"text\0text", "contains NUL bytes"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, says):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(str(file))
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/text", "nul\0byte", "/etc"])
def test_names_that_can_be_no_file_are_refused(name):
    with pytest.raises(InputError, match="is neither a corpus"):
        load(name)


def test_a_subset_has_one_spelling():
    assert {canonical_subset(text) for text in ("0-.5", "0.0-0.50", "0-0.5")} == {"0-0.5"}
    assert canonical_subset("0-1") == canonical_subset("all") == "all"
    assert canonical_subset("part-1") == "part-1"
    assert canonical_subset("0-2") == "0-2"


@pytest.mark.parametrize("subset", ["part-1", "0.5-0.5", "0.7-0.2", "0-1.5", "half", "0..1-1", "-"])
def test_unknown_subsets_are_refused_with_those_there_are(subset):
    with pytest.raises(InputError, match="corpus pydocs has all, and fractions from 0 to 1"):
        load("pydocs", subset)


def test_a_corpora_folder_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("GPTCORE_CORPORA", "/no/such/folder")
    with pytest.raises(InputError, match="GPTCORE_CORPORA is '/no/such/folder'"):
        load("gulliver")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTCORE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="set GPTCORE_CACHE to a folder that can"):
        load("pydocs")


def test_the_book_is_downloaded_once(book, serve, empty_cache, monkeypatch):
    monkeypatch.delenv("GPTCORE_CORPORA")
    url = serve(book.read_bytes())
    monkeypatch.setattr(corpus, "GULLIVER_URL", url)
    first = load("gulliver")
    assert first.origin == url
    monkeypatch.setattr(corpus, "GULLIVER_URL", "http://127.0.0.1:9/")
    second = load("gulliver")
    assert second.digest == first.digest
    assert second.origin == str(empty_cache / "gulliver.txt")


@pytest.mark.parametrize("damage", [b"", b"\0" * 999, b"\xff\xfe", b"half a book"])
def test_a_damaged_book_in_the_cache_is_downloaded_again(
    book, serve, empty_cache, monkeypatch, damage
):
    monkeypatch.delenv("GPTCORE_CORPORA")
    monkeypatch.setattr(corpus, "GULLIVER_URL", serve(book.read_bytes()))
    right = load("gulliver").digest
    (empty_cache / corpus.GULLIVER_FILES[0]).write_bytes(damage)
    assert load("gulliver").digest == right


def test_a_page_that_is_not_the_book_is_not_kept(serve, empty_cache, monkeypatch):
    monkeypatch.setattr(corpus, "GULLIVER_URL", serve(b"<html>please log in</html>"))
    with pytest.raises(CorpusUnavailable, match="does not send Gulliver's Travels: save Project"):
        load("gulliver")
    assert not empty_cache.exists()


def test_a_book_that_cannot_be_fetched_says_how_to_get_it(empty_cache, monkeypatch):
    monkeypatch.setattr(corpus, "GULLIVER_URL", "http://127.0.0.1:9/")
    monkeypatch.setattr(corpus, "DOWNLOAD_TRIES", 2)
    with pytest.raises(CorpusUnavailable, match="name that folder in GPTCORE_CORPORA"):
        load("gulliver")


def test_each_tokenizer_has_a_cache_of_its_own(empty_cache):
    text, _ = corpus.read_text("pydocs")
    by_words, by_bytes = (
        load_corpus(CorpusConfig(name="pydocs", tokenizer=name), context=8)
        for name in ("gpt2", "bytes")
    )
    assert by_bytes.digest == by_words.digest  # the text is one
    assert bytes(by_bytes.tokens.tolist()) == text.encode()
    assert {file.name for file in empty_cache.iterdir()} == {
        f"{by_words.digest}.npy",
        f"{by_words.digest}-bytes.npy",
    }


def test_a_part_of_a_book_is_cut_at_the_same_character_over_bytes(book):
    parts = [
        load_corpus(CorpusConfig(subset="part-2", tokenizer=name), context=8)
        for name in ("gpt2", "bytes")
    ]
    spelled = [TOKENIZERS[part.tokenizer].encoding().decode(part.tokens.tolist()) for part in parts]
    assert spelled[0] == spelled[1]
    assert spelled[0].startswith("PART II. A VOYAGE.")
