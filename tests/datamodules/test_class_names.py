import pytest

from datamodules.class_names import read_class_names, refuse_codes
from datamodules.errors import DataError


def write(tmp_path, text, name="names.tsv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_table_with_a_header_in_any_order(tmp_path):
    table = write(tmp_path, "index\twnid\tnames\n0\tn2\tsnail\n1\tn1\tgoldfish, Carassius auratus\n2\tn9\tother\n")
    assert read_class_names(table, ["n1", "n2"]) == [["goldfish", "Carassius auratus"], ["snail"]]


def test_csv_protects_commas_with_quotes(tmp_path):
    table = write(tmp_path, 'class,name\na,"cat, kitten"\nb,dog\n', "names.csv")
    assert read_class_names(table, ["a", "b"]) == [["cat", "kitten"], ["dog"]]


def test_one_line_for_each_class(tmp_path):
    assert read_class_names(write(tmp_path, "cat, kitten\ndog\n", "n.txt"), ["a", "b"]) == [["cat", "kitten"], ["dog"]]


def test_a_table_without_a_header_is_read_by_its_column_of_classes(tmp_path):
    for text in ("b\tdog\na\tcat, kitten\n", "dog\tb\ncat, kitten\ta\n"):
        assert read_class_names(write(tmp_path, text), ["a", "b"]) == [["cat", "kitten"], ["dog"]]
    with pytest.raises(DataError, match=r"no column holds the classes as the data set calls them .*such as x"):
        read_class_names(write(tmp_path, "b\tdog\na\tcat\n"), ["x", "y"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class\tname\na\tcat\n", "does not name 1 of 2 classes .first: b."),
        ("cat\n", "has 1 lines for 2 classes"),
        ("", "has 0 lines for 2 classes"),
        ("class\tname\na\tcat\nb\t , \n", "gives b no name"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_class_names(write(tmp_path, text), ["a", "b"])


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        read_class_names(tmp_path / "nowhere.tsv", ["a"])
    (tmp_path / "b.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        read_class_names(tmp_path / "b.tsv", ["a"])


def test_codes_of_wordnet_are_no_names(tmp_path):
    table = write(tmp_path, "wnid\tnames\nn01443537\tgoldfish\nn01742172\tn01742172\n")
    names = read_class_names(table, ["n01443537", "n01742172"])
    with pytest.raises(DataError, match=r"by codes of WordNet \(n01742172\): give a table"):
        refuse_codes(names)
    refuse_codes(names[:1])
    with pytest.raises(DataError, match=r"n00000004 and 3 more\)"):
        refuse_codes([[f"n{i:08d}"] for i in range(8)])
