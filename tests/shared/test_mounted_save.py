"""nnsight's `save` on every object: away while a library is imported that stumbles over it, and back afterwards."""

import nnsight
import pytest
from anyio import TypedAttributeSet, typed_attribute

from shared.mounted_save import without_mounted_save


def define():
    class Attributes(TypedAttributeSet):
        one: int = typed_attribute()

    return Attributes


def test_it_is_away_inside_and_back_outside():
    assert nnsight.CONFIG.APP.PYMOUNT
    with pytest.raises(TypeError, match="save"):  # the fault this is for
        define()
    with without_mounted_save():
        assert not hasattr(object(), "save")
        assert define().one is not None
    assert hasattr(object(), "save")


def test_it_is_back_after_an_error():
    with pytest.raises(ZeroDivisionError), without_mounted_save():
        1 / 0  # noqa: B018
    assert hasattr(object(), "save")
