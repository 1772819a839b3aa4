from lorahub_slashed import Slashed

from lorahub.testing import check_format


def test_the_format_keeps_the_laws() -> None:
    check_format(Slashed())
