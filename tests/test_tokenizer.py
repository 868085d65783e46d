from gptcore.tokenizer import VOCAB_SIZE, gpt2_encoding, is_word_piece, token_bytes


def test_ids_are_gpt2s():
    # From GPT-2's published vocabulary.
    assert gpt2_encoding().encode("Hello world") == [15496, 995]
    assert gpt2_encoding().encode_ordinary(" the") == [262]
    assert gpt2_encoding().eot_token == 50256
    assert gpt2_encoding().n_vocab == VOCAB_SIZE == len(token_bytes())


def test_any_text_comes_back():
    text = "Brobdingnag’s\n\n  naïve 🐎 <|endoftext|>\t"
    assert gpt2_encoding().decode(gpt2_encoding().encode_ordinary(text)) == text


def test_word_pieces_are_text_of_more_than_one_byte():
    assert is_word_piece(995)
    assert not is_word_piece(gpt2_encoding().eot_token)
    assert not any(is_word_piece(token) for token in range(256))
    undecodable = next(i for i, piece in enumerate(token_bytes()) if piece == b"\xe2\x80")
    assert not is_word_piece(undecodable)
