"""Text on its way to a terminal."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.terminal import latin1_where_undecodable, visible


def test_every_control_character_but_newline_and_tab_becomes_its_escape():
    for code in range(0x10000):
        character = chr(code)
        if unicodedata.category(character) == "Cc" and character not in "\n\t":
            assert visible(f"a{character}b") == f"a\\x{code:02x}b".replace("\\x0d", "\\r")
        else:
            assert visible(f"a{character}b") == f"a{character}b"


@given(st.binary())
def test_bytes_become_text_that_can_be_encoded_and_what_was_utf_8_stays(data):
    text = latin1_where_undecodable(data.decode("utf-8", "surrogateescape"))
    text.encode("utf-8")
    assert latin1_where_undecodable(text) == text
    try:
        assert text == data.decode("utf-8")
    except UnicodeDecodeError:
        assert latin1_where_undecodable(b"\xe9".decode("utf-8", "surrogateescape") + text) == "é" + text
