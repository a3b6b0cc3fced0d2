"""Tables in plain text."""

from lora.tables import size, starred, table


def test_numbers_stand_to_the_right_and_words_to_the_left() -> None:
    rows = [["q", "8", "12 x 4", "a", ""], ["gate", "16", "scalar", "longer", "-1"]]
    assert table(["name", "r", "shape", "word", "gap"], rows).split("\n") == [
        "name   r   shape  word    gap",
        "-----------------------------",
        "q      8  12 x 4  a",
        "gate  16  scalar  longer   -1",
    ]
    assert table(["a", "bb"], []) == "a  bb\n-----"


def test_sizes_and_names() -> None:
    assert (size((4, 12)), size((7,)), size(())) == ("4 x 12", "7", "scalar")
    assert starred("model.layers.10.q2.5") == "model.layers.*.q2.*"
    assert starred("3.layers") == "3.layers"
