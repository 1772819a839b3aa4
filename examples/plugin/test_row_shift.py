from lorahub_row_shift import ROW_SHIFT

from lorahub.testing import check_kind


def test_row_shifts_keep_the_laws() -> None:
    check_kind(ROW_SHIFT)
