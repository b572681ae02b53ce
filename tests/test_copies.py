"""The scripts' copied blocks are what they say they are, the checker can tell, and every mutation still has its place."""

import pytest
from check_copies import check
from conftest import ROOT
from mutants import read_mutations

SOURCE = '''LIMIT = 3


@staticmethod
def shared(x):
    """Add the limit."""
    return x + LIMIT


def main():
    pass
'''
COPY = '''def before():
    pass


# Copied from first.shared
@staticmethod
def shared(x):
    """Add the limit."""
    return x + LIMIT


# Copied from first.LIMIT
LIMIT = 3


def main():
    print("its own")
'''


@pytest.fixture
def pair(tmp_path):
    (tmp_path / "first.py").write_text(SOURCE)
    (tmp_path / "second.py").write_text(COPY)
    return [tmp_path / "first.py", tmp_path / "second.py"]


def test_repository_has_no_faulty_copy(pair):
    assert check(sorted(ROOT.glob("llava_*.py"))) == [] == check(pair)


@pytest.mark.parametrize("old, new", [("x + LIMIT", "x - LIMIT"), ("LIMIT = 3", "LIMIT = 4"), ("Add", "Subtract")])
def test_drift_is_reported_and_mended(pair, old, new):
    pair[1].write_text(COPY.replace(old, new))
    faults = check(pair)
    assert len(faults) == 1 and "differs from first." in faults[0]
    assert check(pair, fix=True) == []
    assert pair[1].read_text() == COPY


def test_twins_and_markers_that_point_nowhere_or_at_a_copy_are_reported(pair, tmp_path):
    (tmp_path / "third.py").write_text(COPY.replace("first.", "second.").replace("before", "earlier"))
    assert sum("written in no script" in fault for fault in check([*pair, tmp_path / "third.py"])) == 2
    pair[1].write_text(COPY.replace("first.shared", "first.gone"))
    assert any("written in no script" in fault for fault in check(pair))
    pair[1].write_text(COPY.replace("# Copied from first.shared\n", ""))
    assert check(pair) == ["shared is written in first and in second; mark one as copied, or rename it."]


def test_every_mutation_has_one_place_and_a_test():
    for name, old, new, test in read_mutations():
        assert (ROOT / name).read_text().count(old) == 1 and old != new, old
        file, function = test.split("::")
        assert f"def {function}(" in (ROOT / file).read_text(), test
