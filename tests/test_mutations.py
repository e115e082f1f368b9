"""The list of faults and guards: whole, of the code as it is, and what tests/README.md shows."""

import pytest
from mutations import MUTATIONS, ROOT, TABLE, line_of


def test_every_fault_has_a_number_of_its_own():
    numbers = [mutation.number for mutation in MUTATIONS]

    assert numbers == sorted(set(numbers))
    assert set(range(1, 64)) <= set(numbers)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: str(mutation.number))
def test_guards_are_where_the_list_has_them(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.guard) == 1
    assert (ROOT / "tests" / f"{mutation.test[0]}.py").exists()
    assert line_of(mutation) in TABLE.read_text().splitlines()
